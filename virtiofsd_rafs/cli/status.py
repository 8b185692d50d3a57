"""``virtiofsd-rafs status``: a client of the daemon's API socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import click

from virtiofsd_rafs.config import default_api_socket
from virtiofsd_rafs.errors import BadReply, ConfigError, Unreachable

_PATH = click.Path(path_type=Path)
_TIMEOUT_S = 30.0
_SLOWEST = 5


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def fetch_body(api_socket: Path, path: str) -> bytes:
    """What the daemon that listens at *api_socket* answers to *path*. Raises Unreachable, BadReply."""
    connection = _UnixConnection(api_socket)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable(
            f"{api_socket}: no daemon answers: {e}", remedy="give the --api-socket of a running daemon"
        ) from e
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise BadReply(f"{api_socket}: HTTP status {response.status}")
    return body


def fetch_status(api_socket: Path, path: str = "/api/v1/status") -> dict[str, Any]:
    """The status of the daemon that listens at *api_socket*, or what it answers to another *path*.

    Raises Unreachable, BadReply.
    """
    try:
        status = json.loads(fetch_body(api_socket, path))
    except ValueError as e:
        raise BadReply(f"{api_socket}: the answer is no JSON") from e
    if not isinstance(status, dict):
        raise BadReply(f"{api_socket}: the answer is no object")
    return status


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def describe(status: dict[str, Any]) -> str:
    """*status* for people."""
    image, session, agent = status["image"], status["session"], status["agent"]
    lines = [f"{status['id']}: {status['state']}, version {status['version']}", f"image {image['name']}"]
    for blob in image.get("blobs", []):
        states = blob["states"]
        where = "on disk" if blob["on_disk"] else "in memory"
        ready = states["verified"] if blob["on_disk"] else states["spilled"]
        lines.append(f"  blob {blob['id'][:16]}: {ready} of {blob['n_chunks']} chunks {where}")
    lines.append("processes")
    rows: list[tuple[str, ...]] = [("role", "pid", "memory", "")]
    for role, process in status["processes"].items():
        pss = process.get("pss_kib")
        notes = [f"{name} {process[name]}" for name in ("generation", "crashes") if name in process]
        rows.append((role, str(process["pid"]), _size(pss * 1024) if pss else "-", ", ".join(notes)))
    lines += _table(rows)
    lines.append(f"queues ({'VMM connected' if session['frontend_connected'] else 'no VMM'})")
    if status["queues"]:
        rows = [("queue", "size", "parked", "in flight", "completed")]
        for queue in status["queues"]:
            names = ("index", "size", "parked", "in_flight", "completed")
            rows.append(tuple(str(queue[name]) for name in names))
        lines += _table(rows)
    fetches = sum(agent["fetches"].values())
    failed = fetches - agent["fetches"].get("ok", 0)
    lines.append(f"fetched {_size(agent['bytes_fetched'])} in {fetches} requests, {failed} of them failed")
    waiting, under_way = agent.get("chunks_waiting", 0), agent.get("fetches_in_flight", 0)
    lines.append(f"waiting for {waiting} chunks, {under_way} fetches under way")
    stalls = status["stalls"]
    lines.append(f"{stalls['count']} requests waited {stalls['total_ns'] / 1e9:.3f} s altogether")
    if stalls["slowest"]:
        rows = [("waited", "offset", "file")]
        for stall in stalls["slowest"][:_SLOWEST]:
            waited = f"{(stall['done_ns'] - stall['parked_ns']) / 1e9:.3f} s"
            rows.append((waited, str(stall["offset"]), stall["path"] or f"node {stall['nodeid']}"))
        lines += _table(rows)
    return "\n".join(lines)


@click.command()
@click.option("--api-socket", type=_PATH, help="The daemon's API socket.")
@click.option(
    "--socket-path", type=_PATH, help="The daemon's vhost-user socket: its API socket lies beside it."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(api_socket: Path | None, socket_path: Path | None, as_json: bool) -> None:
    """Show a running daemon's processes, queues and traffic.

    \b
    Example: virtiofsd-rafs status --socket-path rafs.sock
    """
    if (api_socket is None) == (socket_path is None):
        raise ConfigError("which daemon?", remedy="give either --api-socket or --socket-path")
    if api_socket is None:
        assert socket_path is not None
        api_socket = default_api_socket(socket_path)
    found = fetch_status(api_socket)
    click.echo(json.dumps(found, indent=2) if as_json else describe(found))
