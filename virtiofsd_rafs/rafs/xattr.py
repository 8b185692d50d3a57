"""Reads the extended attributes that stand inline behind an inode."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import Buffer, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.rafs.inode import Inode


class Xattr(NamedTuple):
    """``prefix + suffix`` is the full name."""

    prefix: bytes
    suffix: bytes
    value: bytes


def xattrs(buf: Buffer, inode: Inode) -> Iterator[Xattr]:
    """The attributes of *inode* in stored order. Raises BadImage.

    Source: Linux fs/erofs/xattr.c; RAFS has no shared xattrs and no long prefixes.
    """
    if not inode.xattr_size:
        return
    where = f"xattr (nid {inode.nid})"
    end = inode.body_offset
    header = c.XATTR_HEADER.parse(buf, inode.xattr_offset)
    if header.h_shared_count:
        raise BadImage(where, "shared attributes, which RAFS does not have", offset=inode.xattr_offset)
    offset = inode.xattr_offset + c.XATTR_HEADER.size
    while offset < end:
        entry = c.XATTR_ENTRY.parse(buf, offset)
        prefix = c.XATTR_PREFIXES.get(entry.e_name_index)
        if prefix is None:
            raise BadImage(where, f"the name index {entry.e_name_index} is unknown", offset=offset)
        name_offset = offset + c.XATTR_ENTRY.size
        value_offset = name_offset + entry.e_name_len
        value_end = value_offset + entry.e_value_size
        if value_end > end:
            raise BadImage(where, f"an attribute ends at {value_end}, all of them at {end}", offset=offset)
        suffix = bytes(buf[name_offset:value_offset])
        # A prefix with a dot needs a suffix, the ACL names have none.
        if bool(suffix) != prefix.endswith(b".") or b"\0" in suffix or len(prefix + suffix) > c.NAME_MAX:
            raise BadImage(where, f"the name {prefix + suffix!r} is impossible", offset=offset)
        yield Xattr(prefix, suffix, bytes(buf[value_offset:value_end]))
        offset = align_up(value_end, 4)
