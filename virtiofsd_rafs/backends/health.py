"""Whether a place is worth a request: it rests after failures, ever longer, and is then probed by one real
request at a time. No I/O; time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

from enum import Enum

# The first rest after a failure; it doubles with each failed probe, up to the cap. A place that restarts is
# back within seconds, and one that is away costs one request a minute.
REST_FIRST_S = 2.0
REST_CAP_S = 60.0


class State(Enum):
    """What to do with a place."""

    WELL = "well"
    DUE = "due"  # it has rested: one request may find out whether it is well again
    RESTING = "resting"


class Health:
    """The health of one place.

    Args:
        failure_limit: failures in a row that make it rest.
        first_s: the first rest.
        cap_s: the longest one.
    """

    def __init__(
        self, *, failure_limit: int = 1, first_s: float = REST_FIRST_S, cap_s: float = REST_CAP_S
    ) -> None:
        self._failure_limit = max(1, failure_limit)
        self._first_s = first_s
        self._cap_s = max(cap_s, first_s)
        self._failures = 0
        self._rest_s = 0.0
        self._until = 0.0
        self._probing = False
        self._failed_at = float("-inf")

    def state(self, now: float) -> State:
        """What to do at *now*."""
        if self._failures < self._failure_limit:
            return State.WELL
        return State.RESTING if self._probing or now < self._until else State.DUE

    def rests_for(self, now: float) -> float:
        """Seconds of rest that are left; 0 for a place that is well or due."""
        return max(0.0, self._until - now) if self._failures >= self._failure_limit else 0.0

    def probe(self) -> None:
        """A request finds out whether it is well; until its end, nobody else tries."""
        self._probing = True

    def probed(self) -> None:
        """The probe has ended, whatever it found."""
        self._probing = False

    def succeeded(self, began: float | None = None) -> None:
        """It answered as it should, to a request that *began* then (None: a moment ago).

        What began before the last failure proves nothing.
        """
        if began is not None and began <= self._failed_at:
            return
        self._failures = 0
        self._rest_s = 0.0

    def failed(self, now: float, *, at_least_s: float = 0.0) -> None:
        """It did not, at *now*. *at_least_s*: how long it has to rest, also after a single failure."""
        self._failures += 1
        self._failed_at = now
        if at_least_s:
            self._failures = max(self._failures, self._failure_limit)
        if self._failures < self._failure_limit:
            return
        # Requests that were under way together fail together: that is one failure.
        if now >= self._until:
            self._rest_s = min(self._cap_s, self._rest_s * 2 or self._first_s)
        self._until = max(self._until, now + max(self._rest_s, at_least_s))
