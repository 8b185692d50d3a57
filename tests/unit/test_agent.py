"""The agent with a scripted source: whatever the source does, waiters get right bytes or nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.backends.base import ANSWERED_BY
from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.errors import AuthError, BackendTimeout, NotFound, Throttled, Unreachable
from virtiofsd_rafs.native.session import Post, Trace
from virtiofsd_rafs.native.store import Store
from virtiofsd_rafs.runtime import agent as agent_module
from virtiofsd_rafs.runtime.agent import Agent
from virtiofsd_rafs.runtime.metrics import Metrics
from virtiofsd_rafs.runtime.outage import FAILURES

# A guard against hanging, not an expectation.
HANG_S = 60.0

Step = Callable[[int, int, bytes], "bytes | Exception"]
"""What one call of the source does with the right bytes, by offset and length."""


def right(_offset: int, _length: int, data: bytes) -> bytes:
    return data


def short(_offset: int, _length: int, data: bytes) -> bytes:
    return data[:-1]


def long(_offset: int, _length: int, data: bytes) -> bytes:
    return data + b"x"


def flipped(_offset: int, _length: int, data: bytes) -> bytes:
    return bytes([data[0] ^ 0x80]) + data[1:]


def fails(error: Exception) -> Step:
    return lambda _offset, _length, _data: error


class ScriptedSource:
    """Follows *script*, a step for each call, then *ever_after*."""

    def __init__(self, image: MadeImage, *script: Step, ever_after: Step = right) -> None:
        self._image = image
        self._script = list(script)
        self._ever_after = ever_after
        self.calls: list[tuple[int, int]] = []
        self.running = 0
        self.most_running = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        assert blob_id == self._image.blob_id
        self.calls.append((offset, length))
        step = self._script.pop(0) if self._script else self._ever_after
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
            result = step(offset, length, self._image.blob[offset : offset + length])
        finally:
            self.running -= 1
        if isinstance(result, Exception):
            raise result
        return result

    async def blob_size(self, blob_id: str) -> int:
        assert blob_id == self._image.blob_id
        return len(self._image.blob)

    async def close(self) -> None:
        pass


class FakeSession:
    """Posts and wake-ups of a worker that does not exist."""

    def __init__(self) -> None:
        self.post_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._posts: list[Post] = []
        self.wakes = 0
        self.woken = asyncio.Event()

    def post(self, *chunks: int, blob: int = 0, mount: int = 0) -> None:
        self._posts += [Post(mount, blob, chunk, 7, 0, time.monotonic_ns()) for chunk in chunks]
        os.eventfd_write(self.post_fd, 1)

    def posts(self) -> list[Post]:
        posts, self._posts = self._posts, []
        return posts

    def trace(self) -> list[Trace]:
        return []

    def wake(self) -> None:
        self.wakes += 1
        self.woken.set()

    @property
    def wake_fds(self) -> list[int]:
        return []


class Rig:
    """An agent, and what is around it."""

    def __init__(
        self, image: MadeImage, cache: Path | None, source: ScriptedSource, boot_id: bytes, **options: float
    ) -> None:
        self.image = image
        self.source = source
        self.session = FakeSession()
        self.metrics = Metrics()
        self.store = Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20, boot_id=boot_id)
        self.store.open_blob(0)
        self.opened = 0
        settings = {"retry_first_s": 0.001, "retry_cap_s": 0.01, "amplify": 0, "io_deadline_s": HANG_S}
        config = ServeConfig(image="x", api_socket=Path("x"), **(settings | options))

        async def open_source() -> ScriptedSource:
            self.opened += 1
            return source

        self.agent = Agent(self.session, self.store, {0: image.blob_id}, open_source, config, self.metrics)

    @property
    def ready(self) -> set[int]:
        view = self.store.chunks(0)
        return {chunk for chunk in range(len(view)) if view.ready(chunk)}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits as a worker does: looks at the states whenever it is woken."""
        async with asyncio.timeout(HANG_S):
            while not condition():
                self.session.woken.clear()
                try:
                    async with asyncio.timeout(0.02):
                        await self.session.woken.wait()
                except TimeoutError:
                    pass

    async def until_ready(self, *chunks: int) -> None:
        await self.until(lambda: self.ready >= set(chunks))


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@asynccontextmanager
async def rig(
    image: MadeImage,
    cache: Path | None,
    source: ScriptedSource | None = None,
    boot_id: bytes = b"B" * 16,
    **options: float,
) -> AsyncIterator[Rig]:
    made = Rig(image, cache, source or ScriptedSource(image), boot_id, **options)
    made.agent.start()
    try:
        yield made
    finally:
        await made.agent.close()
        made.store.close()
        os.close(made.session.post_fd)


def check_data(cache: Path, image: MadeImage, *chunks: int) -> None:
    data = (cache / f"{image.blob_id}.blob.data").read_bytes()
    for chunk in chunks:
        at = image.chunks[chunk].uncompressed_offset
        assert data[at : at + len(image.plain[chunk])] == image.plain[chunk]


async def test_posts_become_fetches_and_wakes(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache, amplify=1 << 20) as r:
        r.session.post(3)
        await r.until_ready(3)
        await r.until(lambda: len(r.metrics.log) == 1)
        assert r.session.wakes == 1
        (record,) = r.metrics.log
        assert (record.result, record.n_wanted, record.nodeid, record.attempt) == ("ok", 1, 7, 1)
        assert record.n_chunks == len(image.chunks) - 3 == r.metrics.chunks["ok"]
        assert record.started_ns <= record.ended_ns
        assert r.metrics.bytes_fetched == sum(length for _, length in r.source.calls)
    check_data(cache, image, *range(3, len(image.chunks)))


async def test_what_another_daemon_fetches_is_waited_for_and_fetched_when_it_is_given_up(
    image: MadeImage, cache: Path
) -> None:
    source = ScriptedSource(image)
    async with rig(image, cache) as ours:
        async with rig(image, cache, source) as theirs:
            source.gate.clear()
            theirs.session.post(1)
            await theirs.until(lambda: source.running == 1)
            ours.session.post(1, 1)
            await ours.until(lambda: ours.agent.planner.waiting == 1)
            source.gate.set()
            await ours.until_ready(1)
            await ours.until(lambda: not ours.agent.planner.left)
            source.gate.clear()
            theirs.session.post(2)
            await theirs.until(lambda: source.running == 1)
            ours.session.post(2)
            await ours.until(lambda: ours.agent.planner.waiting == 1)
            assert ours.source.calls == []
        await ours.until_ready(2)
        assert len(ours.source.calls) == 1
    check_data(cache, image, 1, 2)


async def test_others_see_at_once_what_is_fetched_and_what_is_not_any_more(
    image: MadeImage, cache: Path
) -> None:
    async with rig(image, cache) as r:
        r.session.post(1, 2)
        r.agent._readable()  # no task has run since
        assert r.store.states(0).fetching == 2
        await r.agent.close()
        assert r.source.calls == []
        assert r.store.states(0).fetching == 0


async def test_an_outage_is_told_once_and_so_is_its_end(
    image: MadeImage, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    away = [fails(Unreachable("away"))] * 40
    async with rig(image, cache, ScriptedSource(image, *away)) as r:
        chunks = range(len(image.chunks))
        r.session.post(*chunks)
        await r.until(lambda: r.agent.outage_s > 0)
        await r.until_ready(*chunks)
        await r.until(lambda: r.agent.outage_s == 0)
    assert caplog.text.count("nothing comes from the source") == 1
    assert caplog.text.count("the source delivers again, after ") == 1
    assert caplog.text.count("away (try ") <= FAILURES + 16  # of all connections


async def test_what_was_posted_before_the_start_is_served(image: MadeImage, cache: Path) -> None:
    made = Rig(image, cache, ScriptedSource(image), b"B" * 16)
    made.session.post(1)
    os.eventfd_read(made.session.post_fd)  # the notice was lost, with the predecessor
    made.agent.start()
    await made.until_ready(1)
    await made.agent.close()
    made.store.close()
    os.close(made.session.post_fd)


async def test_one_fetch_for_any_number_of_posts(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache) as r:
        r.source.gate.clear()
        for _ in range(20):
            r.session.post(2)
            await asyncio.sleep(0)
        await r.until(lambda: r.source.running == 1)
        r.session.post(2)
        await asyncio.sleep(0.01)
        r.source.gate.set()
        await r.until_ready(2)
        r.session.post(2)
        await r.until(lambda: r.session.wakes >= 2)
        assert len(r.source.calls) == 1
        assert r.opened == 1


@pytest.mark.parametrize(
    "step",
    [
        short,
        long,
        flipped,
        fails(Unreachable("gone")),
        fails(BackendTimeout("slow")),
        fails(Throttled("busy", retry_after_s=0.01)),
        fails(NotFound("not yet")),
        fails(AuthError("token expired")),
        fails(RuntimeError("a bug")),
    ],
    ids=["short", "long", "flipped", "gone", "slow", "busy", "not-found", "refused", "bug"],
)
async def test_what_a_retry_can_cure_costs_nothing(image: MadeImage, cache: Path, step: Step) -> None:
    source = ScriptedSource(image, step, step)
    async with rig(image, cache, source) as r:
        r.session.post(1)
        await r.until_ready(1)
        assert len(source.calls) == 3
        await r.until(lambda: sum(r.metrics.fetches.values()) == 3)
        assert r.agent.planner.counters.retries == 2
        assert [record.attempt for record in r.metrics.log] == [1, 2, 3]
    check_data(cache, image, 1)


async def test_an_outage_costs_no_waiter(image: MadeImage, cache: Path) -> None:
    source = ScriptedSource(image, ever_after=fails(Unreachable("away")))
    async with rig(image, cache, source) as r:
        r.session.post(*range(8))
        await r.until(lambda: len(source.calls) > 40)
        assert r.ready == set()
        source._ever_after = right
        await r.until_ready(*range(8))
    check_data(cache, image, *range(8))


async def test_wrong_bytes_for_ever_are_never_kept(image: MadeImage, cache: Path) -> None:
    source = ScriptedSource(image, ever_after=flipped)
    async with rig(image, cache, source, io_deadline_s=1.0) as r:
        r.session.post(1)
        await r.until(lambda: r.agent.planner.counters.expired == 1)
        assert r.ready == set()
        assert r.session.wakes == 0
        assert r.metrics.chunks["ok"] == 0
        assert r.agent.planner.waiting == 0
        # The chunk is absent again, and a new post tries anew.
        source._ever_after = right
        r.session.post(1)
        await r.until_ready(1)
    check_data(cache, image, 1)


class TwoPlaces(ScriptedSource):
    """Says who answered, and is told who sent nonsense."""

    def __init__(self, image: MadeImage, *script: Step) -> None:
        super().__init__(image, *script)
        self.told: list[tuple[str, int, int, str]] = []

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        data = await super().read_range(blob_id, offset, length)
        ANSWERED_BY.set(f"place {len(self.calls)}")
        return data

    def wrong_bytes(self, blob_id: str, offset: int, length: int, source: str) -> None:
        self.told.append((blob_id, offset, length, source))


async def test_who_sent_wrong_bytes_is_told_the_source(image: MadeImage, cache: Path) -> None:
    source = TwoPlaces(image, flipped)
    async with rig(image, cache, source, amplify=1 << 20) as r:
        r.session.post(2)
        await r.until_ready(2)
        assert [record.source for record in r.metrics.log] == ["place 1", "place 2"]
    chunk = image.chunks[2]
    assert source.told == [(image.blob_id, chunk.compressed_offset, chunk.compressed_size, "place 1")]


async def test_what_backs_off_is_tried_when_the_source_was_renewed(image: MadeImage, cache: Path) -> None:
    source = ScriptedSource(image, fails(AuthError("no")))
    async with rig(image, cache, source, retry_first_s=50.0, retry_cap_s=60.0) as r:
        r.session.post(2)
        await r.until(lambda: len(r.metrics.log) == 1)
        assert r.ready == set()
        r.agent.renewed()
        await r.until_ready(2)


async def test_a_bad_neighbour_does_not_fail_the_others(image: MadeImage, cache: Path) -> None:
    bad = image.chunks[2]

    def one_bad(offset: int, _length: int, data: bytes) -> bytes:
        at = bad.compressed_offset - offset
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]

    source = ScriptedSource(image, ever_after=one_bad)
    async with rig(image, cache, source, amplify=1 << 20) as r:
        r.session.post(0, 1, 2, 3)
        await r.until_ready(0, 1, 3)
        assert len(source.calls) >= 1
        assert 2 not in r.ready
        source._ever_after = right
        await r.until_ready(2)
        # After the first, which took it along, it went alone.
        assert set(source.calls[1:]) == {(bad.compressed_offset, bad.compressed_size)}
    check_data(cache, image, *range(4))


async def test_a_slow_fetch_holds_nobody_else_up(image: MadeImage, cache: Path) -> None:
    held = asyncio.Event()
    source = ScriptedSource(image)
    first = image.chunks[0].compressed_offset
    read = source.read_range

    async def read_range(blob_id: str, offset: int, length: int) -> bytes:
        if offset == first:
            await held.wait()
        return await read(blob_id, offset, length)

    source.read_range = read_range  # type: ignore[method-assign]
    async with rig(image, cache, source) as r:
        r.session.post(0)
        await asyncio.sleep(0)
        r.session.post(*range(5, 9))
        await r.until_ready(*range(5, 9))
        assert 0 not in r.ready
        held.set()
        await r.until_ready(0)


async def test_connections_are_bounded(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache, connections=3) as r:
        r.source.gate.clear()
        r.session.post(*range(0, 16, 2))
        await r.until(lambda: r.source.running == 3)
        await asyncio.sleep(0.02)
        r.source.gate.set()
        await r.until_ready(*range(0, 16, 2))
        assert r.source.most_running == 3


async def test_stored_chunks_are_verified_not_fetched(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache) as r:
        r.session.post(0, 1)
        await r.until_ready(0, 1)
    with (cache / f"{image.blob_id}.blob.data").open("r+b") as f:
        f.seek(image.chunks[1].uncompressed_offset)
        f.write(b"\0\0")
    async with rig(image, cache, boot_id=b"C" * 16) as r:
        assert r.ready == set()
        r.session.post(0, 1)
        await r.until_ready(0, 1)
        assert r.metrics.verifications == {"good": 1, "bad": 1}
        # Only the one that did not survive was fetched.
        (call,) = r.source.calls
        assert call[0] == image.chunks[1].compressed_offset
    check_data(cache, image, 0, 1)


async def test_a_chunk_that_is_asked_for_again_and_again_is_looked_at(
    image: MadeImage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "RECHECK_S", 0.0)
    async with rig(image, cache) as r:
        r.session.post(1)
        await r.until_ready(1)
        with (cache / f"{image.blob_id}.blob.data").open("r+b") as f:
            f.seek(image.chunks[1].uncompressed_offset)
            f.write(b"\0\0")
        for _ in range(agent_module.RECHECK_POSTS):
            r.session.post(1)
            await asyncio.sleep(0.01)
        await r.until(lambda: len(r.source.calls) == 2)
        await r.until_ready(1)
    check_data(cache, image, 1)


async def test_memory_serves_without_a_cache(image: MadeImage) -> None:
    async with rig(image, None) as r:
        r.session.post(*range(8))
        await r.until_ready(*range(8))
        assert r.store.stats().spill_chunks == 8


async def test_posts_that_make_no_sense_are_ignored(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache) as r:
        r.session.post(10_000)
        r.session.post(0, blob=9)
        r.session.post(0, mount=3)
        r.session.post(1)
        await r.until_ready(1)
        assert r.agent.planner.counters.invalid_posts == 3
        assert len(r.source.calls) == 1


async def test_a_source_that_cannot_be_opened_is_tried_again(image: MadeImage, cache: Path) -> None:
    made = Rig(image, cache, ScriptedSource(image), b"B" * 16)
    failures = Counter[str]()
    opened = made.agent._source

    async def flaky() -> object:
        failures["n"] += 1
        if failures["n"] < 3:
            raise AuthError("config.json is unusable")
        return await opened()

    made.agent._source = flaky  # type: ignore[assignment]
    made.agent.start()
    made.session.post(1)
    await made.until_ready(1)
    await made.agent.close()
    made.store.close()
    os.close(made.session.post_fd)


async def test_close_leaves_nothing_behind(image: MadeImage, cache: Path) -> None:
    async with rig(image, cache) as r:
        r.source.gate.clear()
        r.session.post(0, 1, 2)
        await r.until(lambda: r.source.running >= 1)
        r.store.hint_fetching(0, [5], True)
        await r.agent.close()
        assert r.source.running == 0
        assert r.store.states(0).fetching == 1  # that one is ours
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert others == []


async def test_an_idle_agent_gives_its_threads_back(
    image: MadeImage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "IDLE_S", 0.01)
    async with rig(image, cache) as r:
        r.session.post(0)
        await r.until_ready(0)
        await r.until(lambda: not r.agent._ingest.has_threads)
        r.session.post(1)
        await r.until_ready(1)
