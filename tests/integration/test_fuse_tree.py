"""What a guest sees through FUSE is the tree that was built: names, metadata, links, attributes, content."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from guest.daemon import Daemon
from tests.source_trees import make_varied_tree
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.frontend import Frontend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def mount(short_dir: Path, missing: Callable[[str], None]) -> Iterator[Callable[[Path], Frontend]]:
    """``mount(source)``: a front-end on a daemon that serves the image of *source* from a directory."""
    from contextlib import ExitStack

    if os.geteuid() != 0:
        missing("root")
    with ExitStack() as stack:

        def enter(manager: AbstractContextManager[Any]) -> Any:
            return stack.enter_context(manager)

        def start(source: Path) -> Frontend:
            out = short_dir / "out"
            build_image(source, out, chunk_size=1 << 20)
            options = ["--blob-dir", str(out), "--cache-dir", str(short_dir / "cache")]
            daemon = enter(Daemon(str(out / "image.boot"), short_dir, short_dir / "log", options))
            daemon.wait_ready()
            fe: Frontend = enter(Frontend.connect(daemon.socket))
            fe.start()
            fe.init()
            return fe

        yield start


def xattrs_of(path: bytes) -> dict[bytes, bytes]:
    """All extended attributes of a file on disk; symbolic links have none in a guest either."""
    if os.path.islink(path):
        return {}
    return {
        os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }


def test_the_whole_tree(mount: Callable[[Path], Frontend], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make_varied_tree(source)
    fe = mount(source)
    seen = fe.read_tree()
    top = os.fsencode(source)
    expected = {b""}
    for folder, names, files in os.walk(top):
        expected |= {os.path.relpath(os.path.join(folder, name), top) for name in names + files}
    assert {path.strip(b"/") for path in seen} == expected
    nodes: dict[int, int] = {}
    for path, entry in seen.items():
        real = os.path.join(top, path.strip(b"/"))
        st, attr = os.lstat(real), entry.attr
        assert entry.error == 0
        assert (attr.mode, attr.uid, attr.gid) == (st.st_mode, st.st_uid, st.st_gid), path
        seconds = attr.mtime - (1 << 64) if attr.mtime >> 63 else attr.mtime
        assert seconds * 10**9 + attr.mtimensec == st.st_mtime_ns, path
        if not stat.S_ISDIR(st.st_mode):
            assert attr.nlink == st.st_nlink, path
        if stat.S_ISREG(st.st_mode):
            assert attr.size == st.st_size, path
            with open(real, "rb") as file:
                assert entry.sha256 == hashlib.file_digest(file, "sha256").hexdigest(), path
        if stat.S_ISLNK(st.st_mode):
            assert entry.target == os.readlink(real), path
        if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
            major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
            assert attr.rdev == (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12, path
        assert entry.xattrs == xattrs_of(real), path
        # One node for all names of a hard link, and no node for two files.
        assert nodes.setdefault(entry.nodeid, st.st_ino) == st.st_ino, path
        if path.strip(b"/"):
            assert entry.type == stat.S_IFMT(st.st_mode) >> 12, path
    assert fe.check() == {}


def test_a_hundred_thousand_names_and_a_file_beyond_4_gib(
    mount: Callable[[Path], Frontend], tmp_path: Path
) -> None:
    many = tmp_path / "source" / "many"
    many.mkdir(parents=True)
    for i in range(100_000):
        (many / f"{i:x}").touch()
    with (tmp_path / "source" / "huge").open("wb") as file:
        file.write(b"begin")
        file.seek(5 * GIB)
        file.write(b"end")
    fe = mount(tmp_path / "source")
    node = fe.resolve("many").nodeid
    names: list[bytes] = []
    offset, kind = 0, fe.readdirplus
    while entries := kind(node, offset, 65536):
        names += [entry.name for entry in entries]
        offset = entries[-1].off
        # Both forms share their offsets.
        kind = fe.readdir if kind == fe.readdirplus else fe.readdirplus
    assert len(names) == 100_002
    assert set(names) == {b".", b".."} | {b"%x" % i for i in range(100_000)}
    assert fe.lookup(node, "1869f").attr.size == 0
    huge = fe.resolve("huge").nodeid
    assert fe.getattr(huge).size == 5 * GIB + 3
    assert fe.read(huge, 5 * GIB - 4, 100) == bytes(4) + b"end"
    assert fe.read(huge, 0, 8) == b"begin" + bytes(3)
    assert fe.read(huge, 5 * GIB + 3, 8) == b""
    assert fe.lseek(huge, 17, os.SEEK_DATA) == 17
    assert fe.lseek(huge, 17, os.SEEK_HOLE) == 5 * GIB + 3
    assert fe.check() == {}


def test_what_an_immutable_tree_answers(mount: Callable[[Path], Frontend], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    fe = mount(source)
    node = fe.resolve("file").nodeid

    def error(opcode: int, nodeid: int, payload: bytes = b"", room: int = 4096) -> int:
        return fe.wait(fe.request(opcode, nodeid, payload, room), 10).error

    # Not there: an entry without a node that the kernel keeps, not an error that it would ask for again.
    missing = fe.wait(fe.request(Opcode.LOOKUP, 1, b"missing\0", 128), 10)
    assert (missing.error, missing.data[:8]) == (0, bytes(8))
    assert int.from_bytes(missing.data[16:24], "little") > 10**9
    for sticky in (Opcode.OPEN, Opcode.OPENDIR, Opcode.FLUSH):
        assert error(sticky, node, bytes(64)) == errno.ENOSYS
    # This image has no attributes at all, so the kernel need not ask for any.
    assert error(Opcode.GETXATTR, node, bytes(8) + b"user.a\0") == errno.ENOSYS
    assert error(Opcode.LISTXATTR, node, bytes(8)) == errno.ENOSYS
    for write in (Opcode.WRITE, Opcode.SETATTR, Opcode.MKDIR, Opcode.UNLINK, Opcode.RENAME2, Opcode.CREATE):
        assert error(write, node, bytes(128)) == errno.EROFS
    assert error(63, node) == errno.ENOSYS
    assert error(4097, node) == errno.ENOSYS
    assert error(Opcode.LOOKUP, node, b"x\0") == errno.ENOTDIR
    assert error(Opcode.READ, 1, bytes(40)) == errno.EISDIR
    assert error(Opcode.GETATTR, 1 << 60, bytes(16)) == errno.ESTALE
    assert error(Opcode.GETATTR, 1 << 40, bytes(16)) == errno.EIO
    assert error(Opcode.READLINK, node) == errno.EINVAL
    assert fe.statfs().namelen == 255
    assert fe.read(node, 0, 100) == b"content"
    assert fe.check() == {}
