"""Chunk information, table of contents and tar headers of a blob."""

from __future__ import annotations

import hashlib
import struct
import tarfile
from typing import TYPE_CHECKING

import attrs
import pytest

from virtiofsd_rafs.blob import c_blob, chunk_info, toc
from virtiofsd_rafs.blob.chunk_info import CiEntry
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.errors import BadImage, DigestMismatch, UnsupportedFeature
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.superblock import BlobEntry

MIB = 1 << 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, bytes]:
    root = tmp_path_factory.mktemp("blob")
    (root / "src").mkdir()
    for i in range(300):
        (root / f"src/{i}").write_bytes(b"%d" % i * 3000)
    result = build_image(root / "src", root / "out")
    assert result.blob
    return Tree.parse(result.bootstrap.read_bytes()), result.blob.read_bytes()


def section_of(blob: BlobEntry, content: bytes) -> bytes:
    at = blob.record.ci_offset
    return content[at : at + blob.record.ci_compressed_size + c_blob.CI_HEADER_SIZE]


def test_v1_words() -> None:
    # Sizes have their low 20 bits at 44, and their high 4 bits at 8 (uncompressed) and at 40 (compressed).
    raw = struct.pack("<QQ", 0x12345 << 44 | 7 << 12 | 0xA << 8, 0xABCDE << 44 | 0x5 << 40 | 0x12_3456_789A)
    entry = chunk_info.parse_v1(raw)
    assert entry == CiEntry(0x12_3456_789A, 0x5ABCDF, 7 << 12, 0xA12346, compressed=True)
    assert chunk_info.build_v1(entry) == raw


@pytest.mark.parametrize("size", [1, 4096, MIB, MIB + 1, 16 * MIB])
def test_v1_sizes(size: int) -> None:
    entry = CiEntry((1 << 40) - 1, size, (1 << 44) - 4096, size, compressed=False)
    assert chunk_info.parse_v1(chunk_info.build_v1(entry)) == entry


def test_v2_words() -> None:
    raw = struct.pack("<QQQ", 0x11 << 56 | 0xFFF << 32 | 9, 0x800 << 40 | 77, 0xDEADBEEF)
    entry = chunk_info.parse_v2(raw)
    assert entry == CiEntry(77, 0x800, 9 << 12, 0x1000, compressed=True, flags=0x11, data=0xDEADBEEF)
    assert entry.crc32 == 0xDEADBEEF
    assert chunk_info.build_v2(entry) == raw
    assert chunk_info.parse_v2(struct.pack("<QQQ", 9, 1 << 40, 5)).crc32 is None


def test_header() -> None:
    header = c_blob.CiHeader(c_blob.CI_MAGIC, 1, 3, 7, 1000, 50, 112)
    raw = chunk_info.build_header(header)
    assert len(raw) == 4096
    assert chunk_info.parse_header(raw) == header
    assert chunk_info.parse_header(b"xyz" + raw, 3) == header
    for at in (0, 3, 4092, 4095):
        broken = bytearray(raw)
        broken[at] ^= 1
        with pytest.raises(BadImage, match="magic"):
            chunk_info.parse_header(bytes(broken))
    for short in (b"", raw[:-1]):
        with pytest.raises(BadImage):
            chunk_info.parse_header(short)


def test_both_wrappings_say_the_same(built: tuple[Tree, bytes]) -> None:
    tree, content = built
    blob = tree.blobs[0]
    assert blob.record.ci_compressed_size < blob.record.ci_uncompressed_size
    array = chunk_info.unpack_section(blob, section_of(blob, content))
    meta = chunk_info.section_to_blob_meta(blob, section_of(blob, content))
    assert len(meta) == 8192 + 4096
    assert chunk_info.unpack_blob_meta(blob, meta) == array
    by_info = ChunkMap.from_chunk_info(blob, array)
    by_table = ChunkMap.from_chunk_table(tree)[0]
    assert [chunk._replace(digest=None) for chunk in by_table] == list(by_info)


@pytest.mark.parametrize(
    "field",
    ["features", "ci_compressor", "ci_entries", "ci_offset", "ci_compressed_size", "ci_uncompressed_size"],
)
def test_header_must_agree_with_the_blob_table(built: tuple[Tree, bytes], field: str) -> None:
    tree, content = built
    blob = tree.blobs[0]
    section = bytearray(section_of(blob, content))
    section[blob.record.ci_compressed_size + c_blob.CI_HEADER.offsets[field]] ^= 4
    with pytest.raises(BadImage, match=field):
        chunk_info.unpack_section(blob, bytes(section))


def test_cut_off_sections(built: tuple[Tree, bytes]) -> None:
    tree, content = built
    blob = tree.blobs[0]
    section = section_of(blob, content)
    for size in (0, 10, len(section) - 1):
        with pytest.raises(BadImage):
            chunk_info.unpack_section(blob, section[:size])
        with pytest.raises(BadImage):
            chunk_info.unpack_blob_meta(blob, section[:size])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"compressed_offset": 1 << 39}, BadImage),
        ({"uncompressed_offset": 1 << 43}, BadImage),
        ({"uncompressed_offset": 0}, BadImage),  # where chunk 0 is
        ({"uncompressed_size": MIB + 1}, BadImage),
    ],
)
def test_chunk_outside_its_blob(
    built: tuple[Tree, bytes], change: dict[str, int], error: type[Exception]
) -> None:
    tree, content = built
    blob = tree.blobs[0]
    array = bytearray(chunk_info.unpack_section(blob, section_of(blob, content)))
    ChunkMap.from_chunk_info(blob, array)
    array[16:32] = chunk_info.build_v1(chunk_info.parse_v1(array, 16)._replace(**change))
    with pytest.raises(error):
        ChunkMap.from_chunk_info(blob, array)


@pytest.mark.parametrize(
    ("flags", "error"),
    [(0x2, UnsupportedFeature), (0x4, UnsupportedFeature), (0x8, UnsupportedFeature), (0x20, BadImage)],
)
def test_kinds_of_v2_chunks_that_are_refused(
    built: tuple[Tree, bytes], flags: int, error: type[Exception]
) -> None:
    blob = built[0].blobs[0]
    record = blob.record._replace(features=blob.record.features | 4, chunk_count=1)
    blob = attrs.evolve(blob, record=record)
    entry = CiEntry(0, 10, 0, 20, compressed=True)
    assert ChunkMap.from_chunk_info(blob, chunk_info.build_v2(entry)).chunks[0].compressed
    with pytest.raises(error):
        ChunkMap.from_chunk_info(blob, chunk_info.build_v2(entry._replace(flags=flags)))


def test_digest_section_of_another_length(built: tuple[Tree, bytes]) -> None:
    tree, content = built
    array = chunk_info.unpack_section(tree.blobs[0], section_of(tree.blobs[0], content))
    with pytest.raises(BadImage, match="31 bytes"):
        ChunkMap.from_chunk_info(tree.blobs[0], array, bytes(31))


def test_tar_headers_are_tar(built: tuple[Tree, bytes]) -> None:
    for name, size in ((b"image.blob", 0), (b"x", 8**11 - 1), (b"blob.meta", 8**11), (b"y", 1 << 40)):
        raw = toc.build_tar_header(name, size)
        info = tarfile.TarInfo.frombuf(raw, "utf-8", "strict")
        assert (info.name, info.size, info.type) == (name.decode(), size, tarfile.REGTYPE)
        assert toc.parse_tar_header(raw, 0) == (name, size)
    broken = bytearray(toc.build_tar_header(b"image.blob", 5))
    for at in (0, 130, 150, 300):
        changed = bytearray(broken)
        changed[at] ^= 1
        with pytest.raises(BadImage, match="tar header"):
            toc.parse_tar_header(changed, 0)


def test_blob_reads_backwards_as_tar(built: tuple[Tree, bytes]) -> None:
    """Each section is followed by its header, from the end to the start."""
    _, content = built
    found, at = [], len(content)
    while at:
        name, size = toc.parse_tar_header(content, at - 512)
        found.append(name)
        at -= 512 + size
    assert found == [b"rafs.blob.toc", b"blob.digest", b"blob.meta", b"image.blob"]


def test_toc(built: tuple[Tree, bytes]) -> None:
    tree, content = built
    r = tree.blobs[0].record
    sections = toc.parse_toc(content[-4096:], len(content), size=r.blob_toc_size, digest=r.blob_toc_digest)
    assert toc.build_toc(list(sections.values())) == content[-r.blob_toc_size :]
    assert [*sections] == [b"image.blob", b"blob.meta", b"blob.meta.header", b"blob.digest"]
    data_end = sections[b"image.blob"].compressed_size + 512
    assert sections[b"image.blob"].digest == hashlib.sha256(content[:data_end]).digest()
    for section in list(sections.values())[1:]:
        stored = content[section.offset : section.offset + section.compressed_size]
        unpacked = toc.extract(section, stored, 1 << 20)
        assert hashlib.sha256(unpacked).digest() == section.digest
        with pytest.raises(BadImage, match="above 10"):
            toc.extract(section, stored, 10)
        with pytest.raises(BadImage, match="instead of"):
            toc.extract(section, stored[1:], 1 << 20)
        with pytest.raises(DigestMismatch):
            toc.extract(section, bytes([stored[0] ^ 1]) + stored[1:], 1 << 20)


def test_toc_that_is_not_the_promised_one(built: tuple[Tree, bytes]) -> None:
    tree, content = built
    r = tree.blobs[0].record
    with pytest.raises(BadImage, match="promises"):
        toc.parse_toc(content[-4096:], len(content), size=r.blob_toc_size + 128)
    tail = bytearray(content[-4096:])
    tail[-1000] ^= 1
    toc.parse_toc(bytes(tail), len(content), size=r.blob_toc_size)
    with pytest.raises(DigestMismatch):
        toc.parse_toc(bytes(tail), len(content), size=r.blob_toc_size, digest=r.blob_toc_digest)


def test_broken_toc() -> None:
    one = toc.Section(b"blob.meta", Compressor.NONE, bytes(32), 0, 10, 10)
    assert toc.parse_toc(toc.build_toc([one]), 1000) == {b"blob.meta": one}
    for table, message in (
        (toc.build_toc([one, one]), "twice"),
        (toc.build_toc([one._replace(offset=991)]), "beyond the blob"),
        (toc.build_toc([one._replace(name=b"")]), "impossible"),
        (toc.build_toc([one])[1:], "possible length"),
        (b"\7" + toc.build_toc([one])[1:], "compressor"),
        (toc.build_toc([one] * 40), "possible length"),
        (toc.build_tar_header(b"blob.meta", 0), "table of contents"),
        (b"", "do not fit"),
    ):
        with pytest.raises(BadImage, match=message):
            toc.parse_toc(table, 1000)
