"""What a back-end's processes cost, as Linux tells it in /proc."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable


@attrs.frozen
class Usage:
    """What processes have used so far, or between two looks.

    A process or thread that has ended meanwhile counts as nothing, except that the processor time of a
    process includes that of its threads that have ended.
    """

    cpu: dict[int, int]
    """Nanoseconds of processor time by process."""
    sleeps: dict[int, int]
    """Voluntary context switches by thread."""
    disk: dict[int, int]
    """Bytes read from storage by process."""

    @property
    def cpu_ns(self) -> int:
        return sum(self.cpu.values())

    @property
    def wakeups(self) -> int:
        """How often a thread went to sleep."""
        return sum(self.sleeps.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    def __sub__(self, other: Usage) -> Usage:
        def since(now: dict[int, int], before: dict[int, int]) -> dict[int, int]:
            return {key: n - before.get(key, 0) for key, n in now.items()}

        return Usage(
            since(self.cpu, other.cpu), since(self.sleeps, other.sleeps), since(self.disk, other.disk)
        )


@attrs.frozen
class Memory:
    """Proportional set size of one process in KiB."""

    name: str
    pss: int
    shared: int
    """The part of it in shared memory (Pss_Shmem): pages of the guest that it maps, and tables in memfds."""
    file: int
    """The part of it in files (Pss_File): programs and libraries."""

    @property
    def own(self) -> int:
        """Without shared memory."""
        return self.pss - self.shared


def family(pid: int) -> list[int]:
    """*pid* and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += parents.get(pid, [])
    return found


def _cpu_clock(pid: int) -> int:
    """The clock of a process's processor time, as clock_getcpuclockid(3) makes it (CPUCLOCK_SCHED)."""
    return (~pid << 3) | 2


def usage(pid: int) -> Usage:
    """Of *pid* and its descendants (CPU clocks, ``/proc/PID/io`` and ``task/*/status``)."""
    found = Usage({}, {}, {})
    for member in family(pid):
        with contextlib.suppress(OSError):
            found.cpu[member] = time.clock_gettime_ns(_cpu_clock(member))
        with contextlib.suppress(OSError):
            io = Path(f"/proc/{member}/io").read_text()
            found.disk[member] = int(io.partition("\nread_bytes:")[2].split()[0])
        for task in Path(f"/proc/{member}/task").glob("*"):
            with contextlib.suppress(OSError):
                status = (task / "status").read_text()
                found.sleeps[int(task.name)] = int(
                    status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]
                )
    return found


def parse_rollup(name: str, text: str) -> Memory:
    """A ``smaps_rollup`` (Linux, Documentation/filesystems/proc.rst)."""
    fields = {
        key: value.split()[0] for key, _, value in (line.partition(":") for line in text.splitlines()[1:])
    }
    return Memory(name, int(fields["Pss"]), int(fields["Pss_Shmem"]), int(fields["Pss_File"]))


def mapped_files(smaps: str) -> dict[tuple[str, str], int]:
    """KiB in memory of each mapping of a file, by path and offset (Linux, /proc/PID/smaps)."""
    found: dict[tuple[str, str], int] = {}
    mapping = None
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            # range, permissions, offset, device, inode and a path, if there is one
            mapping = (words[5], words[2]) if len(words) > 5 and words[5].startswith("/") else None
        elif words[0] == "Rss:" and mapping is not None and not mapping[0].startswith("/memfd:"):
            found[mapping] = found.get(mapping, 0) + int(words[1])
    return found


def alone_kib(pid: int) -> int:
    """What *pid* and its descendants would need if nobody else used their programs and libraries.

    PSS counts such pages in part when other processes map them, as this one does, which is Python as well.
    Here each mapping counts whole, once for the family: an upper bound, as the C library is used anyway.
    """
    files: dict[tuple[str, str], int] = {}
    total = 0
    for member in family(pid):
        rollup = parse_rollup("", Path(f"/proc/{member}/smaps_rollup").read_text())
        total += rollup.pss - rollup.file
        for mapping, kib in mapped_files(Path(f"/proc/{member}/smaps").read_text()).items():
            files[mapping] = max(files.get(mapping, 0), kib)
    return total + sum(files.values())


def names(pids: Iterable[int]) -> dict[int, str]:
    """What processes call themselves (``comm``); ``?`` for one that has ended."""
    found = {}
    for pid in pids:
        found[pid] = "?"
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


def memory(pid: int) -> list[Memory]:
    """Of *pid* and its descendants, in the order of their pids; one that ends meanwhile has none."""
    found = []
    for member in sorted(family(pid)):
        folder = Path(f"/proc/{member}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = (folder / "comm").read_text().strip()
            found.append(parse_rollup(name, (folder / "smaps_rollup").read_text()))
    return found


def pss_kib(pid: int) -> int:
    """Proportional set size of *pid* and its descendants."""
    return sum(each.pss for each in memory(pid))


@functools.cache
def _cpus() -> list[int]:
    """What this process may use before it pins itself."""
    return sorted(os.sched_getaffinity(0))


def pin(pids: list[int]) -> None:
    """This process on the first CPU, all threads of *pids* on the others, if there are others.

    On one CPU a front-end and a back-end share its cache, as no guest does: the scheduler's mood would decide
    all.
    """
    cpus = _cpus()
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), cpus[1:] or cpus)
    os.sched_setaffinity(0, cpus[:1])
