"""Carries out what the planner decides: fetches, verifies, stores, wakes the workers.

Posts come through shared memory and an eventfd; bytes come from a :class:`BlobSource` and go through the
store, which decodes and verifies them in threads of the core. Everything else happens on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from virtiofsd_rafs.backends.base import ANSWERED_BY, Distrustful, Streaming
from virtiofsd_rafs.cache.eviction import Eviction
from virtiofsd_rafs.errors import BackendError, BadReply, RangeIgnored, Throttled, VirtiofsdRafsError
from virtiofsd_rafs.native.store import DECODE_ERROR, DIGEST_MISMATCH, OK, OUTCOME_NAMES, trim
from virtiofsd_rafs.runtime.first_start import FirstStart
from virtiofsd_rafs.runtime.ingest import Ingest
from virtiofsd_rafs.runtime.metrics import FetchRecord, Metrics, Stalls, runs_of
from virtiofsd_rafs.runtime.planner import Planner
from virtiofsd_rafs.runtime.wants import NOBODY, Origin, Posted
from virtiofsd_rafs.runtime.watching import Watching

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Container, Coroutine, Mapping, Sequence

    from virtiofsd_rafs.backends.base import BlobSource
    from virtiofsd_rafs.config import ServeConfig
    from virtiofsd_rafs.native.session import Post, Trace
    from virtiofsd_rafs.native.store import Store
    from virtiofsd_rafs.runtime.layout import Key
    from virtiofsd_rafs.runtime.streams import Streams
    from virtiofsd_rafs.runtime.wants import Fetch

_log = logging.getLogger(__name__)

# After this long without a fetch, threads and scratch memory are given back.
IDLE_S = 5.0
# A chunk that is verified and yet asked for so often, over so long a time, is looked at again: its bytes may
# have been damaged behind our back, and a worker that cannot read them can only ask.
RECHECK_POSTS = 3
RECHECK_S = 1.0
_RECHECK_LEN = 256
# Outcomes that are the fault of who sent the bytes.
_WRONG_BYTES = (DIGEST_MISMATCH, DECODE_ERROR)


class Posts(Protocol):
    """The part of the session that the agent uses."""

    @property
    def post_fd(self) -> int:
        """An eventfd that becomes readable with new posts."""
        ...

    def posts(self) -> Sequence[Post]:
        """The posts since the last call."""
        ...

    def trace(self) -> Sequence[Trace]:
        """Requests that had waited and were answered since the last call."""
        ...

    def wake(self) -> None:
        """Makes the workers look at the states of the chunks that they wait for."""
        ...

    @property
    def wake_fds(self) -> Sequence[int]:
        """The eventfds by which :meth:`wake` does that."""
        ...


class Agent:
    """Serves the posts of one mounted image.

    Args:
        session: posts come from it, and it is woken when chunks have come.
        store: the chunks.
        blob_ids: ids of the blobs by number.
        source: awaited when the first byte is needed.
        config: deadlines, sizes, what to fetch in advance.
        metrics: what happens is counted there.
        bootstrap_fd: the mounted bootstrap; without it nothing is known of files.
        started_ns: when FUSE_INIT was answered (CLOCK_MONOTONIC), 0 before.
        completed: called when the source is not needed any more, each time that becomes true.
    """

    def __init__(
        self,
        session: Posts,
        store: Store,
        blob_ids: Mapping[int, str],
        source: Callable[[], Awaitable[BlobSource]],
        config: ServeConfig,
        metrics: Metrics,
        *,
        bootstrap_fd: int | None = None,
        started_ns: Callable[[], int] = lambda: 0,
        completed: Callable[[], None] = lambda: None,
    ) -> None:
        self._session = session
        self._store = store
        self._blob_ids = blob_ids
        self._source = source
        self._io_deadline_s = config.io_deadline_s
        self._metrics = metrics
        # What the disk refused when the files were opened was told then.
        self._disk_trouble_told = store.stats().disk_errors > 0
        chunks = {index: store.chunks(index) for index in blob_ids}
        touched = {index: store.touched(index) for index in blob_ids}
        amplify = config.amplify
        if not all(view.has_data for view in chunks.values()):
            # Without a disk, what is read ahead pushes out what somebody waits for.
            amplify = min(amplify, config.spill_size // (8 * config.connections))
        self.planner = Planner(
            chunks,
            amplify=amplify,
            connections=config.connections,
            io_deadline_s=config.io_deadline_s,
            retry_first_s=config.retry_first_s,
            retry_cap_s=config.retry_cap_s,
            fill_rate=config.fill_rate,
            touched=touched,
        )
        self.first_start = FirstStart(
            config,
            store,
            blob_ids,
            self.planner,
            bootstrap_fd=bootstrap_fd,
            pump=self._pump,
            started_ns=started_ns,
            completed=completed,
        )
        self.eviction = Eviction(store, config.cache_size)
        self.stalls = Stalls()
        self._streams: Streams | None = None
        self._ingest = Ingest(store)
        self._watching = Watching(store, session.wake_fds, self._pump)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._suspects: dict[Key, tuple[float, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Serves from now on, also what was posted before."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._session.post_fd, self._readable)
        self._take_posts()
        self.first_start.start()
        self.eviction.start()
        self._pump()

    async def close(self) -> None:
        """Stops serving. Chunks that were being fetched are absent again."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove_reader(self._session.post_fd)
        await self.first_start.close()
        for timer in (self._timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for fetch in self.planner.fetches:  # which were cancelled before they began
            self._store.hint_fetching(fetch.blob, fetch.chunks, False)
        await self.eviction.close()
        self._watching.close()
        self._ingest.close()

    # -- posts ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        # Read first: a post that comes meanwhile makes the descriptor readable again.
        try:
            os.read(self._session.post_fd, 8)
        except BlockingIOError:
            return
        self._take_posts()

    def _take_posts(self) -> None:
        now = time.monotonic()
        ready = to_do = False
        for post in self._session.posts():
            # One image per daemon: another mount's number cannot be meant.
            key = (post.blob_index if post.mount == 0 else -1, post.chunk_index)
            posted = self.planner.post(key, now, Origin(post.nodeid, post.file_offset), post.time_ns / 1e9)
            to_do = to_do or posted is not Posted.LEFT
            if posted is Posted.READY:
                ready = True
                self._suspect(key, now)
            elif posted is Posted.INVALID:
                _log.warning("a worker asks for chunk %d of blob %d: there is none", post.chunk_index, key[0])
        if ready:
            self._session.wake()
        if to_do:
            self._pump()
        else:
            # Beside many daemons that is what happens most, and all of them hear of the same chunk at once.
            self._await_others(now)

    def _suspect(self, key: Key, now: float) -> None:
        """Counts posts of a chunk that is verified; too many of them start another verification."""
        first, n = self._suspects.get(key, (now, 0))
        if len(self._suspects) >= _RECHECK_LEN:
            self._suspects.clear()
        self._suspects[key] = (first, n + 1)
        if n + 1 >= RECHECK_POSTS and now - first >= RECHECK_S:
            del self._suspects[key]
            self._spawn(self._recheck(key))

    async def _recheck(self, key: Key) -> None:
        good = await self._ingest.verify_present(*key, force=True)
        self._metrics.verifications["good" if good else "bad"] += 1
        if not good:
            _log.error("chunk %d of blob %s is damaged in the cache", key[1], self._blob_ids[key[0]])
            self.planner.post(key, time.monotonic(), NOBODY)
        self._session.wake()
        self._pump()

    # -- fetches --------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Starts what can be started, and sets the timer for the rest."""
        if self._loop is None:
            return
        now = time.monotonic()
        for key in self.planner.next_verifications():
            self._spawn(self._verify(key))
        for fetch in self.planner.next_fetches(now):
            # At once: other daemons may want the same chunks at the same moment.
            self._store.hint_fetching(fetch.blob, fetch.chunks, True)
            self._spawn(self._fetch(fetch))
        if self.planner.take_found_ready():
            self._session.wake()
        self._await_others(now)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if not self._tasks and self._has_threads:
            self._idle_timer = self._loop.call_later(IDLE_S, self._relax)

    def _await_others(self, now: float) -> None:
        """Looks after what is left to other daemons."""
        self._watching.follow(self.planner.left)
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        """Wakes us when the planner has something to do without a new event."""
        event = self.planner.next_event()
        if self._timer is not None:
            if event == self._timer_at:
                return
            self._timer.cancel()
            self._timer = None
        if event is not None and self._loop is not None:
            self._timer_at = event
            self._timer = self._loop.call_later(max(0.0, event - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._pump()

    @property
    def _has_threads(self) -> bool:
        return self._ingest.has_threads or self._watching.has_thread

    def _relax(self) -> None:
        """Gives back what only a busy agent needs."""
        if not self._tasks and not self.planner.left and self._has_threads:
            self._watching.close()
            self._ingest.close()
            trim()
            self.first_start.settled()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("internal error", exc_info=error)
        self._pump()
        if not self._tasks and not self.planner.busy:
            self.first_start.settled()

    async def _verify(self, key: Key) -> None:
        good = False
        self.eviction.hold(key[0], [key[1]], self._io_deadline_s)
        try:
            good = await self._ingest.verify_present(*key)
        finally:
            self.planner.verified(key, good)
            self._metrics.verifications["good" if good else "bad"] += 1
        if good:
            self._session.wake()
        else:
            _log.info("chunk %d of blob %s did not survive, fetching it", key[1], self._blob_ids[key[0]])

    async def _fetch(self, fetch: Fetch) -> None:
        """One try. However it ends, the planner hears of it."""
        started_ns = time.monotonic_ns()
        told = False
        result, n_bytes = "internal.bug", 0
        try:
            outcomes = await self._bring(fetch)
            n_bytes = fetch.length
            self.eviction.hold(fetch.blob, fetch.wants, self._io_deadline_s)  # some came meanwhile
            self.eviction.stored()
            self._tell_disk_trouble()
            bad = self._judge(fetch, outcomes)
            await self._distrust(fetch, outcomes)
            result = OUTCOME_NAMES[next((o for o in outcomes if o != OK), OK)]
            told = True
            self._tell_outage_end()
            self.planner.stored(fetch.fetch_id, bad, time.monotonic())
            if len(bad) < len(fetch.chunks):
                self._session.wake()
        except VirtiofsdRafsError as e:
            told, result = True, e.msgid
            self._failed(fetch, e)
        finally:
            self._store.hint_fetching(fetch.blob, fetch.chunks, False)
            if not told:
                self.planner.failed(fetch.fetch_id, time.monotonic(), hopeless=True)
            self._metrics.fetched(self._record(fetch, started_ns, result), n_bytes)
            self.stalls.add(self._session.trace())  # before newer ones overwrite them

    async def _bring(self, fetch: Fetch) -> bytes:
        """Fetches and stores; an outcome for each chunk."""
        source = await self._source()
        if isinstance(source, Streaming) and source.ignores_ranges(self._blob_ids[fetch.blob]):
            passed = await self._pass(source, fetch)
            if passed is not None:
                return passed
        try:
            data = [await self._read(source, fetch)]
        except RangeIgnored:
            passed = await self._pass(source, fetch) if isinstance(source, Streaming) else None
            if passed is None:
                raise
            return passed
        self.eviction.hold(fetch.blob, fetch.wants, self._io_deadline_s)
        # Nothing here keeps the bytes alive longer than the store needs them.
        return await self._ingest.ingest(fetch.blob, fetch.offset, data.pop(), fetch.chunks)

    async def _read(self, source: BlobSource, fetch: Fetch) -> bytes:
        blob_id = self._blob_ids[fetch.blob]
        async with self._deadline():
            data = await source.read_range(blob_id, fetch.offset, fetch.length)
        if len(data) != fetch.length:
            raise BadReply(f"{len(data)} bytes came instead of {fetch.length}")
        return data

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Nothing is waited for longer than a read may last."""
        try:
            async with asyncio.timeout(self._io_deadline_s):
                yield
        except TimeoutError as e:
            if isinstance(e, BackendError):
                raise
            raise BadReply(f"no answer within {self._io_deadline_s:g} s") from e

    async def _pass(self, source: Streaming, fetch: Fetch) -> bytes | None:
        """Waits until a stream of the whole blob has passed; None when ranges are honoured by now."""
        if self._streams is None:
            # Few servers need it, and all starts would pay for it.
            from virtiofsd_rafs.runtime.streams import Streams

            self._streams = Streams(
                layout=self.planner.layout,
                take=self._take_passing,
                spawn=self._spawn,
                keeps=lambda: self.first_start.keeps_all,
            )
        async with self._deadline():
            return await self._streams.bring(source, fetch.blob, self._blob_ids[fetch.blob], fetch.chunks)

    async def _take_passing(
        self, blob: int, base: int, data: bytes, chunks: Sequence[int], awaited: Container[int]
    ) -> bytes:
        """Stores what a stream brings. What nobody has asked for is logged here, the rest with its fetch."""
        started_ns = time.monotonic_ns()
        self.eviction.hold(blob, [c for c in chunks if c in awaited], self._io_deadline_s)
        outcomes = await self._ingest.ingest(blob, base, data, chunks)
        # Some were asked for meanwhile: their fetches tell of them as well.
        self.eviction.hold(blob, [c for c in chunks if c in awaited], self._io_deadline_s)
        self.eviction.stored()
        self._tell_disk_trouble()
        others = [(c, o) for c, o in zip(chunks, outcomes, strict=True) if c not in awaited]
        for _, outcome in others:
            self._metrics.chunks[OUTCOME_NAMES[outcome]] += 1
        if others:
            places = self._store.chunks(blob)
            n_bytes = sum(places.lengths[chunk] for chunk, _ in others)
            record = FetchRecord(
                started_ns=started_ns,
                ended_ns=time.monotonic_ns(),
                blob_index=blob,
                offset=places.offsets[others[0][0]],
                length=n_bytes,
                n_chunks=len(others),
                n_wanted=0,
                attempt=1,
                nodeid=0,
                file_offset=0,
                result=OUTCOME_NAMES[next((o for _, o in others if o != OK), OK)],
                reason="fill",
                runs=runs_of((chunk, "fill") for chunk, _ in others),
                source=ANSWERED_BY.get(),
            )
            self._metrics.fetched(record, n_bytes)
        self._session.wake()
        return outcomes

    def _tell_disk_trouble(self) -> None:
        """Once, and not per chunk: a full disk refuses them all."""
        if self._disk_trouble_told:
            return
        stats = self._store.stats()
        if stats.disk_errors:
            self._disk_trouble_told = True
            _log.warning(
                "the cache disk refuses (%s): memory stands in; make room there, or use another --cache-dir",
                os.strerror(stats.last_disk_errno),
            )

    def _judge(self, fetch: Fetch, outcomes: bytes) -> list[int]:
        """The chunks whose bytes were not kept."""
        bad = []
        for chunk, outcome in zip(fetch.chunks, outcomes, strict=True):
            self._metrics.chunks[OUTCOME_NAMES[outcome]] += 1
            if outcome != OK:
                bad.append(chunk)
                _log.warning(
                    "chunk %d of blob %s was not kept: %s (try %d)",
                    chunk,
                    self._blob_ids[fetch.blob],
                    OUTCOME_NAMES[outcome],
                    fetch.attempt,
                )
        return bad

    async def _distrust(self, fetch: Fetch, outcomes: bytes) -> None:
        """Tells a source with several places which ranges were wrong: the next try asks another place."""
        wrong = [c for c, o in zip(fetch.chunks, outcomes, strict=True) if o in _WRONG_BYTES]
        if not wrong:
            return
        source = await self._source()
        if isinstance(source, Distrustful):
            chunks = self._store.chunks(fetch.blob)
            for chunk in wrong:
                offset, length = chunks.offsets[chunk], chunks.lengths[chunk]
                source.wrong_bytes(self._blob_ids[fetch.blob], offset, length, ANSWERED_BY.get())

    def renewed(self) -> None:
        """The source may deliver again: what backs off is tried at once."""
        self.planner.retry_now()
        self._pump()

    @property
    def outage_s(self) -> float:
        """Seconds for which nothing has come, whatever was tried; 0 while the source delivers."""
        since = self.planner.outage.since
        return 0.0 if since is None else time.monotonic() - since

    def _failed(self, fetch: Fetch, error: VirtiofsdRafsError) -> None:
        was_away = self.planner.outage.since is not None
        # What is tried during an outage fails as expected.
        _log.log(
            logging.DEBUG if was_away else logging.WARNING,
            "%d bytes at %d of blob %s: %s: %s (try %d)",
            fetch.length,
            fetch.offset,
            self._blob_ids[fetch.blob],
            error.msgid,
            error,
            fetch.attempt,
        )
        self.planner.failed(
            fetch.fetch_id,
            time.monotonic(),
            retry_after_s=error.retry_after_s if isinstance(error, Throttled) else None,
            hopeless=not (isinstance(error, BackendError) and error.retryable),
        )
        if self.planner.outage.since is not None and not was_away:
            _log.warning("nothing comes from the source: it is asked again until it delivers")

    def _tell_outage_end(self) -> None:
        if self.planner.outage.since is not None:
            _log.warning("the source delivers again, after %.1f s", self.outage_s)

    def _record(self, fetch: Fetch, started_ns: int, result: str) -> FetchRecord:
        origin = fetch.origin
        return FetchRecord(
            started_ns=started_ns,
            ended_ns=time.monotonic_ns(),
            blob_index=fetch.blob,
            offset=fetch.offset,
            length=fetch.length,
            n_chunks=len(fetch.chunks),
            n_wanted=len(fetch.wants),
            attempt=fetch.attempt,
            nodeid=origin.nodeid,
            file_offset=origin.file_offset,
            result=result,
            reason=fetch.reason,
            runs=runs_of(fetch.reasons()),
            source=ANSWERED_BY.get(),
        )
