"""Listening unix sockets, bound before anything heavy is imported.

VMMs and orchestrators wait for them, and reading the command line takes longer than starting Python. So the
sockets that the arguments seem to name are bound first (:func:`bind_early`); when the command line has been
read properly, ``serve`` takes them over (:func:`take`), and what it does not take goes away again
(:func:`drop`). This module imports little, and its importers on that way must do so as well.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import time

from virtiofsd_rafs.errors import TYPE_CHECKING, SocketSetupError

if TYPE_CHECKING:
    from collections.abc import Sequence

# sun_path of sockaddr_un without the terminating NUL (unix(7)), less the suffix of the name it is bound by.
_MAX_SOCKET_PATH = 107 - len(".new")
_SUFFIX_OF_API = ".api"
# What ends a daemon: the keeper reads them from a signalfd (native/crates/keeper).
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# As the command line spells them, and the environment (auto_envvar_prefix of the command line).
_OPTIONS = {
    "--socket-path": "VIRTIOFSD_RAFS_SERVE_SOCKET_PATH",
    "--api-socket": "VIRTIOFSD_RAFS_SERVE_API_SOCKET",
}

# Others that bind in the same folder are waited for, but not for long: anybody may hold the lock of a folder.
_LOCK_TRIES = 100
_LOCK_PAUSE_S = 0.001

_early: dict[str, socket.socket] = {}


def api_beside(socket_path: str) -> str:
    """The API's socket of a daemon that was not told another one."""
    return socket_path + _SUFFIX_OF_API


def bind_socket(path: str | os.PathLike[str], *, mode: int) -> socket.socket:
    """A listening unix socket at *path*.

    A socket file that nobody listens on any more is replaced; anything else that is there is left alone.
    Raises SocketSetupError.
    """
    path = os.fspath(path)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise SocketSetupError(
            f"{path}: a socket path has at most {_MAX_SOCKET_PATH} bytes", remedy="use a shorter path"
        )
    lock = _lock(os.path.dirname(path) or ".")
    try:
        return _bind(path, mode)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: str) -> int | None:
    """A descriptor with the lock of *folder*, without which two daemons may both remove what is stale."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        except OSError:
            break
    return fd


def _bind(path: str, mode: int) -> socket.socket:
    # Whoever waits for the name to appear connects at once: it must not be there before somebody listens.
    new = path + ".new"
    for each in (path, new):
        _remove_stale(each)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o777 & ~mode)
    try:
        sock.bind(new)
        try:
            sock.listen(16)
            os.link(new, path)  # unlike a rename, it takes nobody's place
        finally:
            _unlink(new)
    except OSError as e:
        sock.close()
        raise SocketSetupError(
            f"{path}: cannot be bound: {e.strerror}", remedy="does its folder exist, and may you write to it?"
        ) from e
    finally:
        os.umask(old_umask)
    return sock


def _unlink(path: str) -> None:
    try:  # noqa: SIM105  (contextlib is another import)
        os.unlink(path)
    except FileNotFoundError:
        pass


def _remove_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        if not os.path.islink(path):
            return
        is_socket = False
    if not is_socket:
        raise SocketSetupError(f"{path}: is there and is no socket", remedy="remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            _unlink(path)
            return
        except BlockingIOError:
            pass  # who listens has no room for another one
        except OSError as e:
            raise SocketSetupError(f"{path}: {e.strerror}") from e
    raise SocketSetupError(f"{path}: another process listens there", remedy="end it, or name another path")


def bind_early(arguments: Sequence[str]) -> None:
    """Binds what *arguments* of ``serve`` seem to name.

    It is a guess, because options of which nothing is known here may have values that look like options. What
    cannot be bound is left to ``serve``, which tells why: other mistakes on the command line come first.
    Signals that end a daemon wait from now on, so that none leaves a socket file behind.
    """
    paths = _guess(arguments)
    if not paths:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        # Who sees the VMM's socket may use the API.
        for path in reversed(paths):
            _early[path] = bind_socket(path, mode=0o600)
    except SocketSetupError:
        drop()


def _guess(arguments: Sequence[str]) -> list[str]:
    """Paths of the vhost-user socket and of the API's; none when nothing is to be served, or nobody knows."""
    found = {option: os.environ.get(variable, "") for option, variable in _OPTIONS.items()}
    waiting = ""
    for argument in arguments:
        if argument in ("--help", "--"):
            return []
        name, equals, value = argument.partition("=")
        if waiting:
            found[waiting], waiting = argument, ""
        elif name in found and equals:
            found[name] = value
        elif argument in found:
            waiting = argument
    path = found["--socket-path"]
    api = found["--api-socket"] or api_beside(path)
    if waiting or not path or ".." in f"{path}/{api}".split("/"):
        return []
    # As pathlib spells them, for `take`. pathlib itself costs milliseconds.
    return [os.path.normpath(path), os.path.normpath(api)]


def take(path: str | os.PathLike[str]) -> socket.socket:
    """The socket at *path*, which the caller owns now: bound early, or else bound now.

    Raises SocketSetupError.
    """
    early = _early.pop(os.fspath(path), None)
    if early is None:
        drop()  # a wrong guess: one of them may be in the way
        return bind_socket(path, mode=0o600)
    return early


def drop() -> None:
    """Closes and removes what was bound early and not taken."""
    while _early:
        path, sock = _early.popitem()
        sock.close()
        _unlink(path)
