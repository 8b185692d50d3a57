"""The bytes of a RAFS v6 bootstrap: constants and records only, no logic.

RAFS v6 is EROFS with an extended superblock and private tables. EROFS names follow Linux
``fs/erofs/erofs_fs.h``; the private parts are described in docs/formats/rafs-v6.md. All integers are little
endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from virtiofsd_rafs.rafs.records import (
    U8,
    U16,
    U32,
    U64,
    Bytes4,
    Bytes8,
    Bytes16,
    Bytes32,
    Bytes64,
    Layout,
)

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
SLOT_SIZE = 32  # nid unit

SUPER_OFFSET = 1024
EXT_SUPER_OFFSET = SUPER_OFFSET + 128
DEVICE_TABLE_OFFSET = EXT_SUPER_OFFSET + 256
DEVICE_SLOT_SIZE = 128

SUPER_MAGIC = 0xE0F5E1E2
FEATURE_COMPAT_RAFS_V6 = 0x4000_0000
FEATURE_INCOMPAT_CHUNKED_FILE = 0x4
FEATURE_INCOMPAT_DEVICE_TABLE = 0x8
FEATURE_INCOMPAT = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE

NAME_MAX = 255
SYMLINK_MAX = 4096
CHUNK_SIZE_MIN = 4096
CHUNK_SIZE_MAX = 16 << 20
CHUNKS_MAX = 1 << 24  # a chunk index has 24 bits
BLOBS_MAX = 255  # the device id of a chunk index has 8 bits and counts from 1
BOOTSTRAP_MAX = 2 << 30
# Widths of the v1 chunk information: a 32-bit count of 4 KiB pages and 40 bits of bytes.
UNCOMPRESSED_BLOB_MAX = 1 << 44
COMPRESSED_BLOB_MAX = 1 << 40
XATTR_VALUE_MAX = 65535


class SuperFlags(IntFlag):
    """Flags of the extended superblock. An unknown incompatible bit forbids mounting."""

    COMPRESSION_NONE = 0x1
    COMPRESSION_LZ4 = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSION_GZIP = 0x40
    COMPRESSION_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS_MODE = 0x200
    ENCRYPTION_NONE = 0x0100_0000
    ENCRYPTION_AES_128_XTS = 0x0200_0000


COMPATIBLE_FLAGS = 0xFC00_0000  # bits reserved for features that a reader may ignore


class BlobFeatures(IntFlag):
    """Features of a data blob; the low 16 bits are incompatible ones."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    IS_CHUNKDICT_GENERATED = 0x200
    IS_SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x1000_0000
    HAS_TOC = 0x2000_0000
    CAP_TAR_TOC = 0x4000_0000


INCOMPATIBLE_BLOB_FEATURES = 0xFFFF


class Compressor(IntEnum):
    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digester(IntEnum):
    BLAKE3 = 0
    SHA256 = 1


COMPRESSOR_FLAGS = {
    Compressor.NONE: SuperFlags.COMPRESSION_NONE,
    Compressor.LZ4_BLOCK: SuperFlags.COMPRESSION_LZ4,
    Compressor.GZIP: SuperFlags.COMPRESSION_GZIP,
    Compressor.ZSTD: SuperFlags.COMPRESSION_ZSTD,
}
DIGESTER_FLAGS = {Digester.BLAKE3: SuperFlags.HASH_BLAKE3, Digester.SHA256: SuperFlags.HASH_SHA256}


class ErofsSuperBlock(NamedTuple):
    magic: U32
    checksum: U32
    feature_compat: U32
    blkszbits: U8
    sb_extslots: U8
    root_nid: U16
    inos: U64
    build_time: U64
    build_time_nsec: U32
    blocks: U32
    meta_blkaddr: U32
    xattr_blkaddr: U32
    uuid: Bytes16
    volume_name: Bytes16
    feature_incompat: U32
    union: U16
    extra_devices: U16
    devt_slotoff: U16
    reserved: Bytes32 = bytes(32)
    reserved2: U32 = 0
    reserved3: U16 = 0


SUPER_BLOCK = Layout(ErofsSuperBlock, "superblock")
assert SUPER_BLOCK.size == 128


class ExtSuperBlock(NamedTuple):
    """The record is 256 bytes on disk; the reserved rest is not part of it."""

    flags: U64
    blob_table_offset: U64
    blob_table_size: U32
    chunk_size: U32
    chunk_table_offset: U64
    chunk_table_size: U64
    prefetch_table_offset: U64
    prefetch_table_size: U32
    reserved: U32 = 0


EXT_SUPER_BLOCK = Layout(ExtSuperBlock, "extended superblock")


class DeviceSlot(NamedTuple):
    """128 bytes on disk, the reserved rest is not part of the record."""

    blob_id: Bytes64
    blocks: U32
    mapped_blkaddr: U32


DEVICE_SLOT = Layout(DeviceSlot, "device slot")


class BlobRecord(NamedTuple):
    """256 bytes on disk, the reserved rest is not part of the record."""

    blob_id: Bytes64
    blob_index: U32
    chunk_size: U32
    chunk_count: U32
    compression_algo: U32
    digest_algo: U32
    features: U32
    compressed_size: U64
    uncompressed_size: U64
    blob_toc_size: U32
    ci_compressor: U32
    ci_offset: U64
    ci_compressed_size: U64
    ci_uncompressed_size: U64
    blob_toc_digest: Bytes32
    blob_meta_digest: Bytes32
    blob_meta_size: U64
    cipher_iv_high: Bytes8
    cipher_algo: U32


BLOB_RECORD = Layout(BlobRecord, "blob table")
BLOB_RECORD_SIZE = 256


class ChunkRecord(NamedTuple):
    """One entry of the chunk table."""

    digest: Bytes32
    blob_index: U32
    flags: U32
    compressed_size: U32
    uncompressed_size: U32
    compressed_offset: U64
    uncompressed_offset: U64
    file_offset: U64
    chunk_index: U32
    crc32: U32


CHUNK_RECORD = Layout(ChunkRecord, "chunk table")
assert CHUNK_RECORD.size == 80


class ChunkFlags(IntFlag):
    """Flags of a chunk table entry."""

    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC32 = 0x10


LAYOUT_FLAT_PLAIN = 0
LAYOUT_FLAT_INLINE = 2
LAYOUT_CHUNK_BASED = 4
FORMAT_EXTENDED = 0x1  # bit 0 of i_format; bits 1-3 are the layout

CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_BITS = 0x1F


class CompactInode(NamedTuple):
    i_format: U16
    i_xattr_icount: U16
    i_mode: U16
    i_nlink: U16
    i_size: U32
    i_reserved: U32
    i_u: U32
    i_ino: U32
    i_uid: U16
    i_gid: U16
    i_reserved2: Bytes4 = bytes(4)


COMPACT_INODE = Layout(CompactInode, "inode")
assert COMPACT_INODE.size == 32


class ExtendedInode(NamedTuple):
    i_format: U16
    i_xattr_icount: U16
    i_mode: U16
    i_reserved: U16
    i_size: U64
    i_u: U32
    i_ino: U32
    i_uid: U32
    i_gid: U32
    i_mtime: U64
    i_mtime_nsec: U32
    i_nlink: U32
    i_reserved2: Bytes16 = bytes(16)


EXTENDED_INODE = Layout(ExtendedInode, "inode")
assert EXTENDED_INODE.size == 64


class DirentRecord(NamedTuple):
    nid: U64
    nameoff: U16
    file_type: U8
    reserved: U8 = 0


DIRENT = Layout(DirentRecord, "dirent")
assert DIRENT.size == 12


class ChunkIndex(NamedTuple):
    """EROFS: advise, device_id (16 bits), blkaddr; RAFS puts a 24-bit index around its low byte."""

    ci_low: U16
    device_id: U8
    ci_high: U8
    blkaddr: U32


CHUNK_INDEX = Layout(ChunkIndex, "chunk index")
assert CHUNK_INDEX.size == 8


class XattrHeader(NamedTuple):
    h_name_filter: U32
    h_shared_count: U8
    h_reserved: U8 = 0
    h_reserved2: U16 = 0
    h_reserved3: Bytes4 = bytes(4)


XATTR_HEADER = Layout(XattrHeader, "xattr header")
assert XATTR_HEADER.size == 12


class XattrEntry(NamedTuple):
    e_name_len: U8
    e_name_index: U8
    e_value_size: U16


XATTR_ENTRY = Layout(XattrEntry, "xattr entry")

# name index -> what stands before the stored name
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
