"""Decides what is fetched next. No I/O and no clock: time is an argument, results are told to it.

Chunks that somebody waits for (posts) become *wants*. A want is in exactly one place: in the queue, in the
heap of those that back off, in a fetch, with a verification of stored bytes, or left to another daemon. A
fetch is one range of one blob: a wanted chunk, wanted neighbours, and, while connections are free, the absent
chunks that follow it in the blob (read-ahead, in a window that grows while somebody reads on). A chunk is in
at most one fetch, however many posts ask for it.

While nobody waits, or the link has room beside those who do, lists are prefetched and the image is filled
(:mod:`~virtiofsd_rafs.runtime.background`). Who then wants such a chunk joins its fetch.

Daemons that share a cache directory see which chunks the others fetch. A want for such a chunk is left to
them for up to a second (:mod:`~virtiofsd_rafs.runtime.left`). Then it is fetched here as well, and nothing is
left to others for a while: the other daemon may be dead, or slow.

A failed fetch puts its wants back, later and alone or with other wants, never with read-ahead: a bad
neighbour must not harm them twice. What was only read ahead is forgotten. A want whose deadline has passed is
dropped; the chunk is absent then, and the next post starts anew. While nothing comes at all, tries are spaced
(:mod:`~virtiofsd_rafs.runtime.outage`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from typing import TYPE_CHECKING

from virtiofsd_rafs.runtime.background import BACKGROUND_MIN, Background, Load
from virtiofsd_rafs.runtime.layout import Layout
from virtiofsd_rafs.runtime.left import Left
from virtiofsd_rafs.runtime.link import Link
from virtiofsd_rafs.runtime.outage import Outage
from virtiofsd_rafs.runtime.readahead import ReadAhead
from virtiofsd_rafs.runtime.wants import Counters, Fetch, Origin, Posted, Wait, Want

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from virtiofsd_rafs.runtime.layout import Chunks, Key
    from virtiofsd_rafs.runtime.wants import Reason

# Two ranges are merged when what lies between them is at most this part of ``amplify`` (as nydusd does it):
# bytes that nobody needs, against a round trip.
GAP_SHIFT = 7
# A server's request to pause is honoured up to this: its mistake must not outlast an outage.
MAX_RETRY_AFTER_S = 30.0
# Errors that another try seldom cures (not found, refused) are tried again too, because credentials are
# renewed and blobs uploaded meanwhile, but more slowly.
HOPELESS_FACTOR = 4.0
# The last try for a request is made when this is left of its deadline, in seconds or as a part of it.
LAST_TRY_S = 1.0
LAST_TRY = 1 / 12
# So many of the wants that came last are looked at for some that may be tried during an outage.
LATEST = 256
# What one fetch may turn into when it is decoded, as a multiple of ``amplify``: an image whose chunks shrink
# a thousandfold must not make a small read decode gigabytes.
MAX_EXPANSION = 8


class Planner:
    """See the module's comment.

    Args:
        blobs: places and states of all chunks.
        amplify: the most that a fetch spans beyond its first chunk.
        connections: fetches at once.
        io_deadline_s: how long somebody waits.
        retry_first_s, retry_cap_s: pauses between tries.
        first_window: the read-ahead that a fetch starts with; see ReadAhead.
        fill_rate: bytes per second of the fill; 0: what the link carries.
        touched: which chunks reads were answered from; see ReadAhead.
        rng: numbers in [0, 1), the source of jitter.
    """

    def __init__(
        self,
        blobs: Mapping[int, Chunks],
        *,
        amplify: int,
        connections: int,
        io_deadline_s: float,
        retry_first_s: float,
        retry_cap_s: float,
        first_window: int | None = None,
        fill_rate: int = 0,
        touched: Mapping[int, Sequence[int]] | None = None,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._blobs = blobs
        self._layouts: dict[int, Layout] = {}  # made when a blob is first fetched from: start-up is short
        self._amplify = amplify
        self._gap = amplify >> GAP_SHIFT
        self.link = Link()
        self._read_ahead = ReadAhead(
            amplify=amplify, link=self.link, first_window=first_window, touched=touched
        )
        self.background = Background(
            blobs=blobs,
            layout=self.layout,
            absent=self._absent,
            hinted=lambda blob, chunk: blobs[blob].hinted(chunk),
            link=self.link,
            gap=self._gap,
            max_size=max(amplify, BACKGROUND_MIN) * MAX_EXPANSION,
            slots=connections - 1,
            fill_rate=fill_rate,
            retry_first_s=retry_first_s,
        )
        self._connections = connections
        self._io_deadline_s = io_deadline_s
        self._retry_first_s = retry_first_s
        self._retry_cap_s = retry_cap_s
        self._rng = rng
        self._ids = itertools.count(1)
        self._sequence = itertools.count()
        self._queue: dict[Key, Want] = {}
        self._delayed: dict[Key, Want] = {}
        self._delayed_heap: list[tuple[float, int, Key]] = []
        self._fetching: dict[Key, Fetch] = {}
        self._verifying: dict[Key, Want] = {}
        self._verify_next: list[Key] = []
        self._fetches: dict[int, Fetch] = {}
        self._paused_until = 0.0
        self._bytes_in_flight = 0
        self._demanding = 0  # fetches that somebody waits for
        self._last_demand = float("-inf")
        self._found_ready = False
        self.left = Left(blobs)
        self._reserve_s = min(LAST_TRY_S, io_deadline_s * LAST_TRY)
        self.outage = Outage(first_s=retry_first_s, cap_s=min(retry_cap_s, self._reserve_s), rng=rng)
        self.counters = Counters()

    # -- what happens ---------------------------------------------------------------------------------------

    def post(self, key: Key, now: float, origin: Origin, since: float | None = None) -> Posted:
        """A worker waits for chunk *key*, for a request that it took at *since* (now when nobody says)."""
        self.counters.posts += 1
        chunks = self._blobs.get(key[0])
        if chunks is None or not chunks.promised(key[1]):
            self.counters.invalid_posts += 1
            return Posted.INVALID
        if chunks.ready(key[1]):
            return Posted.READY
        taken = now if since is None else min(now, max(since, now - self._io_deadline_s))
        deadline = taken + self._io_deadline_s
        left = self.left.get(key)
        if left is not None:
            left.wait(deadline)
            return Posted.LEFT
        waiting = self._queue.get(key) or self._delayed.get(key) or self._verifying.get(key)
        if waiting is not None:
            waiting.wait(deadline)
            return Posted.JOINED
        fetch = self._fetching.get(key)
        if fetch is not None:
            want = fetch.wants.get(key[1])
            if want is None:
                fetch.wants[key[1]] = want = Want(key, origin, now, deadline)
                if fetch.reason == "demand":
                    self.counters.read_ahead_used += 1
                else:
                    self.counters.prefetch_used += 1
                    self._demanding += 1 if len(fetch.wants) == 1 else 0
            want.wait(deadline)
            return Posted.JOINED
        want = Want(key, origin, now, deadline)
        want.wait(deadline)
        if chunks.unverified(key[1]):
            self._verifying[key] = want
            self._verify_next.append(key)
            return Posted.VERIFY
        if self.left.may_take(want, now):
            self.left.put(want, now)
            return Posted.LEFT
        self._queue[key] = want
        return Posted.QUEUED

    def verified(self, key: Key, good: bool) -> None:
        """The verification of *key* has ended; bytes that are not good will be fetched."""
        want = self._verifying.pop(key, None)
        if want is not None and not good:
            self._queue[key] = want

    def stored(self, fetch_id: int, bad: Iterable[int], now: float) -> None:
        """A fetch has ended; its chunks are stored, except *bad* ones, whose bytes were wrong."""
        fetch = self._end(fetch_id, now)
        self.link.ended(fetch.started, now, fetch.length)
        if self.outage.ended():
            self._end_pauses()
        if fetch.reason != "demand":
            self.background.worked()
        for chunk in bad:
            want = fetch.wants.get(chunk)
            if want is not None:
                want.alone = True
                self._retry(want, now, self._pause(want))
            elif fetch.reason != "demand":
                self.counters.given_up += self.background.bad(fetch.reason, (fetch.blob, chunk))

    def failed(
        self, fetch_id: int, now: float, *, retry_after_s: float | None = None, hopeless: bool = False
    ) -> None:
        """A fetch delivered nothing. *retry_after_s* is what the server asked for."""
        fetch = self._end(fetch_id, now)
        asked = min(retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        if asked:
            self._paused_until = max(self._paused_until, now + asked)
        for want in fetch.wants.values():
            pause = self._pause(want) * (HOPELESS_FACTOR if hopeless else 1.0)
            self._retry(want, now, max(pause, asked), asked)
        if fetch.reason != "demand":
            left = [(fetch.blob, chunk) for chunk in fetch.chunks if chunk not in fetch.wants]
            self.background.failed(fetch.reason, left, now + asked, self._rng(), hopeless=hopeless)
        if not hopeless:
            self.outage.failed(now)

    def retry_now(self) -> None:
        """Ends all pauses: the reason for the failures may be gone."""
        self.outage.ended()
        self._end_pauses()
        self._paused_until = 0.0

    def _end_pauses(self) -> None:
        self._queue.update(self._delayed)
        self._delayed.clear()
        self._delayed_heap.clear()

    def _end(self, fetch_id: int, now: float) -> Fetch:
        fetch = self._fetches.pop(fetch_id)
        for chunk in fetch.chunks:
            del self._fetching[fetch.blob, chunk]
        self._bytes_in_flight -= fetch.length
        if fetch.wants:
            self._demanding -= 1
            self._last_demand = now
        return fetch

    def _pause(self, want: Want) -> float:
        """Doubles with each try of the want, up to the cap; drawn from its upper half."""
        base = min(self._retry_cap_s, self._retry_first_s * 2.0 ** min(want.attempts, 30))
        return base * (0.5 + self._rng() / 2)

    def _retry(self, want: Want, now: float, pause: float, asked: float = 0.0) -> None:
        """Tries again after *pause*, of which the server asked for *asked* seconds at least.

        A pause that reaches past the end of a request, or so close to it that a try would come too late, is
        cut short for one last try: the source may be back by then. For bytes that were bad, only the last
        request counts: time does not mend them.
        """
        want.attempts += 1
        reserve = self._reserve_s
        end = want.deadline if want.alone else want.next_due(now + reserve)
        at = now + pause
        if now < end - reserve < at:
            at = max(end - reserve, now + asked)
        if at >= want.deadline:
            self.counters.expired += 1
            return
        self.counters.retries += 1
        self._delayed[want.key] = want
        heapq.heappush(self._delayed_heap, (at, next(self._sequence), want.key))

    def _came_from_another(self, key: Key) -> None:
        """What was left to another daemon is there."""
        self.counters.left_to_others += 1
        layout = self.layout(key[0])
        offset = layout.chunks.offsets[key[1]]
        self._read_ahead.followed(layout, key[0], offset, offset + layout.chunks.lengths[key[1]])

    # -- what to do -----------------------------------------------------------------------------------------

    def next_verifications(self) -> list[Key]:
        """Chunks whose stored bytes are to be verified now, each to be answered by :meth:`verified`."""
        keys, self._verify_next = self._verify_next, []
        return keys

    def next_fetches(self, now: float) -> list[Fetch]:
        """Fetches to start now, each to be answered by :meth:`stored` or :meth:`failed`."""
        while self._delayed_heap and self._delayed_heap[0][0] <= now:
            _, _, key = heapq.heappop(self._delayed_heap)
            self._queue[key] = self._delayed.pop(key)
        for back in self.left.look(now):
            if self._blobs[back.key[0]].ready(back.key[1]):
                self._found_ready = True
                self._came_from_another(back.key)
            else:
                self._queue[back.key] = back
        if now < self._paused_until:
            return []
        fetches = []
        while len(self._fetches) < self._connections:
            want = self._next_queued(now)
            if want is None:
                break
            key = want.key
            del self._queue[key]
            if want.deadline <= now:
                self.counters.expired += 1
            elif self._blobs[key[0]].ready(key[1]):
                self._found_ready = True  # another daemon was quicker
                if want.left_since is not None:
                    self._came_from_another(key)
            elif self.left.may_take(want, now):
                self.left.put(want, now)
            else:
                if self.outage.next_try <= now:
                    self.outage.tried(now)
                fetches.append(self._plan(want, now))
        if self.background and not self._queue:
            self._plan_background(fetches, now)
        return fetches

    def _next_queued(self, now: float) -> Want | None:
        """The next want to try.

        While tries are spaced, who came after the failures began is still tried once, at once: it may be for
        something that is there, and must not wait for what is not.
        """
        since = self.outage.since
        if since is None or self.outage.next_try <= now:
            return next(iter(self._queue.values()), None)
        latest = itertools.islice(reversed(self._queue.values()), LATEST)
        return next((want for want in latest if not want.attempts and want.first_posted > since), None)

    def _plan_background(self, fetches: list[Fetch], now: float) -> None:
        """Adds to *fetches* what the link can carry beside what somebody waits for."""
        while (picked := self.background.pick(self._load(), now)) is not None:
            fetch = self._start(picked.blob, picked.start, picked.end, picked.chunks, {}, now, picked.reason)
            fetch.about = Origin(picked.nodeid, 0)
            self.counters.background_fetches += 1
            if picked.reason == "prefetch":
                self.counters.chunks_prefetched += len(picked.chunks)
            else:
                self.counters.chunks_filled += len(picked.chunks)
            fetches.append(fetch)

    def _load(self) -> Load:
        """What is under way."""
        return Load(
            free=self._connections - len(self._fetches),
            n_bytes=self._bytes_in_flight,
            demand=self._demanding > 0 or bool(self._queue or self.left or self._delayed or self._verifying),
            last_demand=self._last_demand,
        )

    def take_found_ready(self) -> bool:
        """Whether wanted chunks became ready without us since the last call: the workers must be woken."""
        found, self._found_ready = self._found_ready, False
        return found

    def next_event(self) -> float | None:
        """When :meth:`next_fetches` has something to do without a new event; None: never."""
        events = [self._delayed_heap[0][0]] if self._delayed_heap else []
        if self.left:
            events.append(self.left.next_look)
        if self._queue and len(self._fetches) < self._connections:
            events.append(self.outage.next_try)
        elif not self._queue and self.background:
            background = self.background.next_event(self._load())
            if background is not None:
                events.append(background)
        return max(min(events), self._paused_until) if events else None

    @property
    def busy(self) -> bool:
        """Whether anything is to be fetched, now or later."""
        return bool(self._fetches or self.waiting or self.background)

    @property
    def last_demand(self) -> float:
        """When the last fetch for somebody who waited ended; minus infinity before."""
        return self._last_demand

    @property
    def fetches(self) -> Collection[Fetch]:
        """Fetches under way."""
        return self._fetches.values()

    @property
    def in_flight(self) -> int:
        """How many fetches are under way."""
        return len(self._fetches)

    @property
    def waiting(self) -> int:
        """Chunks that somebody waits for."""
        fetching = sum(len(fetch.wants) for fetch in self._fetches.values())
        left = sum(1 for _ in self._left_wants())
        return len(self._queue) + left + len(self._delayed) + len(self._verifying) + fetching

    def waits(self, limit: int) -> list[Wait]:
        """What is waited for now, longest first, at most *limit*."""
        groups = (
            *((fetch.wants.values(), "fetching") for fetch in self._fetches.values()),
            (self._queue.values(), "queued"),
            (self._left_wants(), "left to another daemon"),
            (self._delayed.values(), "backing off"),
            (self._verifying.values(), "verifying"),
        )
        found = (
            Wait(want.key, want.origin, want.first_posted, want.attempts, doing)
            for wants, doing in groups
            for want in wants
        )
        return heapq.nsmallest(limit, found, key=lambda wait: wait.since)

    def _left_wants(self) -> Iterator[Want]:
        """Those that are left to others and have not come."""
        return (want for want in self.left.wants if not self._blobs[want.key[0]].ready(want.key[1]))

    # -- how ------------------------------------------------------------------------------------------------

    def layout(self, blob: int) -> Layout:
        """The chunks of *blob* by place."""
        layout = self._layouts.get(blob)
        if layout is None:
            layout = self._layouts[blob] = Layout(self._blobs[blob])
        return layout

    def _plan(self, want: Want, now: float) -> Fetch:
        """The fetch for *want*, which has just left the queue."""
        blob, chunk = want.key
        layout = self.layout(blob)
        offsets, lengths = layout.chunks.offsets, layout.chunks.lengths
        start, end = offsets[chunk], offsets[chunk] + lengths[chunk]
        chunks = [chunk]
        wants = {chunk: want}
        if not want.alone:
            for other in layout.before(chunk):
                at, stop = offsets[other], offsets[other] + lengths[other]
                if start - stop > self._gap or end - at > self._amplify:
                    break
                if self._take(blob, other, wants, now):
                    chunks.insert(0, other)
                    start = min(start, at)
            # With more wants than connections, reading ahead would only make them wait longer.
            room = self._connections - len(self._fetches) - 1
            read_ahead = want.attempts == 0 and len(self._queue) <= room and self.outage.since is None
            waited_for = sum(fetch.length for fetch in self._fetches.values() if fetch.wants)
            window = self._read_ahead.window(layout, blob, offsets[chunk], waited_for)
            span = max(window.ahead, self._amplify)
            budget = span * MAX_EXPANSION - layout.chunks.size(chunk)
            for other in layout.after(chunk):
                at, stop = offsets[other], offsets[other] + lengths[other]
                if at - end > self._gap or stop - start > span:
                    break
                ahead = read_ahead and stop - start <= window.ahead and self._free(blob, other)
                if self._take(blob, other, wants, now) or ahead:
                    chunks.append(other)
                    end = max(end, stop)
                    budget -= layout.chunks.size(other)
                    if budget <= 0:
                        break
            for other in layout.before(chunks[0]) if read_ahead and window.behind else ():
                at, stop = offsets[other], offsets[other] + lengths[other]
                if start - stop > self._gap or end - at > span or budget <= 0:
                    break
                if self._free(blob, other):
                    chunks.insert(0, other)
                    start = min(start, at)
                    budget -= layout.chunks.size(other)
            others = [other for other in chunks if other not in wants]
            self._read_ahead.planned(layout, blob, end, window, others)
        fetch = self._start(blob, start, end, chunks, wants, now, "demand", want.attempts + 1)
        self.counters.fetches += 1
        self.counters.chunks_wanted += len(wants)
        self.counters.chunks_read_ahead += len(chunks) - len(wants)
        return fetch

    def _start(
        self,
        blob: int,
        start: int,
        end: int,
        chunks: Sequence[int],
        wants: dict[int, Want],
        now: float,
        reason: Reason,
        attempt: int = 1,
    ) -> Fetch:
        fetch = Fetch(
            fetch_id=next(self._ids),
            blob=blob,
            offset=start,
            length=end - start,
            chunks=tuple(chunks),
            wants=wants,
            started=now,
            attempt=attempt,
            reason=reason,
            demanded=frozenset(wants),
        )
        self._fetches[fetch.fetch_id] = fetch
        for number in chunks:
            self._fetching[blob, number] = fetch
        self._bytes_in_flight += fetch.length
        self._demanding += 1 if wants else 0
        return fetch

    def _take(self, blob: int, chunk: int, wants: dict[int, Want], now: float) -> bool:
        """Moves the want for *chunk* from the queue into *wants*, if there is one that may have company."""
        want = self._queue.get((blob, chunk))
        if want is None or want.alone or self._blobs[blob].ready(chunk) or self.left.may_take(want, now):
            return False
        del self._queue[blob, chunk]
        wants[chunk] = want
        return True

    def _absent(self, blob: int, chunk: int) -> bool:
        """Whether nothing is stored of *chunk* and nobody is busy with it."""
        key = (blob, chunk)
        busy = (self._fetching, self._queue, self.left, self._delayed, self._verifying)
        if any(key in place for place in busy):
            return False
        chunks = self._blobs[blob]
        return not chunks.ready(chunk) and not chunks.unverified(chunk)

    def _free(self, blob: int, chunk: int) -> bool:
        """Whether it is absent, and no other daemon says that it is fetching it."""
        return self._absent(blob, chunk) and not self._blobs[blob].hinted(chunk)
