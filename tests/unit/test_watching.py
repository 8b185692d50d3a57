"""What other daemons fetch, seen through the states that daemons of one cache directory share."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.errors import CacheError
from virtiofsd_rafs.native.store import Store
from virtiofsd_rafs.runtime import watching
from virtiofsd_rafs.runtime.left import Left
from virtiofsd_rafs.runtime.wants import NOBODY, Want
from virtiofsd_rafs.runtime.watching import Watching

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
# A guard against hanging, not an expectation.
HANG_S = 60.0


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


@pytest.fixture
def stores(image: MadeImage, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Ours and another daemon's, of one directory."""
    (tmp_path / "cache").mkdir()

    def store() -> Store:
        made = Store(image.bootstrap, cache_dir=tmp_path / "cache", spill_size=MIB)
        made.open_blob(0)
        return made

    with store() as ours, store() as theirs:
        yield ours, theirs


class Changes:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.n = 0
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self.n += 1
        self._event.set()

    async def next(self) -> None:
        async with asyncio.timeout(HANG_S):
            await self._event.wait()
        self._event.clear()


def wake_fd(stack: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


async def readable(fd: int) -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, event.set)
    async with asyncio.timeout(HANG_S):
        await event.wait()
    asyncio.get_running_loop().remove_reader(fd)


def left_of(store: Store, *chunks: int) -> Left:
    left = Left({0: store.chunks(0)})
    for chunk in chunks:
        want = Want((0, chunk), NOBODY, 0.0, 90.0)
        assert left.may_take(want, 0.0)
        left.put(want, 0.0)
    return left


async def test_what_another_daemon_brings_wakes_the_workers_alone(
    image: MadeImage, stores: tuple[Store, Store]
) -> None:
    ours, theirs = stores
    theirs.hint_fetching(0, [1, 2, 3], True)
    changes = Changes()
    with ExitStack() as stack:
        fds = [wake_fd(stack), wake_fd(stack)]
        w = Watching(ours, fds, changes)
        left = left_of(ours, 1, 2, 3)
        assert not w.has_thread
        w.follow(left)
        assert w.has_thread
        for chunk in (2, 3):
            theirs.ingest(0, 0, image.blob, [chunk])
            for fd in fds:
                await readable(fd)
                assert os.eventfd_read(fd) == 1
        assert changes.n == 0
        assert sorted(want.key for want in left.look(0.1)) == [(0, 2), (0, 3)]
        # What was given up has to be fetched here: the loop is told, while the rest is watched on.
        theirs.hint_fetching(0, [1], False)
        await changes.next()
        assert [want.key for want in left.look(0.2)] == [(0, 1)]
        w.close()


async def test_a_change_that_came_first_is_seen(image: MadeImage, stores: tuple[Store, Store]) -> None:
    ours, theirs = stores
    theirs.hint_fetching(0, [3, 4], True)
    left = left_of(ours, 3, 4)
    theirs.ingest(0, 0, image.blob, [3])
    theirs.hint_fetching(0, [4], False)
    changes = Changes()
    with ExitStack() as stack:
        fd = wake_fd(stack)
        w = Watching(ours, [fd], changes)
        w.follow(left)
        await readable(fd)
        await changes.next()
        w.close()


async def test_there_is_no_thread_for_nothing(stores: tuple[Store, Store]) -> None:
    ours, theirs = stores
    w = Watching(ours, [], lambda: None)
    left = Left({0: ours.chunks(0)})
    w.follow(left)
    assert not w.has_thread
    theirs.hint_fetching(0, [1], True)
    left = left_of(ours, 1)
    w.follow(left)
    w.close()
    assert not w.has_thread
    theirs.hint_fetching(0, [1], False)
    assert left.look(0.1)
    w.follow(left)
    assert not w.has_thread
    w.close()


async def test_without_a_thread_they_are_looked_at_late(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Store, _wakes: list[int]) -> None:
        raise CacheError("no thread can be made")

    monkeypatch.setattr(watching, "Watch", refuse)
    ours, theirs = stores
    theirs.hint_fetching(0, [1], True)
    w = Watching(ours, [], lambda: None)
    left = left_of(ours, 1)
    w.follow(left)
    w.follow(left)
    assert caplog.text.count("seen late: no thread can be made") == 1
    assert left.next_look == 0.25
    w.close()
