"""The errors of this package: one tree, each with a stable id, a guest errno and an exit code.

An error names its cause and, where there is one, the remedy. ``msgid`` is stable: logs, metrics and JSON use
it.
Subclasses inherit a builtin as well, so that a caller may catch either.
"""

from __future__ import annotations

import errno as _errno
import os as _os

# As typing's; its import costs the start of `serve` two milliseconds.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import ClassVar


class VirtiofsdRafsError(Exception):
    """Base of all errors raised on purpose; never raised itself."""

    msgid: ClassVar[str] = "error"
    guest_errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class ConfigError(VirtiofsdRafsError, ValueError):
    """An option, a configuration file or their combination makes no sense."""

    msgid = "config.invalid"
    exit_code = 2


class ImageError(VirtiofsdRafsError):
    """The image cannot be served."""

    msgid = "image.error"
    exit_code = 3


class BadImage(ImageError, ValueError):
    """The image breaks its format. ``where`` names structure and field, ``offset`` the byte in the file."""

    msgid = "image.malformed"

    def __init__(self, where: str, message: str, *, offset: int | None = None, remedy: str = "") -> None:
        at = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"bad image: {where}{at}: {message}", remedy=remedy)
        self.where = where
        self.offset = offset


class UnsupportedFeature(ImageError, NotImplementedError):
    """The image is well-formed but uses a feature that this version does not serve."""

    msgid = "image.unsupported"
    guest_errno = _errno.EOPNOTSUPP


class UnverifiedImage(ImageError):
    """The image has no digest for some of its data, and nobody said that this is fine."""

    msgid = "image.unverified"


class DigestMismatch(ImageError):
    """Bytes do not have the digest that the image or the registry promised. Never cached, never served."""

    msgid = "digest.mismatch"


class BuildError(VirtiofsdRafsError):
    """A source tree cannot be made into an image. Names the path and the reason."""

    msgid = "build.failed"

    def __init__(self, path: str, reason: str, *, remedy: str = "") -> None:
        super().__init__(f"cannot store {path}: {reason}", remedy=remedy)
        self.path = path


class OutputError(VirtiofsdRafsError, OSError):
    """What a command makes cannot be written. Names the folder, the reason and the remedy."""

    msgid = "output.unusable"

    def __init__(self, folder: object, reason: str) -> None:
        remedy = "make room there, or choose" if reason == _os.strerror(_errno.ENOSPC) else "choose"
        super().__init__(f"cannot write to {folder}: {reason}", remedy=f"{remedy} another folder with -o")


class CacheError(VirtiofsdRafsError, OSError):
    """The local cache cannot be used."""

    msgid = "cache.error"


class BackendError(VirtiofsdRafsError, OSError):
    """A registry, an object store or a directory did not deliver."""

    msgid = "backend.error"
    exit_code = 4
    retryable: ClassVar[bool] = True


class AuthError(BackendError, PermissionError):
    """The credentials were refused, or there are none."""

    msgid = "backend.auth"
    retryable = False


class CredentialsExpired(AuthError):
    """The credentials were good once. New ones may come any moment: who waits may go on waiting."""

    msgid = "backend.auth-expired"
    retryable = True


class NotFound(BackendError, FileNotFoundError):
    """The image or blob is not there."""

    msgid = "backend.not-found"
    retryable = False


class Throttled(BackendError):
    """The server asks for a pause of ``retry_after_s`` seconds."""

    msgid = "backend.throttled"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreachable(BackendError, ConnectionError):
    """The server cannot be reached, or the connection broke."""

    msgid = "backend.unreachable"


class BackendTimeout(BackendError, TimeoutError):
    """The server did not answer in time."""

    msgid = "backend.timeout"


class BadReply(BackendError):
    """The server answered something that its protocol does not allow (short body, wrong range)."""

    msgid = "backend.bad-reply"


class RangeIgnored(BadReply):
    """The server answered a range request with the whole blob, and the slice lies too deep in it."""

    msgid = "backend.range-ignored"


class UntrustedServer(BackendError):
    """TLS cannot be set up with the server: its certificate is not trusted, or it speaks no TLS at all."""

    msgid = "backend.untrusted"
    retryable = False


class SocketSetupError(VirtiofsdRafsError, OSError):
    """A socket cannot be bound, or the front-end broke the vhost-user protocol during set-up."""

    msgid = "socket.setup"
    exit_code = 5


class SandboxError(VirtiofsdRafsError):
    """The kernel cannot confine the daemon as was asked for."""

    msgid = "sandbox.unavailable"
    exit_code = 7


class PeerError(VirtiofsdRafsError):
    """The VMM or the guest sent something malformed: their bug."""

    msgid = "peer.malformed"
    exit_code = 5


class LocalError(VirtiofsdRafsError):
    """Our bug."""

    msgid = "internal.bug"
    exit_code = 70
