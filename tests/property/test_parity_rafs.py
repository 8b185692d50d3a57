"""The Rust reader and its readable twin say the same about every image, sound or damaged.

The same calls are made on both; what they answer, or that they refuse, is compared inode by inode.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.blob.codecs import decompress
from virtiofsd_rafs.errors import BadImage, UnsupportedFeature
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.rafs import NativeTree
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/nydus"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of public test data is absent")

AnyTree = Tree | NativeTree
READERS = (Tree.parse, NativeTree.parse)
readers = pytest.mark.parametrize("parse", READERS, ids=("python", "rust"))

INODE_FIELDS = (
    "nid",
    "ino",
    "disk_ino",
    "mode",
    "uid",
    "gid",
    "nlink",
    "size",
    "mtime",
    "mtime_nsec",
    "rdev",
    "layout",
)
BLOB_FIELDS = (
    "blob_id",
    "chunk_count",
    "compressor",
    "digester",
    "uncompressed_size",
    "data_size",
    "ci_compressor",
    "chunk_info_size",
    "toc_digest",
)
SUPER_FIELDS = ("flags", "chunk_size", "root_nid", "inos", "build_time", "build_time_nsec", "meta_offset")


class Refused(NamedTuple):
    """Stands for a BadImage or UnsupportedFeature."""

    kind: type[Exception]


def outcome(call: Callable[[], Any]) -> Any:
    """What *call* returns, or that it refuses the image; any other exception passes."""
    try:
        return call()
    except (BadImage, UnsupportedFeature) as e:
        return Refused(BadImage if isinstance(e, BadImage) else UnsupportedFeature)


def chunk_maps(tree: AnyTree) -> list[dict[int, Any]]:
    if isinstance(tree, NativeTree):
        return [tree.chunk_map(index) for index in range(len(tree.blobs))]
    return [dict(chunk_map.chunks) for chunk_map in ChunkMap.from_chunk_table(tree)]


def describe_inode(tree: AnyTree, nid: int) -> Any:
    """Everything that a reader says about one node id."""
    inode: Any = tree.inode(nid)
    said: dict[str, Any] = {field: getattr(inode, field) for field in INODE_FIELDS}
    said["xattrs"] = xattrs = outcome(lambda: list(tree.xattrs(inode)))
    if not isinstance(xattrs, Refused):
        said["xattr_get"] = [tree.xattr_get(inode, x.prefix + x.suffix) for x in xattrs]
        said["no xattr"] = tree.xattr_get(inode, b"user.")
    if inode.is_dir:
        said["entries"] = entries = outcome(lambda: list(tree.entries(inode)))
        if not isinstance(entries, Refused):
            # Damaged directories may be searched on different ways; listed ones are in order.
            names = [entry.name for entry in entries]
            said["lookup"] = [tree.lookup(inode, name) for name in [*names, b"", b"A", b"zzzz"]]
            said["goes on"] = [list(tree.entries(inode, entry.next_cookie))[:1] for entry in entries[:40]]
    elif inode.is_symlink:
        said["target"] = outcome(lambda: tree.readlink(inode))
    elif inode.is_reg and inode.layout == c.LAYOUT_CHUNK_BASED:
        said["chunks"] = outcome(lambda: list(tree.chunks(inode)))
        said["some"] = outcome(lambda: list(tree.chunks(inode, 4095, 4098)))
        said["none"] = outcome(lambda: list(tree.chunks(inode, inode.size, 1)))
        said["content"] = outcome(lambda: tree.inline_data(inode))
    elif inode.is_reg:
        said["content"] = outcome(lambda: tree.inline_data(inode))
        said["part"] = outcome(lambda: tree.inline_data(inode, 4090, 10))
        said["chunks"] = outcome(lambda: list(tree.chunks(inode)))
    return said


def describe(parse: Callable[[bytes], AnyTree], image: bytes) -> Any:
    """Everything that a reader says about an image, for every node id that could be in it."""
    tree = outcome(lambda: parse(image))
    if isinstance(tree, Refused):
        return tree
    slots = (len(image) - tree.superblock.meta_offset) // c.SLOT_SIZE
    return {
        "superblock": {field: getattr(tree.superblock, field) for field in SUPER_FIELDS},
        "algorithms": (tree.superblock.compressor, tree.superblock.digester),
        "blobs": [{field: getattr(blob, field) for field in BLOB_FIELDS} for blob in tree.blobs],
        "prefetch": tree.prefetch_nids(),
        "chunk maps": outcome(lambda: chunk_maps(tree)),
        "inodes": [
            outcome(lambda nid=nid: describe_inode(tree, nid)) for nid in (*range(slots + 1), 1 << 58)
        ],
    }


def fixture_bootstrap() -> bytes:
    return (FIXTURES / "bootstrap/rafs-v6-2.2.boot").read_bytes()


def inline_bootstrap() -> bytes:
    """The bootstrap inside a blob of nydus-image from before 2.2."""
    blob = FIXTURES / "toc/2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
    return decompress(blob.read_bytes()[7997 : 7997 + 501], c.Compressor.ZSTD, 20480)


def fill(root: Path) -> None:
    """One of everything that an ordinary user can make, small enough to be damaged many times."""
    (root / "empty").touch()
    (root / "small").write_bytes(b"small")
    (root / "chunks").write_bytes(bytes(i % 251 for i in range(3 * 4096 + 5)))
    os.link(root / "chunks", root / "hardlink")
    (root / "link").symlink_to("chunks")
    (root / "long link").symlink_to("x" * 4000)
    os.mkfifo(root / "fifo", 0o640)
    with closing(socket.socket(socket.AF_UNIX)) as server:
        # The path of a socket is short: bind relative to its directory.
        here = os.open(".", os.O_RDONLY)
        os.chdir(root)
        server.bind("socket")
        os.fchdir(here)
        os.close(here)
    deep = root / "deep" / "deeper"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    many = root / "many"
    many.mkdir()
    for i in range(150):
        (many / f"entry {i:03} {'n' * (i % 60)}").symlink_to("..")
    # 16 names of 244 bytes and their entries fill a block: the last one ends without NUL.
    full = root / "full"
    full.mkdir()
    for i in range(40):
        (full / f"{i:02}{'f' * 242}").touch()
    os.utime(root / "small", ns=(0, 1_600_000_000_123_456_789))
    os.utime(root / "empty", ns=(0, -5_000_000_000))
    (root / "small").chmod(0o4750)


def set_xattrs(root: Path) -> None:
    os.setxattr(root / "small", "user.a", b"value")
    os.setxattr(root / "small", "user." + "n" * 250, bytes(range(256)))
    os.setxattr(root / "deep", "user.empty", b"")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity") / "source"
    root.mkdir()
    fill(root)
    set_xattrs(root)
    return root


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("parity-image")
    return build_image(source, out, chunk_size=4096).bootstrap.read_bytes()


@pytest.fixture(params=["built", "fixture", "inline"])
def image(request: pytest.FixtureRequest) -> bytes:
    if request.param == "built":
        return request.getfixturevalue("built")
    if not FIXTURES.is_dir():
        pytest.skip("the folder of public test data is absent")
    return fixture_bootstrap() if request.param == "fixture" else inline_bootstrap()


def test_both_say_the_same(image: bytes) -> None:
    python, rust = (describe(parse, image) for parse in READERS)
    assert not isinstance(python, Refused)
    assert python == rust


@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "gzip", "none"])
@pytest.mark.parametrize("digester", ["blake3", "sha256"])
@pytest.mark.parametrize("chunk_size", [4096, 1 << 20, 16 << 20])
def test_both_say_the_same_of_every_kind_of_image(
    source: Path, tmp_path: Path, compressor: str, digester: str, chunk_size: int
) -> None:
    result = build_image(source, tmp_path, compressor=compressor, digester=digester, chunk_size=chunk_size)
    image = result.bootstrap.read_bytes()
    python, rust = (describe(parse, image) for parse in READERS)
    assert not isinstance(python, Refused)
    assert python == rust


@readers
def test_tree_is_the_source(parse: Callable[[bytes], AnyTree], source: Path, built: bytes) -> None:
    tree: Any = parse(built)
    found = {}
    for node in walk(tree):
        path = source / os.fsdecode(node.path.lstrip(b"/"))
        found[path] = node.inode.nid
        expected = path.lstat()
        inode = node.inode
        assert (inode.mode, inode.uid, inode.gid) == (expected.st_mode, expected.st_uid, expected.st_gid), (
            path
        )
        assert inode.mtime * 10**9 + inode.mtime_nsec == expected.st_mtime_ns, path
        if not stat.S_ISDIR(expected.st_mode):
            assert inode.nlink == expected.st_nlink, path
            assert inode.size == expected.st_size, path
        if inode.is_symlink:
            assert tree.readlink(inode) == os.fsencode(path.readlink())
        else:
            names = os.listxattr(path, follow_symlinks=False)
            attributes = {os.fsdecode(x.prefix + x.suffix): x.value for x in tree.xattrs(inode)}
            assert attributes == {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    # Not rglob: that of Python 3.11.2 fails on a link whose target is longer than a name may be.
    below = {Path(top) / name for top, dirs, files in os.walk(source) for name in dirs + files}
    assert set(found) == {source} | below
    assert found[source / "chunks"] == found[source / "hardlink"]


@readers
def test_chunks_describe_the_content(parse: Callable[[bytes], AnyTree], source: Path, built: bytes) -> None:
    tree: Any = parse(built)
    maps = chunk_maps(tree)
    for node in walk(tree):
        if node.inode.is_reg and node.inode.size:
            parts = list(tree.chunks(node.inode))
            assert sum(part.length for part in parts) == node.inode.size
            for part in parts:
                chunk = maps[part.blob_index][part.chunk_index]
                assert (chunk.uncompressed_offset, chunk.uncompressed_size) == (part.data_offset, part.length)


@readers
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1152, 1408, 4095])
def test_short_images_are_refused(parse: Callable[[bytes], AnyTree], size: int, built: bytes) -> None:
    with pytest.raises(BadImage):
        parse(built[:size])


def interesting_bytes(image: bytes) -> list[int]:
    """Where damage means something: bytes that are not 0, and those beside them."""
    marked = {at + d for at, byte in enumerate(image) if byte for d in (-1, 0, 1)}
    return sorted(at for at in marked if 0 <= at < len(image))


def damaged(image: bytes, changes: list[tuple[int, int]]) -> bytes:
    places = interesting_bytes(image)
    out = bytearray(image)
    for place, byte in changes:
        out[places[place % len(places)]] = byte
    return bytes(out)


def assert_same_verdict(image: bytes) -> None:
    python, rust = (describe(parse, image) for parse in READERS)
    if isinstance(python, Refused) and isinstance(rust, Refused):
        return  # of two faults either may be met first
    assert python == rust


changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)
thorough = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@thorough
@given(changes=changes)
def test_damage_to_a_built_image(built: bytes, changes: list[tuple[int, int]]) -> None:
    assert_same_verdict(damaged(built, changes))


@needs_fixtures
@thorough
@given(changes=changes)
def test_damage_to_the_public_image(changes: list[tuple[int, int]]) -> None:
    assert_same_verdict(damaged(fixture_bootstrap(), changes))


def single_bytes() -> Iterator[tuple[int, int]]:
    image = fixture_bootstrap()
    for at in interesting_bytes(image):
        for mask in (0x01, 0x80, 0xFF):
            yield at, mask


@needs_fixtures
def test_each_damaged_byte_of_the_public_image() -> None:
    """With one fault, the kind of refusal is the same as well."""
    image = fixture_bootstrap()
    refused = 0
    for at, mask in single_bytes():
        changed = bytearray(image)
        changed[at] ^= mask
        python, rust = (describe(parse, bytes(changed)) for parse in READERS)
        assert python == rust, f"byte {at} xor {mask:#x}"
        refused += isinstance(rust, Refused)
    assert refused > 100
