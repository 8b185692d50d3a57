"""The process that the user started: binds sockets, forks control, becomes the keeper.

Sockets are bound before anything heavy is imported, because VMMs and orchestrators wait for them. The native
loop runs here from then on; it comes back to Python only when control has to be forked.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.errors import SocketSetupError, VirtiofsdRafsError
from virtiofsd_rafs.native.session import ForkControl, Session
from virtiofsd_rafs.runtime.environment import hide_secrets, reveal_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from virtiofsd_rafs.config import ServeConfig

# sun_path of sockaddr_un without the terminating NUL (unix(7)), less the suffix of the name it is bound by.
_MAX_SOCKET_PATH = 107 - len(".new")


def bind_socket(path: Path, *, mode: int) -> socket.socket:
    """A listening unix socket at *path*.

    A socket file that nobody listens on any more is replaced; anything else that is there is left alone.
    Raises SocketSetupError.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise SocketSetupError(
            f"{path}: a socket path has at most {_MAX_SOCKET_PATH} bytes", remedy="use a shorter path"
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o777 & ~mode)
    # Whoever waits for the name to appear connects at once: it must not be there before somebody listens.
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        sock.bind(os.fspath(new))
        sock.listen(16)
        new.rename(path)
    except OSError as e:
        sock.close()
        raise SocketSetupError(
            f"{path}: cannot be bound: {e.strerror}", remedy="does its folder exist, and may you write to it?"
        ) from e
    finally:
        os.umask(old_umask)
    return sock


def _remove_stale(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise SocketSetupError(f"{path}: is there and is no socket", remedy="remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as e:
            raise SocketSetupError(f"{path}: {e.strerror}") from e
    raise SocketSetupError(f"{path}: another process listens there", remedy="end it, or name another path")


def serve(config: ServeConfig) -> int:
    """Serve *config*'s image until the front-end goes or a signal comes; the exit code."""
    if config.socket_path is None:
        raise SocketSetupError("no socket path was given", remedy="--socket-path PATH")
    listener = bind_socket(config.socket_path, mode=0o600)
    paths = [config.socket_path]
    try:
        api = bind_socket(config.api_socket, mode=0o600)
        paths.append(config.api_socket)
        private = _Private(api, os.memfd_create("rafs-renewed", os.MFD_CLOEXEC), hide_secrets())
        session = Session.create(listener.detach(), io_deadline_s=config.io_deadline_s, keep=config.keep)
        return _run(session, private, config)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


class _Private(NamedTuple):
    """What each control inherits, and no worker."""

    api: socket.socket
    renewed: int
    """memfd with the credentials that came by the API."""
    environment: int | None
    """memfd with those of the environment."""


def _run(session: Session, private: _Private, config: ServeConfig) -> int:
    while True:
        event = session.run()
        if not isinstance(event, ForkControl):
            return event
        pid = os.fork()
        if pid == 0:
            os._exit(_control(session, event.fd, private, config))
        os.close(event.fd)
        session.control_started(pid)


def _control(session: Session, keeper_fd: int, private: _Private, config: ServeConfig) -> int:
    """The life of control, in the child. Nothing of the parent's may run when it ends."""
    try:
        memory = [fd for fd in (private.renewed, private.environment) if fd is not None]
        session.become_control([keeper_fd, private.api.fileno(), *memory])
        reveal_secrets(private.environment)
        from virtiofsd_rafs.runtime import control

        keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=keeper_fd)
        return control.main(session, keeper, private.api, config, memory=private.renewed)
    except VirtiofsdRafsError as e:
        print(f"virtiofsd-rafs: {e.msgid}: {e}", file=sys.stderr)
        return e.exit_code
    except Exception:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        sys.stderr.flush()
