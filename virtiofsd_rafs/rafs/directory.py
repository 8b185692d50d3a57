"""Reads directories: blocks of 12-byte entries, names behind them, sorted over all blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.inode import Inode, data_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.rafs.records import Buffer

# EROFS file types are the FT_* numbers of ext2; index -> DT_* of dirent.h.
_D_TYPES = (0, 8, 4, 2, 6, 1, 12, 10)
# Places per block in a cookie; a block holds at most 4096 // 13 entries.
_COOKIE_SLOTS = 1024


class Dirent(NamedTuple):
    """``next_cookie`` given to entries() goes on behind this entry. ``d_type`` is a DT_* number."""

    name: bytes
    nid: int
    d_type: int
    next_cookie: int


class _Block:
    """One directory block, with every offset checked before it is used."""

    def __init__(self, buf: Buffer, inode: Inode, number: int) -> None:
        self.buf = buf
        self.start, self.length = data_block(inode, number)
        self.where = f"directory (nid {inode.nid}, block {number})"
        first = self._record(0).nameoff
        if first % c.DIRENT.size or first < c.DIRENT.size or first >= self.length:
            raise self._bad(f"the first name offset {first} is impossible")
        self.count = first // c.DIRENT.size

    def _bad(self, message: str) -> BadImage:
        return BadImage(self.where, message, offset=self.start)

    def _record(self, index: int) -> c.DirentRecord:
        if (index + 1) * c.DIRENT.size > self.length:
            raise self._bad(f"entry {index} does not fit")
        return c.DIRENT.parse(self.buf, self.start + index * c.DIRENT.size)

    def entry(self, index: int) -> tuple[bytes, int, int]:
        """Name, nid and DT_* type of entry *index* < count."""
        record = self._record(index)
        begin = record.nameoff
        last = index + 1 == self.count
        end = self.length if last else self._record(index + 1).nameoff
        if not self.count * c.DIRENT.size <= begin < end <= self.length:
            raise self._bad(f"entry {index} has a name from {begin} to {end}")
        name = bytes(self.buf[self.start + begin : self.start + end])
        if last:
            # The last name ends with the block, or with the first NUL of the padding.
            name = name.partition(b"\0")[0]
        if not name or len(name) > c.NAME_MAX or b"\0" in name or b"/" in name:
            raise self._bad(f"entry {index} has the impossible name {name!r}")
        if record.file_type >= len(_D_TYPES):
            raise self._bad(f"entry {index} has the unknown type {record.file_type}")
        return name, record.nid, _D_TYPES[record.file_type]


def entries(buf: Buffer, inode: Inode, cookie: int = 0) -> Iterator[Dirent]:
    """The entries of directory *inode* from *cookie* on, "." and ".." among them; 0 is the start.

    Raises BadImage where the structure breaks, also for a name that is not above the one before it.
    """
    first, index = divmod(cookie, _COOKIE_SLOTS)
    previous = b""
    for number in range(first, inode.n_blocks):
        block = _Block(buf, inode, number)
        while index < block.count:
            name, nid, d_type = block.entry(index)
            if name <= previous:
                raise BadImage(block.where, f"{name!r} is not above {previous!r}", offset=block.start)
            previous = name
            index += 1
            yield Dirent(name, nid, d_type, number * _COOKIE_SLOTS + index)
        index = 0


def lookup(buf: Buffer, inode: Inode, name: bytes) -> tuple[int, int] | None:
    """Nid and DT_* type of *name* in directory *inode*, or None.

    Binary search over the first names of the blocks, then inside one block. Raises BadImage.
    """
    low, high = 0, inode.n_blocks - 1
    found: _Block | None = None
    while low <= high:
        middle = (low + high) // 2
        block = _Block(buf, inode, middle)
        if block.entry(0)[0] <= name:
            found, low = block, middle + 1
        else:
            high = middle - 1
    if found is None:
        return None
    low, high = 0, found.count - 1
    while low <= high:
        middle = (low + high) // 2
        candidate, nid, d_type = found.entry(middle)
        if candidate == name:
            return nid, d_type
        if candidate < name:
            low = middle + 1
        else:
            high = middle - 1
    return None
