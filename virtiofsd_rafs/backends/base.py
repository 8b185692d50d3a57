"""What every source of blobs offers, and what it needs to know."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

from virtiofsd_rafs.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from virtiofsd_rafs.backends.config import RegistryAccess
    from virtiofsd_rafs.registry.secret import Secret

_FILE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,254}")
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")

# Who answered the call of this task: "registry", "local", a mirror's host:port. A source sets it when it has
# the bytes, for the log of fetches; it is no secret and no URL.
ANSWERED_BY: ContextVar[str] = ContextVar("answered_by", default="")


@attrs.define
class ConnectionCounts:
    """Connections of all HTTP clients of this process."""

    opened: int = 0
    reused: int = 0
    """Requests that found an open one."""


CONNECTIONS = ConnectionCounts()


@attrs.frozen(kw_only=True)
class CredentialUpdate:
    """New credentials for a source that is in use; None leaves what there is."""

    registry_auth: Secret | None = None
    """base64 of ``user:password``."""
    registry_token: Secret | None = None
    proxy_url: Secret | None = None
    """May hold user and password."""
    access_key_id: str | None = None
    access_key_secret: Secret | None = None
    security_token: Secret | None = None
    """Of S3 or OSS; an empty one takes it away."""


@runtime_checkable
class Renewable(Protocol):
    """A source whose credentials can be renewed while it is in use."""

    def renew(self, update: CredentialUpdate) -> None:
        """Uses *update* from the next request on; what does not concern this source is ignored.

        Raises ConfigError, and changes nothing, for what is malformed.
        """
        ...


@runtime_checkable
class Distrustful(Protocol):
    """A source with several places for the same bytes."""

    def wrong_bytes(self, blob_id: str, offset: int, length: int, source: str) -> None:
        """What *source* (see ANSWERED_BY) sent for this range was wrong.

        Another place is asked first when the range, or a part of it, is read again.
        """
        ...


@attrs.frozen(kw_only=True)
class SourceReport:
    """One place that a source asks, for metrics and status."""

    source: str
    """Its label, as ANSWERED_BY."""
    url: str
    """Without query and user."""
    requests: int
    errors: int
    """Requests that failed, and chunks whose bytes were wrong."""
    bytes: int
    state: str
    """well, resting, due (it has rested, the next request is a probe)."""
    rests_for_s: float


@runtime_checkable
class Reporting(Protocol):
    """A source that counts what each of its places did."""

    def report(self) -> list[SourceReport]:
        """The places in the order in which they are asked."""
        ...


class BlobSource(Protocol):
    """Where the bytes of blobs come from.

    Methods raise BackendError subclasses only. ``error.retryable`` says whether the same call can succeed
    later; ``Throttled.retry_after_s`` when. Nothing is tried again inside, but authentication and redirects
    are part of a call, and so is asking the next one of several places. Any number of calls may run at once;
    a cancelled one gives its connection back.
    """

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """Exactly *length* >= 1 bytes of the blob at *offset*, as stored: not decoded and not verified."""
        ...

    async def blob_size(self, blob_id: str) -> int:
        """The length of the stored blob."""
        ...

    async def close(self) -> None:
        """Gives up connections and files. The source is not used afterwards."""
        ...


class WholeBlob(Protocol):
    """A reply with all of a blob, which is read once from its beginning to its end."""

    def pieces(self) -> AsyncIterator[bytes]:
        """The bytes, from the first one on. Raises BackendError when they break off or trickle."""
        ...

    async def close(self) -> None:
        """Gives up what was not read."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A source whose servers may send the whole blob, whatever range is asked for."""

    def ignores_ranges(self, blob_id: str) -> bool:
        """Whether they did that when they were asked last: each range costs all in front of it."""
        ...

    async def open_whole(self, blob_id: str, offset: int, length: int) -> WholeBlob | None:
        """All of the blob; None when a request for this range shows that ranges are honoured by now."""
        ...


class SourceConfig(Protocol):
    """The part of the configuration that a source reads."""

    @property
    def access(self) -> RegistryAccess: ...

    @property
    def connections(self) -> int: ...

    @property
    def io_deadline_s(self) -> float: ...


def check_range(offset: int, length: int) -> None:
    """Raises ConfigError (the caller's bug) for a range that cannot be asked for."""
    if offset < 0 or length < 1 or offset + length > 1 << 63:
        raise ConfigError(f"no range: {length} bytes at {offset}")


def file_name(blob_id: str) -> str:
    """*blob_id* as a file name.

    It comes from an image: anything that could leave the directory is refused.
    """
    if not _FILE_NAME.fullmatch(blob_id):
        raise BadBlobId(f"blob id {blob_id[:80]!r} is no file name")
    return blob_id


def sha256_digest(blob_id: str) -> str:
    """*blob_id* as ``sha256:hex``, the only way to name a blob in a registry."""
    if not _SHA256_HEX.fullmatch(blob_id):
        raise BadBlobId(f"blob id {blob_id[:80]!r} is no sha256, a registry cannot have it")
    return f"sha256:{blob_id}"


class BadBlobId(BackendError, ValueError):
    """The image names a blob in a way that this source cannot look up."""

    msgid = "backend.bad-blob-id"
    retryable = False
