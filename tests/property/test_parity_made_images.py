"""Both readers over images that the builder does not make: one body, and the content is known beforehand.

Files behind their inode, every kind of attribute, devices, 255 blobs, 5 GiB, chunk bits for the kernel,
directories of 100 000 entries.
"""

from __future__ import annotations

import itertools
import stat
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.errors import BadImage, UnsupportedFeature
from virtiofsd_rafs.native.rafs import NativeTree
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import align_up
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from collections.abc import Iterable

AnyTree = Tree | NativeTree
pytestmark = pytest.mark.parametrize("parse", [Tree.parse, NativeTree.parse], ids=("python", "rust"))

ROOT = 128
BUILD_TIME = (1_700_000_000, 5)


@attrs.define
class Maker:
    """Appends inodes to an image; ``finish`` puts the root and the tables into it."""

    chunk_size: int = 4096
    n_blobs: int = 1
    image: bytearray = attrs.field(init=False)
    chunks: list[c.ChunkRecord] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self.image = bytearray(self.meta + ROOT * c.SLOT_SIZE + c.EXTENDED_INODE.size)

    @property
    def blob_table(self) -> int:
        return align_up(c.DEVICE_TABLE_OFFSET + self.n_blobs * c.DEVICE_SLOT_SIZE, c.BLOCK_SIZE)

    @property
    def meta(self) -> int:
        return align_up(self.blob_table + self.n_blobs * c.BLOB_RECORD_SIZE, c.BLOCK_SIZE)

    def append(self, data: bytes, alignment: int) -> int:
        at = align_up(len(self.image), alignment)
        self.image.extend(bytes(at - len(self.image)) + data)
        return at

    def inode(
        self,
        mode: int,
        content: bytes = b"",
        *,
        layout: int = c.LAYOUT_FLAT_PLAIN,
        size: int | None = None,
        union: int | None = None,
        xattrs: Iterable[tuple[int, bytes, bytes]] = (),
        **fields: int,
    ) -> int:
        """Node id of a new inode, extended if *fields* has times. *content* goes where *layout* says; for
        chunk-based files it is the array of indexes.
        """
        whole, tail = b"", b""
        if layout == c.LAYOUT_FLAT_PLAIN:
            whole = content
        elif layout == c.LAYOUT_FLAT_INLINE:
            cut = max(len(content) - 1, 0) // c.BLOCK_SIZE * c.BLOCK_SIZE
            whole, tail = content[:cut], content[cut:]
        else:
            tail = content
        if union is None:
            union = self.append(whole, c.BLOCK_SIZE) // c.BLOCK_SIZE if whole else 0
        body = b"".join(
            pad(c.XATTR_ENTRY.build(c.XattrEntry(len(n), i, len(v))) + n + v, 4) for i, n, v in xattrs
        )
        if body:
            body = c.XATTR_HEADER.build(c.XattrHeader(0, 0)) + body
        extended = bool(fields.keys() & {"i_mtime", "i_mtime_nsec"}) or (size or 0) >> 32 > 0
        record: dict[str, int] = {
            "i_format": layout << 1 | extended,
            "i_xattr_icount": (len(body) - 12) // 4 + 1 if body else 0,
            "i_mode": mode,
            "i_nlink": 1,
            "i_reserved": 0,
            "i_size": len(content) if size is None else size,
            "i_u": union,
            "i_ino": 0,
            "i_uid": 0,
            "i_gid": 0,
            **fields,
        }
        if extended:
            record.setdefault("i_mtime", 0)
            record.setdefault("i_mtime_nsec", 0)
            head = c.EXTENDED_INODE.build(c.ExtendedInode(**record))
        else:
            head = c.COMPACT_INODE.build(c.CompactInode(**record))
        head += body
        if layout == c.LAYOUT_CHUNK_BASED:
            head = pad(head, 8)
        return (self.append(head + tail, c.SLOT_SIZE) - self.meta) // c.SLOT_SIZE

    def chunk(self, blob: int, size: int, at: int) -> bytes:
        """Index of a new, uncompressed chunk of *blob* at *at* of its address space."""
        number = sum(record.blob_index == blob for record in self.chunks)
        self.chunks.append(
            c.ChunkRecord(bytes([number % 256]) * 32, blob, 0, size, size, at, at, 0, number, 0)
        )
        return chunk_index(blob, number, at)

    def finish(self, entries: Iterable[tuple[bytes, int, int]]) -> bytes:
        data = directory([(b".", ROOT, 2), (b"..", ROOT, 2), *entries])
        block = self.append(data, c.BLOCK_SIZE) // c.BLOCK_SIZE
        root = c.ExtendedInode(1, 0, 0o40755, 0, len(data), block, 0, 0, 0, 0, 0, 2)
        self.put(self.meta + ROOT * c.SLOT_SIZE, c.EXTENDED_INODE.build(root))
        table = b"".join(map(c.CHUNK_RECORD.build, self.chunks))
        table_at = self.append(table, c.BLOCK_SIZE)
        self.append(b"", c.BLOCK_SIZE)
        self.put(
            c.SUPER_OFFSET,
            c.SUPER_BLOCK.build(
                c.ErofsSuperBlock(
                    magic=c.SUPER_MAGIC,
                    checksum=0,
                    feature_compat=c.FEATURE_COMPAT_RAFS_V6,
                    blkszbits=c.BLOCK_BITS,
                    sb_extslots=0,
                    root_nid=ROOT,
                    inos=1,
                    build_time=BUILD_TIME[0],
                    build_time_nsec=BUILD_TIME[1],
                    blocks=0,
                    meta_blkaddr=self.meta // c.BLOCK_SIZE,
                    xattr_blkaddr=0,
                    uuid=b"",
                    volume_name=b"",
                    feature_incompat=c.FEATURE_INCOMPAT,
                    union=0,
                    extra_devices=self.n_blobs,
                    devt_slotoff=11,
                )
            ),
        )
        flags = c.SuperFlags.COMPRESSION_NONE | c.SuperFlags.HASH_SHA256 | c.SuperFlags.EXPLICIT_UID_GID
        self.put(
            c.EXT_SUPER_OFFSET,
            c.EXT_SUPER_BLOCK.build(
                c.ExtSuperBlock(
                    flags=flags,
                    blob_table_offset=self.blob_table,
                    blob_table_size=self.n_blobs * c.BLOB_RECORD_SIZE,
                    chunk_size=self.chunk_size,
                    chunk_table_offset=table_at,
                    chunk_table_size=len(table),
                    prefetch_table_offset=0,
                    prefetch_table_size=8,
                )
            ),
        )
        for index in range(self.n_blobs):
            self.put_blob(index)
        return bytes(self.image)

    def put(self, at: int, data: bytes) -> None:
        self.image[at : at + len(data)] = data

    def put_blob(self, index: int) -> None:
        chunks = [record for record in self.chunks if record.blob_index == index]
        space = max((r.uncompressed_offset + r.uncompressed_size for r in chunks), default=0)
        record = c.BlobRecord(
            blob_id=f"{index:064x}".encode(),
            blob_index=index,
            chunk_size=self.chunk_size,
            chunk_count=len(chunks),
            compression_algo=c.Compressor.NONE,
            digest_algo=c.Digester.SHA256,
            features=c.BlobFeatures.ALIGNED,
            compressed_size=space,
            uncompressed_size=align_up(space, c.BLOCK_SIZE),
            blob_toc_size=0,
            ci_compressor=0,
            ci_offset=space,
            ci_compressed_size=16 * len(chunks),
            ci_uncompressed_size=16 * len(chunks),
            blob_toc_digest=b"",
            blob_meta_digest=b"",
            blob_meta_size=0,
            cipher_iv_high=b"",
            cipher_algo=0,
        )
        self.put(self.blob_table + index * c.BLOB_RECORD_SIZE, c.BLOB_RECORD.build(record))
        slot = c.DeviceSlot(record.blob_id, align_up(space, c.BLOCK_SIZE) // c.BLOCK_SIZE, 512)
        self.put(c.DEVICE_TABLE_OFFSET + index * c.DEVICE_SLOT_SIZE, c.DEVICE_SLOT.build(slot))


def pad(data: bytes, alignment: int) -> bytes:
    return data.ljust(align_up(len(data), alignment), b"\0")


def chunk_index(blob: int, number: int, at: int) -> bytes:
    index = c.ChunkIndex(number & 0xFFFF, blob + 1, number >> 16, at >> c.BLOCK_BITS)
    return c.CHUNK_INDEX.build(index)


def directory(entries: Iterable[tuple[bytes, int, int]]) -> bytes:
    """Directory blocks with (name, nid, EROFS file type)."""
    blocks: list[list[tuple[bytes, int, int]]] = [[]]
    used = 0
    for entry in sorted(entries):
        need = c.DIRENT.size + len(entry[0])
        if used + need > c.BLOCK_SIZE:
            blocks.append([])
            used = 0
        blocks[-1].append(entry)
        used += need
    packed = []
    for block in blocks:
        offsets = itertools.accumulate(
            (len(name) for name, _, _ in block), initial=c.DIRENT.size * len(block)
        )
        records = [c.DirentRecord(nid, at, kind) for (_, nid, kind), at in zip(block, offsets, strict=False)]
        packed.append(b"".join(map(c.DIRENT.build, records)) + b"".join(name for name, _, _ in block))
    return b"".join(pad(block, c.BLOCK_SIZE) for block in packed[:-1]) + packed[-1]


def content_of(size: int) -> bytes:
    return bytes(i % 251 for i in range(size))


def chunk_maps(tree: AnyTree) -> list[dict[int, Any]]:
    if isinstance(tree, NativeTree):
        return [tree.chunk_map(index) for index in range(len(tree.blobs))]
    return [dict(chunk_map.chunks) for chunk_map in ChunkMap.from_chunk_table(tree)]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 3 * 4096 + 7])
def test_files_and_links_in_the_bootstrap(parse: Any, size: int) -> None:
    maker = Maker()
    content = content_of(size)
    plain = maker.inode(0o100644, content)
    inline = maker.inode(0o100644, content, layout=c.LAYOUT_FLAT_INLINE, i_mtime=1, i_mtime_nsec=2)
    target = b"t" * min(max(size, 1), 4096)
    links = [maker.inode(0o120777, target, layout=layout) for layout in (0, 2)]
    tree = parse(maker.finish([]))
    for nid in (plain, inline):
        inode = tree.inode(nid)
        assert tree.inline_data(inode) == content
        for offset, length in ((0, 1), (4090, 20), (size, 5), (size // 2, size)):
            assert tree.inline_data(inode, offset, length) == content[offset : offset + length]
        with pytest.raises(BadImage):
            list(tree.chunks(inode))
    for nid in links:
        assert tree.readlink(tree.inode(nid)) == target


def test_times(parse: Any) -> None:
    maker = Maker()
    compact = maker.inode(0o100644)
    cases = [(0, 0), (1 << 40, 999_999_999), (2**64 - 7, 1)]
    extended = [maker.inode(0o100644, i_mtime=s, i_mtime_nsec=ns) for s, ns in cases]
    late = maker.inode(0o100644, i_mtime=0, i_mtime_nsec=10**9)
    tree = parse(maker.finish([]))
    inode = tree.inode(compact)
    assert (inode.mtime, inode.mtime_nsec) == BUILD_TIME
    times = [(inode.mtime, inode.mtime_nsec) for inode in map(tree.inode, extended)]
    assert times == [(0, 0), (1 << 40, 999_999_999), (-7, 1)]
    with pytest.raises(BadImage):
        tree.inode(late)


def test_special_files(parse: Any) -> None:
    maker = Maker()
    rdev = 0xFFFF_FFFF
    kinds = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
    nids = [maker.inode(kind | 0o600, union=rdev) for kind in kinds]
    tree = parse(maker.finish([]))
    assert [tree.inode(nid).rdev for nid in nids] == [rdev, rdev, 0, 0]
    without_type = Maker()
    nid = without_type.inode(0o644)
    with pytest.raises(BadImage, match="type"):
        parse(without_type.finish([])).inode(nid)


def test_attributes(parse: Any) -> None:
    xattrs = [
        (1, b"a", b""),
        (1, b"n" * 250, b"v" * 65535),
        (2, b"", b"access"),
        (3, b"", b"default"),
        (4, b"overlay.opaque", b"y"),
        (6, b"capability", bytes(range(20))),
    ]
    maker = Maker()
    nid = maker.inode(0o100644, b"tail", layout=c.LAYOUT_FLAT_INLINE, xattrs=xattrs)
    tree = parse(maker.finish([]))
    inode = tree.inode(nid)
    found = list(tree.xattrs(inode))
    assert [(x.suffix, x.value) for x in found] == [(name, value) for _, name, value in xattrs]
    assert [x.prefix for x in found] == [c.XATTR_PREFIXES[index] for index, _, _ in xattrs]
    for x in found:
        assert tree.xattr_get(inode, x.prefix + x.suffix) == x.value
    assert tree.xattr_get(inode, b"user.b") is None
    assert tree.inline_data(inode) == b"tail"


@pytest.mark.parametrize("bad", [(0, b"x"), (5, b"x"), (1, b""), (2, b"x"), (1, b"a\0"), (1, b"n" * 251)])
def test_impossible_attributes(parse: Any, bad: tuple[int, bytes]) -> None:
    maker = Maker()
    nid = maker.inode(0o100644, xattrs=[(1, b"good", b"value"), (*bad, b"")])
    tree = parse(maker.finish([]))
    found = tree.xattrs(tree.inode(nid))
    with pytest.raises(BadImage):
        list(found)


@pytest.mark.parametrize("bits", range(12, 25))
def test_chunk_sizes(parse: Any, bits: int) -> None:
    stride = 1 << bits
    maker = Maker(chunk_size=stride)
    size = 2 * stride + 77
    indexes = b"".join(maker.chunk(0, min(stride, size - at), at) for at in range(0, size, stride))
    # Chunk bits of the next power of two, for the kernel; and indexes beyond the last chunk.
    union = c.CHUNK_FORMAT_INDEXES | bits + 2 - 12
    fields = {"layout": c.LAYOUT_CHUNK_BASED, "size": size, "union": union}
    nid = maker.inode(0o100644, indexes + indexes, i_mtime=0, **fields)
    tree = parse(maker.finish([]))
    inode = tree.inode(nid)

    def parts(*bounds: int) -> list[tuple[int, int, int]]:
        return [(p.chunk_index, p.chunk_offset, p.length) for p in tree.chunks(inode, *bounds)]

    assert parts() == [(0, 0, stride), (1, 0, stride), (2, 0, 77)]
    assert parts(stride - 1, 2) == [(0, stride - 1, 1), (1, 0, 1)]
    assert parts(size - 1, 10) == [(2, 76, 1)]
    assert parts(size, 10) == parts(0, 0) == []
    (chunks,) = chunk_maps(tree)
    assert [chunks[p.chunk_index].uncompressed_offset for p in tree.chunks(inode)] == [0, stride, 2 * stride]


def test_more_than_4_gib(parse: Any) -> None:
    stride = 16 << 20
    size = (5 << 30) + 4097
    maker = Maker(chunk_size=stride)
    indexes = b"".join(maker.chunk(0, min(stride, size - at), at) for at in range(0, size, stride))
    nid = maker.inode(0o100644, indexes, layout=c.LAYOUT_CHUNK_BASED, size=size)
    tree = parse(maker.finish([]))
    inode = tree.inode(nid)
    assert inode.size == size
    assert sum(part.length for part in tree.chunks(inode)) == size
    assert [part[:4] for part in tree.chunks(inode, 5 << 30)] == [(0, 320, 0, 4097)]


def test_255_blobs(parse: Any) -> None:
    maker = Maker(n_blobs=255)
    nids = []
    for blob in range(255):
        indexes = maker.chunk(blob, 4096, 0) + maker.chunk((blob + 1) % 255, 100, 8192)
        nids.append(maker.inode(0o100644, indexes, layout=c.LAYOUT_CHUNK_BASED, size=4196))
    tree = parse(maker.finish([]))
    assert [blob.blob_id for blob in tree.blobs] == [f"{index:064x}" for index in range(255)]
    for blob, nid in enumerate(nids):
        assert [part.blob_index for part in tree.chunks(tree.inode(nid))] == [blob, (blob + 1) % 255]
    assert all(len(chunks) == 2 for chunks in chunk_maps(tree))


def test_256_blobs_are_refused(parse: Any) -> None:
    with pytest.raises(BadImage):
        parse(Maker(n_blobs=256).finish([]))


@pytest.mark.parametrize("number", [1, 1 << 16, (1 << 24) - 1])
def test_indexes_of_no_chunk_are_refused(parse: Any, number: int) -> None:
    maker = Maker()
    maker.chunk(0, 4096, 0)
    nids = [
        maker.inode(0o100644, index, layout=c.LAYOUT_CHUNK_BASED, size=4096)
        for index in (chunk_index(0, number, 0), chunk_index(-1, 0, 0), chunk_index(1, 0, 0))
    ]
    tree = parse(maker.finish([]))
    for nid in nids:
        with pytest.raises(BadImage):
            list(tree.chunks(tree.inode(nid)))


@pytest.mark.parametrize("layout", [c.LAYOUT_FLAT_PLAIN, c.LAYOUT_FLAT_INLINE])
def test_directory_of_100_000_entries(parse: Any, layout: int) -> None:
    maker = Maker()
    names = [b"entry-%06d" % i for i in range(100_000)]
    data = directory((name, i, 1) for i, name in enumerate(names))
    nid = maker.inode(0o40755, data, layout=layout, i_mtime=0)
    tree = parse(maker.finish([(b"dir", nid, 2)]))
    inode = tree.inode(nid)
    listed = list(tree.entries(inode))
    assert [(entry.name, entry.nid) for entry in listed] == [(name, i) for i, name in enumerate(names)]
    assert {entry.d_type for entry in listed} == {8}
    for i in range(0, 100_000, 997):
        assert tree.lookup(inode, names[i]) == (i, 8)
        assert tree.lookup(inode, names[i] + b"x") is None
        rest = tree.entries(inode, listed[i].next_cookie)
        assert next(rest, None) == (listed[i + 1] if i + 1 < len(listed) else None)
    assert tree.lookup(inode, b"") is None
    assert list(tree.entries(inode, listed[-1].next_cookie)) == list(tree.entries(inode, 1 << 60)) == []


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("a bit of the flags", (c.EXT_SUPER_OFFSET + 5, 1)),
        ("the low half of the flags", (c.EXT_SUPER_OFFSET + 1, 4)),
        ("a blob feature", (4096 + 84 + 1, 0x10)),
        ("a chunk flag", ("chunk table", 36, 0x80)),
        ("a hole", ("chunk table", 36, 0x02)),
    ],
)
def test_unknown_bits_are_refused(parse: Any, where: str, change: tuple[Any, ...]) -> None:
    maker = Maker()
    maker.chunk(0, 4096, 0)
    image = bytearray(maker.finish([]))
    assert chunk_maps(parse(bytes(image)))[0]
    *table, at, byte = change
    if table:
        at += c.EXT_SUPER_BLOCK.parse(image, c.EXT_SUPER_OFFSET).chunk_table_offset
    image[at] |= byte
    with pytest.raises(BadImage):
        chunk_maps(parse(bytes(image)))


@pytest.mark.parametrize(
    "bit",
    [
        c.BlobFeatures.ZRAN,
        c.BlobFeatures.BATCH,
        c.BlobFeatures.ENCRYPTED,
        c.BlobFeatures.TARFS,
        c.BlobFeatures.EXTERNAL,
    ],
)
def test_unsupported_features_are_named(parse: Any, bit: c.BlobFeatures) -> None:
    maker = Maker()
    image = bytearray(maker.finish([]))
    image[4096 + 84 : 4096 + 88] = int(c.BlobFeatures.ALIGNED | bit).to_bytes(4, "little")
    with pytest.raises(UnsupportedFeature):
        parse(bytes(image))


@pytest.mark.parametrize("field", ["uncompressed_offset", "compressed_size", "digest"])
def test_chunks_described_twice_must_agree(parse: Any, field: str) -> None:
    maker = Maker()
    maker.chunk(0, 4096, 0)
    maker.chunk(0, 4096, 8192)
    first, second = maker.chunks
    assert len(chunk_maps(parse(maker.finish([])))[0]) == 2
    other: Any = {"uncompressed_offset": 4096, "compressed_size": 4095, "digest": b"x" * 32}[field]
    maker = Maker()
    maker.chunks = [first, second, second._replace(**{field: other})]
    with pytest.raises(BadImage):
        chunk_maps(parse(maker.finish([])))


def test_chunks_must_not_overlap(parse: Any) -> None:
    maker = Maker(chunk_size=1 << 20)
    maker.chunk(0, 8192, 0)
    maker.chunk(0, 4096, 4096)
    with pytest.raises(BadImage, match=r"overlap|share"):
        chunk_maps(parse(maker.finish([])))
