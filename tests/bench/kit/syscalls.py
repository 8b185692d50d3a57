"""System calls of other processes, counted exactly.

The kernel counts them (tracepoint ``raw_syscalls:sys_enter``, perf_event_open(2)) where it lets us: tracefs
has to be readable, and perf_event_paranoid below 2, or the capability CAP_PERFMON there. Else ``strace -c``
does, which slows the processes down so much that batches become smaller; the way is told with the number.
Without either there is no number.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_EVENT = "events/raw_syscalls/sys_enter/id"
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_TYPE_TRACEPOINT = 2
_ATTR_SIZE = 64  # PERF_ATTR_SIZE_VER0
_INHERIT = 1 << 1
_CLOEXEC = 1 << 3
_ATTACH_S = 10.0


class Counted(Protocol):
    """``calls`` is known when the context has been left; ``None`` if nothing could count."""

    method: str
    calls: int | None


class _Result:
    def __init__(self, method: str) -> None:
        self.method = method
        self.calls: int | None = None


@contextlib.contextmanager
def counting(pids: Sequence[int]) -> Iterator[Counted]:
    """Counts what the processes, their threads and new threads of theirs call while the context is open."""
    for way in (_with_perf, _with_strace):
        with contextlib.ExitStack() as stack:
            try:
                result = stack.enter_context(way(pids))
            except OSError:
                continue
            yield result
            return
    yield _Result("n/a")


def _event_id() -> int:
    for folder in TRACEFS:
        with contextlib.suppress(OSError):
            return int((folder / _EVENT).read_text())
    if os.geteuid() == 0:
        # As systemd does at boot.
        argv = ["mount", "-t", "tracefs", "nodev", str(TRACEFS[0])]
        subprocess.run(argv, check=False, stderr=subprocess.DEVNULL)
    return int((TRACEFS[0] / _EVENT).read_text())


def perf_attr(event: int) -> bytes:
    """``struct perf_event_attr`` of a tracepoint that is counted, in new threads as well."""
    return struct.pack("<IIQQQQQIIQ", _PERF_TYPE_TRACEPOINT, _ATTR_SIZE, event, 0, 0, 0, _INHERIT, 0, 0, 0)


@contextlib.contextmanager
def _with_perf(pids: Sequence[int]) -> Iterator[_Result]:
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError("perf_event_open has a number that is not known here")
    attr = perf_attr(_event_id())
    libc = ctypes.CDLL(None, use_errno=True)
    result = _Result("perf")
    with contextlib.ExitStack() as stack:
        counters = []
        for pid in pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                fd = libc.syscall(number, attr, int(task), -1, -1, ctypes.c_ulong(_CLOEXEC))
                if fd < 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), "perf_event_open")
                stack.callback(os.close, fd)
                counters.append(fd)
        before = _read(counters)
        yield result
        result.calls = _read(counters) - before


def _read(counters: Sequence[int]) -> int:
    return sum(struct.unpack("<Q", os.read(fd, 8))[0] for fd in counters)


@contextlib.contextmanager
def _with_strace(pids: Sequence[int]) -> Iterator[_Result]:
    program = shutil.which("strace")
    if program is None:
        raise OSError("no strace")
    result = _Result("strace")
    with tempfile.NamedTemporaryFile(prefix="vr-") as summary, tempfile.TemporaryFile("w+") as noise:
        argv = [program, "-f", "-c", "-o", summary.name, *(f"--attach={pid}" for pid in pids)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=noise) as tracer:
            try:
                _wait_attached(tracer, pids)
                yield result
            finally:
                tracer.send_signal(signal.SIGINT)
                tracer.wait()
        result.calls = total_of(Path(summary.name).read_text())


def _wait_attached(tracer: subprocess.Popen[bytes], pids: Sequence[int]) -> None:
    deadline = time.monotonic() + _ATTACH_S
    while not all(_tracer_of(pid) == tracer.pid for pid in pids):
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise OSError("strace cannot attach")
        time.sleep(0.01)


def _tracer_of(pid: int) -> int:
    match = re.search(r"^TracerPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def total_of(summary: str) -> int:
    """All calls in what ``strace -c`` wrote: the fourth column of the last line; 0 for nothing."""
    lines = [line.split() for line in summary.splitlines() if line.split()[-1:] == ["total"]]
    return int(lines[-1][3]) if lines else 0
