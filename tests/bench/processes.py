"""What a back-end's processes cost, as Linux tells it in /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import attrs


@attrs.frozen
class Usage:
    """What processes have used so far."""

    cpu_ns: int
    wakeups: int
    """Voluntary context switches: how often a thread went to sleep."""

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu_ns - other.cpu_ns, self.wakeups - other.wakeups)


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


def usage(pid: int) -> Usage:
    """Processor time and sleeps of all threads of *pid* and its descendants (task/*/schedstat and status)."""
    cpu_ns = wakeups = 0
    for member in family(pid):
        for task in Path(f"/proc/{member}/task").glob("*"):
            with contextlib.suppress(OSError):
                cpu_ns += int((task / "schedstat").read_text().split()[0])
                status = (task / "status").read_text()
                wakeups += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return Usage(cpu_ns, wakeups)


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


def memory(pid: int) -> list[Memory]:
    """Of *pid* and its descendants, in the order of their pids."""
    found = []
    for member in sorted(family(pid)):
        folder = Path(f"/proc/{member}")
        name = (folder / "comm").read_text().strip()
        found.append(parse_rollup(name, (folder / "smaps_rollup").read_text()))
    return found


def pin(pids: list[int]) -> None:
    """This process on the first CPU, all threads of *pids* on the others, if there are others.

    On one CPU a front-end and a back-end share its cache, as no guest does: the scheduler's mood would decide
    all.
    """
    cpus = sorted(os.sched_getaffinity(0))
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), cpus[1:] or cpus)
    os.sched_setaffinity(0, cpus[:1])
