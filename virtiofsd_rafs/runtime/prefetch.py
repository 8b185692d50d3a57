"""Lists of files that will be wanted, as runs of chunks.

A list has one path per line, absolute in the image. A directory stands for all files below it. Behind a TAB
an offset and behind another one a length may follow: then only those bytes of the file are meant, as
``virtiofsd-rafs record`` writes them. Empty lines and lines that begin with ``#`` are passed over.

Everything here is for a thread, and lets other threads in often: lists may be long, and the event loop
answers meanwhile.
"""

from __future__ import annotations

import posixpath
import time
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.native.rafs import RUN_WORDS, NativeTree
from virtiofsd_rafs.runtime.backlog import Runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from mmap import mmap

# Node ids that a guest uses are numbers of inodes in the image, this much larger; the root is 1.
NID_BIAS = 2
# As many as Linux follows in one look-up.
_MAX_LINKS = 40
# After so many lines the other threads get their turn.
_BATCH = 100
_TURN_S = 0.0005


class Listed(NamedTuple):
    """A line of a list; *length* None: to the end."""

    path: bytes
    offset: int = 0
    length: int | None = None


class Resolved(NamedTuple):
    """What a list means in one image."""

    runs: Runs
    everything: bool
    """The list names the root: the whole image."""
    missing: list[bytes]
    """Paths that the image does not have."""


def parse_list(data: bytes) -> tuple[list[Listed], list[int]]:
    """The entries of a list, and the numbers of the lines that make no sense."""
    bad: list[int] = []
    return list(iterate_list(data, bad)), bad


def iterate_list(data: bytes, bad: list[int]) -> Iterator[Listed]:
    """The entries of a list, one after the other; *bad* gets the numbers of lines that make no sense."""
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        if not line.strip() or line.startswith(b"#"):
            continue
        path, *place = line.split(b"\t")
        if not path.startswith(b"/") or b"\0" in path or len(place) > 2:
            bad.append(number)
            continue
        # A number that is longer than any offset is not worth reading.
        if not all(1 <= len(each) <= 20 and each.isdigit() for each in place):
            bad.append(number)
            continue
        yield Listed(path, *(int(each) for each in place))


def format_list(entries: Iterable[Listed]) -> bytes:
    """The list that :func:`parse_list` reads.

    Names with a line feed or a TAB cannot be said and are left out.
    """
    lines = []
    for path, offset, length in entries:
        if b"\n" in path or b"\t" in path:
            continue
        lines.append(path if length is None and not offset else b"%s\t%d\t%d" % (path, offset, length or 0))
    return b"".join(line + b"\n" for line in lines)


class _Lookup:
    """Finds paths, following symbolic links. Directories are remembered: neighbours in a list share them."""

    def __init__(self, tree: NativeTree) -> None:
        self._tree = tree
        self._directories: dict[bytes, int | None] = {b"/": tree.root}

    def find(self, path: bytes) -> int | None:
        """The node id behind *path*, or None."""
        return self._find(posixpath.normpath(b"/" + path.lstrip(b"/")), _MAX_LINKS)

    def _find(self, path: bytes, links: int) -> int | None:
        known = self._directories.get(path, -1)
        if known != -1:
            return known
        head, name = posixpath.split(path)
        parent_nid = self._find(head, links)
        found = None
        if parent_nid is not None:
            parent = self._tree.inode(parent_nid)
            entry = self._tree.lookup(parent, name) if parent.is_dir else None
            found = entry[0] if entry is not None else None
        if found is not None:
            inode = self._tree.inode(found)
            if inode.is_symlink:
                target = posixpath.normpath(posixpath.join(head, self._tree.readlink(inode)))
                found = self._find(b"/" + target.lstrip(b"/"), links - 1) if links else None
            elif inode.is_dir:
                self._directories[path] = found
        return found


def resolve(image: bytes | mmap, entries: Iterable[Listed]) -> Resolved:
    """What *entries* mean in the bootstrap *image*. Raises BadImage."""
    tree = NativeTree(image)
    lookup = _Lookup(tree)
    runs = Runs()
    missing = []
    for number, (path, offset, length) in enumerate(entries, 1):
        if number % _BATCH == 0:
            time.sleep(_TURN_S)
        nid = lookup.find(path)
        if nid is None:
            missing.append(path)
        elif nid == tree.root:
            return Resolved(runs, True, missing)
        else:
            _add(runs, tree, nid, offset, length)
    return Resolved(runs, False, missing)


def resolve_table(image: bytes | mmap) -> Resolved:
    """What the image's own prefetch table means. Raises BadImage."""
    tree = NativeTree(image)
    runs = Runs()
    for number, nid in enumerate(tree.prefetch_nids(), 1):
        if number % _BATCH == 0:
            time.sleep(_TURN_S)
        if nid == tree.root:
            return Resolved(runs, True, [])
        _add(runs, tree, nid, 0, None)
    return Resolved(runs, False, [])


def _add(runs: Runs, tree: NativeTree, nid: int, offset: int, length: int | None) -> None:
    """Appends what *nid* has to *runs*."""
    words = tree.run_words(nid, offset, length)
    for number, at in enumerate(range(0, len(words), RUN_WORDS), 1):
        if number % (_BATCH * 8) == 0:
            time.sleep(_TURN_S)
        found, _, blob, first, n = words[at : at + RUN_WORDS]
        runs.add(blob, first, n, found + NID_BIAS)
