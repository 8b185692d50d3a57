"""What warm requests may meet: chunks that the remote holds back, and reads that have to go to the disk."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import Load, LoadResult, Op, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.bench.sides import Side
    from tests.sim.registry import RegistrySimulator
    from virtiofsd_rafs.native.frontend import Token

GUARD_S = 60.0
_PAGE = mmap.PAGESIZE
_SETTLE_S = 0.2
_DROP_EVERY_S = 0.05


@attrs.define
class Beside:
    """What came of the trouble itself, told beside the figures of the warm requests."""

    stop_ms: float | None = None
    """How long the VM's pause took, with all those requests parked: GET_VRING_BASE of all queues, and what
    QEMU sends with it."""
    failed: int = 0
    """Reads that brought an error or wrong bytes in the end."""
    cold: LoadResult | None = None
    disk_mib: float = 0.0
    """What the back-end's processes read from the disk meanwhile."""


def _read_args(target: Target, offset: int) -> bytes:
    return struct.pack("<QQIIQII", target.fh, offset, 4096, 0, 0, 0, 0)


def places(targets: Sequence[Target], n: int) -> list[tuple[Target, int]]:
    """*n* places in *targets*, no two of them within 1 MiB: they are chunks of their own in any image."""
    found = [(t, at) for at in range(0, min(t.size for t in targets), 1 << 20) for t in targets]
    if len(found) < n:
        raise RuntimeError(f"only {len(found)} chunks for {n} reads")
    return found[:n]


@contextmanager
def held_chunks(
    side: Side, sim: RegistrySimulator, cold: Sequence[Target], n: int, seconds: float, pause: bool
) -> Iterator[Beside]:
    """*n* reads in the same queue whose chunks do not come for *seconds*.

    With *pause* the VM is paused just before they come, and goes on.

    Raises:
        RuntimeError: nothing reached the registry, or reads fail in the end.
    """
    fe, beside = side.fe, Beside()
    fault = sim.fault("hold", where="blob")
    tokens: list[tuple[Token, Target, int]] = []
    for target, offset in places(cold, n):
        token = fe.request(Opcode.READ, target.nodeid, _read_args(target, offset), 4096)
        tokens.append((token, target, offset))
    deadline = time.monotonic() + GUARD_S
    while not fault.hits:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{side.name}: the read of a cold chunk did not reach the registry")
        time.sleep(0.001)
    time.sleep(_SETTLE_S)
    timer = threading.Timer(seconds, fault.release)
    timer.start()
    try:
        yield beside
        if pause:
            before = time.monotonic()
            bases = fe.stop(GUARD_S)
            beside.stop_ms = (time.monotonic() - before) * 1000
            fe.resume(bases)
    finally:
        timer.join()
    for token, target, offset in tokens:
        reply = fe.wait(token, GUARD_S)
        assert target.content is not None
        with target.content.open("rb") as file:
            file.seek(offset)
            beside.failed += bool(reply.error or reply.data != file.read(4096))


def absent_ranges(path: Path) -> list[tuple[int, int]]:
    """The parts (offset, length) of a file that are not in the page cache (mincore(2))."""
    import ctypes

    size = path.stat().st_size
    n = -(-size // _PAGE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        buffer = (ctypes.c_char * size).from_buffer(mapped)
        vec = (ctypes.c_ubyte * n)()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(buffer), ctypes.c_size_t(size), vec)
        del buffer
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {path}")
    found: list[tuple[int, int]] = []
    for page in range(n):
        if vec[page] & 1:
            continue
        if found and sum(found[-1]) == page * _PAGE:
            found[-1] = (found[-1][0], found[-1][1] + _PAGE)
        else:
            found.append((page * _PAGE, _PAGE))
    return found


def must_block(path: Path, ranges: Sequence[tuple[int, int]]) -> None:
    """Checks that a read of what is not in the page cache would block.

    Raises:
        RuntimeError: it would not: the pages are there, or the file system has no disk behind it.
    """
    offset = max(ranges, key=lambda r: r[1], default=(0, 0))[0]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.preadv(fd, [bytearray(_PAGE)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return
    except OSError as e:
        raise RuntimeError(f"{path}: its file system has no disk to wait for ({e.strerror})") from e
    finally:
        os.close(fd)
    raise RuntimeError(f"{path}: what was dropped from the page cache is still there")


class _Dropper:
    """Keeps parts of files out of the page cache."""

    def __init__(self, parts: dict[Path, list[tuple[int, int]]]) -> None:
        self._parts = [(os.open(path, os.O_RDONLY | os.O_CLOEXEC), ranges) for path, ranges in parts.items()]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_DROP_EVERY_S):
            for fd, ranges in self._parts:
                for offset, length in ranges:
                    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        for fd, _ in self._parts:
            os.close(fd)


@contextmanager
def disk_reads(
    side: Side, parts: dict[Path, list[tuple[int, int]]], cold: Sequence[Target], depth: int, seconds: float
) -> Iterator[Beside]:
    """4 KiB reads at random in *cold*, in the same queue, while *parts* are kept out of the page cache."""
    for path, ranges in parts.items():
        must_block(path, ranges)
    beside = Beside()
    load = Load(
        [Op("read", cold, 4096)], depth=depth, duration_s=seconds, canaries=False, stall_s=GUARD_S, seed=2
    )
    results: list[LoadResult] = []
    dropper = _Dropper(parts)
    thread = threading.Thread(target=lambda: results.append(side.fe.load(load)))
    before = side.usage().disk_bytes
    thread.start()
    try:
        yield beside
    finally:
        thread.join()
        dropper.end()
    beside.disk_mib = (side.usage().disk_bytes - before) / (1 << 20)
    if not results:
        raise RuntimeError(f"{side.name}: the reads from the disk failed")
    beside.cold = results[0]
    beside.failed = results[0].total.errors + results[0].total.wrong + results[0].lost
