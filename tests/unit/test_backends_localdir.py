"""Blobs in a directory."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import attrs
import pytest

from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.backends.localdir import LocalDirSource
from virtiofsd_rafs.errors import BackendError, BadReply, NotFound
from virtiofsd_rafs.image.resolve import ResolvedImage

if TYPE_CHECKING:
    from pathlib import Path

BLOB = os.urandom(100_000)
BLOB_ID = "ab" * 32


@attrs.frozen
class Config:
    access: RegistryAccess = attrs.field(factory=lambda: RegistryAccess(plain_http=False))
    connections: int = 8
    io_deadline_s: float = 90.0


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
