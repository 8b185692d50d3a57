"""One run of a case on a side, and what came of it."""

from __future__ import annotations

import errno
import statistics
import threading
from typing import TYPE_CHECKING, Any

import attrs

from tests.bench.kit import pages, syscalls
from tests.bench.kit.cases import load_of, op_of
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.fuse.structs import OpenIn, ReadIn
from virtiofsd_rafs.native.frontend import Load, Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.bench.kit.cases import Case, Targets
    from tests.bench.sides import Side
    from virtiofsd_rafs.native.frontend import LoadResult

# Long enough for some hundred requests, one at a time, also where strace slows them down.
COUNTED_S = 0.25
N_STALLED = 64
Steps = tuple[tuple[float, int], ...]


@attrs.frozen
class Setting:
    """How all runs are made."""

    duration_s: float
    wait: str = "sleep"
    canaries: bool = False


@attrs.frozen
class Run:
    """One run. Per operation unless it says otherwise; a walk of the whole tree is one operation."""

    ops_per_s: float
    bytes_per_s: float
    cpu_us: float
    """Processor time of all the back-end's processes."""
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    kicks: float
    interrupts: float
    wakeups: float
    """Sleeps of the back-end's threads, per request."""
    requests: int
    disk_bytes: int
    """Read from storage, in all."""
    faults: dict[str, int]
    """What was done to rings and buffers that must not be, by kind, in all."""
    errors: int = 0
    wrong: int = 0
    lost: int = 0
    remote_requests: int | None = None
    """What the remote was asked for, in all; ``None`` where there is none."""
    remote_bytes: int | None = None
    idle_p99_us: float | None = None
    """Of the same load without what disturbs it, where something does."""
    steps: Steps = attrs.field(default=(), repr=False)
    """Latencies: up to so many microseconds, so many requests."""

    @property
    def failed(self) -> str:
        """What went wrong, for a table; empty if nothing did."""
        texts = {"errors": self.errors, "wrong": self.wrong, "lost": self.lost, **self.faults}
        return ", ".join(f"{n} {what}" for what, n in texts.items() if n)


def _run_of(side: Side, load: Callable[[], tuple[LoadResult, int]]) -> Run:
    """Runs *load*, which also tells how many operations it was."""
    before = side.usage()
    result, n_ops = load()
    used = side.usage() - before
    requests, n = max(result.total.count, 1), max(n_ops, 1)
    total = result.total
    return Run(
        n_ops / result.elapsed_s,
        result.bytes_per_s,
        used.cpu_ns / 1000 / n,
        *(total.p50_us, total.p99_us, total.p999_us, total.max_us),
        result.kicks / requests,
        result.interrupts / requests,
        used.wakeups / requests,
        total.count,
        used.disk_bytes,
        dict(result.faults),
        *(total.errors, total.wrong, result.lost),
        steps=result.steps,
    )


def run_case(side: Side, case: Case, targets: Targets, setting: Setting, data: Sequence[Path] = ()) -> Run:
    """One run of a case that needs no remote; *data* are the files whose pages a ``disk`` case drops."""
    if case.what == "walk":
        return _run_of(side, lambda: _walk(side, case, setting))
    load = load_of(case, targets, duration_s=setting.duration_s, wait=setting.wait, canaries=setting.canaries)
    if case.what == "forget":
        # As many lookups as are forgotten then: the nodes stay known, as they were before.
        fill = attrs.evolve(load.ops[0], kind="lookup", targets=targets.names, random=False)
        side.fe.load(attrs.evolve(load, ops=[fill]))
        storm = attrs.evolve(load.ops[0], random=False)
        load = attrs.evolve(load, ops=[storm], queues=[0])
    if case.what == "disk":
        pages.drop(data)
    return _run_of(side, lambda: _load(side, load))


def _load(side: Side, load: Load) -> tuple[LoadResult, int]:
    result = side.fe.load(load)
    return result, result.total.count


def _walk(side: Side, case: Case, setting: Setting) -> tuple[LoadResult, int]:
    wait = case.wait or setting.wait
    walk = Walk(depth=case.depth, duration_s=setting.duration_s, wait="poll" if wait == "poll" else "sleep")
    result = side.fe.walk(walk)
    return result.load, result.walks


def system_calls(
    side: Side, case: Case, targets: Targets, setting: Setting, data: Sequence[Path] = ()
) -> tuple[str, float | None]:
    """How system calls were counted, and how many there were per request, in a short run of its own."""
    if case.what in ("remote", "stalled"):
        return "n/a", None
    short = attrs.evolve(setting, duration_s=min(COUNTED_S, setting.duration_s))
    with syscalls.counting(side.pids()) as counted:
        run = run_case(side, case, targets, short, data)
    # Both halves of a forget storm are counted, and both have as many requests.
    requests = run.requests * (2 if case.what == "forget" else 1)
    return counted.method, None if counted.calls is None else counted.calls / max(requests, 1)


def not_needed(side: Side, case: Case, targets: Targets) -> str | None:
    """Why a guest would not send such requests to this side, or ``None``."""
    if case.kind == "open" and targets.files:
        try:
            node = targets.files[0].nodeid
            side.fe.release(node, _open(side, node))
        except OSError as e:
            if e.errno == errno.ENOSYS:
                return "OPEN is answered with ENOSYS: a guest sends no more"
            raise
    return None


def _open(side: Side, nodeid: int) -> int:
    return int.from_bytes(side.fe.call(Opcode.OPEN, nodeid, OpenIn().pack(), 16)[:8], "little")


def stalled(
    side: Side,
    case: Case,
    targets: Targets,
    setting: Setting,
    hold: Callable[[], Callable[[], None]],
) -> Run:
    """A load on the first large file beside reads of the others whose chunks do not come.

    The load ends before they do; each of them has to be answered then. *hold* makes the remote hold its
    answers back and returns what releases them.

    Raises:
        RuntimeError: a read that was held back failed.
    """
    warm = targets.large[0]
    # Every byte of it, so that no request of the load has to wait for anything.
    whole = attrs.evolve(op_of(case, targets), targets=[warm], size=128 << 10, random=False)
    side.fe.load(Load([whole], depth=8, count=-(-warm.size // whole.size), canaries=False))
    load = load_of(case, targets, duration_s=setting.duration_s, wait=setting.wait, canaries=setting.canaries)
    load = attrs.evolve(load, ops=[attrs.evolve(load.ops[0], targets=[warm])], stall_s=60.0)
    idle = side.fe.load(load)
    release = hold()
    cold = targets.large[1:] or [warm]
    places = [(t, at) for at in range(0, cold[0].size, 1 << 20) for t in cold if at < t.size][:N_STALLED]
    tokens = [side.fe.request(Opcode.READ, t.nodeid, _read_args(t.fh, at), 4096) for t, at in places]
    timer = _after(setting.duration_s + 0.5, release)
    try:
        run = _run_of(side, lambda: _load(side, load))
    finally:
        timer()
    failed = [reply.error for reply in map(side.fe.wait, tokens) if reply.error or len(reply.data) != 4096]
    if failed:
        raise RuntimeError(f"{side.name}: {len(failed)} reads that were held back failed ({failed[0]})")
    return attrs.evolve(run, idle_p99_us=idle.total.p99_us)


def _read_args(fh: int, offset: int) -> bytes:
    return ReadIn(fh=fh, offset=offset, size=4096).pack()


def _after(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    """Calls that after so many seconds, in a thread; returns what waits until it has happened."""
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer.join


def median(runs: Sequence[Run]) -> Run:
    """Each figure's own median; what went wrong is added up, and so are the latencies' steps."""
    summed = {"errors", "wrong", "lost"}
    values: dict[str, Any] = {}
    for field in attrs.fields(Run):
        each = [getattr(run, field.name) for run in runs]
        if field.name == "steps":
            values[field.name] = merged(each)
        elif field.name == "faults":
            kinds = sorted({kind for faults in each for kind in faults})
            values[field.name] = {kind: sum(faults.get(kind, 0) for faults in each) for kind in kinds}
        elif field.name in summed:
            values[field.name] = sum(each)
        else:
            values[field.name] = None if None in each else statistics.median(each)
    return Run(**values)


def merged(all_steps: Sequence[Steps]) -> Steps:
    """The steps of several runs together."""
    counts: dict[float, int] = {}
    for steps in all_steps:
        for value, n in steps:
            counts[value] = counts.get(value, 0) + n
    return tuple(sorted(counts.items()))
