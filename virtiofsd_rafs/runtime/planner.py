"""Decides what is fetched next. No I/O and no clock: time is an argument, results are told to it.

Chunks that somebody waits for (posts) become *wants*. A want is in exactly one place: in the queue, in the
heap of those that back off, in a fetch, or with a verification of stored bytes. A fetch is one range of one
blob: a wanted chunk, wanted neighbours, and, while connections are free, the absent chunks that follow it in
the blob (read-ahead, in a window that grows while somebody reads on). A chunk is in at most one fetch,
however many posts ask for it.

A failed fetch puts its wants back, later and alone or with other wants, never with read-ahead: a bad
neighbour must not harm them twice. What was only read ahead is forgotten. A want whose deadline has passed is
dropped; the chunk is absent then, and the next post starts anew.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# Two ranges are merged when what lies between them is at most this part of ``amplify`` (as nydusd does it):
# bytes that nobody needs, against a round trip.
GAP_SHIFT = 7
# Read-ahead starts with this part of ``amplify`` and doubles when the next want lies where it would have read
# on: most reads of a booting system are small and far apart, and what is read ahead in vain delays what is
# wanted.
FIRST_WINDOW_SHIFT = 3
# Ends of fetches that are remembered per blob, to recognise who reads on: as many streams as can grow at
# once.
STREAMS = 16
# A server's request to pause is honoured up to this: its mistake must not outlast an outage.
MAX_RETRY_AFTER_S = 30.0
# Errors that another try seldom cures (not found, refused) are tried again too, because credentials are
# renewed and blobs uploaded meanwhile, but more slowly.
HOPELESS_FACTOR = 4.0
# What one fetch may turn into when it is decoded, as a multiple of ``amplify``: an image whose chunks shrink
# a thousandfold must not make a small read decode gigabytes.
MAX_EXPANSION = 8
# How many neighbours are looked at: an image may place any number of chunks at the same offset.
MAX_LOOK = 8192

Key = tuple[int, int]
"""(blob, chunk): a blob's number among all that the daemon serves, and a chunk's number in it."""


class Chunks(Protocol):
    """Places and states of one blob's chunks, as of this moment."""

    @property
    def offsets(self) -> Sequence[int]:
        """Byte offset of each chunk in the blob."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """Stored bytes of each chunk."""
        ...

    def size(self, chunk: int) -> int:
        """Uncompressed bytes of the chunk."""
        ...

    def promised(self, chunk: int) -> bool:
        """Whether the image describes the chunk (numbers may have gaps)."""
        ...

    def ready(self, chunk: int) -> bool:
        """Whether it may be served."""
        ...

    def unverified(self, chunk: int) -> bool:
        """Whether bytes are stored that must be verified first."""
        ...


class Posted(Enum):
    """What became of a post."""

    READY = "ready"  # wake the workers: it is there
    QUEUED = "queued"
    JOINED = "joined"  # somebody waits for it already, or it was read ahead
    VERIFY = "verify"  # stored, to be verified: see Planner.next_verifications
    INVALID = "invalid"  # the image has no such chunk


class Origin(NamedTuple):
    """Who asked first, for the log of fetches."""

    nodeid: int
    file_offset: int


@attrs.define(eq=False)
class Want:
    """A chunk that somebody waits for."""

    key: Key
    origin: Origin
    first_posted: float
    deadline: float
    attempts: int = 0
    alone: bool = False
    """Its bytes were bad: fetch it by itself."""


@attrs.define(eq=False)
class Fetch:
    """A range of a blob to fetch, and the chunks to take from it."""

    fetch_id: int
    blob: int
    offset: int
    length: int
    chunks: tuple[int, ...]
    """By their place in the blob."""
    wants: dict[int, Want]
    """Those chunks of it that somebody waits for; grows while the fetch runs."""
    started: float
    attempt: int
    """1 for the first try."""
    reason: str = "demand"
    demanded: frozenset[int] = frozenset()
    """Chunks that somebody waited for when it was planned; the others were read ahead."""

    def reasons(self) -> list[tuple[int, str]]:
        """Why each of its chunks was fetched."""
        return [(c, "demand" if c in self.demanded else "read-ahead") for c in self.chunks]

    @property
    def origin(self) -> Origin:
        """Who asked first."""
        return next(iter(self.wants.values())).origin


@attrs.define
class Counters:
    """What happened since the start."""

    posts: int = 0
    invalid_posts: int = 0
    fetches: int = 0
    retries: int = 0
    chunks_wanted: int = 0
    chunks_read_ahead: int = 0
    read_ahead_used: int = 0
    """Chunks that were posted while a fetch that read them ahead was under way."""
    expired: int = 0


class Wait(NamedTuple):
    """A chunk that somebody waits for, for people."""

    key: Key
    origin: Origin
    since: float
    attempts: int
    """Tries that have failed."""
    doing: str
    """"fetching", "queued", "backing off", "verifying"."""


class _Stream(NamedTuple):
    """Where a fetch ended, and the read-ahead that it was given; in bytes of the blob."""

    end: int
    window: int


class _Layout:
    """Chunks of a blob in the order of their places. Builders number them so; others are sorted once."""

    __slots__ = ("_order", "_rank", "chunks")

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        offsets = chunks.offsets
        self._order: list[int] | None = None
        self._rank: list[int] = []
        # Numbers that the image does not describe stand at 0 and are skipped later, whatever their place.
        last = 0
        for chunk, offset in enumerate(offsets):
            if chunks.promised(chunk):
                if offset < last:
                    break
                last = offset
        else:
            return
        self._order = sorted(range(len(offsets)), key=offsets.__getitem__)
        self._rank = [0] * len(offsets)
        for rank, chunk in enumerate(self._order):
            self._rank[chunk] = rank

    def after(self, chunk: int) -> Iterable[int]:
        """The described chunks behind *chunk*, nearest first."""
        if self._order is None:
            numbers: Iterable[int] = range(chunk + 1, len(self.chunks.offsets))
        else:
            numbers = itertools.islice(self._order, self._rank[chunk] + 1, None)
        return filter(self.chunks.promised, itertools.islice(numbers, MAX_LOOK))

    def before(self, chunk: int) -> Iterable[int]:
        """The described chunks in front of *chunk*, nearest first."""
        if self._order is None:
            numbers: Iterable[int] = range(chunk - 1, -1, -1)
        else:
            order = self._order
            numbers = (order[rank] for rank in range(self._rank[chunk] - 1, -1, -1))
        return filter(self.chunks.promised, itertools.islice(numbers, MAX_LOOK))


class Planner:
    """See the module's comment.

    *amplify* is the most that a fetch spans beyond its first chunk, *first_window* the read-ahead that it
    starts with (an eighth of that when nobody says). *rng* returns numbers in [0, 1) and is the source of
    jitter.
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
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._blobs = blobs
        self._layouts: dict[int, _Layout] = {}  # made when a blob is first fetched from: start-up is short
        self._amplify = amplify
        self._gap = amplify >> GAP_SHIFT
        self._first_window = amplify >> FIRST_WINDOW_SHIFT if first_window is None else first_window
        self._streams: dict[int, deque[_Stream]] = {}
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
        self._found_ready = False
        self.counters = Counters()

    # -- what happens ---------------------------------------------------------------------------------------

    def post(self, key: Key, now: float, origin: Origin) -> Posted:
        """A worker waits for chunk *key*."""
        self.counters.posts += 1
        chunks = self._blobs.get(key[0])
        if chunks is None or not chunks.promised(key[1]):
            self.counters.invalid_posts += 1
            return Posted.INVALID
        if chunks.ready(key[1]):
            return Posted.READY
        deadline = now + self._io_deadline_s
        waiting = self._queue.get(key) or self._delayed.get(key) or self._verifying.get(key)
        if waiting is not None:
            waiting.deadline = deadline
            return Posted.JOINED
        fetch = self._fetching.get(key)
        if fetch is not None:
            want = fetch.wants.get(key[1])
            if want is None:
                fetch.wants[key[1]] = Want(key, origin, now, deadline)
                self.counters.read_ahead_used += 1
            else:
                want.deadline = deadline
            return Posted.JOINED
        want = Want(key, origin, now, deadline)
        if chunks.unverified(key[1]):
            self._verifying[key] = want
            self._verify_next.append(key)
            return Posted.VERIFY
        self._queue[key] = want
        return Posted.QUEUED

    def verified(self, key: Key, good: bool) -> None:
        """The verification of *key* has ended; bytes that are not good will be fetched."""
        want = self._verifying.pop(key, None)
        if want is not None and not good:
            self._queue[key] = want

    def stored(self, fetch_id: int, bad: Iterable[int], now: float) -> None:
        """A fetch has ended; its chunks are stored, except *bad* ones, whose bytes were wrong."""
        fetch = self._end(fetch_id)
        for chunk in bad:
            want = fetch.wants.get(chunk)
            if want is not None:
                want.alone = True
                self._retry(want, now, self._pause(want))

    def failed(
        self, fetch_id: int, now: float, *, retry_after_s: float | None = None, hopeless: bool = False
    ) -> None:
        """A fetch delivered nothing. *retry_after_s* is what the server asked for."""
        fetch = self._end(fetch_id)
        asked = min(retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        if asked:
            self._paused_until = max(self._paused_until, now + asked)
        for want in fetch.wants.values():
            pause = self._pause(want) * (HOPELESS_FACTOR if hopeless else 1.0)
            self._retry(want, now, max(pause, asked))

    def _end(self, fetch_id: int) -> Fetch:
        fetch = self._fetches.pop(fetch_id)
        for chunk in fetch.chunks:
            del self._fetching[fetch.blob, chunk]
        return fetch

    def _pause(self, want: Want) -> float:
        """Doubles with each try of the want, up to the cap; drawn from its upper half."""
        base = min(self._retry_cap_s, self._retry_first_s * 2.0 ** min(want.attempts, 30))
        return base * (0.5 + self._rng() / 2)

    def _retry(self, want: Want, now: float, pause: float) -> None:
        want.attempts += 1
        if now + pause >= want.deadline:
            self.counters.expired += 1
            return
        self.counters.retries += 1
        self._delayed[want.key] = want
        heapq.heappush(self._delayed_heap, (now + pause, next(self._sequence), want.key))

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
        if now < self._paused_until:
            return []
        fetches = []
        while self._queue and len(self._fetches) < self._connections:
            key, want = next(iter(self._queue.items()))
            del self._queue[key]
            if want.deadline <= now:
                self.counters.expired += 1
            elif self._blobs[key[0]].ready(key[1]):
                self._found_ready = True  # another daemon was quicker
            else:
                fetches.append(self._plan(want, now))
        return fetches

    def take_found_ready(self) -> bool:
        """Whether wanted chunks became ready without us since the last call: the workers must be woken."""
        found, self._found_ready = self._found_ready, False
        return found

    def next_event(self) -> float | None:
        """When :meth:`next_fetches` has something to do without a new event; None: never."""
        if self._queue and len(self._fetches) < self._connections:
            return self._paused_until
        return max(self._delayed_heap[0][0], self._paused_until) if self._delayed_heap else None

    @property
    def in_flight(self) -> int:
        """Fetches under way."""
        return len(self._fetches)

    @property
    def waiting(self) -> int:
        """Chunks that somebody waits for."""
        fetching = sum(len(fetch.wants) for fetch in self._fetches.values())
        return len(self._queue) + len(self._delayed) + len(self._verifying) + fetching

    def waits(self, limit: int) -> list[Wait]:
        """What is waited for now, longest first, at most *limit*."""
        groups = (
            *((fetch.wants.values(), "fetching") for fetch in self._fetches.values()),
            (self._queue.values(), "queued"),
            (self._delayed.values(), "backing off"),
            (self._verifying.values(), "verifying"),
        )
        found = (
            Wait(want.key, want.origin, want.first_posted, want.attempts, doing)
            for wants, doing in groups
            for want in wants
        )
        return heapq.nsmallest(limit, found, key=lambda wait: wait.since)

    # -- how ------------------------------------------------------------------------------------------------

    def _layout(self, blob: int) -> _Layout:
        layout = self._layouts.get(blob)
        if layout is None:
            layout = self._layouts[blob] = _Layout(self._blobs[blob])
        return layout

    def _plan(self, want: Want, now: float) -> Fetch:
        """The fetch for *want*, which has just left the queue."""
        blob, chunk = want.key
        layout = self._layout(blob)
        offsets, lengths = layout.chunks.offsets, layout.chunks.lengths
        start, end = offsets[chunk], offsets[chunk] + lengths[chunk]
        chunks = [chunk]
        wants = {chunk: want}
        if not want.alone:
            for other in layout.before(chunk):
                at, stop = offsets[other], offsets[other] + lengths[other]
                if start - stop > self._gap or end - at > self._amplify:
                    break
                if self._take(blob, other, wants):
                    chunks.insert(0, other)
                    start = min(start, at)
            # With more wants than connections, reading ahead would only make them wait longer.
            room = self._connections - len(self._fetches) - 1
            read_ahead = want.attempts == 0 and len(self._queue) <= room
            budget = self._amplify * MAX_EXPANSION - layout.chunks.size(chunk)
            window = self._window(blob, offsets[chunk])
            for other in layout.after(chunk):
                at, stop = offsets[other], offsets[other] + lengths[other]
                if at - end > self._gap or stop - start > self._amplify:
                    break
                ahead = read_ahead and stop - start <= window and self._absent(blob, other)
                if self._take(blob, other, wants) or ahead:
                    chunks.append(other)
                    end = max(end, stop)
                    budget -= layout.chunks.size(other)
                    if budget <= 0:
                        break
            self._streams[blob].append(_Stream(end, window))
        fetch = Fetch(
            fetch_id=next(self._ids),
            blob=blob,
            offset=start,
            length=end - start,
            chunks=tuple(chunks),
            wants=wants,
            started=now,
            attempt=want.attempts + 1,
            demanded=frozenset(wants),
        )
        self._fetches[fetch.fetch_id] = fetch
        for number in chunks:
            self._fetching[blob, number] = fetch
        self.counters.fetches += 1
        self.counters.chunks_wanted += len(wants)
        self.counters.chunks_read_ahead += len(chunks) - len(wants)
        return fetch

    def _window(self, blob: int, offset: int) -> int:
        """How far to read ahead from a want at byte *offset*: farther, if an earlier fetch led up to it."""
        streams = self._streams.setdefault(blob, deque(maxlen=STREAMS))
        for stream in streams:
            if 0 <= offset - stream.end <= stream.window:
                streams.remove(stream)
                return min(2 * stream.window, self._amplify)
        return self._first_window

    def _take(self, blob: int, chunk: int, wants: dict[int, Want]) -> bool:
        """Moves the want for *chunk* from the queue into *wants*, if there is one that may have company."""
        want = self._queue.get((blob, chunk))
        if want is None or want.alone or self._blobs[blob].ready(chunk):
            return False
        del self._queue[blob, chunk]
        wants[chunk] = want
        return True

    def _absent(self, blob: int, chunk: int) -> bool:
        """Whether nothing is stored of *chunk* and nobody is busy with it."""
        key = (blob, chunk)
        if key in self._fetching or key in self._queue or key in self._delayed or key in self._verifying:
            return False
        chunks = self._blobs[blob]
        return not chunks.ready(chunk) and not chunks.unverified(chunk)
