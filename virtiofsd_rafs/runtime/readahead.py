"""How far a fetch reads on behind what is wanted. Pure: learns from what is wanted later, and from reads.

A reader who goes on where an earlier fetch ended gets a window twice as large; everybody else starts with the
first window. That one adapts: what was read ahead for nothing costs the link, what is used saves a round trip
for each chunk.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtiofsd_rafs.runtime.layout import Key

# Read-ahead starts with this part of ``amplify``: most reads of a booting system are small and far apart.
FIRST_WINDOW_SHIFT = 3
# Ends of fetches that are remembered per blob, to recognise who reads on: as many streams as can grow at
# once.
STREAMS = 16


class _Stream(NamedTuple):
    """Where a fetch ended, the read-ahead that it was given (bytes of the blob), and what that brought."""

    end: int
    window: int
    ahead: tuple[int, ...]


class ReadAhead:
    """The windows of all blobs.

    Args:
        amplify: the largest window, in bytes of the blob.
        first_window: what a new reader gets; an eighth of *amplify* when nobody says.
        touched: whether a read was answered from a chunk; None when nobody can tell.
    """

    def __init__(
        self,
        *,
        amplify: int,
        first_window: int | None = None,
        touched: Callable[[Key], bool] | None = None,
    ) -> None:
        self._amplify = amplify
        self._first = amplify >> FIRST_WINDOW_SHIFT if first_window is None else first_window
        self._touched = touched
        self._streams: dict[int, deque[_Stream]] = {}

    def window(self, blob: int, offset: int) -> int:
        """How far to read on from a want at byte *offset*."""
        streams = self._streams.setdefault(blob, deque(maxlen=STREAMS))
        for stream in streams:
            if 0 <= offset - stream.end <= stream.window:
                streams.remove(stream)
                return min(2 * stream.window, self._amplify)
        return self._first

    def planned(self, blob: int, end: int, window: int, ahead: Sequence[int]) -> None:
        """A fetch with *window* ends at byte *end* and brings the chunks *ahead*, which nobody wants yet."""
        streams = self._streams.setdefault(blob, deque(maxlen=STREAMS))
        streams.append(_Stream(end, window, tuple(ahead)))
