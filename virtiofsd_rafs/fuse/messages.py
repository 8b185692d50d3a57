"""Building requests and taking replies apart: what is of variable length around the structures."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.fuse.structs import Dirent, Direntplus, EntryOut, InHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.fuse.wire import Buffer

_ALIGN = 8


def build_request(
    opcode: int,
    nodeid: int,
    payload: bytes = b"",
    *,
    unique: int,
    uid: int = 0,
    gid: int = 0,
    pid: int = 1,
    len_: int | None = None,
) -> bytes:
    """In header and *payload*; *len_* overrides the header's length, so that it can lie."""
    length = InHeader.SIZE + len(payload) if len_ is None else len_
    header = InHeader(len=length, opcode=opcode, unique=unique, nodeid=nodeid, uid=uid, gid=gid, pid=pid)
    return header.pack() + payload


def name_arg(name: str | bytes) -> bytes:
    """A file name as an argument: its bytes and a NUL."""
    return os.fsencode(name) + b"\0"


@attrs.frozen
class DirEntry:
    """An entry of READDIR or, then with ``entry``, of READDIRPLUS. ``type`` is a ``DT_*`` number."""

    ino: int
    off: int
    type: int
    name: bytes
    entry: EntryOut | None = None


def parse_dirents(data: Buffer, *, plus: bool) -> Iterator[DirEntry]:
    """The entries in the reply to READDIR, or to READDIRPLUS when *plus*.

    Raises:
        ValueError: an entry is cut off, has no name, or its name holds a slash or a NUL.
    """
    at = 0
    while at < len(data):
        entry = None
        start = at
        if plus:
            wide = Direntplus.unpack(data, at)
            entry, dirent = wide.entry_out, wide.dirent
            at += Direntplus.SIZE
        else:
            dirent = Dirent.unpack(data, at)
            at += Dirent.SIZE
        name = bytes(data[at : at + dirent.namelen])
        if not name or len(name) != dirent.namelen or b"/" in name or b"\0" in name:
            raise ValueError(
                f"directory entry at byte {start} has the name {name!r}, length {dirent.namelen}"
            )
        at += -(-(at - start + dirent.namelen) // _ALIGN) * _ALIGN - (at - start)
        if at > len(data):
            raise ValueError(
                f"directory entry at byte {start} is cut off: its padding ends at {at} of {len(data)}"
            )
        yield DirEntry(dirent.ino, dirent.off, dirent.type, name, entry)


def build_dirent(ino: int, off: int, type_: int, name: bytes, entry: EntryOut | None = None) -> bytes:
    """An entry as a server builds it, for READDIRPLUS when *entry* is given."""
    dirent = Dirent(ino=ino, off=off, namelen=len(name), type=type_)
    head = dirent.pack() if entry is None else Direntplus(entry_out=entry, dirent=dirent).pack()
    return (head + name).ljust(-(-(len(head) + len(name)) // _ALIGN) * _ALIGN, b"\0")


def parse_xattr_names(data: Buffer) -> list[bytes]:
    """The names in the reply to LISTXATTR.

    Raises:
        ValueError: the list does not end with a NUL, or a name is empty.
    """
    if not data:
        return []
    names = bytes(data).split(b"\0")
    if names.pop() or not all(names):
        raise ValueError("the list of extended attributes is malformed")
    return names


def mode_to_dtype(mode: int) -> int:
    """The ``DT_*`` number for a mode (Linux include/linux/fs_types.h: the file type's four bits)."""
    return stat.S_IFMT(mode) >> 12
