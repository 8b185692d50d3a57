"""What is to be fetched while nobody waits: lists of chunks (prefetch), and all that is absent (fill)."""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtiofsd_rafs.runtime.layout import Key, Layout

# So many entries of a list are looked at for neighbours of its first one: lists are in the order of use, and
# files that are used one after the other often lie side by side in another order.
LOOK = 512

# A backlog is not walked for ever in one go: after so many chunks that are there already the caller gets a
# pause.
MAX_SCAN = 4096


class Run(NamedTuple):
    """Chunks with consecutive numbers."""

    blob: int
    first: int
    n_chunks: int
    nodeid: int = 0
    """Of the file whose they are, as a guest names it; 0: not known."""


_WORDS = 4


class Runs:
    """Any number of runs, in a few bytes each: lists may name a hundred thousand files."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._words = array("Q")
        for run in runs:
            self.add(*run)

    def add(self, blob: int, first: int, n_chunks: int, nodeid: int = 0) -> None:
        """Appends one."""
        self._words.extend((blob, first, n_chunks, nodeid))

    def __len__(self) -> int:
        return len(self._words) // _WORDS

    def __getitem__(self, number: int) -> Run:
        return Run(*self._words[number * _WORDS : (number + 1) * _WORDS])

    def __iter__(self) -> Iterator[Run]:
        return (self[number] for number in range(len(self)))

    @property
    def n_chunks(self) -> int:
        """Of all together."""
        return sum(self._words[2::_WORDS])


class ListBacklog:
    """Runs of chunks in the order in which they will be wanted."""

    def __init__(self) -> None:
        self._lists: deque[Runs] = deque()
        self._at = 0  # in the first list
        self._skip = 0  # chunks of that run
        self._again: deque[Key] = deque()

    def add(self, runs: Runs) -> None:
        """Appends *runs*."""
        if len(runs):
            self._lists.append(runs)

    def again(self, key: Key) -> None:
        """*key* is to be fetched once more, before the others."""
        self._again.append(key)

    def clear(self) -> None:
        """Forgets all."""
        self._lists.clear()
        self._at = self._skip = 0
        self._again.clear()

    def __bool__(self) -> bool:
        return bool(self._lists or self._again)

    def head(self, absent: Callable[[int, int], bool]) -> Key | None:
        """The first chunk that is still absent; forgets those before it.

        None with something left: ask again.
        """
        while self._again:
            if absent(*self._again[0]):
                return self._again[0]
            self._again.popleft()
        for _ in range(MAX_SCAN):
            if not self._lists:
                break
            blob, first, n, _nodeid = self._lists[0][self._at]
            if self._skip < n:
                if absent(blob, first + self._skip):
                    return blob, first + self._skip
                self._skip += 1
                continue
            self._skip = 0
            self._at += 1
            if self._at == len(self._lists[0]):
                self._lists.popleft()
                self._at = 0
        return None

    def nodeid(self, key: Key) -> int:
        """The file of *key*, the head; 0: not known."""
        if not self._lists:
            return 0
        blob, first, _, nodeid = self._lists[0][self._at]
        return nodeid if (blob, first + self._skip) == key else 0

    def near(self, key: Key) -> Callable[[int], bool]:
        """Which chunks of the blob of *key*, the head, may go along with it: those that come soon."""
        blob = key[0]
        soon = {chunk for index, chunk in itertools.islice(self._keys(), LOOK) if index == blob}
        return soon.__contains__

    def _keys(self) -> Iterator[Key]:
        yield from self._again
        at, skip = self._at, self._skip
        for runs in self._lists:
            for number in range(at, len(runs)):
                blob, first, n, _ = runs[number]
                for chunk in range(first + skip, first + n):
                    yield blob, chunk
                skip = 0
            at = 0


class FillBacklog:
    """Everything that is absent, blob by blob, by place.

    One pass over the image, begun by :meth:`start`. Chunks that could not be fetched are come back to at its
    end.
    """

    def __init__(self, blobs: Iterable[int], layout: Callable[[int], Layout]) -> None:
        self._all = sorted(blobs)
        self._layout = layout
        self._blobs: deque[int] = deque()
        self._rank = 0
        self._again: deque[Key] = deque()

    def start(self) -> None:
        """Begins a pass at the first chunk."""
        self._blobs = deque(self._all)
        self._rank = 0
        self._again.clear()

    def again(self, key: Key) -> None:
        """*key* is to be fetched once more, after the others."""
        self._again.append(key)

    def clear(self) -> None:
        """Ends the pass."""
        self._blobs.clear()
        self._again.clear()

    def __bool__(self) -> bool:
        return bool(self._blobs or self._again)

    def head(self, absent: Callable[[int, int], bool]) -> Key | None:
        """The first chunk that is still absent; forgets those before it.

        None with something left: ask again.
        """
        for _ in range(MAX_SCAN):
            if not self._blobs:
                break
            blob = self._blobs[0]
            layout = self._layout(blob)
            if self._rank >= len(layout):
                self._blobs.popleft()
                self._rank = 0
                continue
            chunk = layout.at(self._rank)
            if layout.chunks.promised(chunk) and absent(blob, chunk):
                return blob, chunk
            self._rank += 1
        if self._blobs:
            return None
        while self._again:
            if absent(*self._again[0]):
                return self._again[0]
            self._again.popleft()
        return None

    def nodeid(self, _: Key) -> int:
        """Not known."""
        return 0

    def near(self, _: Key) -> Callable[[int], bool]:
        """All that is absent may go along."""
        return lambda _: True


Backlog = ListBacklog | FillBacklog
