"""Prefetch and fill by the agent, over a scripted source."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.sim.images import MadeImage, make_image
from tests.unit.test_agent import HANG_S, FakeSession, ScriptedSource, fails, flipped, right
from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.errors import ConfigError, Unreachable
from virtiofsd_rafs.native.store import Store
from virtiofsd_rafs.runtime import first_start
from virtiofsd_rafs.runtime.agent import Agent
from virtiofsd_rafs.runtime.first_start import is_complete
from virtiofsd_rafs.runtime.metrics import Metrics
from virtiofsd_rafs.runtime.mount import seal_bootstrap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

N_FILES, EACH = 6, 4
N_CHUNKS = N_FILES * EACH


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made", n_files=N_FILES, chunks_each=EACH)


class Rig:
    def __init__(self, image: MadeImage, cache: Path | None, source: ScriptedSource, **options: Any) -> None:
        self.source = source
        self.session = FakeSession()
        self.metrics = Metrics()
        self.started_ns = 0
        self.completed = 0
        if cache is not None:
            cache.mkdir(exist_ok=True)
        self.store = Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20)
        self.store.open_blob(0)
        settings = {"retry_first_s": 0.001, "retry_cap_s": 0.01, "amplify": 0, "prefetch": "none"}
        config = ServeConfig(image="x", api_socket=cache or "x", cache_dir=cache, **(settings | options))

        async def open_source() -> ScriptedSource:
            return source

        def completed() -> None:
            self.completed += 1

        self.bootstrap_fd = seal_bootstrap(image.bootstrap)
        self.agent = Agent(
            self.session,
            self.store,
            {0: image.blob_id},
            open_source,
            config,
            self.metrics,
            bootstrap_fd=self.bootstrap_fd,
            started_ns=lambda: self.started_ns,
            completed=completed,
        )

    @property
    def ready(self) -> list[int]:
        view = self.store.chunks(0)
        return [chunk for chunk in range(len(view)) if view.ready(chunk)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S):
            while not condition():  # noqa: ASYNC110  # states of the store change without an event
                await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        await self.until(lambda: not self.agent.planner.busy and not self.agent._tasks)


@asynccontextmanager
async def rig(
    image: MadeImage, cache: Path | None, source: ScriptedSource | None = None, **options: Any
) -> AsyncIterator[Rig]:
    made = Rig(image, cache, source or ScriptedSource(image), **options)
    made.agent.start()
    try:
        yield made
    finally:
        await made.agent.close()
        made.store.close()
        os.close(made.session.post_fd)
        os.close(made.bootstrap_fd)


async def test_a_list_is_fetched_without_a_post(
    image: MadeImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = tmp_path / "list"
    listed.write_bytes(b"/file004\nnonsense\n/file001\t4096\t4096\n/missing\n")
    async with rig(image, tmp_path / "cache", prefetch_files=listed) as r:
        await r.until(lambda: len(r.ready) == EACH + 1)
        await r.until_idle()
        assert r.ready == [5, *range(16, 20)]
        assert {record.reason for record in r.metrics.log} == {"prefetch"}
        log = sorted(r.metrics.log, key=lambda record: record.started_ns)
        assert [chunk for record in log for chunk, _ in record.chunks] == [16, 17, 18, 19, 5]
        assert r.agent.first_start.status() == {"listed_chunks": 5, "prefetching": False, "fill": "off"}
        assert r.session.wakes > 0
    assert "line 2" in caplog.text
    assert "/missing" in caplog.text


async def test_a_list_that_cannot_be_read_is_told(
    image: MadeImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(image, tmp_path / "cache", prefetch_files=tmp_path / "gone") as r:
        await r.until(lambda: "cannot be used" in caplog.text)
        r.session.post(3)
        await r.until(lambda: r.ready == [3])


async def test_prefetch_of_all(image: MadeImage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig(image, tmp_path / "cache", prefetch="all") as r:
        await r.until(lambda: r.completed == 1)
        assert r.ready == list(range(N_CHUNKS))
        assert r.metrics.bytes_fetched == len(image.blob[: sum(c.compressed_size for c in image.chunks)])
    assert "needs no registry any more" in caplog.text


async def test_fill_now_survives_trouble_and_ends_complete(image: MadeImage, tmp_path: Path) -> None:
    source = ScriptedSource(image, fails(Unreachable("away")), flipped, fails(Unreachable("away")), right)
    async with rig(image, tmp_path / "cache", source, fill="now") as r:
        await r.until(lambda: r.completed == 1)
        assert r.agent.first_start.status()["fill"] == "done"
        assert is_complete(r.store, [0])
        assert {record.reason for record in r.metrics.log} == {"fill"}
    # An interrupted one goes on chunk by chunk, a finished one does nothing.
    async with rig(image, tmp_path / "cache", fill="now") as r:
        assert r.completed == 1
        await r.until_idle()
        assert r.source.calls == []


async def test_fill_goes_on_where_it_was_interrupted(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path / "cache") as r:
        r.session.post(*range(0, N_CHUNKS, 2))
        await r.until(lambda: len(r.ready) == N_CHUNKS // 2)
    async with rig(image, tmp_path / "cache", fill="now") as r:
        await r.until(lambda: r.completed == 1)
        fetched = sum(record.n_chunks for record in r.metrics.log)
        assert fetched == N_CHUNKS // 2


async def test_what_a_dead_daemon_was_fetching_is_filled_as_well(
    image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First it is left to it, because it may be alive."""
    monkeypatch.setattr(first_start, "_OTHERS_S", 0.01)
    async with rig(image, tmp_path / "cache") as dead:
        dead.store.hint_fetching(0, [5, 6, 11], True)
    async with rig(image, tmp_path / "cache", fill="now") as r:
        await r.until(lambda: r.completed == 1)
        chunks = [chunk for record in r.metrics.log for chunk, _ in record.chunks]
        assert sorted(chunks[-3:]) == [5, 6, 11]
        assert sorted(chunks) == list(range(N_CHUNKS))
        assert r.agent.first_start.status()["fill"] == "done"


async def test_fill_after_the_start(
    image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_start, "_TICK_S", 0.001)
    monkeypatch.setattr(first_start, "START_QUIET_S", 0.01)
    async with rig(image, tmp_path / "cache", fill="after-start") as r:
        await asyncio.sleep(0.05)
        assert r.source.calls == []
        assert r.agent.first_start.status()["fill"] == "waiting"
        r.started_ns = time.monotonic_ns()
        await r.until(lambda: r.completed == 1)


async def test_chunks_that_are_always_bad_are_tried_again_later(
    image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_start, "_NEW_PASS_S", 0.01)
    first = image.chunks[0].compressed_size

    def bad_start(offset: int, length: int, data: bytes) -> bytes:
        return flipped(offset, length, data) if offset < first and r.passes < 8 else data

    source = ScriptedSource(image, ever_after=bad_start)
    async with rig(image, tmp_path / "cache", source, fill="now") as r:
        type(r).passes = property(lambda self: len(self.metrics.log))  # type: ignore[attr-defined]
        await r.until(lambda: r.completed == 1)
        assert r.agent.planner.counters.given_up == 2


async def test_what_is_lost_makes_it_incomplete_again(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path / "cache", fill="now") as r:
        await r.until(lambda: r.completed == 1)
        data = tmp_path / "cache" / f"{image.blob_id}.blob.data"
        data.write_bytes(bytes(data.stat().st_size))
        assert not r.store.verify_present(0, 7, force=True)
        assert not is_complete(r.store, [0])
        r.session.post(7)
        await r.until(lambda: r.ready == list(range(N_CHUNKS)))
        await r.until(lambda: r.completed == 1)


async def test_without_a_disk_nothing_is_fetched_in_advance(
    image: MadeImage, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(image, None, prefetch="all") as r:
        assert not r.agent.planner.busy
        assert not is_complete(r.store, [0])
    assert "no cache disk" in caplog.text


async def test_an_image_above_the_limit_is_fetched_on_demand(
    image: MadeImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of it would push out its beginning."""
    monkeypatch.setattr("virtiofsd_rafs.config.MIN_CACHE_SIZE", 1)
    async with rig(image, tmp_path / "cache", fill="now", prefetch="all", cache_size=4096) as r:
        assert not r.agent.planner.busy
    assert "fetched on demand only" in caplog.text


async def test_closing_ends_everything(image: MadeImage, tmp_path: Path) -> None:
    source = ScriptedSource(image)
    source.gate.clear()
    async with rig(image, tmp_path / "cache", source, fill="now") as r:
        await r.until(lambda: source.running > 0)
        await r.agent.close()
        assert source.running == 0
        calls = len(source.calls)
        source.gate.set()
        await asyncio.sleep(0.02)
        assert len(source.calls) == calls


@pytest.mark.parametrize(
    "options",
    [{"fill": "now"}, {"fill": "after-start", "cache_dir": "/x", "connections": 1}, {"fill": "often"}],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(image="x", api_socket="x", **options)  # type: ignore[arg-type]
