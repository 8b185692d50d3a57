"""The tree of a RAFS v6 image, read in place from its bootstrap.

The readable reference of the Rust reader: same names, same checks, same answers. It does no I/O and keeps
nothing but the buffer. Offsets, counts and names are checked where they are used, so opening an image costs
the same whatever its size.
"""

from __future__ import annotations

import struct
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import attrs

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs import directory, xattr
from virtiofsd_rafs.rafs.directory import Dirent
from virtiofsd_rafs.rafs.inode import Inode, chunk_index_offset, data_block, parse_inode
from virtiofsd_rafs.rafs.records import Buffer, in_range
from virtiofsd_rafs.rafs.superblock import BlobEntry, SuperBlock, parse_blobs, parse_superblock
from virtiofsd_rafs.rafs.xattr import Xattr

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BlobEntry", "ChunkRef", "Dirent", "Inode", "SuperBlock", "Tree", "Xattr"]


class ChunkRef(NamedTuple):
    """``length`` bytes of a file, from byte ``chunk_offset`` of a chunk on.

    ``data_offset`` is where the chunk starts in the blob's uncompressed address space, by the index; the
    chunk map says the same in a well-formed image.
    """

    blob_index: int
    chunk_index: int
    chunk_offset: int
    length: int
    data_offset: int


@attrs.frozen
class Tree:
    """An image whose superblocks, device slots and blob table have been checked."""

    image: Buffer
    superblock: SuperBlock
    blobs: tuple[BlobEntry, ...]

    @classmethod
    def parse(cls, image: Buffer) -> Tree:
        """The tree of the bootstrap *image*. Raises BadImage or UnsupportedFeature."""
        if len(image) > c.BOOTSTRAP_MAX:
            raise BadImage("bootstrap", f"{len(image)} bytes, at most {c.BOOTSTRAP_MAX}")
        superblock = parse_superblock(image)
        tree = cls(image, superblock, parse_blobs(image, superblock))
        if not tree.inode(tree.root).is_dir:
            raise BadImage("superblock.root_nid", f"nid {tree.root} is not a directory")
        return tree

    @property
    def root(self) -> int:
        return self.superblock.root_nid

    def inode(self, nid: int) -> Inode:
        return parse_inode(self.image, self.superblock, nid)

    def lookup(self, parent: Inode, name: bytes) -> tuple[int, int] | None:
        """Nid and DT_* type of *name* in directory *parent*, or None."""
        self._expect(parent, parent.is_dir, "a directory")
        return directory.lookup(self.image, parent, name)

    def entries(self, parent: Inode, cookie: int = 0) -> Iterator[Dirent]:
        """The entries of directory *parent* in order, "." and ".." included, from *cookie* on."""
        self._expect(parent, parent.is_dir, "a directory")
        return directory.entries(self.image, parent, cookie)

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link, which is neither empty nor longer than a block."""
        self._expect(inode, inode.is_symlink, "a symbolic link")
        offset, length = data_block(inode, 0)
        target = bytes(self.image[offset : offset + length])
        if b"\0" in target:
            raise BadImage(f"symlink (nid {inode.nid})", "the target holds NUL", offset=offset)
        return target

    def xattrs(self, inode: Inode) -> Iterator[Xattr]:
        return xattr.xattrs(self.image, inode)

    def xattr_get(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of the attribute with the full name *name* ("user.x"), or None."""
        for prefix, suffix, value in self.xattrs(inode):
            if prefix + suffix == name:
                return value
        return None

    def chunks(self, inode: Inode, offset: int = 0, length: int | None = None) -> Iterator[ChunkRef]:
        """Where bytes ``[offset, offset + length)`` of a chunk-based file are, clipped to its size.

        The stride is the superblock's chunk size: builders write other chunk bits into the inode, for the
        kernel, when all chunks are neighbours, and one index per stride all the same.
        """
        self._expect(inode, inode.is_reg and inode.layout == c.LAYOUT_CHUNK_BASED, "a file in chunks")
        end = inode.size if length is None else min(offset + length, inode.size)
        chunk_size = self.superblock.chunk_size
        while offset < end:
            number, inside = divmod(offset, chunk_size)
            take = min(chunk_size - inside, end - offset)
            index = self.chunk_index(inode, number)
            yield ChunkRef(
                blob_index=index.device_id - 1,
                chunk_index=index.ci_high << 16 | index.ci_low,
                chunk_offset=inside,
                length=take,
                data_offset=index.blkaddr << c.BLOCK_BITS,
            )
            offset += take

    def chunk_index(self, inode: Inode, number: int) -> c.ChunkIndex:
        """The index of the *number*-th chunk of a file; it names a chunk that its blob has."""
        at = chunk_index_offset(inode) + number * c.CHUNK_INDEX.size
        index = c.CHUNK_INDEX.parse(self.image, at)
        if not 0 < index.device_id <= len(self.blobs):
            raise c.CHUNK_INDEX.bad("device_id", f"{index.device_id} (nid {inode.nid}) names no blob", at)
        count = self.blobs[index.device_id - 1].chunk_count
        if (chunk_index := index.ci_high << 16 | index.ci_low) >= count:
            raise c.CHUNK_INDEX.bad("ci_low", f"chunk {chunk_index} of {count} (nid {inode.nid})", at)
        return index

    def inline_data(self, inode: Inode, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[offset, offset + length)``, clipped to the size, of a file that lies in the bootstrap."""
        self._expect(inode, inode.is_reg and inode.layout != c.LAYOUT_CHUNK_BASED, "stored in the bootstrap")
        end = inode.size if length is None else min(offset + length, inode.size)
        parts = []
        while offset < end:
            start, size = data_block(inode, offset >> c.BLOCK_BITS)
            inside = offset % c.BLOCK_SIZE
            take = min(size - inside, end - offset)
            in_range(self.image, f"inode.data (nid {inode.nid})", start, size)
            parts.append(bytes(self.image[start + inside : start + inside + take]))
            offset += take
        return b"".join(parts)

    def chunk_table(self) -> Iterator[c.ChunkRecord]:
        """The records of the chunk table as stored; BadImage for one that names no chunk."""
        start = self.superblock.ext.chunk_table_offset
        for at in range(start, start + self.superblock.ext.chunk_table_size, c.CHUNK_RECORD.size):
            record = c.CHUNK_RECORD.parse(self.image, at)
            if record.blob_index >= len(self.blobs):
                raise c.CHUNK_RECORD.bad("blob_index", f"{record.blob_index} names no blob", at)
            if record.chunk_index >= self.blobs[record.blob_index].chunk_count:
                raise c.CHUNK_RECORD.bad(
                    "chunk_index", f"chunk {record.chunk_index} is not in blob {record.blob_index}", at
                )
            yield record

    def prefetch_nids(self) -> list[int]:
        """The nids of the prefetch table; a single entry, the root, stands for everything."""
        ext = self.superblock.ext
        if not ext.prefetch_table_offset:
            return []
        raw = self.image[ext.prefetch_table_offset : ext.prefetch_table_offset + ext.prefetch_table_size]
        nids = struct.unpack(f"<{len(raw) // 4}I", raw)
        return list(takewhile(bool, nids))

    def _expect(self, inode: Inode, condition: bool, what: str) -> None:
        if not condition:
            raise BadImage(f"inode (nid {inode.nid})", f"is not {what}", offset=inode.offset)
