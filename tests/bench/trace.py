"""What a boot reads, in small: whole small files here and there, parts of large ones. Always the same."""

from __future__ import annotations

import random
import stat
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtiofsd_rafs.native.frontend import Frontend, TreeEntry

PAGE = 4096
STEP = 128 * 1024
_SHARE = 0.15
_LARGE = 1 << 20


class Part(NamedTuple):
    """A READ of a file: path, offset and length in bytes."""

    path: bytes
    offset: int
    length: int


def boot_like(sizes: Mapping[bytes, int], seed: int = 1) -> Iterator[Part]:
    """READs of about every seventh file of *sizes*, in random order, cut as a guest's read-ahead cuts them.

    Of files of 1 MiB and more, as of libraries, begin and end and one place in every MiB are read.
    """
    rng = random.Random(seed)
    paths = sorted(path for path, size in sizes.items() if size)
    chosen = rng.sample(paths, min(len(paths), max(1, round(_SHARE * len(paths)))))
    for path in chosen:
        size = sizes[path]
        if size < _LARGE:
            starts = list(range(0, size, STEP))
        else:
            last = (size - 1) // PAGE * PAGE
            inside = [at + rng.randrange(_LARGE // PAGE) * PAGE for at in range(0, size, _LARGE)]
            starts = [0, last, *(at for at in inside if at < size)]
        for offset in starts:
            yield Part(path, offset, min(STEP, size - offset))


def file_sizes(tree: Mapping[bytes, TreeEntry]) -> dict[bytes, int]:
    """Path to size of the regular files of a tree that was read through a front-end."""
    return {path: entry.attr.size for path, entry in tree.items() if stat.S_ISREG(entry.attr.mode)}


def replay(fe: Frontend, tree: Mapping[bytes, TreeEntry], parts: Iterator[Part]) -> int:
    """Reads *parts* one after the other; how many bytes came.

    Raises:
        PeerError: a READ was short.
    """
    total = 0
    handles: dict[bytes, int] = {}
    for path, offset, length in parts:
        node = tree[path].nodeid
        if path not in handles:
            handles[path] = fe.open(node)
        got = len(fe.read(node, offset, length, fh=handles[path]))
        if got != length:
            raise PeerError(f"READ of {path!r} at {offset} brought {got} bytes instead of {length}")
        total += got
    return total
