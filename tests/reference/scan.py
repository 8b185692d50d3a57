"""Reads a source tree: names, attributes, links and xattrs, everything but the content of files."""

from __future__ import annotations

import errno
import os
import stat
from array import array
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import BuildError
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}


@attrs.define(eq=False)
class SourceInode:
    """One file of whatever type; several names may lead to it.

    ``path`` is the first of its names in order, relative to the source, for reading and for messages.
    ``nlink`` counts the names inside the tree, for a directory 2 plus its sub-directories. ``target`` is what
    a symbolic link holds. ``xattrs`` is the body as it stands on disk. ``chunks`` gets the chunk indexes of a
    regular file; ``size`` is i_size; ``offset`` and ``blkaddr`` are the place in the bootstrap.
    """

    path: bytes
    st: os.stat_result
    nlink: int = 0
    target: bytes = b""
    xattrs: bytes = b""
    children: list[tuple[bytes, SourceInode]] = attrs.field(factory=list)
    parent: SourceInode | None = None
    chunks: array[int] = attrs.field(factory=lambda: array("I"))
    ino: int = 0
    size: int = 0
    offset: int = 0
    blkaddr: int = 0

    @property
    def mode(self) -> int:
        return self.st.st_mode

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.st.st_mode)

    @property
    def is_reg(self) -> bool:
        return stat.S_ISREG(self.st.st_mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.st.st_mode)

    @property
    def is_device(self) -> bool:
        return stat.S_ISCHR(self.st.st_mode) or stat.S_ISBLK(self.st.st_mode)

    def fail(self, reason: str, *, remedy: str = "") -> BuildError:
        """The error about this file."""
        return BuildError(printable(self.path), reason, remedy=remedy)


def printable(path: bytes) -> str:
    """*path* for a message: one line, whatever bytes it has; the root is "."."""
    return ascii(os.fsdecode(path))[1:-1] if not path.isascii() or b"\n" in path else path.decode() or "."


def scan(source: Path) -> SourceInode:
    """The tree of the directory *source*, names sorted by their bytes. Symbolic links are not followed.

    Raises BuildError with the path of what cannot be read or stored.
    """
    top = os.fsencode(source)
    try:
        st = os.stat(top)
    except OSError as e:
        raise BuildError(str(source), os.strerror(e.errno or 0)) from e
    if not stat.S_ISDIR(st.st_mode):
        raise BuildError(str(source), "not a directory")
    root = SourceInode(b"", st, nlink=2, xattrs=_xattrs(top, b""))
    root.parent = root
    links: dict[tuple[int, int], SourceInode] = {}
    pending = [root]
    while pending:
        directory = pending.pop()
        directory.children = _children(top, directory, links)
        pending += [child for _, child in directory.children if child.is_dir]
    return root


def _children(
    top: bytes, directory: SourceInode, links: dict[tuple[int, int], SourceInode]
) -> list[tuple[bytes, SourceInode]]:
    try:
        names = sorted(os.listdir(os.path.join(top, directory.path)))
    except OSError as e:
        raise directory.fail(os.strerror(e.errno or 0)) from e
    children = []
    for name in names:
        path = os.path.join(directory.path, name)
        child = _child(top, path, links)
        if child.is_dir:
            child.parent = directory
            child.nlink = 2
            directory.nlink += 1
        else:
            child.nlink += 1
        children.append((name, child))
    return children


def _child(top: bytes, path: bytes, links: dict[tuple[int, int], SourceInode]) -> SourceInode:
    full = os.path.join(top, path)
    try:
        st = os.lstat(full)
        if stat.S_IFMT(st.st_mode) not in _TYPES:
            raise BuildError(printable(path), f"file type {stat.S_IFMT(st.st_mode):#o} is unknown")
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            known = links.get((st.st_dev, st.st_ino))
            if known is not None:
                return known
        target = os.readlink(full) if stat.S_ISLNK(st.st_mode) else b""
    except OSError as e:
        raise BuildError(printable(path), os.strerror(e.errno or 0)) from e
    inode = SourceInode(path, st, target=target, xattrs=_xattrs(full, path))
    if st.st_nlink > 1 and not inode.is_dir:
        links[st.st_dev, st.st_ino] = inode
    return inode


def in_order(root: SourceInode) -> Iterator[SourceInode]:
    """Every inode once: all children of a directory side by side, then what is below each of them.

    The order decides where inodes and chunks lie, so a directory is read from few blocks, and neighbours in
    the tree are neighbours in the blob.
    """
    yield root
    seen: set[int] = set()
    stack = [root]
    while stack:
        directory = stack.pop()
        for _, child in directory.children:
            if id(child) not in seen:
                # Directories have one name only, so the set stays as small as the number of hard links.
                if child.nlink > 1 and not child.is_dir:
                    seen.add(id(child))
                yield child
        stack.extend(child for _, child in reversed(directory.children) if child.is_dir)


def _xattrs(full: bytes, path: bytes) -> bytes:
    """The inline xattr body of the file at *full*: empty, or header and entries, sorted."""
    try:
        names = os.listxattr(full, follow_symlinks=False)
        values = {os.fsencode(name): os.getxattr(full, name, follow_symlinks=False) for name in names}
    except OSError as e:
        if e.errno == errno.ENOTSUP:
            return b""
        raise BuildError(printable(path), f"extended attributes: {os.strerror(e.errno or 0)}") from e
    try:
        return build_xattrs(values)
    except ValueError as e:
        raise BuildError(printable(path), str(e), remedy="remove the attribute with setfattr -x") from e


def _name_index(name: bytes) -> int | None:
    for index, prefix in c.XATTR_PREFIXES.items():
        # Prefixes with a dot need a suffix, the ACL names are complete.
        if name.startswith(prefix) and (len(name) > len(prefix)) == prefix.endswith(b"."):
            return index
    return None


def build_xattrs(values: dict[bytes, bytes]) -> bytes:
    """The inline xattr body for full name -> value. ValueError for what the format cannot hold."""
    entries = []
    for name, value in values.items():
        index = _name_index(name)
        if index is None:
            raise ValueError(f"RAFS has no room for extended attributes named {printable(name)}")
        if len(name) > c.NAME_MAX or len(value) > c.XATTR_VALUE_MAX:
            raise ValueError(f"the extended attribute {printable(name)} is too long")
        entries.append((index, name[len(c.XATTR_PREFIXES[index]) :], value))
    if not entries:
        return b""
    body = bytearray(c.XATTR_HEADER.build(c.XattrHeader(0, 0)))
    for index, suffix, value in sorted(entries):
        body += c.XATTR_ENTRY.build(c.XattrEntry(len(suffix), index, len(value))) + suffix + value
        body += bytes(-len(body) % 4)
    if (len(body) - c.XATTR_HEADER.size) // 4 + 1 > 0xFFFF:
        raise ValueError("its extended attributes are larger than 256 KiB")
    return bytes(body)
