"""A small tree that answers FUSE requests, for the simulated back-end."""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.fuse import Opcode, build_dirent, mode_to_dtype
from virtiofsd_rafs.fuse.structs import (
    Attr,
    AttrOut,
    EntryOut,
    GetxattrIn,
    GetxattrOut,
    InHeader,
    InitIn,
    InitOut,
    Kstatfs,
    LseekIn,
    LseekOut,
    OutHeader,
    ReadIn,
    StatfsOut,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.define
class Node:
    """A file, directory or link; ``children`` of a directory by name."""

    ino: int
    mode: int
    data: bytes = b""
    children: dict[bytes, int] = attrs.field(factory=dict)
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)

    def attr(self) -> Attr:
        return Attr(ino=self.ino, mode=self.mode, size=len(self.data), nlink=1, blksize=4096)

    def entry(self) -> EntryOut:
        return EntryOut(nodeid=self.ino, attr=self.attr(), entry_valid=1000, attr_valid=1000)


def sample() -> dict[int, Node]:
    """A root with a file of 300 000 bytes, an empty one, a link, and a directory with 300 small files."""
    nodes = [
        Node(1, stat.S_IFDIR | 0o755, children={b"big": 2, b"empty": 3, b"link": 4, b"many": 5}),
        Node(
            2,
            stat.S_IFREG | 0o644,
            bytes(i * 7 % 251 for i in range(300_000)),
            xattrs={b"user.a": b"1", b"user.b": b""},
        ),
        Node(3, stat.S_IFREG | 0o600),
        Node(4, stat.S_IFLNK | 0o777, b"many/0"),
        Node(5, stat.S_IFDIR | 0o700, children={b"%d" % i: 100 + i for i in range(300)}),
        *(Node(100 + i, stat.S_IFREG | 0o644, b"%d\n" % i * i) for i in range(300)),
    ]
    return {node.ino: node for node in nodes}


@attrs.define
class FuseTree:
    """Handler for ``BackendSim``."""

    nodes: dict[int, Node] = attrs.field(factory=sample)
    seen: list[Opcode] = attrs.field(factory=list)

    def __call__(self, request: bytes) -> bytes | None:
        header = InHeader.unpack(request)
        assert header.len == len(request)
        opcode = Opcode(header.opcode)
        self.seen.append(opcode)
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
            return None
        try:
            body, error = self._answer(opcode, header.nodeid, request[InHeader.SIZE :]), 0
        except OSError as e:
            body, error = b"", -(e.errno or errno.EIO)
        return OutHeader(len=OutHeader.SIZE + len(body), error=error, unique=header.unique).pack() + body

    def _answer(self, opcode: Opcode, nodeid: int, payload: bytes) -> bytes:
        if opcode is Opcode.INIT:
            asked = InitIn.unpack(payload)
            return InitOut(major=7, minor=min(asked.minor, 38), max_pages=256, flags=asked.flags).pack()
        if opcode is Opcode.DESTROY:
            return b""
        node = self.nodes.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, "no such node")
        match opcode:
            case Opcode.LOOKUP:
                child = node.children.get(payload.removesuffix(b"\0"))
                return (
                    EntryOut(entry_valid=1000).pack() if child is None else self.nodes[child].entry().pack()
                )
            case Opcode.GETATTR:
                return AttrOut(attr_valid=1000, attr=node.attr()).pack()
            case Opcode.READ:
                asked_read = ReadIn.unpack(payload)
                return node.data[asked_read.offset : asked_read.offset + asked_read.size]
            case Opcode.READLINK:
                return node.data
            case Opcode.READDIR | Opcode.READDIRPLUS:
                asked_read = ReadIn.unpack(payload)
                return self._entries(node, asked_read.offset, asked_read.size, opcode is Opcode.READDIRPLUS)
            case Opcode.LISTXATTR:
                return self._sized(payload, b"".join(name + b"\0" for name in node.xattrs))
            case Opcode.GETXATTR:
                name = payload[GetxattrIn.SIZE :].removesuffix(b"\0")
                if name not in node.xattrs:
                    raise OSError(errno.ENODATA, "no such attribute")
                return self._sized(payload, node.xattrs[name])
            case Opcode.STATFS:
                return StatfsOut(st=Kstatfs(blocks=77, bsize=4096, namelen=255)).pack()
            case Opcode.LSEEK:
                return LseekOut(offset=LseekIn.unpack(payload).offset).pack()
        raise OSError(errno.ENOSYS, "not served")

    @staticmethod
    def _sized(payload: bytes, value: bytes) -> bytes:
        size = GetxattrIn.unpack(payload).size
        if size == 0:
            return GetxattrOut(size=len(value)).pack()
        if len(value) > size:
            raise OSError(errno.ERANGE, "too small")
        return value

    def _entries(self, node: Node, offset: int, size: int, plus: bool) -> bytes:
        def each() -> Iterator[bytes]:
            names = [(b".", node.ino), (b"..", node.ino), *node.children.items()]
            for i, (name, ino) in list(enumerate(names))[offset:]:
                child = self.nodes[ino]
                entry = child.entry() if plus else None
                yield build_dirent(ino, i + 1, mode_to_dtype(child.mode), name, entry)

        data = b""
        for entry in each():
            if len(data) + len(entry) > size:
                break
            data += entry
        return data
