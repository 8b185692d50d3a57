"""How far a fetch reads on around what is wanted. Pure: learns from what is wanted later, and from reads.

A byte that is read ahead costs its time on the link, a chunk that was read ahead and is used saves a round
trip. So what is gained is counted in bytes that the link carries in one round trip (the bandwidth-delay
product):

* A reader who goes on where an earlier fetch ended gets a window twice as large, on a fast link beyond
  ``amplify``.
* Everybody else gets the first window: about one round trip of the link.
* When wants have come from everywhere in a blob, it is taken for one that is read throughout, in whatever
  order, and each want brings its whole surroundings.
* Otherwise, when read-ahead brings more bytes for nothing than it saves, the first window shrinks, down to
  none, and grows again when wants keep falling where it would have read.

The numbers were chosen with ``scripts/bench model``.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtiofsd_rafs.runtime.layout import Layout
    from virtiofsd_rafs.runtime.link import Link

# The first window is no smaller than this part of ``amplify`` unless it is wasted: most reads of a booting
# system are small and far apart.
FIRST_WINDOW_SHIFT = 3
# Ends of fetches that are remembered per blob, to recognise who reads on: as many streams as can grow at
# once.
STREAMS = 16
# Over shorter round trips than this, in seconds, a request is not worth many bytes, however fast the link.
LONG_TRIP_S = 0.01
# What the link carries in this time may be read ahead of somebody who reads on, up to so many times
# ``amplify``: on a fast link a request costs more than its bytes.
STREAM_S = 0.05
STREAM_FACTOR = 4
# A blob is read throughout when this share of its regions (of ``amplify`` bytes) had a want of its own, after
# at least so many: more than a boot makes.
THROUGHOUT = 0.4
THROUGHOUT_WANTS = 25
# What was read ahead is judged when so many fetches have come after it.
JUDGED_AFTER = 32
# So many first windows may be wasted (or saved) before the first window changes.
PATIENCE = 8
# The first window halves so often before nothing is left of it.
LEVELS = 3


class Window(NamedTuple):
    """Bytes of the blob that may be read beyond a want."""

    ahead: int
    behind: int = 0
    """In front of it, that is, at smaller offsets."""


class _Stream(NamedTuple):
    """Where a fetch ended, and the read-ahead that it was given, in bytes of the blob."""

    end: int
    window: int


class _Ahead(NamedTuple):
    """Chunks that a fetch read ahead."""

    blob: int
    lengths: Sequence[int]
    """Of all chunks of the blob."""
    chunks: tuple[int, ...]


@attrs.define
class _Blob:
    """What is known of the readers of a blob."""

    streams: deque[_Stream] = attrs.field(factory=lambda: deque(maxlen=STREAMS))
    wants: int = 0
    """Those that nobody led up to."""
    regions: set[int] = attrs.field(factory=set)
    """Where they were."""


class ReadAhead:
    """The windows of all blobs.

    Args:
        amplify: the largest first window, in bytes of the blob; 0: nothing is read ahead.
        link: what it carries.
        first_window: what a new reader gets, always; None: as the link and the reads suggest.
        touched: per blob one byte for each chunk, not 0 when a read was answered from it; None when nobody
            can tell.
    """

    def __init__(
        self,
        *,
        amplify: int,
        link: Link,
        first_window: int | None = None,
        touched: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._amplify = amplify
        self._link = link
        self._fixed = first_window
        self._touched = touched
        self._blobs: defaultdict[int, _Blob] = defaultdict(_Blob)
        self._ahead: deque[_Ahead] = deque()
        self._level = 0
        self._score = 0.0

    @property
    def level(self) -> int:
        """How often the first window is halved; LEVELS: there is none."""
        return self._level

    def window(self, layout: Layout, blob: int, offset: int, n_bytes: int = 0) -> Window:
        """How far to read around a want at byte *offset*, while *n_bytes* are under way for others who wait.

        When those fill the link for a round trip, nobody's round trip leaves it idle, and bytes that may be
        for nothing make the others wait: only who reads on gets more than what is wanted.
        """
        if not self._amplify:
            return Window(0)
        known = self._blobs[blob]
        whole = self._first()
        first = 0 if self._level >= LEVELS else whole >> self._level
        for stream in known.streams:
            # Who was given less than a whole first window is recognised by where that would have led.
            if 0 <= offset - stream.end <= max(stream.window, whole):
                known.streams.remove(stream)
                if stream.window < whole:
                    self._judge(self._trip_bytes())  # it would have saved this fetch
                return Window(min(2 * max(stream.window, first), self._longest()))
        known.wants += 1
        known.regions.add(offset // self._amplify)
        if self._fixed is None:
            if n_bytes >= max(self._trip_bytes(), self._amplify >> FIRST_WINDOW_SHIFT):
                return Window(0)
            if self._throughout(layout, known):
                return Window(self._amplify, self._amplify)
        return Window(first)

    def planned(self, layout: Layout, blob: int, end: int, window: Window, ahead: Sequence[int]) -> None:
        """A fetch with *window* ends at byte *end* and brings the chunks *ahead*, which nobody wants yet."""
        known = self._blobs[blob]
        known.streams.append(_Stream(end, window.ahead))
        touched = self._touched
        if touched is None or self._fixed is not None:
            return
        self._ahead.append(_Ahead(blob, layout.chunks.lengths, tuple(ahead)))
        if len(self._ahead) > JUDGED_AFTER:
            blob, lengths, chunks = self._ahead.popleft()
            wasted = [lengths[chunk] for chunk in chunks if not touched[blob][chunk]]
            self._judge((len(chunks) - len(wasted)) * self._trip_bytes() - sum(wasted))

    def followed(self, layout: Layout, blob: int, offset: int, end: int) -> None:
        """A want at byte *offset* was fetched by another daemon: whoever reads on from *end* goes on, too."""
        window = self.window(layout, blob, offset)
        self._blobs[blob].streams.append(_Stream(end, window.ahead))

    def _judge(self, gain: float) -> None:
        """Read-ahead has saved (or, if negative, cost) *gain* bytes."""
        bound = PATIENCE * max(self._amplify >> FIRST_WINDOW_SHIFT, self._trip_bytes())
        self._score = max(-bound, min(self._score + gain, bound))
        if self._score <= -bound and self._level < LEVELS:
            self._level += 1
            self._score = 0.0
        elif self._score >= bound and self._level > 0:
            self._level -= 1
            self._score = 0.0

    def _trip_bytes(self) -> float:
        """What the link carries in one round trip; the smallest first window while that is not known."""
        rate = self._link.rate
        return (self._amplify >> FIRST_WINDOW_SHIFT) if rate is None else rate * self._link.round_trip

    def _first(self) -> int:
        if self._fixed is not None:
            return self._fixed
        window = self._amplify >> FIRST_WINDOW_SHIFT
        trip = self._trip_bytes() if self._link.round_trip >= LONG_TRIP_S else 0.0
        while 0 < window < self._amplify and 1.5 * window <= trip:
            window *= 2
        return window

    def _longest(self) -> int:
        rate = self._link.rate
        if rate is None:
            return self._amplify
        return max(self._amplify, min(int(rate * STREAM_S), STREAM_FACTOR * self._amplify))

    def _throughout(self, layout: Layout, known: _Blob) -> bool:
        if known.wants < THROUGHOUT_WANTS:
            return False
        last = layout.at(len(layout) - 1)
        total = layout.chunks.offsets[last] + layout.chunks.lengths[last]
        return len(known.regions) * self._amplify >= THROUGHOUT * total
