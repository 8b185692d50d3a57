"""A client of a daemon's API socket. Standard library only: these commands answer at once."""

from __future__ import annotations

import errno
import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.config import default_api_socket
from virtiofsd_rafs.errors import BackendTimeout, BadReply, ConfigError, Unreachable

if TYPE_CHECKING:
    from pathlib import Path

STATUS = "/api/v1/status"
# With the memory of the processes and more fetches: for who does not ask often.
FULL_STATUS = f"{STATUS}?full=1"
_TIMEOUT_S = 30.0
# A trace of full logs is a few megabytes.
_MAX_BODY = 256 << 20


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float = _TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def fetch_body(api_socket: Path, path: str, *, timeout_s: float = _TIMEOUT_S) -> bytes:
    """What the daemon that listens at *api_socket* answers to a GET of *path*.

    Raises Unreachable, BackendTimeout, BadReply.
    """
    connection = UnixConnection(api_socket, timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(_MAX_BODY)
    except TimeoutError as e:
        raise BackendTimeout(
            f"{api_socket}: the daemon did not answer within {timeout_s:g} s",
            remedy="its log tells what it is busy with",
        ) from e
    except http.client.RemoteDisconnected as e:
        raise _unreachable(api_socket, ConnectionResetError(errno.ECONNRESET, "")) from e
    except OSError as e:
        raise _unreachable(api_socket, e) from e
    except http.client.HTTPException as e:
        raise BadReply(
            f"{api_socket}: what listens there speaks no HTTP",
            remedy="give the API socket, by default the vhost-user socket's name with .api behind it",
        ) from e
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise BadReply(
            f"{api_socket}: {path} was answered with HTTP status {response.status}",
            remedy="is the daemon older than this command?",
        )
    return body


def fetch_json(api_socket: Path, path: str = STATUS, *, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """As :func:`fetch_body`, for an answer that is a JSON object."""
    body = fetch_body(api_socket, path, timeout_s=timeout_s)
    try:
        answer = json.loads(body)
    except ValueError as e:
        raise BadReply(f"{api_socket}: the answer is no JSON") from e
    if not isinstance(answer, dict):
        raise BadReply(f"{api_socket}: the answer is no object")
    return answer


def _unreachable(api_socket: Path, error: OSError) -> Unreachable:
    """What the system's refusal means for somebody who wants to ask a daemon."""
    cause, remedy = {
        errno.ENOENT: (
            "no daemon listens: there is no such socket",
            "give the socket of a running daemon; it appears when the daemon has started",
        ),
        errno.ECONNREFUSED: (
            "no daemon listens: the one that made this socket has gone",
            "remove the file, or start the daemon again",
        ),
        errno.ENOTSOCK: ("this is no socket", "give the --api-socket of a running daemon"),
        errno.EACCES: ("the socket belongs to another user", "run this as the daemon's user, or as root"),
        errno.EPERM: ("the socket belongs to another user", "run this as the daemon's user, or as root"),
        errno.ECONNRESET: ("the daemon closed the connection", "did it end just now? its log tells"),
        errno.EPIPE: ("the daemon closed the connection", "did it end just now? its log tells"),
        errno.ENOTDIR: ("no daemon listens: there is no such folder", "give the socket of a running daemon"),
    }.get(
        error.errno or 0,
        # Without a number: the name is longer than a socket's may be, or the peer closed without a word.
        (
            "no daemon answers: " + (error.strerror or str(error) or "the connection ended"),
            "give the --api-socket of a running daemon",
        ),
    )
    return Unreachable(f"{api_socket}: {cause}", remedy=remedy)


def which_socket(api_socket: Path | None, socket_path: Path | None) -> Path:
    """The API socket that a command's options name. Raises ConfigError unless exactly one is given."""
    if (api_socket is None) == (socket_path is None):
        raise ConfigError("which daemon?", remedy="give either --api-socket or --socket-path")
    if api_socket is not None:
        return api_socket
    assert socket_path is not None
    return default_api_socket(socket_path)
