"""The image of the golden dump, built in memory so that neither file system nor user decides a byte of it."""

from __future__ import annotations

import io
import os
import stat

from tests.reference.blob_writer import BlobWriter
from tests.reference.bootstrap_writer import BootstrapWriter
from tests.reference.scan import SourceInode, build_xattrs
from virtiofsd_rafs.blob.dump import dump_blob
from virtiofsd_rafs.image._blob_tail import finish_blob
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.dump import dump
from virtiofsd_rafs.rafs.v6 import Tree

CHUNK_SIZE = 4096


class _Stat:
    """The fields of os.stat_result that the builder reads."""

    def __init__(self, mode: int, *, size: int = 0, owner: int = 0, mtime_ns: int = 0, rdev: int = 0) -> None:
        self.st_mode = mode
        self.st_size = size
        self.st_uid = self.st_gid = owner
        self.st_mtime_ns = mtime_ns
        self.st_rdev = rdev


def _node(path: bytes, mode: int, **fields: int) -> SourceInode:
    return SourceInode(path, _Stat(mode, **fields), nlink=1)  # type: ignore[arg-type]


def build() -> tuple[bytes, bytes]:
    """Bootstrap and blob."""
    out = io.BytesIO()
    blob = BlobWriter(out, compressor=c.Compressor.NONE, digester=c.Digester.BLAKE3)

    def file(path: bytes, content: bytes, **fields: int) -> SourceInode:
        node = _node(path, stat.S_IFREG | 0o644, size=len(content), **fields)
        for at in range(0, len(content), CHUNK_SIZE):
            node.chunks.append(blob.add(content[at : at + CHUNK_SIZE], at))
        return node

    root = _node(b"", stat.S_IFDIR | 0o755, mtime_ns=1_700_000_000_000_000_000)
    root.parent = root
    etc = _node(b"etc", stat.S_IFDIR | 0o1777, owner=70_000)
    etc.parent = root
    many = _node(b"many", stat.S_IFDIR | 0o700)
    many.parent = root
    root.nlink, etc.nlink, many.nlink = 4, 2, 2
    hard = file(b"a", b"A" * 5000, mtime_ns=-1_500_000_000)
    hard.nlink = 2
    hard.xattrs = build_xattrs({b"user.x": b"value", b"security.y": b"", b"system.posix_acl_access": b"acl"})
    link = _node(b"link", stat.S_IFLNK | 0o777, mtime_ns=1)
    link.target = b"etc/\xff"
    null = _node(b"null", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
    root.children = [
        (b"!", file(b"!", b"")),
        (b"a", hard),
        (b"etc", etc),
        (b"link", link),
        (b"many", many),
        (b"null", null),
        (b"z\xff", file(b"z\xff", b"A" * 4096 + b"B")),
    ]
    etc.children = [(b"hard", hard)]
    fifo = _node(b"many/0", stat.S_IFIFO | 0o600)
    fifo.nlink = 20
    many.children = [(b"%02d-" % i + b"n" * 240, fifo) for i in range(20)]

    record = finish_blob(
        blob, chunk_size=CHUNK_SIZE, compressor=c.Compressor.NONE, digester=c.Digester.BLAKE3
    )
    writer = BootstrapWriter(
        root,
        chunk_size=CHUNK_SIZE,
        compressor=c.Compressor.NONE,
        digester=c.Digester.BLAKE3,
        blob=blob,
        record=record,
    )
    bootstrap = io.BytesIO()
    writer.write(bootstrap)
    return bootstrap.getvalue(), out.getvalue()


def dump_text() -> str:
    """The dump that the golden file holds."""
    bootstrap, blob = build()
    tree = Tree.parse(bootstrap)
    return "\n".join([*dump(tree), *dump_blob(tree.blobs[0], blob), ""])
