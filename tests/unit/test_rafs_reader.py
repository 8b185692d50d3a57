"""The rules of the bootstrap reader, one by one, over a small image."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from virtiofsd_rafs.errors import BadImage, UnsupportedFeature
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import resolve, walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.rafs.records import Layout
    from virtiofsd_rafs.rafs.v6 import Inode


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("reader")
    src = root / "src"
    (src / "dir").mkdir(parents=True)
    (src / "file").write_bytes(b"x" * 10_000)
    (src / "link").symlink_to("file")
    for i in range(500):
        (src / f"dir/name-{i:04}").touch()
    os.setxattr(src / "file", "user.one", b"1")
    os.setxattr(src / "file", "user.two", b"22")
    return build_image(src, root / "out", chunk_size=4096).bootstrap.read_bytes()


def patched(image: bytes, offset: int, fmt: str, *values: int | bytes) -> bytes:
    changed = bytearray(image)
    struct.pack_into("<" + fmt, changed, offset, *values)
    return bytes(changed)


def at(layout: Layout, base: int, field: str) -> int:
    return base + layout.offsets[field]


SB, EXT, BLOB, DEV = c.SUPER_OFFSET, c.EXT_SUPER_OFFSET, c.BLOCK_SIZE, c.DEVICE_TABLE_OFFSET


@pytest.mark.parametrize(
    ("layout", "base", "field", "fmt", "value"),
    [
        (c.SUPER_BLOCK, SB, "magic", "I", 0),
        (c.SUPER_BLOCK, SB, "checksum", "I", 1),
        (c.SUPER_BLOCK, SB, "feature_compat", "I", 0),
        (c.SUPER_BLOCK, SB, "blkszbits", "B", 11),
        (c.SUPER_BLOCK, SB, "sb_extslots", "B", 1),
        (c.SUPER_BLOCK, SB, "inos", "Q", 0),
        (c.SUPER_BLOCK, SB, "build_time_nsec", "I", 10**9),
        (c.SUPER_BLOCK, SB, "meta_blkaddr", "I", 1 << 31),
        (c.SUPER_BLOCK, SB, "xattr_blkaddr", "I", 1),
        (c.SUPER_BLOCK, SB, "feature_incompat", "I", 0x1C),
        (c.SUPER_BLOCK, SB, "union", "H", 1),
        (c.SUPER_BLOCK, SB, "extra_devices", "H", 2),
        (c.SUPER_BLOCK, SB, "devt_slotoff", "H", 12),
        (c.EXT_SUPER_BLOCK, EXT, "flags", "Q", 0x84 | 1 << 40),
        (c.EXT_SUPER_BLOCK, EXT, "flags", "Q", 0x80),
        (c.EXT_SUPER_BLOCK, EXT, "flags", "Q", 0x85),
        (c.EXT_SUPER_BLOCK, EXT, "chunk_size", "I", 4097),
        (c.EXT_SUPER_BLOCK, EXT, "chunk_size", "I", 2048),
        (c.EXT_SUPER_BLOCK, EXT, "chunk_size", "I", 1 << 25),
        (c.EXT_SUPER_BLOCK, EXT, "blob_table_offset", "Q", 4097),
        (c.EXT_SUPER_BLOCK, EXT, "blob_table_offset", "Q", 0),
        (c.EXT_SUPER_BLOCK, EXT, "blob_table_offset", "Q", 1 << 63),
        (c.EXT_SUPER_BLOCK, EXT, "blob_table_size", "I", 255),
        (c.EXT_SUPER_BLOCK, EXT, "blob_table_size", "I", 256 * 256),
        (c.EXT_SUPER_BLOCK, EXT, "chunk_table_offset", "Q", (1 << 64) - 4096),
        (c.EXT_SUPER_BLOCK, EXT, "chunk_table_size", "Q", 79),
        (c.BLOB_RECORD, BLOB, "blob_id", "64s", b"../x"),
        (c.BLOB_RECORD, BLOB, "blob_index", "I", 1),
        (c.BLOB_RECORD, BLOB, "chunk_size", "I", 8192),
        (c.BLOB_RECORD, BLOB, "chunk_count", "I", (1 << 24) + 1),
        (c.BLOB_RECORD, BLOB, "compression_algo", "I", 4),
        (c.BLOB_RECORD, BLOB, "ci_compressor", "I", 4),
        (c.BLOB_RECORD, BLOB, "digest_algo", "I", 2),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_1021),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_0020),
        (c.BLOB_RECORD, BLOB, "compressed_size", "Q", (1 << 40) + 1),
        (c.BLOB_RECORD, BLOB, "uncompressed_size", "Q", (1 << 44) + 1),
        (c.BLOB_RECORD, BLOB, "ci_offset", "Q", 511),
        (c.BLOB_RECORD, BLOB, "ci_offset", "Q", 1 << 63),
        (c.BLOB_RECORD, BLOB, "ci_compressed_size", "Q", 1 << 20),
        (c.BLOB_RECORD, BLOB, "ci_uncompressed_size", "Q", 1 << 20),
        (c.DEVICE_SLOT, DEV, "blob_id", "64s", b"x"),
    ],
)
def test_broken_field_is_named_with_its_offset(
    image: bytes, layout: Layout, base: int, field: str, fmt: str, value: int | bytes
) -> None:
    Tree.parse(image)
    with pytest.raises(BadImage) as e:
        Tree.parse(patched(image, at(layout, base, field), fmt, value))
    assert e.value.where.startswith(layout.where)
    related = {"blob_table_size", "blob_id", "ci_offset"}
    assert e.value.where.endswith("." + field) or field in related
    assert e.value.offset is not None


@pytest.mark.parametrize(
    ("layout", "base", "field", "fmt", "value"),
    [
        (c.SUPER_BLOCK, SB, "blkszbits", "B", 9),
        (c.EXT_SUPER_BLOCK, EXT, "flags", "Q", 0x284),
        (c.EXT_SUPER_BLOCK, EXT, "flags", "Q", 0x0200_0084),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_0029),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_00A1),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_0121),
        (c.BLOB_RECORD, BLOB, "features", "I", 0x7000_0821),
        (c.BLOB_RECORD, BLOB, "cipher_algo", "I", 1),
    ],
)
def test_feature_that_is_not_served(
    image: bytes, layout: Layout, base: int, field: str, fmt: str, value: int
) -> None:
    with pytest.raises(UnsupportedFeature):
        Tree.parse(patched(image, at(layout, base, field), fmt, value))


def test_reserved_compatible_flags_are_fine(image: bytes) -> None:
    flags = struct.unpack_from("<Q", image, EXT)[0]
    Tree.parse(patched(image, EXT, "Q", flags | 0x8000_0000))


@pytest.mark.parametrize("size", [0, 1023, 1024, 1151, 4096, 4097, 12_288])
def test_short_bootstrap(image: bytes, size: int) -> None:
    with pytest.raises(BadImage):
        Tree.parse(image[:size])


def test_root_must_be_a_directory(image: bytes) -> None:
    file = resolve(Tree.parse(image), b"/file")
    assert file is not None
    with pytest.raises(BadImage, match="not a directory"):
        Tree.parse(patched(image, at(c.SUPER_BLOCK, SB, "root_nid"), "H", file.nid))


@pytest.fixture
def inode_at(image: bytes) -> Callable[[bytes], Inode]:
    def find(path: bytes) -> Inode:
        found = resolve(Tree.parse(image), path)
        assert found is not None
        return found

    return find


@pytest.mark.parametrize(
    ("path", "field", "fmt", "value"),
    [
        (b"/file", "i_format", "H", 0x3),
        (b"/file", "i_format", "H", 0x1009),
        (b"/file", "i_mode", "H", 0o170644),
        (b"/file", "i_mode", "H", 0o040755),
        (b"/file", "i_size", "Q", 1 << 62),
        (b"/file", "i_size", "Q", (1 << 64) - 1),
        (b"/file", "i_xattr_icount", "H", 0xFFFF),
        (b"/file", "i_mtime_nsec", "I", 10**9),
        (b"/link", "i_size", "Q", 0),
        (b"/link", "i_size", "Q", 4097),
        (b"/dir", "i_size", "Q", 1 << 40),
        (b"/dir", "i_u", "I", 0xFFFF_FFFF),
    ],
)
def test_broken_inode(
    image: bytes, inode_at: Callable[[bytes], Inode], path: bytes, field: str, fmt: str, value: int
) -> None:
    inode = inode_at(path)
    changed = patched(image, at(c.EXTENDED_INODE, inode.offset, field), fmt, value)
    with pytest.raises(BadImage, match=f"nid {inode.nid}"):
        Tree.parse(changed).inode(inode.nid)


@pytest.mark.parametrize("nid", [1 << 20, 1 << 58, 1 << 63, (1 << 64) - 1])
def test_inode_beyond_the_image(image: bytes, nid: int) -> None:
    with pytest.raises(BadImage):
        Tree.parse(image).inode(nid)


def test_missing_mtime_is_the_build_time(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    inode = inode_at(b"/link")
    raw = c.CompactInode(c.LAYOUT_FLAT_INLINE << 1, 0, 0o120777, 1, 4, 0, 0, 9, 1, 2)
    changed = bytearray(image)
    changed[inode.offset : inode.offset + 32] = c.COMPACT_INODE.build(raw)
    changed = bytearray(patched(bytes(changed), at(c.SUPER_BLOCK, SB, "build_time"), "QI", 1234, 56))
    found = Tree.parse(bytes(changed)).inode(inode.nid)
    assert (found.extended, found.mtime, found.mtime_nsec, found.uid, found.gid) == (False, 1234, 56, 1, 2)


def test_times_before_1970(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    inode = inode_at(b"/file")
    changed = patched(image, at(c.EXTENDED_INODE, inode.offset, "i_mtime"), "q", -5)
    assert Tree.parse(changed).inode(inode.nid).mtime == -5


@pytest.mark.parametrize(
    ("rdev", "device"),
    [(0x103, (1, 3)), (259 << 8 | 0xE0 | 0x493 << 20, (259, 300_000)), (0xFFFF_FFFF, (4095, 0xFFFFF))],
)
def test_device_numbers(
    image: bytes, inode_at: Callable[[bytes], Inode], rdev: int, device: tuple[int, int]
) -> None:
    inode = inode_at(b"/file")
    changed = patched(image, at(c.EXTENDED_INODE, inode.offset, "i_u"), "I", rdev)
    changed = patched(changed, at(c.EXTENDED_INODE, inode.offset, "i_mode"), "H", 0o020644)
    found = Tree.parse(changed).inode(inode.nid)
    assert (found.rdev, found.device) == (rdev, device)


def test_cookies_go_on_anywhere(image: bytes) -> None:
    tree = Tree.parse(image)
    inode = resolve(tree, b"/dir")
    assert inode is not None
    assert inode.n_blocks > 1
    every = list(tree.entries(inode))
    assert len(every) == 502
    cookies = [entry.next_cookie for entry in every]
    assert cookies == sorted(set(cookies))
    assert 0 not in cookies
    for i in range(0, len(every), 7):
        assert list(tree.entries(inode, cookies[i])) == every[i + 1 :]
    for cookie in (1 << 40, 1 << 63):
        assert list(tree.entries(inode, cookie)) == []


def test_lookup_finds_what_is_there_only(image: bytes) -> None:
    tree = Tree.parse(image)
    inode = resolve(tree, b"/dir")
    assert inode is not None
    for entry in tree.entries(inode):
        assert tree.lookup(inode, entry.name) == (entry.nid, entry.d_type)
        assert tree.lookup(inode, entry.name + b"x") is None
    for name in (b"", b"!", b"name-", b"name-00005", b"zzz", b"\xff" * 300):
        assert tree.lookup(inode, name) is None


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [
        (8, "H", 0),  # first name offset: decides the number of entries
        (8, "H", 13),
        (8, "H", 0xFFF0),
        (12 + 8, "H", 0),  # a name before the names
        (12 + 8, "H", 0xFFFF),  # a name beyond the block
        (10, "B", 8),  # file type
    ],
)
def test_broken_directory(
    image: bytes, inode_at: Callable[[bytes], Inode], offset: int, fmt: str, value: int
) -> None:
    inode = inode_at(b"/dir")
    tree = Tree.parse(patched(image, (inode.union << 12) + offset, fmt, value))
    with pytest.raises(BadImage, match=f"directory .nid {inode.nid}, block 0"):
        list(tree.entries(inode))


@pytest.mark.parametrize("name", [b"nam/-0000", b"nam\0-0000", b"zzzzzzzzz"])
def test_broken_names(image: bytes, inode_at: Callable[[bytes], Inode], name: bytes) -> None:
    inode = inode_at(b"/dir")
    start = image.index(b"name-0000", inode.union << 12)
    tree = Tree.parse(patched(image, start, "9s", name))
    with pytest.raises(BadImage, match=r"name|above"):
        list(tree.entries(inode))


def test_directory_that_contains_itself_ends_the_walk(
    image: bytes, inode_at: Callable[[bytes], Inode]
) -> None:
    root = inode_at(b"/")
    names = [entry.name for entry in Tree.parse(image).entries(root)]
    record = root.body_offset + 12 * names.index(b"dir")
    with pytest.raises(BadImage, match="is met again"):
        list(walk(Tree.parse(patched(image, record, "Q", root.nid))))


def test_xattrs(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    tree, inode = Tree.parse(image), inode_at(b"/file")
    assert list(tree.xattrs(inode)) == [(b"user.", b"one", b"1"), (b"user.", b"two", b"22")]
    assert tree.xattr_get(inode, b"user.two") == b"22"
    assert tree.xattr_get(inode, b"user.") is None
    assert tree.xattr_get(inode, b"one") is None
    assert list(tree.xattrs(inode_at(b"/link"))) == []


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, 1), (12, 0), (12, 255), (13, 5), (13, 2), (14, 200), (16, 0)],
    ids=["shared", "no suffix", "long suffix", "index", "suffix for an acl", "long value", "NUL"],
)
def test_broken_xattrs(image: bytes, inode_at: Callable[[bytes], Inode], offset: int, value: int) -> None:
    inode = inode_at(b"/file")
    tree = Tree.parse(patched(image, inode.xattr_offset + offset, "B", value))
    with pytest.raises(BadImage, match="xattr"):
        list(tree.xattrs(inode))


@pytest.mark.parametrize(("offset", "value"), [(2, 0), (2, 2), (3, 1), (0, 200)])
def test_broken_chunk_index(
    image: bytes, inode_at: Callable[[bytes], Inode], offset: int, value: int
) -> None:
    inode = inode_at(b"/file")
    where = -(-inode.body_offset // 8) * 8
    tree = Tree.parse(patched(image, where + offset, "B", value))
    with pytest.raises(BadImage, match="chunk index"):
        list(tree.chunks(inode))


def test_chunk_ranges(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    tree, inode = Tree.parse(image), inode_at(b"/file")
    for offset in (0, 1, 4095, 4096, 9999, 10_000, 20_000):
        for length in (0, 1, 4096, 5000, 1 << 62):
            parts = [(ref.chunk_offset, ref.length) for ref in tree.chunks(inode, offset, length)]
            assert sum(n for _, n in parts) == max(min(offset + length, 10_000) - offset, 0)
            assert all(start + n <= 4096 for start, n in parts)


def test_wrong_kind_of_inode(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    tree, file, folder = Tree.parse(image), inode_at(b"/file"), inode_at(b"/dir")
    for call in (
        lambda: tree.lookup(file, b"x"),
        lambda: list(tree.entries(file)),
        lambda: tree.readlink(file),
        lambda: list(tree.chunks(folder)),
        lambda: tree.inline_data(folder),
        lambda: tree.inline_data(file),
    ):
        with pytest.raises(BadImage, match="is not"):
            call()


def test_flat_files_are_read(image: bytes, inode_at: Callable[[bytes], Inode]) -> None:
    """Other builders put small files into the bootstrap: a file of 5000 bytes, the tail behind its inode."""
    inode = inode_at(b"/file")
    raw = c.EXTENDED_INODE.parse(image, inode.offset)
    flat = raw._replace(i_format=1 | c.LAYOUT_FLAT_INLINE << 1, i_size=5000, i_u=1)
    changed = bytearray(image)
    changed[inode.offset : inode.offset + 64] = c.EXTENDED_INODE.build(flat)
    tree = Tree.parse(bytes(changed))
    found = tree.inode(inode.nid)
    expected = bytes(changed[4096:8192] + changed[inode.body_offset : inode.body_offset + 904])
    assert tree.inline_data(found) == expected
    assert tree.inline_data(found, 4000, 200) == expected[4000:4200]
    assert tree.inline_data(found, 4999, 10) == expected[4999:]
    assert tree.inline_data(found, 5000, 10) == b""


def test_prefetch_table(image: bytes) -> None:
    ext = c.EXT_SUPER_BLOCK.parse(image, EXT)._replace(
        prefetch_table_offset=4096 + 256, prefetch_table_size=16
    )
    changed = bytearray(image)
    changed[EXT : EXT + c.EXT_SUPER_BLOCK.size] = c.EXT_SUPER_BLOCK.build(ext)
    struct.pack_into("<4I", changed, 4096 + 256, 128, 133, 0, 7)
    assert Tree.parse(image).prefetch_nids() == []
    assert Tree.parse(bytes(changed)).prefetch_nids() == [128, 133]
    # Old builders left a size without an offset.
    assert (
        Tree.parse(
            patched(bytes(changed), at(c.EXT_SUPER_BLOCK, EXT, "prefetch_table_offset"), "Q", 0)
        ).prefetch_nids()
        == []
    )
