"""While nothing comes from the source, few tries find out whether it is back, whoever waits. No I/O and no
clock.

Each want backs off by itself, and dozens may wait: together they would ask a source that is away dozens of
times a second, and tell as often that it failed. So tries are spaced once several in a row have failed,
whatever they were for; but who comes later has a first try of its own. The first one that succeeds ends that,
and all pauses with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# So many failures in a row are no bad luck of single requests.
FAILURES = 8
# The longest time between two tries: a request that waits until its end is answered if the source is back a
# second before that.
SPACING_CAP_S = 1.0


class Outage:
    """Whether the source is away, and when it may be asked again.

    Args:
        first_s: seconds between the first two tries; doubled up to *cap_s*.
        cap_s: the longest time between two tries.
        rng: numbers in [0, 1), the source of jitter.
    """

    def __init__(self, *, first_s: float, cap_s: float, rng: Callable[[], float]) -> None:
        self._cap_s = min(cap_s, SPACING_CAP_S)
        self._first_s = min(first_s, self._cap_s)
        self._rng = rng
        self._failures = 0
        self._first_failure = 0.0
        self._spacing_s = self._first_s
        self._next_try = float("-inf")

    @property
    def since(self) -> float | None:
        """When the first of the failures was; None while the source delivers."""
        return self._first_failure if self._failures >= FAILURES else None

    @property
    def next_try(self) -> float:
        """When the source may be asked; minus infinity while it delivers."""
        return self._next_try if self._failures >= FAILURES else float("-inf")

    def tried(self, now: float) -> None:
        """The source is asked."""
        if self._failures >= FAILURES:
            self._next_try = now + self._spacing_s * (0.5 + self._rng() / 2)

    def failed(self, now: float) -> None:
        """It did not deliver."""
        self._failures += 1
        if self._failures == 1:
            self._first_failure = now
        if self._failures == FAILURES:
            self._spacing_s = self._first_s
            self.tried(now)
        elif self._failures > FAILURES:
            self._spacing_s = min(self._cap_s, self._spacing_s * 2)

    def ended(self) -> bool:
        """It delivers, or there is reason to think so. Whether it did not before."""
        was = self._failures >= FAILURES
        self._failures = 0
        return was
