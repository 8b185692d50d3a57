"""Lays out and writes a bootstrap from a scanned tree whose chunks are in the blob already.

The order of its parts is that of native/crates/image-builder/src/bootstrap.rs.
"""

from __future__ import annotations

import stat
from typing import IO, TYPE_CHECKING

from tests.reference.scan import SourceInode, in_order
from virtiofsd_rafs.image._bootstrap_head import BUILD_TIME, build_head, metadata_offset
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.reference.blob_writer import BlobWriter

# S_IFMT -> EROFS file type
_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


Entry = tuple[bytes, SourceInode]  # of a directory


class BootstrapWriter:
    """Writes the bootstrap of the tree *root*; *record* describes its only blob (None: no content)."""

    def __init__(
        self,
        root: SourceInode,
        *,
        chunk_size: int,
        compressor: c.Compressor,
        digester: c.Digester,
        blob: BlobWriter,
        record: c.BlobRecord | None,
    ) -> None:
        self._root = root
        self._chunk_size = chunk_size
        self._compressor = compressor
        self._digester = digester
        self._blob = blob
        self._record = record
        self._has_xattr = False
        self._position = 0
        self._meta_offset = metadata_offset(has_blob=record is not None, n_prefetch=0)
        self._chunk_table_offset = self._plan()
        self.size = align_up(self._chunk_table_offset + len(blob.chunks) * c.CHUNK_RECORD.size, c.BLOCK_SIZE)

    def _plan(self) -> int:
        """Gives every inode its number and place; returns the offset behind the last one."""
        offset = self._meta_offset + c.BLOCK_SIZE
        with_blocks = []
        for ino, inode in enumerate(in_order(self._root), start=1):
            inode.ino = ino
            inode.size = _data_size(inode)
            self._has_xattr |= bool(inode.xattrs)
            size = _inode_size(inode) + len(inode.xattrs)
            if inode.is_reg:
                size = align_up(size, c.CHUNK_INDEX.size) + len(inode.chunks) * c.CHUNK_INDEX.size
            elif _layout(inode) == c.LAYOUT_FLAT_INLINE:
                size += inode.size % c.BLOCK_SIZE
                # Inline data must not cross a block; the inode stays in the same one.
                if offset % c.BLOCK_SIZE + size > c.BLOCK_SIZE:
                    offset = align_up(offset, c.BLOCK_SIZE)
            if _n_whole_blocks(inode):
                with_blocks.append(inode)
            inode.offset = offset
            offset = align_up(offset + size, c.SLOT_SIZE)
        self.n_inodes = ino
        self._with_blocks = with_blocks
        offset = align_up(offset, c.BLOCK_SIZE)
        for inode in with_blocks:
            inode.blkaddr = offset >> c.BLOCK_BITS
            offset += _n_whole_blocks(inode) << c.BLOCK_BITS
        return offset

    def write(self, out: IO[bytes]) -> None:
        """Writes the whole bootstrap to *out*, from its start to its end."""
        self._out = out
        head = build_head(
            size=self.size,
            chunk_table_offset=self._chunk_table_offset,
            n_inodes=self.n_inodes,
            root_nid=self._nid(self._root),
            has_xattr=self._has_xattr,
            chunk_size=self._chunk_size,
            compressor=self._compressor,
            digester=self._digester,
            record=self._record,
        )
        self._put(0, head)
        for inode in in_order(self._root):
            self._put(inode.offset, self._inode(inode))
            if _layout(inode) == c.LAYOUT_FLAT_INLINE:
                self._write(self._data(inode)[_n_whole_blocks(inode) << c.BLOCK_BITS :])
            elif inode.is_reg:
                self._put(align_up(self._position, c.CHUNK_INDEX.size), b"".join(self._chunk_indexes(inode)))
        for inode in self._with_blocks:
            data = self._data(inode)
            self._put(inode.blkaddr << c.BLOCK_BITS, data[: _n_whole_blocks(inode) << c.BLOCK_BITS])
        self._put(self._chunk_table_offset, b"")
        for index in range(len(self._blob.chunks)):
            self._write(self._chunk_record(index))
        self._put(self.size, b"")

    def _put(self, offset: int, data: bytes) -> None:
        """Writes *data* at *offset*, which is never before the end of what is there; fills the gap."""
        assert offset >= self._position
        self._write(bytes(offset - self._position))
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._position += len(data)

    def _nid(self, inode: SourceInode) -> int:
        return (inode.offset - self._meta_offset) // c.SLOT_SIZE

    def _inode(self, inode: SourceInode) -> bytes:
        """The inode and its xattrs."""
        st = inode.st
        union = inode.blkaddr
        if inode.is_reg:
            union = c.CHUNK_FORMAT_INDEXES | (self._chunk_size.bit_length() - 1 - c.BLOCK_BITS)
        elif inode.is_device:
            union = st.st_rdev & 0xFFFF_FFFF
        icount = (len(inode.xattrs) - c.XATTR_HEADER.size) // 4 + 1 if inode.xattrs else 0
        i_format = _layout(inode) << 1
        if _is_compact(inode):
            raw = c.COMPACT_INODE.build(
                c.CompactInode(
                    i_format=i_format,
                    i_xattr_icount=icount,
                    i_mode=st.st_mode,
                    i_nlink=inode.nlink,
                    i_size=inode.size,
                    i_reserved=0,
                    i_u=union,
                    i_ino=inode.ino,
                    i_uid=st.st_uid,
                    i_gid=st.st_gid,
                )
            )
        else:
            seconds, nanoseconds = divmod(st.st_mtime_ns, 1_000_000_000)
            raw = c.EXTENDED_INODE.build(
                c.ExtendedInode(
                    i_format=i_format | c.FORMAT_EXTENDED,
                    i_xattr_icount=icount,
                    i_mode=st.st_mode,
                    i_reserved=0,
                    i_size=inode.size,
                    i_u=union,
                    i_ino=inode.ino,
                    i_uid=st.st_uid,
                    i_gid=st.st_gid,
                    i_mtime=seconds & 0xFFFF_FFFF_FFFF_FFFF,
                    i_mtime_nsec=nanoseconds,
                    i_nlink=inode.nlink,
                )
            )
        return raw + inode.xattrs

    def _data(self, inode: SourceInode) -> bytes:
        """What a directory or a link holds."""
        if not inode.is_dir:
            return inode.target
        *full, last = map(self._directory_block, directory_blocks(_entries(inode)))
        return b"".join(block.ljust(c.BLOCK_SIZE, b"\0") for block in full) + last

    def _directory_block(self, nodes: list[Entry]) -> bytes:
        nameoff = len(nodes) * c.DIRENT.size
        records = []
        for name, node in nodes:
            file_type = _FILE_TYPES[stat.S_IFMT(node.mode)]
            records.append(c.DIRENT.build(c.DirentRecord(self._nid(node), nameoff, file_type)))
            nameoff += len(name)
        return b"".join(records) + b"".join(name for name, _ in nodes)

    def _chunk_indexes(self, inode: SourceInode) -> Iterator[bytes]:
        for index in inode.chunks:
            blkaddr = self._blob.chunks[index].uncompressed_offset >> c.BLOCK_BITS
            yield c.CHUNK_INDEX.build(c.ChunkIndex(index & 0xFFFF, 1, index >> 16, blkaddr))

    def _chunk_record(self, index: int) -> bytes:
        info = self._blob.chunks[index]
        return c.CHUNK_RECORD.build(
            c.ChunkRecord(
                digest=self._blob.digest(index),
                blob_index=0,
                flags=c.ChunkFlags.COMPRESSED if info.compressed else 0,
                compressed_size=info.compressed_size,
                uncompressed_size=info.uncompressed_size,
                compressed_offset=info.compressed_offset,
                uncompressed_offset=info.uncompressed_offset,
                file_offset=self._blob.file_offsets[index],
                chunk_index=index,
                crc32=0,
            )
        )


def _is_compact(inode: SourceInode) -> bool:
    """Whether 32 bytes hold everything: build time for mtime, and no device number (nydusd)."""
    st = inode.st
    return (
        st.st_mtime_ns == BUILD_TIME
        and not inode.is_device
        and max(st.st_uid, st.st_gid, inode.nlink) <= 0xFFFF
        and inode.size <= 0xFFFF_FFFF
    )


def _inode_size(inode: SourceInode) -> int:
    return c.COMPACT_INODE.size if _is_compact(inode) else c.EXTENDED_INODE.size


def _entries(inode: SourceInode) -> list[Entry]:
    """Names of a directory with "." and ".." at their place in byte order."""
    assert inode.parent is not None
    return sorted([*inode.children, (b".", inode), (b"..", inode.parent)], key=lambda entry: entry[0])


def directory_blocks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Splits the sorted *entries* of a directory into blocks, of which there is at least one."""
    block: list[Entry] = []
    used = 0
    for entry in entries:
        size = c.DIRENT.size + len(entry[0])
        if used + size > c.BLOCK_SIZE:
            yield block
            block, used = [], 0
        block.append(entry)
        used += size
    yield block


def _data_size(inode: SourceInode) -> int:
    """i_size: of a directory, the bytes up to the end of its last block's names."""
    if inode.is_reg:
        return inode.st.st_size
    if inode.is_symlink:
        return len(inode.target)
    if not inode.is_dir:
        return 0
    *full, last = directory_blocks(_entries(inode))
    return len(full) * c.BLOCK_SIZE + sum(c.DIRENT.size + len(name) for name, _ in last)


def _layout(inode: SourceInode) -> int:
    if inode.is_reg:
        return c.LAYOUT_CHUNK_BASED
    tail = inode.size % c.BLOCK_SIZE
    if tail and _inode_size(inode) + len(inode.xattrs) + tail <= c.BLOCK_SIZE:
        return c.LAYOUT_FLAT_INLINE
    return c.LAYOUT_FLAT_PLAIN


def _n_whole_blocks(inode: SourceInode) -> int:
    """Blocks outside of the inode area that a directory or link takes."""
    if inode.is_reg:
        return 0
    if _layout(inode) == c.LAYOUT_FLAT_INLINE:
        return inode.size >> c.BLOCK_BITS
    return -(-inode.size // c.BLOCK_SIZE)
