"""Blobs that come as a whole, whatever range is asked for: the agent over a source that streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.sim.images import MadeImage, make_image
from tests.unit.test_agent import ScriptedSource
from tests.unit.test_first_start import Rig, rig
from virtiofsd_rafs.backends.base import ANSWERED_BY
from virtiofsd_rafs.errors import RangeIgnored, Unreachable
from virtiofsd_rafs.runtime import streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

N_FILES, EACH = 6, 4
N_CHUNKS = N_FILES * EACH
PIECE = 1000


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made", n_files=N_FILES, chunks_each=EACH)


class Whole:
    """All of a blob, in small pieces."""

    def __init__(self, source: StreamingSource, number: int) -> None:
        self._source = source
        self._number = number

    async def pieces(self) -> AsyncIterator[bytes]:
        source = self._source
        data = source.contents[min(self._number, len(source.contents) - 1)]
        for at in range(0, len(data), PIECE):
            if at <= source.breaks.get(self._number, -1) < at + PIECE:
                raise Unreachable("cut")
            if at >= source.hold_at:
                await source.gate.wait()
            source.sent += len(data[at : at + PIECE])
            await asyncio.sleep(0)
            yield data[at : at + PIECE]

    async def close(self) -> None:
        self._source.open -= 1


class StreamingSource(ScriptedSource):
    """Sends the whole blob for each range, until it has ``learnt``."""

    def __init__(self, image: MadeImage) -> None:
        super().__init__(image)
        self.contents = [image.blob]
        self.breaks: dict[int, int] = {}
        self.hold_at = 1 << 63
        self.learnt = False
        self.seen = False
        self.streams = 0
        self.sent = 0
        self.open = self.most_open = 0

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        if self.learnt:
            return await super().read_range(blob_id, offset, length)
        self.seen = True
        raise RangeIgnored("all of it")

    def ignores_ranges(self, blob_id: str) -> bool:
        return self.seen

    async def open_whole(self, blob_id: str, offset: int, length: int) -> Whole | None:
        if self.learnt:
            self.seen = False
            return None
        number, self.streams = self.streams, self.streams + 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        ANSWERED_BY.set("registry")
        return Whole(self, number)


def chunk_bytes(image: MadeImage) -> int:
    """Where the last chunk ends."""
    return max(chunk.compressed_offset + chunk.compressed_size for chunk in image.chunks)


@pytest.fixture(params=[streams.BATCH, 1])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BATCH", request.param)


@pytest.mark.usefixtures("batch")
async def test_all_of_it_comes_once(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(*range(N_CHUNKS - 1, -1, -1))
        await r.until(lambda: r.completed == 1)
        await r.until_idle()
    assert (source.streams, source.most_open, source.open) == (1, 1, 0)
    assert source.sent <= chunk_bytes(image) + PIECE
    assert {record.result for record in r.metrics.log} == {"ok"}
    assert r.metrics.bytes_fetched == sum(chunk.compressed_size for chunk in image.chunks)
    assert {record.source for record in r.metrics.log} == {"registry"}


async def test_what_is_asked_for_is_there_as_soon_as_it_has_passed(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    wanted = image.chunks[5]
    source.hold_at = wanted.compressed_offset + wanted.compressed_size + PIECE
    source.gate.clear()
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(5)
        await r.until(lambda: 5 in r.ready)
        # The others were neither asked for nor are they lost.
        assert set(r.ready) <= {0, 1, 2, 3, 4, 5}
        # Who comes now and wants what is still to come joins in.
        r.session.post(N_CHUNKS - 1)
        source.gate.set()
        await r.until(lambda: len(r.ready) == N_CHUNKS)
        assert source.streams == 1


async def test_a_stream_that_breaks_off_goes_on_with_what_is_missing(
    image: MadeImage, tmp_path: Path
) -> None:
    source = StreamingSource(image)
    source.breaks = {0: image.chunks[10].compressed_offset, 1: image.chunks[15].compressed_offset}
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(*range(N_CHUNKS))
        await r.until(lambda: r.completed == 1)
        await r.until_idle()
        assert source.streams == 3
        # Nothing is stored twice.
        assert r.metrics.chunks == {"ok": N_CHUNKS}
    assert source.open == 0


async def test_what_is_asked_for_while_it_is_stored_is_told_of_once(
    image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = StreamingSource(image)
    storing, go = asyncio.Event(), asyncio.Event()
    async with rig(image, tmp_path / "cache", source) as r:
        ingest = r.agent._ingest.ingest

        async def slow(*arguments: Any) -> bytes:
            storing.set()
            await go.wait()
            return await ingest(*arguments)

        monkeypatch.setattr(r.agent._ingest, "ingest", slow)
        r.session.post(3)
        await r.until(storing.is_set)
        r.session.post(1)
        await r.until(lambda: r.agent.planner.in_flight == 2)
        go.set()
        await r.until(lambda: len(r.ready) == N_CHUNKS)
        await r.until_idle()
        assert r.metrics.chunks == {"ok": N_CHUNKS}
        assert r.metrics.bytes_fetched == sum(chunk.compressed_size for chunk in image.chunks)


async def test_wrong_bytes_come_again(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    damaged = bytearray(image.blob)
    damaged[image.chunks[7].compressed_offset] ^= 0x55
    source.contents = [bytes(damaged), image.blob]
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(*range(N_CHUNKS))
        await r.until(lambda: r.completed == 1)
        await r.until_idle()
        assert source.streams == 2
        assert r.metrics.chunks["ok"] == N_CHUNKS


async def test_a_server_that_has_learnt_is_asked_for_ranges_again(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    source.seen = source.learnt = True
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(3, 9)
        await r.until(lambda: r.ready == [3, 9])
        assert source.streams == 0
        assert len(source.calls) == 2


async def test_without_a_disk_only_what_is_asked_for_is_kept(image: MadeImage) -> None:
    source = StreamingSource(image)
    async with rig(image, None, source) as r:
        r.session.post(9, 3)
        await r.until(lambda: r.ready == [3, 9])
        await r.until_idle()
        assert source.streams == 1
        assert source.sent <= image.chunks[9].compressed_offset + image.chunks[9].compressed_size + PIECE


async def test_a_blob_that_is_too_short_fails_nobody_else(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    last = image.chunks[N_CHUNKS - 1]
    source.contents = [image.blob[: last.compressed_offset + 10]]
    options: dict[str, Any] = {"io_deadline_s": 1.0}
    async with rig(image, tmp_path / "cache", source, **options) as r:
        r.session.post(*range(N_CHUNKS))
        await r.until(lambda: r.ready == list(range(N_CHUNKS - 1)))
        await r.until(lambda: not r.agent.planner.waiting)
        assert "backend.bad-reply" in r.metrics.fetches


async def test_closing_ends_the_stream(image: MadeImage, tmp_path: Path) -> None:
    source = StreamingSource(image)
    source.hold_at = 2 * PIECE
    source.gate.clear()
    async with rig(image, tmp_path / "cache", source) as r:
        r.session.post(N_CHUNKS - 1)
        await r.until(lambda: source.open == 1)
        assert isinstance(r, Rig)
    assert source.open == 0
