"""Sets of times as sorted, disjoint intervals: how long several things overlapped."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Span = tuple[float, float]
"""Start and end, in seconds."""


class Intervals:
    """The union of *spans*. Questions about it take logarithmic time."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        merged: list[Span] = []
        for start, end in sorted(spans):
            if end <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        self.spans = merged
        self._starts = [start for start, _ in merged]
        self._before = [0.0, *accumulate(end - start for start, end in merged)]

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self._before[-1]

    def _until(self, t: float) -> float:
        """Seconds of the set before *t*."""
        i = bisect_right(self._starts, t)
        if i == 0:
            return 0.0
        start, end = self.spans[i - 1]
        return self._before[i - 1] + min(t, end) - start

    def within(self, start: float, end: float) -> float:
        """Seconds of the set between *start* and *end*."""
        return self._until(end) - self._until(start) if end > start else 0.0

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals([*self.spans, *other.spans])

    def __and__(self, other: Intervals) -> Intervals:
        found, i, j = [], 0, 0
        while i < len(self.spans) and j < len(other.spans):
            (a, b), (c, d) = self.spans[i], other.spans[j]
            found.append((max(a, c), min(b, d)))
            if b < d:
                i += 1
            else:
                j += 1
        return Intervals(span for span in found if span[0] < span[1])
