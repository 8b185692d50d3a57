"""Blobs in a directory."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.sim.sources import Config
from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.localdir import LocalDirSource
from virtiofsd_rafs.backends.readers import MAX_THREADS
from virtiofsd_rafs.errors import BackendError, BackendTimeout, BadReply, NotFound, Unreachable
from virtiofsd_rafs.image.resolve import ResolvedImage

if TYPE_CHECKING:
    from pathlib import Path

BLOB = os.urandom(100_000)
BLOB_ID = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / BLOB_ID).write_bytes(BLOB)
    return tmp_path


async def test_ranges(folder: Path) -> None:
    source = open_source(ResolvedImage("x", b"", blob_dir=folder), Config())
    wanted = [(0, 1), (0, len(BLOB)), (len(BLOB) - 1, 1), (777, 5000)]
    got = await asyncio.gather(*(source.read_range(BLOB_ID, o, n) for o, n in wanted))
    assert got == [BLOB[o : o + n] for o, n in wanted]
    assert await source.blob_size(BLOB_ID) == len(BLOB)
    await source.close()


async def test_a_file_that_is_too_short_and_then_grows(folder: Path) -> None:
    source = LocalDirSource(folder)
    with pytest.raises(BadReply, match=r"has 100000 bytes, 100001 are needed"):
        await source.read_range(BLOB_ID, 99_990, 11)
    (folder / BLOB_ID).write_bytes(BLOB + b"x")
    assert await source.read_range(BLOB_ID, 99_990, 11) == BLOB[-10:] + b"x"
    await source.close()


async def test_a_blob_that_is_not_there(folder: Path) -> None:
    source = LocalDirSource(folder)
    with pytest.raises(NotFound, match="--blob-dir"):
        await source.read_range("cd" * 32, 0, 1)
    (folder / ("cd" * 32)).mkdir()
    with pytest.raises(NotFound, match="no regular file"):
        await source.read_range("cd" * 32, 0, 1)
    await source.close()


async def test_a_fifo_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    source = LocalDirSource(folder)
    with pytest.raises(NotFound, match="no regular file"):
        await source.read_range("fifo", 0, 1)
    await source.close()


@pytest.mark.parametrize(
    "blob_id", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", ".hidden", "x" * 256]
)
async def test_ids_cannot_leave_the_directory(folder: Path, blob_id: str) -> None:
    source = LocalDirSource(folder)
    with pytest.raises(BackendError) as e:
        await source.read_range(blob_id, 0, 1)
    assert not e.value.retryable
    await source.close()


async def test_many_blobs_and_few_descriptors(tmp_path: Path) -> None:
    for n in range(200):
        (tmp_path / f"blob{n}").write_bytes(b"%03d" % n)
    source = LocalDirSource(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        got = await asyncio.gather(*(source.read_range(f"blob{n}", 0, 3) for n in range(200)))
        assert got == [b"%03d" % n for n in range(200)]
    assert len(os.listdir("/proc/self/fd")) - before < 100
    await source.close()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_the_first_directory_that_has_it(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / BLOB_ID).write_bytes(BLOB)
    (tmp_path / "c" / BLOB_ID).write_bytes(b"x" * len(BLOB))
    source = LocalDirSource([tmp_path / name for name in ("a", "b", "c")])
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()


async def test_one_file_for_the_only_blob(tmp_path: Path) -> None:
    (tmp_path / "image.blob").write_bytes(BLOB)
    source = LocalDirSource([], blob_file=tmp_path / "image.blob")
    assert await source.read_range(BLOB_ID, 5, 10) == BLOB[5:15]
    assert await source.blob_size(BLOB_ID) == len(BLOB)
    await source.close()


async def test_a_directory_that_is_not_mounted_may_come_back(tmp_path: Path) -> None:
    source = LocalDirSource(tmp_path / "mount")
    with pytest.raises(Unreachable, match="is it mounted"):
        await source.read_range(BLOB_ID, 0, 10)
    (tmp_path / "mount").mkdir()
    with pytest.raises(NotFound):
        await source.read_range(BLOB_ID, 0, 10)
    (tmp_path / "mount" / BLOB_ID).write_bytes(BLOB)
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
async def test_a_stale_handle_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    source = LocalDirSource(folder)
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    real, left = os.pread, [1]

    def pread(*args: int) -> bytes:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    assert await source.read_range(BLOB_ID, 10, 10) == BLOB[10:20]
    left[0] = 2  # and once more: that is for the planner to try again
    with pytest.raises(Unreachable, match=os.strerror(error)):
        await source.read_range(BLOB_ID, 10, 10)
    assert await source.read_range(BLOB_ID, 10, 10) == BLOB[10:20]
    await source.close()


class Hanging:
    """``os.pread`` that hangs for one blob, as a NAS that is away does."""

    def __init__(self, name: str) -> None:
        self.event = threading.Event()
        self._real = os.pread
        self._name = name

    def __call__(self, fd: int, *args: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(self._name):
            self.event.wait(60)
        return self._real(fd, *args)


async def test_a_read_that_hangs_ends_and_holds_nobody_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "hung").write_bytes(BLOB)
    hanging = Hanging("hung")
    monkeypatch.setattr(os, "pread", hanging)
    source = LocalDirSource(folder, timeout_s=0.3)
    hung = [asyncio.create_task(source.read_range("hung", 0, 10)) for _ in range(MAX_THREADS - 1)]
    await asyncio.sleep(0)
    # One thread is left, and asyncio's own executor has nothing to do with it.
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    assert await asyncio.to_thread(lambda: 1) == 1
    outcomes = await asyncio.gather(*hung, return_exceptions=True)
    assert all(isinstance(e, BackendTimeout) and e.retryable for e in outcomes)
    # When all threads hang, those who come later do not wait for ever either.
    for _ in range(3):
        with pytest.raises(BackendTimeout):
            await source.read_range("hung", 0, 10)
    hanging.event.set()
    async with asyncio.timeout(30):
        while True:
            try:
                assert await source.read_range("hung", 0, 10) == BLOB[:10]
                break
            except BackendTimeout:
                continue
    await source.close()


async def test_close_does_not_wait_for_what_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(BLOB_ID)
    monkeypatch.setattr(os, "pread", hanging)
    source = LocalDirSource(folder, timeout_s=30)
    task = asyncio.create_task(source.read_range(BLOB_ID, 0, 10))
    await asyncio.sleep(0.05)
    await source.close()
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
    with pytest.raises(Unreachable, match="closed"):
        await source.read_range(BLOB_ID, 0, 10)
    hanging.event.set()


def test_a_process_ends_although_a_read_hangs(folder: Path) -> None:
    """The interpreter waits for threads of executors when it ends; not for these."""
    code = (
        "import asyncio, os, sys, threading\n"
        "from pathlib import Path\n"
        "from virtiofsd_rafs.backends.localdir import LocalDirSource\n"
        "os.pread = lambda *args: threading.Event().wait()\n"
        "async def main():\n"
        "    await LocalDirSource(Path(sys.argv[1]), timeout_s=0.1).read_range(sys.argv[2], 0, 1)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), BLOB_ID], capture_output=True, text=True, timeout=60
    )
    assert "BackendTimeout" in done.stderr
