"""What the link to the source carries, learned from fetches that have ended. No clock: times are told."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

# Fetches that are remembered: enough for all connections, few enough to follow a link that changes.
_LEN = 32
# An estimate out of fewer bytes says more about round trips than about the link.
_MIN_BYTES = 128 << 10


class _Done(NamedTuple):
    started: float
    ended: float
    length: int


class Link:
    """Throughput and round trip of the link, estimated from the latest fetches."""

    def __init__(self) -> None:
        self._done: deque[_Done] = deque(maxlen=_LEN)
        self._rate: float | None = None

    def ended(self, started: float, ended: float, length: int) -> None:
        """A fetch has brought *length* bytes. Times in seconds, *ended* never decreases."""
        if ended > started:
            self._done.append(_Done(started, ended, length))
            self._rate = self._estimate()

    @property
    def rate(self) -> float | None:
        """Bytes per second while it is in use; None: not known yet."""
        return self._rate

    @property
    def round_trip(self) -> float:
        """Seconds that the quickest fetch took: an upper bound of a request's fixed cost."""
        return min((done.ended - done.started for done in self._done), default=0.0)

    def _estimate(self) -> float | None:
        """Bytes by the time in which anything was under way, without a round trip for each time that the
        link woke up from rest: a lone small fetch shows how long a request takes, not what the link carries.
        """
        total = sum(done.length for done in self._done)
        if total < _MIN_BYTES:
            return self._rate
        busy, idle_until, starts = 0.0, float("-inf"), 0
        for done in sorted(self._done):
            if done.started >= idle_until:
                starts += 1
            busy += max(0.0, done.ended - max(done.started, idle_until))
            idle_until = max(idle_until, done.ended)
        # What is left of the quickest one without its bytes is the round trip. A fifth of the time counts in
        # any case: a bound for what a wrong guess can do.
        quickest = min(self._done, key=lambda done: done.ended - done.started)
        trip = max(0.0, quickest.ended - quickest.started - quickest.length * busy / total)
        return total / max(busy - starts * trip, busy / 5)
