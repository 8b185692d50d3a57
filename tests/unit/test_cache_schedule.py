"""When a daemon evicts, and what it tells: the store is played."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from virtiofsd_rafs.cache import eviction
from virtiofsd_rafs.cache.eviction import Eviction
from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.errors import CacheError, ConfigError
from virtiofsd_rafs.native.store import StoreStats, Sweep
from virtiofsd_rafs.runtime.mount import usable_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
LIMIT = 256 * MIB
IDLE = Sweep(before=MIB, after=MIB, n_chunks=0, held=0, errno=0, busy=False)
HANG_S = 10.0


class FakeStore:
    def __init__(self) -> None:
        self.grown = 0
        self.met = False
        self.disk_errors = 0
        self.touched = 0
        self.harvests = 0
        self.sweeps: list[tuple[int, bool]] = []
        self.answers: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()

    def growth(self) -> tuple[int, bool]:
        return self.grown, self.met

    def stats(self) -> StoreStats:
        return StoreStats(0, 0, 0, 0, self.disk_errors, 0)

    def harvest(self) -> int:
        self.harvests += 1
        return self.touched

    def sweep(self, limit: int, *, recover: bool) -> Sweep:
        assert self.gate.wait(HANG_S)
        self.sweeps.append((limit, recover))
        answer = self.answers.pop(0) if self.answers else IDLE
        if isinstance(answer, Exception):
            raise answer
        self.met = False
        return answer  # type: ignore[no-any-return]

    def stop_sweep(self) -> None:
        self.gate.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110  # a thread works
            await asyncio.sleep(0.002)


async def swept(made: Eviction, store: FakeStore, n: int) -> None:
    await until(lambda: len(store.sweeps) == n and made._task is None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "AGAIN_S", 0.01)


def make(store: FakeStore, limit: int = LIMIT) -> Eviction:
    return Eviction(store, limit)  # type: ignore[arg-type]


async def test_a_sweep_is_due_when_enough_was_stored() -> None:
    store = FakeStore()
    made = make(store)
    made.start()
    await swept(made, store, 1)  # what was there before
    assert store.sweeps == [(LIMIT, True)]
    store.grown = LIMIT // 64 - 1
    made.stored()
    assert made._task is None
    store.grown += 1
    store.gate.clear()
    made.stored()
    made.stored()  # one at a time
    store.answers = [Sweep(before=9 * MIB, after=7 * MIB, n_chunks=3, held=0, errno=0, busy=False)]
    store.gate.set()
    await swept(made, store, 2)
    made.stored()
    assert made._task is None
    assert (made.counters.evicted_chunks, made.counters.evicted_bytes) == (3, 2 * MIB)
    assert made.counters.cache_bytes == 7 * MIB
    store.disk_errors = 1
    made.stored()
    await swept(made, store, 3)
    made.stored()
    assert made._task is None
    await made.close()
    assert store.harvests == 1


async def test_without_a_limit_only_interrupted_evictions_are_finished() -> None:
    store = FakeStore()
    made = make(store, 0)
    made.start()
    store.grown = 1 << 40
    store.disk_errors = 5
    made.stored()
    assert made._task is None
    store.met = True
    made.stored()
    await swept(made, store, 1)
    assert store.sweeps == [(0, True)]
    await made.close()


async def test_another_process_sweeps() -> None:
    store = FakeStore()
    store.answers = [IDLE._replace(busy=True)] * 3
    made = make(store)
    store.grown = LIMIT
    made.start()
    await swept(made, store, 4)
    assert made.counters.sweeps == 1
    await made.close()


async def test_trouble_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    made = make(store)
    made.start()
    await swept(made, store, 1)
    for answer, text in (
        (CacheError("no such luck"), "no such luck"),
        (IDLE._replace(errno=95), "Operation not supported"),
        (IDLE._replace(before=2 * LIMIT, after=2 * LIMIT, held=LIMIT), "may not go"),
    ):
        for _ in range(2):
            store.answers = [answer]
            n = len(store.sweeps)
            store.grown += LIMIT
            made.stored()
            await swept(made, store, n + 1)
        assert caplog.text.count(text) == 1
    await made.close()


async def test_uses_are_noted_less_often_while_nothing_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "HARVEST_S", 0.001)
    monkeypatch.setattr(eviction, "MAX_HARVEST_S", 0.008)
    store = FakeStore()
    made = make(store, 0)
    made._interval = 0.001
    made.start()
    await until(lambda: store.harvests >= 4)
    assert made._interval == 0.008
    store.touched = 1
    n = store.harvests
    await until(lambda: store.harvests > n + 1)
    assert made._interval == 0.001
    await made.close()
    n = store.harvests
    await asyncio.sleep(0.02)
    assert store.harvests == n


async def test_closing_ends_a_sweep() -> None:
    store = FakeStore()
    made = make(store)
    made.start()
    store.gate.clear()
    await until(lambda: made._task is not None)
    async with asyncio.timeout(HANG_S):
        await made.close()
    made.stored()
    assert made._task is None


@pytest.mark.parametrize(
    "options", [{"cache_size": 1 << 20}, {"cache_size": -1}, {"cache_size": LIMIT, "cache_nydusd": True}]
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(image="x", api_socket="x", **options)  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path, cause, remedy in (
        (tmp_path / "file", "File exists", "it is a file"),
        (tmp_path / "file" / "cache", "Not a directory", "a part of the path is a file"),
    ):
        assert usable_cache(path) is None
        assert cause in caplog.text
        assert remedy in caplog.text
    assert usable_cache(tmp_path / "new" / "cache") == tmp_path / "new" / "cache"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert usable_cache(tmp_path) is None
    assert "let this user write there" in caplog.text
