"""What is fetched while nobody waits, when, and how much of it at once: prefetch lists, then the fill.

Demand comes first: one connection is always free for it, ranges are short on a slow link, and beside a demand
only as much is under way as keeps the link from standing idle. No I/O and no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.runtime.backlog import FillBacklog, ListBacklog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from virtiofsd_rafs.runtime.backlog import Backlog, Runs
    from virtiofsd_rafs.runtime.layout import Key, Layout
    from virtiofsd_rafs.runtime.link import Link
    from virtiofsd_rafs.runtime.wants import Reason

# What is fetched in the background may keep the link busy for so long, in seconds: a read that comes
# meanwhile waits for it. While somebody waits already, less.
BACKGROUND_S = 0.25
BACKGROUND_BESIDE_DEMAND_S = 0.05
# One of its ranges is no smaller than this, however slow the link, and no larger, however fast.
BACKGROUND_MIN = 64 << 10
BACKGROUND_MAX = 4 << 20
# And until the link is known:
BACKGROUND_UNKNOWN = 256 << 10
# The fill pauses until nobody has waited for data for so long.
FILL_QUIET_S = 1.0
# Bad bytes in the background are fetched again so often; a read that wants them starts anew.
BACKGROUND_TRIES = 3
# Pauses after a failure double up to this: nobody waits, and a registry that is away has enough to do.
RETRY_CAP_S = 60.0


class Load(NamedTuple):
    """What the planner has under way."""

    free: int
    """Connections that are not in use."""
    n_bytes: int
    demand: bool
    """Whether somebody waits."""
    last_demand: float
    """When the last fetch for somebody who waited ended."""


class Picked(NamedTuple):
    """A range to fetch in the background."""

    reason: Reason
    blob: int
    start: int
    end: int
    chunks: list[int]
    """By their place in the blob."""
    nodeid: int
    """The file of the first one that was picked; 0: not known."""


class Background:
    """The backlogs, in their order, and the pauses.

    Args:
        blobs: numbers of all blobs.
        layout: chunks of a blob by place.
        absent: whether nothing is stored of a chunk and nobody here is busy with it.
        hinted: whether some daemon says that it is fetching the chunk; it may have died since.
        link: what it carries.
        gap: bytes that a range may bring for nothing between two chunks.
        max_size: what one range may decode to.
        slots: connections that may be used at once.
        fill_rate: bytes per second of the fill; 0: no limit.
        retry_first_s: the first pause after a failure.
    """

    def __init__(
        self,
        *,
        blobs: Iterable[int],
        layout: Callable[[int], Layout],
        absent: Callable[[int, int], bool],
        hinted: Callable[[int, int], bool],
        link: Link,
        gap: int,
        max_size: int,
        slots: int,
        fill_rate: int,
        retry_first_s: float,
    ) -> None:
        self._layout = layout
        self._absent = absent
        self._hinted = hinted
        self._leaves = True
        self._link = link
        self._gap = gap
        self._max_size = max_size
        self._slots = slots
        self._fill_rate = fill_rate
        self._retry_first_s = retry_first_s
        self._listed = ListBacklog()
        self._everything = FillBacklog(blobs, layout)
        self._fill = FillBacklog(blobs, layout)
        self._paused_until = float("-inf")
        self._failures = 0
        self._fill_at = float("-inf")
        self._tries: dict[Key, int] = {}

    # -- what is wanted -------------------------------------------------------------------------------------

    def prefetch(self, runs: Runs) -> None:
        """Chunks that will be wanted soon, in that order."""
        self._listed.add(runs)

    def prefetch_all(self) -> None:
        """The whole image will be wanted soon."""
        self._everything.start()

    def fill(self, *, leaves: bool = True) -> None:
        """The whole image is to be here, some time.

        Without *leaves* also what other daemons say that they are fetching: those may be dead.
        """
        self._leaves = leaves
        self._fill.start()

    @property
    def prefetching(self) -> bool:
        """Whether a list is left."""
        return bool(self._listed or self._everything)

    @property
    def filling(self) -> bool:
        """Whether the fill has begun and is not through."""
        return bool(self._fill)

    def __bool__(self) -> bool:
        return self.prefetching or self.filling

    def clear(self) -> None:
        """Nothing more."""
        for backlog in (self._listed, self._everything, self._fill):
            backlog.clear()

    # -- what came of it ------------------------------------------------------------------------------------

    def worked(self) -> None:
        """A fetch brought its bytes."""
        self._failures = 0

    def bad(self, reason: Reason, key: Key) -> bool:
        """The bytes of *key* were wrong; whether it is given up."""
        self._tries[key] = self._tries.get(key, 0) + 1
        if self._tries[key] >= BACKGROUND_TRIES:
            del self._tries[key]
            return True
        self._backlog(reason).again(key)
        return False

    def failed(
        self, reason: Reason, keys: Sequence[Key], now: float, jitter: float, *, hopeless: bool
    ) -> None:
        """A fetch brought nothing: its chunks come later, and all of the background pauses."""
        for key in keys:
            self._backlog(reason).again(key)
        pause = min(RETRY_CAP_S, self._retry_first_s * 2.0 ** min(self._failures, 30)) * (0.5 + jitter / 2)
        self._failures += 2 if hopeless else 1
        self._paused_until = max(self._paused_until, now + pause)

    def _backlog(self, reason: Reason) -> Backlog:
        return self._fill if reason == "fill" else self._listed

    # -- what to do -----------------------------------------------------------------------------------------

    def pick(self, load: Load, now: float) -> Picked | None:
        """The next range, if there is room for one."""
        # One connection stays free for whoever comes.
        if load.free < 2 or now < self._paused_until:
            return None
        room = self._room(load)
        if load.n_bytes and room < BACKGROUND_MIN:
            return None
        for reason, backlog in self._open(load, now):
            wanted = self._absent if backlog is self._fill and not self._leaves else self._free
            key = backlog.head(wanted)
            if key is not None:
                return self._range(reason, backlog, key, wanted, max(room, BACKGROUND_MIN), now)
            if backlog:
                return None  # there is more to look at, when the event loop has had its turn
        return None

    def _open(self, load: Load, now: float) -> Iterable[tuple[Reason, Backlog]]:
        """The backlogs whose time has come."""
        for backlog in (self._listed, self._everything):
            if backlog:
                yield "prefetch", backlog
        if self._fill and now >= self._fill_start(load):
            yield "fill", self._fill

    def _fill_start(self, load: Load) -> float:
        if load.demand:
            return float("inf")
        return max(load.last_demand + FILL_QUIET_S, self._fill_at)

    def next_event(self, load: Load) -> float | None:
        """When :meth:`pick` may find something without a new event; None: never."""
        if not self or load.free < 2 or (load.n_bytes and self._room(load) < BACKGROUND_MIN):
            return None
        if self.prefetching:
            return self._paused_until
        start = max(self._fill_start(load), self._paused_until)
        return None if start == float("inf") else start

    def _room(self, load: Load) -> int:
        """Bytes that may be added to what is under way."""
        seconds = BACKGROUND_BESIDE_DEMAND_S if load.demand else BACKGROUND_S
        rate = self._link.rate
        may = BACKGROUND_UNKNOWN if rate is None else int(rate * seconds)
        return may - load.n_bytes

    def _free(self, blob: int, chunk: int) -> bool:
        """Whether it is absent, and no other daemon says that it is fetching it."""
        return self._absent(blob, chunk) and not self._hinted(blob, chunk)

    def _range(
        self,
        reason: Reason,
        backlog: Backlog,
        key: Key,
        wanted: Callable[[int, int], bool],
        room: int,
        now: float,
    ) -> Picked:
        """What goes along with *key*: at most half of the room, so that two ranges keep the link busy."""
        blob, chunk = key
        layout = self._layout(blob)
        offsets, lengths = layout.chunks.offsets, layout.chunks.lengths
        near = backlog.near(key)
        limit = min(max(room // 2, BACKGROUND_MIN), BACKGROUND_MAX)
        size = layout.chunks.size(chunk)
        start, end = offsets[chunk], offsets[chunk] + lengths[chunk]
        chunks = [chunk]
        between: list[int] = []  # absent, and on the way to the next one that is listed
        # Bad bytes before: by itself, so that it harms nobody.
        alone = key in self._tries
        for other in () if alone else layout.after(chunk):
            at, stop = offsets[other], offsets[other] + lengths[other]
            if at - end > self._gap or stop - start > limit or size >= self._max_size:
                break
            if not wanted(blob, other) or (blob, other) in self._tries:
                continue
            between.append(other)
            if near(other):
                chunks += between
                size += sum(map(layout.chunks.size, between))
                between = []
                end = max(end, stop)
        for other in () if alone else layout.before(chunk):
            at, stop = offsets[other], offsets[other] + lengths[other]
            if start - stop > self._gap or end - at > limit or size >= self._max_size:
                break
            if near(other) and wanted(blob, other) and (blob, other) not in self._tries:
                chunks.insert(0, other)
                size += layout.chunks.size(other)
                start = min(start, at)
        if reason == "fill" and self._fill_rate:
            self._fill_at = max(now, self._fill_at) + (end - start) / self._fill_rate
        return Picked(reason, blob, start, end, chunks, backlog.nodeid(key))
