"""One boot from start of the daemon to the first HTTP answer, with the times of everything between."""

from __future__ import annotations

import http.client
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from guest.daemon import BackEnd, Daemon
from guest.initramfs import make_initramfs
from guest.kit import Kernel, kernel_command_line, make_kit
from guest.qemu import Guest, GuestError, Machine
from guest.registry import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@attrs.frozen
class Boot:
    """What one boot gave. Times are seconds since the daemon was started.

    Attributes:
        name: how the report calls it.
        started: when the daemon was started (``time.monotonic()``).
        times: event name to time, in the order in which they happened.
        status: what the back-end told about itself right after the first HTTP answer.
        trace: its account of fetches and waiting requests at that moment.
    """

    name: str
    started: float
    times: dict[str, float]
    status: dict[str, Any]
    trace: dict[str, Any] = attrs.field(factory=dict)


def http_status(port: int, timeout: float = 5) -> int | None:
    """The status of ``GET /`` on loopback, or nothing if there was no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        # QEMU's user network takes the connection itself and resets it when the guest refuses.
        return None
    finally:
        connection.close()


def boot(
    name: str,
    image: str,
    *,
    kernel: Kernel,
    options: Sequence[str] = (),
    logs: Path,
    kind: Literal["q35", "microvm"] = "q35",
    memory: int = 512,
    timeout: float = 300,
    note: Callable[[str], None] = lambda _: None,
    back_end: Callable[[str, Path, Path, Sequence[str]], BackEnd] = Daemon,
) -> Boot:
    """Serves *image*, boots a guest from it, waits for HTTP 200, and ends both.

    Args:
        name: prefix of the log files.
        image: what ``serve`` takes.
        kernel: what to boot.
        options: further arguments of ``serve``.
        logs: folder for the logs of daemon and console.
        kind: QEMU machine.
        memory: of the guest, MiB.
        timeout: seconds for the whole boot.
        note: gets a text about what is going on, several times per second.
        back_end: starts what serves the image, given the image, a folder for sockets, a log and *options*.

    Raises:
        DaemonError: the back-end did not start, ended early, or did not end when its VM had gone.
        GuestError: the guest did not come up.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rafs-") as tmp:
        work = Path(tmp)
        port = free_port()
        kit = make_kit(work / "kit.img", kernel, "serve")
        with back_end(image, work, logs / f"{name}-daemon.log", options) as daemon:
            times = {"daemon ready": daemon.wait_ready() - daemon.started}
            machine = Machine(
                kernel=kernel.image,
                command_line=kernel_command_line(),
                vhost_socket=daemon.socket,
                work_dir=work,
                kind=kind,
                kit=kit,
                initramfs=make_initramfs(work / "initramfs", kernel),
                memory=memory,
                http_port=port,
            )
            with Guest(machine) as guest:
                try:
                    answered = _wait_http(guest, daemon, port, daemon.started + timeout, note)
                finally:
                    (logs / f"{name}-console.log").write_text(
                        "".join(f"{line.text}\n" for line in guest.lines)
                    )
                status, trace = daemon.status(), daemon.trace()
                found = guest.milestones()
                guest.qmp("quit")
                guest.wait(30)
            code = daemon.wait_end()
            if code:
                raise daemon.failure(f"{daemon.name} ended with exit code {code}")
    for event, milestone in (("first exec", "init"), ("network up", "up"), ("server starts", "starts")):
        if milestone in found:
            times[event] = found[milestone] - daemon.started
    times["HTTP 200"] = answered - daemon.started
    return Boot(name, daemon.started, times, status, trace)


def _wait_http(
    guest: Guest, daemon: BackEnd, port: int, deadline: float, note: Callable[[str], None]
) -> float:
    """Asks until the guest's server answers with 200; the time of that."""
    last = None
    while time.monotonic() < deadline:
        if guest.process.poll() is not None:
            raise GuestError(f"QEMU ended with exit code {guest.process.returncode}:\n{guest.console()}")
        if daemon.process.poll() is not None:
            raise daemon.failure(f"{daemon.name} ended with exit code {daemon.process.returncode}")
        seen = guest.milestones()
        note(f"guest: {next(reversed(seen), 'kernel')}")
        if "job-ended" in seen:
            raise GuestError(f"the server in the guest ended:\n{guest.console()}")
        if "starts" in seen:
            last = http_status(port)
            if last == http.HTTPStatus.OK:
                return time.monotonic()
        time.sleep(0.05)
    answer = "no HTTP answer" if last is None else f"HTTP {last} instead of 200"
    raise GuestError(f"{answer} from the guest in time; its console ends:\n{guest.console()}")
