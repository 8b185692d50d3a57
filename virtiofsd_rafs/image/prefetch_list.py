"""Lists of what a start reads first, as files: one entry per line, in the order of use.

``path``, or ``path<TAB>offset<TAB>length`` for a part of a file, in bytes. Paths are those inside the image;
directories stand for everything below them. Empty lines mean nothing. This is what ``nydus-image -P fs``
takes, with the parts added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class PrefetchEntry(NamedTuple):
    """A path inside the image, and which bytes of the file; ``length`` is None for all up to the end."""

    path: bytes
    offset: int = 0
    length: int | None = None


def parse_prefetch_list(data: bytes) -> Iterator[PrefetchEntry]:
    """The entries of a list. A line that has no two numbers at its end is a path, whatever is in it."""
    for line in data.split(b"\n"):
        path = line.removesuffix(b"\r")
        if not path:
            continue
        parts = path.rsplit(b"\t", 2)
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            yield PrefetchEntry(parts[0], int(parts[1]), int(parts[2]))
        else:
            yield PrefetchEntry(path)


def format_prefetch_entry(entry: PrefetchEntry) -> bytes:
    """The line that :func:`parse_prefetch_list` reads, with its end."""
    if entry.length is None:
        return entry.path + b"\n"
    return b"%s\t%d\t%d\n" % (entry.path, entry.offset, entry.length)
