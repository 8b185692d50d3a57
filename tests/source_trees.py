"""Source trees for tests of images, and one form in which trees on disk and in images can be compared."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.blob import codecs, digest
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import walk

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parents[2] / "shared/fixtures/nydus"
MIB = 1 << 20

# Two entries for owner and a named user, and what POSIX asks for beside them: version 2 of the kernel's form.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in (
        (1, 7, 0xFFFFFFFF),
        (2, 5, 1000),
        (4, 5, 0xFFFFFFFF),
        (16, 5, 0xFFFFFFFF),
        (32, 5, 0xFFFFFFFF),
    )
)


def make_varied_tree(root: Path) -> None:
    """Every kind of file that an image can hold. Needs root, as making images of root file systems does."""
    rng = random.Random(7)
    files = {
        "a/hello": b"hello\n",
        "a/empty": b"",
        "a/same": b"hello\n",
        "a/random": rng.randbytes(2 * MIB) + b"tail",
        "a/exact": rng.randbytes(MIB),
        "a/text": b"The quick brown fox\n" * 100_000,
        "n" * 255: b"long",
        os.fsdecode(b"\xff\xfe\x80bad"): b"no UTF-8",
        "ümläut": b"u",
        "-dash": b"",
        "!before-dots": b"b",
        " space": b"s",
        "new\nline": b"s",
        "own/wide": b"x",
        "own/setuid": b"x",
        "time/zero": b"0",
        "time/before": b"-",
        "time/nanoseconds": b"ns",
        "time/far": b"2100",
        "xattrs/file": b"x",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for i in range(700):
        (root / "many").mkdir(exist_ok=True)
        (root / "many" / f"{'z' * (i % 200 + 1)}{i}").write_text(str(i))
    (root / "emptydir").mkdir()
    deep = root
    for i in range(40):
        deep /= f"deep{i}"
        deep.mkdir()
    (deep / "leaf").write_text("leaf")

    (root / "a/hard").hardlink_to(root / "a/hello")
    (root / "hard2").hardlink_to(root / "a/hello")
    (root / "a/link").symlink_to("hello")
    (root / "a/longlink").symlink_to("x" * 4095)
    (root / "dangling").symlink_to("y" * 100)
    os.link(root / "dangling", root / "dangling2", follow_symlinks=False)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(root / "sock"))
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 300_000))
    with (root / "sparse").open("wb") as f:
        f.truncate(5 * MIB)
        f.seek(3 * MIB + 17)
        f.write(b"data")

    file, folder = root / "xattrs/file", root / "xattrs"
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    for name, value in {
        "user.a": b"1",
        "user.empty": b"",
        "user." + "k" * 200: b"v" * 3000,
        "trusted.overlay.opaque": b"y",
        "security.capability": capability,
        "system.posix_acl_access": ACL,
    }.items():
        os.setxattr(file, name, value)
    os.setxattr(folder, "user.dir", b"d")
    os.setxattr(folder, "system.posix_acl_default", ACL)

    os.chown(root / "own/wide", 100_000, (1 << 31) + 5)
    os.chmod(root / "own/setuid", 0o6755)
    os.chmod(root / "own", 0o1777)
    os.symlink("time", root / "time/link")
    os.mkdir(root / "time/dir")
    os.mknod(root / "time/console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    for name in ("zero", "link", "dir", "console"):
        os.utime(root / "time" / name, ns=(0, 0), follow_symlinks=False)
    os.utime(root / "time/before", ns=(0, -1_500_000_000))
    os.utime(root / "time/nanoseconds", ns=(0, 1_600_000_000_123_456_789))
    os.utime(root / "time/far", ns=(0, 4_102_444_800 * 10**9))


def read_directory(root: Path) -> dict[bytes, dict[str, Any]]:
    """Path -> attributes and content of everything below *root*; hard links of one file share "same_as"."""
    top = os.fsencode(root)
    paths = [top]
    for folder, folders, names in os.walk(top):
        paths += [os.path.join(folder, name) for name in folders + names]
    found: dict[bytes, dict[str, Any]] = {}
    first: dict[int, bytes] = {}
    for path in sorted(paths):
        st = os.lstat(path)
        name = path[len(top) :] or b"/"
        found[name] = entry = {
            "mode": st.st_mode,
            "uid": st.st_uid,
            "gid": st.st_gid,
            "nlink": 2 + sum(e.is_dir(follow_symlinks=False) for e in os.scandir(path))
            if stat.S_ISDIR(st.st_mode)
            else st.st_nlink,
            "mtime": divmod(st.st_mtime_ns, 10**9),
            "same_as": first.setdefault(st.st_ino, name),
            "xattrs": {
                os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            },
        }
        if stat.S_ISREG(st.st_mode):
            entry["content"] = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(st.st_mode):
            entry["content"] = os.readlink(path)
        elif stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
            entry["content"] = (os.major(st.st_rdev), os.minor(st.st_rdev))
    return found


def read_image(bootstrap: bytes, blob: bytes) -> dict[bytes, dict[str, Any]]:
    """The same of an image with at most one blob; chunks are decompressed and verified on the way."""
    tree = Tree.parse(bootstrap)
    read_chunk = chunk_reader(tree, blob)
    found: dict[bytes, dict[str, Any]] = {}
    first: dict[int, bytes] = {}
    for path, inode in sorted(walk(tree)):
        found[path] = entry = {
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "nlink": inode.nlink,
            "mtime": (inode.mtime, inode.mtime_nsec),
            "same_as": first.setdefault(inode.nid, path),
            "xattrs": {prefix + suffix: value for prefix, suffix, value in tree.xattrs(inode)},
        }
        if inode.is_reg:
            parts = [(ref, read_chunk(ref.chunk_index)) for ref in tree.chunks(inode)]
            entry["content"] = b"".join(data[: ref.length] for ref, data in parts)
        elif inode.is_symlink:
            entry["content"] = tree.readlink(inode)
        elif stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
            entry["content"] = inode.device
    return found


def chunk_reader(tree: Tree, blob: bytes) -> Callable[[int], bytes]:
    """A function from chunk index to the verified bytes of a chunk of blob 0."""
    maps = ChunkMap.from_chunk_table(tree)

    def read(index: int) -> bytes:
        chunk = maps[0].chunks[index]
        stored = blob[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
        compressor = tree.blobs[0].compressor if chunk.compressed else c.Compressor.NONE
        data = codecs.decompress(stored, compressor, chunk.uncompressed_size)
        assert chunk.digest is not None
        digest.verify(data, tree.blobs[0].digester, chunk.digest, f"chunk {index}")
        return data

    return read
