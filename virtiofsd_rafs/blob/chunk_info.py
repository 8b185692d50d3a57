"""Chunk information ("ci"): where each chunk is, in the blob and in its uncompressed address space.

The array comes in two forms of entry (v1: 16 bytes, v2: 24 bytes) and two wrappings: inside the blob (maybe
compressed, header behind it), and as a blob.meta file (plain, padded to 4 KiB, header behind it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.blob import c_blob as c
from virtiofsd_rafs.blob import codecs
from virtiofsd_rafs.rafs.c_rafs_v6 import BLOCK_SIZE, BlobFeatures
from virtiofsd_rafs.rafs.records import Buffer, align_up, in_range

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.superblock import BlobEntry

_SIZE_LOW = 0xF_FFFF
_OFFSET_40 = (1 << 40) - 1


class CiEntry(NamedTuple):
    """One entry of the array as stored, of whatever kind; offsets and sizes in bytes."""

    compressed_offset: int
    compressed_size: int
    uncompressed_offset: int
    uncompressed_size: int
    compressed: bool
    flags: int = 0
    data: int = 0

    @property
    def crc32(self) -> int | None:
        """CRC-32C of the uncompressed chunk."""
        return self.data & 0xFFFF_FFFF if self.flags & c.CI_V2_HAS_CRC32 else None


class CiSection(NamedTuple):
    """The array as it was written to a blob; sizes in bytes, ``sha256`` of the plain array."""

    stored_size: int
    size: int
    compressed: bool
    sha256: bytes


def parse_v1(buf: Buffer, offset: int = 0) -> CiEntry:
    """The 16-byte entry at *offset*; a chunk is compressed exactly if its two sizes differ."""
    raw = c.CI_V1.parse(buf, offset)
    uncompressed_size = (raw.uncompressed >> 44 | (raw.uncompressed & 0xF00) << 12) + 1
    compressed_size = (raw.compressed >> 44 | (raw.compressed >> 40 & 0xF) << 20) + 1
    return CiEntry(
        compressed_offset=raw.compressed & _OFFSET_40,
        compressed_size=compressed_size,
        uncompressed_offset=raw.uncompressed & 0xFFF_FFFF_F000,
        uncompressed_size=uncompressed_size,
        compressed=compressed_size != uncompressed_size,
    )


def build_v1(entry: CiEntry) -> bytes:
    """The 16 bytes that parse_v1 reads; sizes up to 16 MiB, offsets of 40 and 44 bits."""
    size, packed = entry.uncompressed_size - 1, entry.compressed_size - 1
    assert size >> 24 == packed >> 24 == entry.compressed_offset >> 40 == entry.uncompressed_offset >> 44 == 0
    assert entry.uncompressed_offset % BLOCK_SIZE == 0
    uncompressed = (size & _SIZE_LOW) << 44 | entry.uncompressed_offset | (size >> 20) << 8
    compressed = (packed & _SIZE_LOW) << 44 | (packed >> 20) << 40 | entry.compressed_offset
    return c.CI_V1.build(c.CiV1(uncompressed, compressed))


def parse_v2(buf: Buffer, offset: int = 0) -> CiEntry:
    """The 24-byte entry at *offset*. Stored: compressed size, uncompressed size minus one."""
    raw = c.CI_V2.parse(buf, offset)
    flags = raw.uncompressed >> 56
    return CiEntry(
        compressed_offset=raw.compressed & _OFFSET_40,
        compressed_size=raw.compressed >> 40,
        uncompressed_offset=(raw.uncompressed & 0xFFFF_FFFF) << 12,
        uncompressed_size=(raw.uncompressed >> 32 & 0xFF_FFFF) + 1,
        compressed=bool(flags & c.CI_V2_COMPRESSED),
        flags=flags,
        data=raw.data,
    )


def build_v2(entry: CiEntry) -> bytes:
    """The 24 bytes that parse_v2 reads; the values must fit."""
    size = entry.uncompressed_size - 1
    assert size >> 24 == entry.compressed_size >> 24 == entry.compressed_offset >> 40 == 0
    flags = entry.flags & ~c.CI_V2_COMPRESSED | (c.CI_V2_COMPRESSED if entry.compressed else 0)
    uncompressed = flags << 56 | size << 32 | entry.uncompressed_offset >> 12
    return c.CI_V2.build(
        c.CiV2(uncompressed, entry.compressed_size << 40 | entry.compressed_offset, entry.data)
    )


def parse_header(buf: Buffer, offset: int = 0) -> c.CiHeader:
    """The 4096-byte ci header at *offset*. Raises BadImage."""
    in_range(buf, "ci header", offset, c.CI_HEADER_SIZE)
    header = c.CI_HEADER.parse(buf, offset)
    second = int.from_bytes(buf[offset + c.CI_MAGIC2_OFFSET : offset + c.CI_HEADER_SIZE], "little")
    if header.magic != c.CI_MAGIC or second != c.CI_MAGIC:
        raise c.CI_HEADER.bad(
            "magic", f"{header.magic:#x} and {second:#x} instead of {c.CI_MAGIC:#x}", offset
        )
    return header


def build_header(header: c.CiHeader) -> bytes:
    """The 4096 bytes of *header*."""
    return c.CI_HEADER.build(header).ljust(c.CI_MAGIC2_OFFSET, b"\0") + c.CI_MAGIC.to_bytes(4, "little")


def parse_array(raw: Buffer, count: int, *, v2: bool) -> list[CiEntry]:
    """The first *count* entries of the uncompressed array *raw*. Raises BadImage when it is too short."""
    size, parse = (c.CI_V2.size, parse_v2) if v2 else (c.CI_V1.size, parse_v1)
    in_range(raw, "ci array", 0, count * size)
    return [parse(raw, index * size) for index in range(count)]


def unpack_section(blob: BlobEntry, section: Buffer) -> bytes:
    """The uncompressed array of *blob* from the bytes of the blob from ci_offset on, array and header.

    *section* holds ci_compressed_size + 4096 bytes. The header must agree with the blob table.
    Raises BadImage or DigestMismatch.
    """
    size = blob.record.ci_compressed_size
    _check_header(blob, parse_header(section, size), size)
    return codecs.decompress(bytes(section[:size]), blob.ci_compressor, blob.record.ci_uncompressed_size)


def unpack_blob_meta(blob: BlobEntry, meta: Buffer) -> bytes:
    """The array of *blob* from a blob.meta file: the plain array, padded to 4 KiB, and the header.

    Raises BadImage.
    """
    size = blob.record.ci_uncompressed_size
    at = align_up(size, c.CI_ALIGNMENT)
    _check_header(blob, parse_header(meta, at), at)
    return bytes(meta[:size])


def section_to_blob_meta(blob: BlobEntry, section: Buffer) -> bytes:
    """The blob.meta file with the content of *section*, which unpack_section describes.

    Raises BadImage or DigestMismatch.
    """
    array = unpack_section(blob, section)
    header = bytes(section[blob.record.ci_compressed_size :][: c.CI_HEADER_SIZE])
    return array.ljust(align_up(len(array), c.CI_ALIGNMENT), b"\0") + header


def _check_header(blob: BlobEntry, header: c.CiHeader, at: int) -> None:
    bad = c.CI_HEADER.bad
    # Only what decides how the array is read: builders before 2.2 did not repeat the other bits here.
    if (header.features ^ blob.record.features) & BlobFeatures.CHUNK_INFO_V2:
        raise bad("features", f"{header.features:#x} differs from the blob table", at)
    promised = {
        "ci_compressor": blob.record.ci_compressor,
        "ci_offset": blob.record.ci_offset,
        "ci_compressed_size": blob.record.ci_compressed_size,
        "ci_uncompressed_size": blob.record.ci_uncompressed_size,
    }
    if not blob.record.features & BlobFeatures.IS_CHUNKDICT_GENERATED:
        promised["ci_entries"] = blob.chunk_count
    for field, value in promised.items():
        if getattr(header, field) != value:
            raise bad(field, f"{getattr(header, field)}, but {value} in the blob table", at)
