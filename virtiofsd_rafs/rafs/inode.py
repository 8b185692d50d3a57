"""Decodes EROFS inodes, compact (32 bytes) and extended (64 bytes)."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import Buffer, align_up

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.superblock import SuperBlock

_LAYOUTS = (c.LAYOUT_FLAT_PLAIN, c.LAYOUT_FLAT_INLINE, c.LAYOUT_CHUNK_BASED)
_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}


@attrs.frozen
class Inode:
    """One inode, checked: what it names lies inside the image. ``offset`` is where it starts in the
    bootstrap, ``body_offset`` where its inline xattrs end.

    ``mtime`` is in seconds and may be negative; an inode that has none (every compact one) shows the
    superblock's build_time. ``rdev`` is in Linux's 32-bit encoding, 0 for anything but devices. ``union`` is
    the raw i_u: a block address (flat layouts), the device number, or the chunk format.
    """

    nid: int
    disk_ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    mtime_nsec: int
    rdev: int
    layout: int
    extended: bool
    union: int
    offset: int
    xattr_size: int

    @property
    def ino(self) -> int:
        """Number for stat: the nid, as in the kernel and in nydusd; hard links share it, and disk_ino may be
        0.
        """
        return self.nid

    @property
    def xattr_offset(self) -> int:
        return self.offset + (64 if self.extended else 32)

    @property
    def body_offset(self) -> int:
        return self.xattr_offset + self.xattr_size

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_reg(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of a device."""
        return (self.rdev >> 8) & 0xFFF, (self.rdev & 0xFF) | ((self.rdev >> 12) & 0xFFF00)

    @property
    def n_blocks(self) -> int:
        """4 KiB blocks that the data takes."""
        return -(-self.size // c.BLOCK_SIZE)


def xattr_body_size(icount: int) -> int:
    """Bytes of inline xattrs that an i_xattr_icount stands for."""
    return c.XATTR_HEADER.size + (icount - 1) * 4 if icount else 0


def parse_inode(buf: Buffer, sb: SuperBlock, nid: int) -> Inode:
    """The inode with number *nid*; its inline xattrs and data lie inside *buf*.

    Raises BadImage. Source: Linux fs/erofs/inode.c, erofs_read_inode.
    """
    offset = sb.meta_offset + nid * c.SLOT_SIZE
    raw: c.CompactInode | c.ExtendedInode = c.COMPACT_INODE.parse(buf, offset)
    mtime, mtime_nsec = sb.build_time, sb.build_time_nsec
    if extended := bool(raw.i_format & c.FORMAT_EXTENDED):
        raw = c.EXTENDED_INODE.parse(buf, offset)
        # The field is signed: times before 1970 are stored as two's complement.
        mtime = raw.i_mtime - (1 << 64 if raw.i_mtime >> 63 else 0)
        mtime_nsec = raw.i_mtime_nsec
    bad = (c.EXTENDED_INODE if extended else c.COMPACT_INODE).bad
    if mtime_nsec >= 1_000_000_000:
        raise bad("i_mtime_nsec", f"{mtime_nsec} (nid {nid}) is not below one second", offset)
    if raw.i_format >> 1 not in _LAYOUTS:
        raise bad("i_format", f"{raw.i_format:#x} (nid {nid}): the layout is unknown", offset)
    if stat.S_IFMT(raw.i_mode) not in _TYPES:
        raise bad("i_mode", f"{raw.i_mode:#o} (nid {nid}): the file type is unknown", offset)
    inode = Inode(
        nid=nid,
        disk_ino=raw.i_ino,
        mode=raw.i_mode,
        uid=raw.i_uid,
        gid=raw.i_gid,
        nlink=raw.i_nlink,
        size=raw.i_size,
        mtime=mtime,
        mtime_nsec=mtime_nsec,
        rdev=raw.i_u if stat.S_ISCHR(raw.i_mode) or stat.S_ISBLK(raw.i_mode) else 0,
        layout=raw.i_format >> 1,
        extended=extended,
        union=raw.i_u,
        offset=offset,
        xattr_size=xattr_body_size(raw.i_xattr_icount),
    )
    if inode.body_offset > len(buf):
        raise bad("i_xattr_icount", f"{raw.i_xattr_icount} (nid {nid}) reaches beyond the bootstrap", offset)
    _check_body(buf, sb, inode)
    return inode


def _check_body(buf: Buffer, sb: SuperBlock, inode: Inode) -> None:
    """Chunk indexes and data that lie in the bootstrap must not reach beyond it."""
    where = f"inode.i_size (nid {inode.nid})"
    if not (inode.is_reg or inode.is_dir or inode.is_symlink):
        return
    if inode.layout == c.LAYOUT_CHUNK_BASED:
        if not inode.is_reg:
            raise BadImage(where, "only regular files have chunks", offset=inode.offset)
        end = chunk_index_offset(inode) + -(-inode.size // sb.chunk_size) * c.CHUNK_INDEX.size
    elif inode.layout == c.LAYOUT_FLAT_PLAIN:
        end = (inode.union << c.BLOCK_BITS) + inode.size
    else:
        tail = inline_start(inode)
        end = inode.body_offset + inode.size - tail
        if tail:
            end = max(end, (inode.union << c.BLOCK_BITS) + tail)
    if inode.is_symlink and not 0 < inode.size <= c.SYMLINK_MAX:
        raise BadImage(where, f"{inode.size} is not the length of a link", offset=inode.offset)
    if end > len(buf):
        raise BadImage(where, "the content reaches beyond the bootstrap", offset=inode.offset)


def inline_start(inode: Inode) -> int:
    """Position in the file from which on the data of a flat inline inode stands behind the inode."""
    return max(inode.n_blocks - 1, 0) << c.BLOCK_BITS


def chunk_index_offset(inode: Inode) -> int:
    """Where the chunk indexes of a chunk-based inode start."""
    return align_up(inode.body_offset, c.CHUNK_INDEX.size)


def data_block(inode: Inode, block: int) -> tuple[int, int]:
    """Offset in the bootstrap and length of data block *block* of a flat inode."""
    length = min(inode.size - (block << c.BLOCK_BITS), c.BLOCK_SIZE)
    if inode.layout == c.LAYOUT_FLAT_INLINE and block == inode.n_blocks - 1:
        return inode.body_offset, length
    return (inode.union + block) << c.BLOCK_BITS, length
