"""What a registry sent, and whether it was needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.sim.replies import Record

# Bars: bytes sent by bytes needed, and what the daemon's processes may use together (they use 45 MiB).
STORM = 1.2
MEMORY_KIB = 80 << 10

# Faults whose replies bring nothing that can be used, or more than was asked for.
_BENDING = frozenset(
    (
        *("cut", "status", "throttle", "expire-tokens", "ignore-range", "short-body", "long-body"),
        *("wrong-range", "no-content-range", "416", "corrupt", "slow-loris", "stall", "hold", "reset"),
    )
)


@attrs.frozen
class Traffic:
    """Requests for content, as the registry saw them."""

    whole: list[Record]
    """Answered with what was asked for."""
    bent: list[Record]
    """Met by a fault that spoils the answer."""

    @classmethod
    def of(cls, records: Sequence[Record], span: tuple[int, int] | None = None) -> Self:
        """What *records* tell, perhaps only of those that begin in *span* of the blob."""
        content = [
            r
            for r in records
            if r.where in ("blob", "storage") and r.method == "GET" and r.span is not None
            if span is None or span[0] <= r.span[0] <= span[1]
        ]
        bent = [r for r in content if not _BENDING.isdisjoint(r.faults)]
        return cls([r for r in content if r not in bent and r.status in (200, 206)], bent)

    @property
    def sent(self) -> int:
        """Bytes of content in whole answers."""
        return sum(r.sent for r in self.whole)

    @property
    def needed(self) -> int:
        """Bytes of the blob that were asked for at least once."""
        return covered(self.whole)


def covered(records: Sequence[Record]) -> int:
    """Bytes that lie in the range of at least one of *records*."""
    total, end = 0, -1
    for first, last in sorted(r.span for r in records if r.span is not None):
        total += max(0, last - max(first - 1, end))
        end = max(end, last)
    return total
