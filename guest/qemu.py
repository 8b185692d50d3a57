"""Starts QEMU with a vhost-user file system as root, and follows the guest over console, QMP and a report
file.

Emulation (``accel=tcg``) is the default: it works everywhere, also inside a VM. Times seen in such a guest
show trends only.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Literal, Self

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_MILESTONE = re.compile(r"rafs-guest: (?P<name>[\w-]+)(?P<rest>.*)")


class GuestError(Exception):
    """The guest or QEMU ended or did not do what was waited for. The text has the end of the console."""


@attrs.frozen
class Machine:
    """What to boot. Sizes in MiB."""

    kernel: Path
    command_line: str
    vhost_socket: Path
    work_dir: Path
    kind: Literal["q35", "microvm"] = "q35"
    kit: Path | None = None
    initramfs: Path | None = None
    memory: int = 512
    cpus: int = 1
    request_queues: int = 1
    queue_size: int = 1024
    tag: str = "rafs"
    http_port: int | None = None
    may_reboot: bool = False
    accel: str = "tcg"
    qemu: str = "qemu-system-x86_64"

    def argv(self) -> list[str]:
        """QEMU's whole command line.

        The guest's memory is shared (memfd), because the vhost-user back-end reads and writes it. microvm
        needs PCI: virtio-mmio is a module in Debian's kernels, so a root over it would want an initramfs.
        """
        machine = {
            "q35": "q35,usb=off,smbus=off,sata=off",
            "microvm": "microvm,pcie=on,rtc=on",
        }[self.kind]
        fs = f"vhost-user-fs-pci,chardev=fs0,tag={self.tag},queue-size={self.queue_size}"
        if self.request_queues > 1:
            fs += f",num-request-queues={self.request_queues}"
        argv = [
            *(self.qemu, "-nodefaults", "-no-user-config", "-display", "none"),
            *(() if self.may_reboot else ("-no-reboot",)),
            *("-machine", f"{machine},accel={self.accel},memory-backend=mem"),
            *(
                "-cpu",
                "max" if self.accel == "tcg" else "host",
                "-smp",
                str(self.cpus),
                "-m",
                f"{self.memory}M",
            ),
            *("-object", f"memory-backend-memfd,id=mem,size={self.memory}M,share=on"),
            *("-chardev", f"socket,id=fs0,path={self.vhost_socket}", "-device", fs),
            *("-kernel", str(self.kernel), "-append", self.command_line),
            *("-serial", "stdio"),
            *("-qmp", f"unix:{self.work_dir / 'qmp.sock'},server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=report,path={self.work_dir / 'report'}"),
            *("-device", "virtserialport,chardev=report,name=rafs.report"),
        ]
        if self.initramfs is not None:
            argv += ["-initrd", str(self.initramfs)]
        if self.kit is not None:
            argv += ["-drive", f"if=none,id=kit,format=raw,readonly=on,file={self.kit}"]
            argv += ["-device", "nvme,drive=kit,serial=kit"]
        if self.http_port is not None:
            argv += [
                "-netdev",
                f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{self.http_port}-10.0.2.15:80",
            ]
            argv += ["-device", "virtio-net-pci,netdev=net0,romfile="]
        return argv


@attrs.frozen
class Line:
    """A line of the console, and when it came (``time.monotonic()``)."""

    t: float
    text: str


class Guest:
    """A running QEMU. Use it as a context manager: leaving it ends QEMU."""

    def __init__(self, machine: Machine, on_line: Callable[[Line], None] | None = None) -> None:
        self.machine = machine
        self.report_path = machine.work_dir / "report"
        self._on_line = on_line
        self._lines: list[Line] = []
        self._changed = threading.Condition()
        self._eof = False
        self._qmp: Qmp | None = None
        machine.work_dir.mkdir(parents=True, exist_ok=True)
        self.report_path.unlink(missing_ok=True)
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            machine.argv(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.kill()

    def _read(self, stream: IO[bytes]) -> None:
        with (self.machine.work_dir / "console.log").open("wb") as log:
            for raw in stream:
                log.write(raw)
                log.flush()
                line = Line(time.monotonic(), raw.decode("utf-8", "replace").rstrip("\r\n"))
                if self._on_line is not None:
                    self._on_line(line)
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._eof = True
            self._changed.notify_all()

    @property
    def lines(self) -> list[Line]:
        """The console until now."""
        with self._changed:
            return list(self._lines)

    def console(self, last: int = 20) -> str:
        """The last lines of the console as one text, for messages."""
        return "\n".join(f"    | {line.text}" for line in self.lines[-last:])

    def wait_for(self, pattern: str, timeout: float, start: int = 0) -> tuple[int, Line]:
        """Waits for a line of the console that matches the regular expression *pattern*.

        Args:
            pattern: searched in each line.
            timeout: seconds.
            start: index of the first line to look at; the answer's index + 1 goes on behind a match.

        Returns:
            Index and line.

        Raises:
            GuestError: time-out, or the console ended before.
        """
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout
        position = start
        with self._changed:
            while True:
                while position < len(self._lines):
                    if expression.search(self._lines[position].text):
                        return position, self._lines[position]
                    position += 1
                if self._eof:
                    reason = f"QEMU ended before the console showed {pattern!r}"
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    reason = f"the console did not show {pattern!r} within {timeout:g} s"
                    break
        raise GuestError(f"{reason}; its end:\n{self.console()}")

    def milestone(self, name: str, timeout: float, start: int = 0) -> tuple[int, Line]:
        """Waits for the line that :file:`guest/init` or a job writes with ``milestone NAME``."""
        return self.wait_for(rf"rafs-guest: {re.escape(name)}\b", timeout, start)

    def milestones(self) -> dict[str, float]:
        """First host time of each milestone so far."""
        found: dict[str, float] = {}
        for line in self.lines:
            match = _MILESTONE.search(line.text)
            if match:
                found.setdefault(match["name"], line.t)
        return found

    @property
    def qmp(self) -> Qmp:
        """The machine's control socket."""
        if self._qmp is None:
            self._qmp = Qmp(self.machine.work_dir / "qmp.sock")
        return self._qmp

    def wait(self, timeout: float) -> int:
        """Waits until the guest has powered itself off; QEMU's exit code.

        Raises:
            GuestError: time-out.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not power off within {timeout:g} s:\n{self.console()}") from None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """Ends QEMU at once, if it still runs."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)


class Qmp:
    """A connection to QEMU's control socket: one command after the other."""

    def __init__(self, path: Path, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise GuestError(f"QEMU's control socket {path} does not answer") from None
                time.sleep(0.05)
        self._stream = self._socket.makefile("rwb")
        self._read()
        self("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise GuestError("QEMU closed its control socket")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Runs *command* (``stop``, ``cont``, ``system_reset``, ``query-status``, ...); what it returned.

        Raises:
            GuestError: QEMU refused it or is gone.
        """
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise GuestError(f"QEMU refused {command}: {answer['error'].get('desc')}")

    def close(self) -> None:
        """Closes the connection."""
        self._stream.close()
        self._socket.close()
