"""What the planner needs to know of a blob's chunks, and their order by place."""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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

    def hinted(self, chunk: int) -> bool:
        """Whether some daemon says that it is fetching the chunk; it may have died since."""
        ...


class Layout:
    """Chunks of a blob in the order of their places. Builders number them so; others are sorted once."""

    __slots__ = ("_order", "_rank", "chunks")

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        offsets = chunks.offsets
        self._order: list[int] | None = None
        self._rank: list[int] = []
        if all(map(operator.le, offsets, itertools.islice(offsets, 1, None))):
            return
        # Numbers that the image does not describe stand at 0 and are skipped later, whatever their place.
        described = [offset for chunk, offset in enumerate(offsets) if chunks.promised(chunk)]
        if all(map(operator.le, described, itertools.islice(described, 1, None))):
            return
        self._order = sorted(range(len(offsets)), key=offsets.__getitem__)
        self._rank = [0] * len(offsets)
        for rank, chunk in enumerate(self._order):
            self._rank[chunk] = rank

    def __len__(self) -> int:
        return len(self.chunks.offsets)

    def at(self, rank: int) -> int:
        """The chunk that is the *rank*-th by its place."""
        return rank if self._order is None else self._order[rank]

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
