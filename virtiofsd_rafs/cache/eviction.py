"""Keeps the cache directory below its limit while a daemon runs, and tells the others what it uses.

The work is the store's (crate ``chunk-store``, ``evict.rs``), in a thread of its own; here it is decided
when: after so many stored bytes, and from time to time, because other daemons fill the same disk. The chunks
that workers have touched are noted in the directory by a timer that slows down while nothing is touched.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtiofsd_rafs.native.store import Store, Sweep

_log = logging.getLogger(__name__)

# A sweep is due when this part of the limit has been stored since the last one: an eighth is free after it.
STEP_SHIFT = 6
MIN_STEP = 1 << 20
# How often uses are noted: at first, and at most when nothing is used.
HARVEST_S = 5.0
MAX_HARVEST_S = 60.0
# When another process sweeps, or an interrupted eviction may still be one that goes on.
AGAIN_S = 1.0


@attrs.define
class EvictionCounters:
    """What happened since the start."""

    sweeps: int = 0
    evicted_chunks: int = 0
    evicted_bytes: int = 0
    """Bytes that the disk got back."""
    cache_bytes: int = 0
    """What all blobs of the directory use on the disk, as of the last sweep."""


class Eviction:
    """Eviction for one daemon; *limit* in bytes, 0: none. All methods are for the event loop."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._step = max(MIN_STEP, limit >> STEP_SHIFT)
        self._swept_at = 0
        self._refused = store.stats().disk_errors
        self._first = True
        self._interval = HARVEST_S
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._told: set[str] = set()
        self._open = False
        self.limit = limit
        self.counters = EvictionCounters()

    def start(self) -> None:
        """Begins; also with a limit that was lowered since the last run."""
        self._open = True
        self._later()
        if self.limit:
            # Not at once: a guest is starting.
            self._retry()

    async def close(self) -> None:
        """Ends it. What was used is noted for those who go on."""
        self._open = False
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._store.stop_sweep()
            await asyncio.gather(self._task, return_exceptions=True)
        self._store.harvest()

    def hold(self, blob: int, chunks: Iterable[int], seconds: float) -> None:
        """Requests wait for *chunks*: they stay until one was answered, or for *seconds*."""
        self._store.hold(blob, chunks, seconds)

    def stored(self) -> None:
        """Bytes were stored: is it time?"""
        if not self._open or self._task is not None:
            return
        grown, met = self._store.growth()
        refused = self._store.stats().disk_errors
        due = grown - self._swept_at >= self._step or refused > self._refused
        self._refused = refused
        if met or (self.limit and due):
            self._begin(recover=met)

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        touched = self._store.harvest()
        self._interval = HARVEST_S if touched else min(2 * self._interval, MAX_HARVEST_S)
        self._later()
        if self.limit and self._task is None:
            self._begin(recover=False)

    def _begin(self, *, recover: bool) -> None:
        self._task = asyncio.ensure_future(self._sweep(recover=recover))

    async def _sweep(self, *, recover: bool) -> None:
        grown, _ = self._store.growth()
        pool = ThreadPoolExecutor(1, thread_name_prefix="eviction")
        try:
            work = partial(self._store.sweep, self.limit, recover=recover)
            done = await asyncio.get_running_loop().run_in_executor(pool, work)
        except CacheError as e:
            self._tell("failed", "the cache cannot be kept below --cache-size: %s", e)
            self._swept_at = grown
            return
        finally:
            pool.shutdown(wait=False)
            self._task = None
        if done is not None:
            self._swept(done, grown)

    def _swept(self, done: Sweep, grown: int) -> None:
        if done.busy:
            self._retry()
            return
        self._swept_at = grown
        counters = self.counters
        counters.sweeps += 1
        counters.evicted_chunks += done.n_chunks
        counters.evicted_bytes += max(0, done.before - done.after)
        counters.cache_bytes = done.after
        if done.n_chunks:
            _log.info("evicted %d chunks: %d -> %d bytes", done.n_chunks, done.before, done.after)
        if done.errno:
            self._tell(
                "errno",
                "the file system of the cache gives no parts of files back (%s): --cache-size has no effect",
                os.strerror(done.errno),
            )
        elif self.limit and done.after > self.limit:
            self._tell(
                "held",
                "the cache has %d bytes, above --cache-size: %d of them may not go, because requests wait "
                "for them or nydusd may use them",
                done.after,
                done.held,
            )

    def _retry(self) -> None:
        if self._open and self._again is None:
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._retried)

    def _retried(self) -> None:
        self._again = None
        if self._first and self.limit and self._task is None:
            self._first = False
            self._begin(recover=True)
        else:
            self.stored()

    def _tell(self, what: str, text: str, *args: object) -> None:
        """Once each."""
        if what not in self._told:
            self._told.add(what)
            _log.warning(text, *args)
