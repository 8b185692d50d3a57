"""The process that the user started: binds sockets, forks control, becomes the keeper.

Sockets are bound before anything heavy is imported (:mod:`~virtiofsd_rafs.sockets`). The native
loop runs here from then on; it comes back to Python only when control has to be forked.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs import sockets
from virtiofsd_rafs.errors import SocketSetupError, VirtiofsdRafsError
from virtiofsd_rafs.native.session import ForkControl, Session
from virtiofsd_rafs.runtime.environment import hide_secrets, reveal_secrets
from virtiofsd_rafs.runtime.sandbox import Confined, confine

if TYPE_CHECKING:
    from virtiofsd_rafs.config import ServeConfig


def serve(config: ServeConfig) -> int:
    """Serve *config*'s image until the front-end goes or a signal comes; the exit code."""
    if config.socket_path is None:
        raise SocketSetupError("no socket path was given", remedy="--socket-path PATH")
    listener = sockets.take(config.socket_path)
    paths = [config.socket_path]
    try:
        api = sockets.take(config.api_socket)
        paths.append(config.api_socket)
        sockets.drop()
        renewed, environment = os.memfd_create("rafs-renewed", os.MFD_CLOEXEC), hide_secrets()
        confined = confine(config)
        private = _Private(api, renewed, environment, confined)
        session = Session.create(
            listener.detach(),
            io_deadline_s=config.io_deadline_s,
            poll_us=config.poll_us,
            keep=config.keep,
        )
        if confined is not None:
            session.confine_workers(confined.parts)
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
    confined: Confined | None


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
        return control.main(
            session, keeper, private.api, config, memory=private.renewed, confined=private.confined
        )
    except VirtiofsdRafsError as e:
        print(f"virtiofsd-rafs: {e.msgid}: {e}", file=sys.stderr)
        return e.exit_code
    except Exception:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        sys.stderr.flush()
