"""Load loops and walks of the test front-end: what to do, what came of it. The loops are native."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Literal

import attrs

from virtiofsd_rafs.native._lib import ffi, lib
from virtiofsd_rafs.native.frontend_link import checked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from virtiofsd_rafs.native.frontend_device import Layout

Kind = Literal["getattr", "lookup", "absent", "read", "open", "forget"]
"""``absent``: a lookup that must find nothing; ``open``: OPEN and RELEASE; ``forget`` has no answer."""

_FOREVER_S = 365 * 86_400.0
_MAX_FDS = 4096
_MAX_STEPS = 4096
"""More than a native histogram has buckets."""


@attrs.frozen
class Target:
    """An object of an operation: a node, for ``lookup`` a name in it, for ``read`` its size and content.

    Content is compared with the file *content* (from *content_offset* on), or with *digests*: SHA-256 of each
    block of the operation's size, one after the other. Without either only the length is checked.
    """

    nodeid: int
    size: int = 0
    fh: int = 0
    name: bytes = b""
    content: Path | None = None
    content_offset: int = 0
    digests: bytes = b""


@attrs.frozen
class Op:
    """One operation of a mix. Reads are of *size* bytes at multiples of it."""

    kind: Kind
    targets: Sequence[Target]
    size: int = 4096
    weight: int = 1
    random: bool = True
    """Targets and offsets at random, else one after the other, for ever."""


@attrs.frozen
class Load:
    """A load: *depth* requests in flight on each of *queues*, for *duration_s* or *count* requests each."""

    ops: Sequence[Op]
    depth: int = 32
    duration_s: float | None = None
    count: int = 0
    queues: Sequence[int] = (1,)
    wait: Literal["sleep", "poll"] = "sleep"
    canaries: bool = True
    """Watch for writes outside of what the used length says and after completion; costs time."""
    resting: int = 64
    """Completed buffers that rest, watched, before they are used again."""
    seed: int = 1
    stall_s: float = 30.0
    """Without any completion for so long, what is in flight is given up as lost."""
    layout: Layout | None = None


@attrs.frozen
class OpResult:
    """What came of one operation; latencies in microseconds."""

    count: int
    errors: int
    first_errno: int
    wrong: int
    bytes: int
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float


@attrs.frozen
class LoadResult:
    """What came of a load. ``faults`` are those that the back-end committed meanwhile, on any queue."""

    ops: tuple[OpResult, ...]
    total: OpResult
    elapsed_s: float
    lost: int
    kicks: int
    kicks_suppressed: int
    interrupts: int
    faults: dict[str, int]
    steps: tuple[tuple[float, int], ...] = ()
    """Latencies of all requests: values up to the first number in microseconds, so many; ascending."""

    @property
    def ops_per_s(self) -> float:
        return self.total.count / self.elapsed_s

    @property
    def bytes_per_s(self) -> float:
        return self.total.bytes / self.elapsed_s

    @property
    def clean(self) -> bool:
        """Whether every request was answered, rightly, and the rings were used as they must be."""
        return not (self.total.errors or self.total.wrong or self.lost or self.faults)


@attrs.frozen
class Walk:
    """A walk of the tree below *root*, again and again for *duration_s*, or *count* times.

    Defaults are those of one process in a guest with Linux 6.12: one request at a time, one page of names.
    """

    root: int = 1
    depth: int = 1
    size: int = 4096
    duration_s: float | None = None
    count: int = 0
    queue: int = 1
    wait: Literal["sleep", "poll"] = "sleep"
    stall_s: float = 30.0
    layout: Layout | None = None


@attrs.frozen
class WalkResult:
    """What came of walks. ``load`` counts their requests."""

    walks: int
    names: int
    directories: int
    load: LoadResult


class _Pool:
    """Names, digests and files that targets refer to, each once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.data = bytearray()
        self._at: dict[bytes, int] = {}
        self.fds: list[int] = []
        self._files: dict[Path, int] = {}

    def put(self, data: bytes) -> int:
        if data not in self._at:
            self._at[data] = len(self.data)
            self.data += data
        return self._at[data]

    def file(self, path: Path) -> int:
        if path not in self._files:
            if len(self.fds) >= _MAX_FDS:
                raise ValueError(f"a load compares with at most {_MAX_FDS} files: use digests or one file")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)
            self._files[path] = len(self.fds)
            self.fds.append(fd)
        return self._files[path]

    def words(self, t: Target) -> list[int]:
        """A target as native code wants it."""
        expected = [lib.VR_FRONTEND_EXPECT_ANYTHING, 0, 0]
        if t.digests:
            expected = [lib.VR_FRONTEND_EXPECT_BLOCKS, self.put(t.digests), 0]
        elif t.content is not None and t.size:
            expected = [lib.VR_FRONTEND_EXPECT_FILE, self.file(t.content), t.content_offset]
        return [t.nodeid, t.fh, t.size, self.put(t.name), len(t.name), *expected]


def run_load(handle: Any, load: Load, layout_word: int) -> LoadResult:
    """Runs a load on a native front-end; blocks without the interpreter's lock."""
    kinds = {
        "getattr": lib.VR_FRONTEND_OP_GETATTR,
        "lookup": lib.VR_FRONTEND_OP_LOOKUP,
        "absent": lib.VR_FRONTEND_OP_ABSENT,
        "read": lib.VR_FRONTEND_OP_READ,
        "open": lib.VR_FRONTEND_OP_OPEN,
        "forget": lib.VR_FRONTEND_OP_FORGET,
    }
    if load.duration_s is None and not load.count:
        raise ValueError("a load needs a duration or a count")
    duration_s = _FOREVER_S if load.duration_s is None else load.duration_s
    with contextlib.ExitStack() as stack:
        pool = _Pool(stack)
        ops: list[int] = []
        targets: list[int] = []
        n_targets = 0
        for op in load.ops:
            ops += [kinds[op.kind], op.weight, op.size, op.random, n_targets, len(op.targets)]
            for target in op.targets:
                targets += pool.words(target)
            n_targets += len(op.targets)
        params = [
            load.depth,
            load.count,
            round(duration_s * 1000),
            load.wait == "poll",
            layout_word,
            load.canaries,
            load.resting,
            load.seed,
            round(load.stall_s * 1000),
            0,
        ]
        n_out = lib.VR_FRONTEND_LOAD_HEAD + lib.VR_FRONTEND_LOAD_RESULT * (len(load.ops) + 1)
        out = ffi.new("uint64_t[]", n_out)
        steps = ffi.new("uint64_t[]", 2 * _MAX_STEPS)
        checked(
            lib.vr_frontend_load(
                handle,
                ffi.new("uint32_t[]", list(load.queues)),
                len(load.queues),
                ffi.new("uint64_t[]", [int(p) for p in params]),
                ffi.new("uint64_t[]", [int(w) for w in ops]),
                len(load.ops),
                ffi.new("uint64_t[]", targets),
                n_targets,
                ffi.from_buffer("uint8_t[]", pool.data),
                len(pool.data),
                ffi.new("int32_t[]", pool.fds),
                len(pool.fds),
                out,
                n_out,
                steps,
                len(steps),
            )
        )
    return _result(ffi.unpack(out, n_out), steps)


def _result(out: Sequence[int], steps: Any) -> LoadResult:
    """What native code stored for a load."""
    head, words = lib.VR_FRONTEND_LOAD_HEAD, lib.VR_FRONTEND_LOAD_RESULT
    elapsed_ns, lost, _, kicks, suppressed, interrupts, n_steps = out[:head]
    results = []
    for at in range(head, len(out), words):
        row = out[at : at + words]
        results.append(OpResult(*row[:5], *(ns / 1000 for ns in row[5:])))
    pairs = ffi.unpack(steps, 2 * n_steps)
    return LoadResult(
        tuple(results[:-1]),
        results[-1],
        elapsed_ns / 1e9,
        lost,
        kicks,
        suppressed,
        interrupts,
        {},
        tuple((ns / 1000, n) for ns, n in zip(pairs[::2], pairs[1::2], strict=True)),
    )


def run_walk(handle: Any, walk: Walk, layout_word: int) -> WalkResult:
    """Runs walks on a native front-end; blocks without the interpreter's lock."""
    if walk.duration_s is None and not walk.count:
        raise ValueError("a walk needs a duration or a count")
    duration_s = _FOREVER_S if walk.duration_s is None else walk.duration_s
    params = [
        walk.root,
        walk.depth,
        walk.size,
        round(duration_s * 1000),
        walk.count,
        walk.wait == "poll",
        layout_word,
        round(walk.stall_s * 1000),
    ]
    head = lib.VR_FRONTEND_WALK_HEAD
    n_out = head + lib.VR_FRONTEND_LOAD_HEAD + 2 * lib.VR_FRONTEND_LOAD_RESULT
    out = ffi.new("uint64_t[]", n_out)
    steps = ffi.new("uint64_t[]", 2 * _MAX_STEPS)
    words = ffi.new("uint64_t[]", [int(p) for p in params])
    checked(lib.vr_frontend_walk(handle, walk.queue, words, out, n_out, steps, len(steps)))
    numbers = ffi.unpack(out, n_out)
    walks, names, directories = numbers[:head]
    return WalkResult(walks, names, directories, _result(numbers[head:], steps))
