"""The bytes behind the chunks of a data blob: chunk information ("ci"), table of contents, tar headers.

Constants and records only. Described in docs/formats/rafs-v6.md, "Blob file".
"""

from __future__ import annotations

from typing import NamedTuple

from virtiofsd_rafs.rafs.records import U32, U64, Bytes16, Bytes32, Layout

CI_MAGIC = 0xB10B_B10B
CI_HEADER_SIZE = 4096
CI_MAGIC2_OFFSET = CI_HEADER_SIZE - 4
CI_ALIGNMENT = 4096  # of the header behind the array in a blob.meta file

TAR_HEADER_SIZE = 512

CI_V2_COMPRESSED = 0x1
CI_V2_ZRAN = 0x2
CI_V2_BATCH = 0x4
CI_V2_ENCRYPTED = 0x8
CI_V2_HAS_CRC32 = 0x10


class CiHeader(NamedTuple):
    """4096 bytes on disk: this record, zeros, and the magic again in the last four bytes."""

    magic: U32
    features: U32
    ci_compressor: U32
    ci_entries: U32
    ci_offset: U64
    ci_compressed_size: U64
    ci_uncompressed_size: U64
    ci_zran_offset: U64 = 0
    ci_zran_size: U64 = 0
    ci_zran_count: U32 = 0


CI_HEADER = Layout(CiHeader, "ci header")


class CiV1(NamedTuple):
    uncompressed: U64
    compressed: U64


class CiV2(NamedTuple):
    uncompressed: U64
    compressed: U64
    data: U64


CI_V1 = Layout(CiV1, "ci entry")
CI_V2 = Layout(CiV2, "ci entry")


class TocEntry(NamedTuple):
    """128 bytes on disk, the reserved rest is not part of the record."""

    flags: U32
    reserved: U32
    name: Bytes16
    digest: Bytes32
    compressed_offset: U64
    compressed_size: U64
    uncompressed_size: U64


TOC_ENTRY = Layout(TocEntry, "toc entry")
TOC_ENTRY_SIZE = 128

TOC_FLAG_NONE = 0x1
TOC_FLAG_ZSTD = 0x2
TOC_FLAG_LZ4_BLOCK = 0x4

NAME_BLOB = b"image.blob"
NAME_BOOTSTRAP = b"image.boot"
NAME_META = b"blob.meta"
NAME_META_HEADER = b"blob.meta.header"
NAME_DIGEST = b"blob.digest"
NAME_TOC = b"rafs.blob.toc"
