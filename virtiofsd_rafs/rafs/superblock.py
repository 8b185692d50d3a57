"""Reads what describes an image as a whole: superblock, extended superblock, device slots, blob table.

Every value that later code adds or multiplies is checked here against the length of the bootstrap.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import BadImage, UnsupportedFeature
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.records import Buffer

_BLOB_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\0*")  # safe as a file name
_TAR_HEADER_SIZE = 512

# What a blob may ask of its reader and this version does not do.
_UNSERVED = (
    c.BlobFeatures.ZRAN
    | c.BlobFeatures.TARFS
    | c.BlobFeatures.BATCH
    | c.BlobFeatures.ENCRYPTED
    | c.BlobFeatures.EXTERNAL
)


@attrs.frozen
class SuperBlock:
    """The two superblocks, decoded. Offsets and sizes are bytes in the bootstrap."""

    erofs: c.ErofsSuperBlock
    ext: c.ExtSuperBlock
    compressor: c.Compressor
    digester: c.Digester

    @property
    def flags(self) -> c.SuperFlags:
        return c.SuperFlags(self.ext.flags)

    @property
    def chunk_size(self) -> int:
        return self.ext.chunk_size

    @property
    def root_nid(self) -> int:
        return self.erofs.root_nid

    @property
    def inos(self) -> int:
        return self.erofs.inos

    @property
    def build_time(self) -> int:
        return self.erofs.build_time

    @property
    def build_time_nsec(self) -> int:
        return self.erofs.build_time_nsec

    @property
    def meta_offset(self) -> int:
        """Where nid 0 would be."""
        return self.erofs.meta_blkaddr << c.BLOCK_BITS

    @property
    def has_xattr(self) -> bool:
        return bool(self.ext.flags & c.SuperFlags.HAS_XATTR)

    @property
    def explicit_uid_gid(self) -> bool:
        return bool(self.ext.flags & c.SuperFlags.EXPLICIT_UID_GID)


@attrs.frozen
class BlobEntry:
    """One data blob, as its slot in the device table and its record in the blob table describe it."""

    blob_id: str
    record: c.BlobRecord
    device: c.DeviceSlot

    @property
    def index(self) -> int:
        return self.record.blob_index

    @property
    def features(self) -> c.BlobFeatures:
        return c.BlobFeatures(self.record.features)

    @property
    def compressor(self) -> c.Compressor:
        return c.Compressor(self.record.compression_algo)

    @property
    def ci_compressor(self) -> c.Compressor:
        return c.Compressor(self.record.ci_compressor)

    @property
    def digester(self) -> c.Digester:
        return c.Digester(self.record.digest_algo)

    @property
    def chunk_count(self) -> int:
        return self.record.chunk_count

    @property
    def chunk_info_size(self) -> int:
        """Bytes of one entry of the chunk information array."""
        return 24 if self.record.features & c.BlobFeatures.CHUNK_INFO_V2 else 16

    @property
    def uncompressed_size(self) -> int:
        return self.record.uncompressed_size

    @property
    def data_size(self) -> int:
        """Bytes at the start of the blob that hold chunks; what follows is metadata.

        Blobs of nydus-image before 2.2 give it as compressed_size; later ones count the whole file there.
        """
        r = self.record
        if r.features & c.BlobFeatures.SEPARATE or not r.features & c.BlobFeatures.CAP_TAR_TOC:
            return r.compressed_size
        end = r.ci_offset if self.has_chunk_info else r.compressed_size
        return max(end - _TAR_HEADER_SIZE, 0) if r.features & c.BlobFeatures.HAS_TAR_HEADER else end

    @property
    def has_chunk_info(self) -> bool:
        return self.record.ci_compressed_size > 0 and self.record.ci_uncompressed_size > 0

    @property
    def toc_digest(self) -> bytes | None:
        """The digest that authenticates the table of contents, when the image has one."""
        r = self.record
        known = r.features & c.BlobFeatures.HAS_TOC and r.blob_toc_size and any(r.blob_toc_digest)
        return r.blob_toc_digest if known else None


def parse_superblock(buf: Buffer) -> SuperBlock:
    """The superblocks of the bootstrap *buf*.

    Raises BadImage with the byte offset, or UnsupportedFeature for what is well-formed but not served (tarfs,
    encryption, a RAFS version other than 6). Source: Linux fs/erofs/erofs_fs.h, struct erofs_super_block;
    docs/formats/rafs-v6.md, "Superblocks".
    """
    bad = c.SUPER_BLOCK.bad
    sb = c.SUPER_BLOCK.parse(buf, c.SUPER_OFFSET)
    base = c.SUPER_OFFSET
    if sb.magic != c.SUPER_MAGIC:
        raise bad("magic", f"{sb.magic:#010x} instead of {c.SUPER_MAGIC:#x}: not a RAFS v6 bootstrap", base)
    if not sb.feature_compat & c.FEATURE_COMPAT_RAFS_V6:
        raise bad("feature_compat", "the RAFS v6 bit is not set: a plain EROFS image", base)
    if sb.blkszbits == 9:
        raise UnsupportedFeature("the image is in tarfs mode (512-byte blocks)")
    if sb.blkszbits != c.BLOCK_BITS:
        raise bad("blkszbits", f"{sb.blkszbits} instead of {c.BLOCK_BITS}", base)
    if sb.feature_incompat != c.FEATURE_INCOMPAT:
        raise bad("feature_incompat", f"{sb.feature_incompat:#x} instead of {c.FEATURE_INCOMPAT:#x}", base)
    for field in ("checksum", "sb_extslots", "xattr_blkaddr", "union"):
        if value := getattr(sb, field):
            raise bad(field, f"{value} instead of 0", base)
    if sb.build_time_nsec >= 1_000_000_000:
        raise bad("build_time_nsec", f"{sb.build_time_nsec} is not below one second", base)
    if sb.inos == 0:
        raise bad("inos", "0: an image has at least its root", base)
    if len(buf) > c.BOOTSTRAP_MAX or len(buf) % c.BLOCK_SIZE:
        raise BadImage("bootstrap", f"{len(buf)} bytes is no multiple of {c.BLOCK_SIZE} up to 2 GiB")
    if sb.devt_slotoff * c.DEVICE_SLOT_SIZE != c.DEVICE_TABLE_OFFSET:
        raise bad("devt_slotoff", f"{sb.devt_slotoff} instead of 11", base)
    if sb.meta_blkaddr << c.BLOCK_BITS >= len(buf):
        raise bad("meta_blkaddr", f"block {sb.meta_blkaddr} lies beyond the bootstrap", base)

    ext = c.EXT_SUPER_BLOCK.parse(buf, c.EXT_SUPER_OFFSET)
    return SuperBlock(sb, ext, *_check_ext(buf, sb, ext))


def _check_ext(buf: Buffer, sb: c.ErofsSuperBlock, ext: c.ExtSuperBlock) -> tuple[c.Compressor, c.Digester]:
    base = c.EXT_SUPER_OFFSET
    bad = c.EXT_SUPER_BLOCK.bad
    known = 0  # a plain number: ~ of an IntFlag knows nothing of the unknown bits
    for flag in c.SuperFlags:
        known |= flag.value
    if unknown := ext.flags & ~(known | c.COMPATIBLE_FLAGS):
        raise bad("flags", f"unknown bits {unknown:#x}", base)
    if ext.flags & c.SuperFlags.TARFS_MODE:
        raise UnsupportedFeature("the image is in tarfs mode")
    if ext.flags & c.SuperFlags.ENCRYPTION_AES_128_XTS:
        raise UnsupportedFeature("the image is encrypted")
    compressors = [k for k, flag in c.COMPRESSOR_FLAGS.items() if ext.flags & flag]
    digesters = [k for k, flag in c.DIGESTER_FLAGS.items() if ext.flags & flag]
    if len(compressors) != 1 or len(digesters) != 1:
        raise bad("flags", f"{ext.flags:#x} must name one compressor and one digester", base)
    if not (c.CHUNK_SIZE_MIN <= ext.chunk_size <= c.CHUNK_SIZE_MAX) or ext.chunk_size.bit_count() != 1:
        raise bad("chunk_size", f"{ext.chunk_size} is not a power of two from 4 KiB to 16 MiB", base)

    tables_start = max(c.DEVICE_TABLE_OFFSET + sb.extra_devices * c.DEVICE_SLOT_SIZE, c.BLOCK_SIZE)
    # Old builders left a size without an offset for images that have nothing to prefetch.
    prefetch_table_size = ext.prefetch_table_size if ext.prefetch_table_offset else 0
    tables = (
        ("blob_table", ext.blob_table_offset, ext.blob_table_size, c.BLOCK_SIZE, c.BLOB_RECORD_SIZE),
        ("chunk_table", ext.chunk_table_offset, ext.chunk_table_size, c.BLOCK_SIZE, c.CHUNK_RECORD.size),
        ("prefetch_table", ext.prefetch_table_offset, prefetch_table_size, 1, 4),
    )
    for name, offset, size, alignment, unit in tables:
        if size % unit:
            raise bad(f"{name}_size", f"{size} is not a multiple of {unit}", base)
        if size and (offset % alignment or offset < tables_start or offset + size > len(buf)):
            raise bad(f"{name}_offset", f"{offset} is out of place", base)
    n_blobs = ext.blob_table_size // c.BLOB_RECORD_SIZE
    if n_blobs > c.BLOBS_MAX:
        raise bad("blob_table_size", f"{ext.blob_table_size}: more than {c.BLOBS_MAX} blobs", base)
    if n_blobs != sb.extra_devices:
        raise c.SUPER_BLOCK.bad("extra_devices", f"{sb.extra_devices} for {n_blobs} blobs", c.SUPER_OFFSET)
    return compressors[0], digesters[0]


def parse_blobs(buf: Buffer, sb: SuperBlock) -> tuple[BlobEntry, ...]:
    """The blobs of the image by index; ``blobs[i].index == i``.

    Raises BadImage or UnsupportedFeature. Source: docs/formats/rafs-v6.md, "Device slots" and "Blob table".
    """
    blobs = []
    for index in range(sb.erofs.extra_devices):
        base = sb.ext.blob_table_offset + index * c.BLOB_RECORD_SIZE
        record = c.BLOB_RECORD.parse(buf, base)
        slot = c.DEVICE_TABLE_OFFSET + index * c.DEVICE_SLOT_SIZE
        device = c.DEVICE_SLOT.parse(buf, slot)
        if not _BLOB_ID.fullmatch(record.blob_id):
            raise c.BLOB_RECORD.bad("blob_id", "is not of letters, digits, '-' and '_'", base)
        if device.blob_id != record.blob_id:
            raise c.DEVICE_SLOT.bad("blob_id", f"differs from the one in the blob table (blob {index})", slot)
        _check_blob(record, base, index, sb)
        blobs.append(BlobEntry(record.blob_id.rstrip(b"\0").decode(), record, device))
    return tuple(blobs)


def _check_blob(r: c.BlobRecord, base: int, index: int, sb: SuperBlock) -> None:
    bad = c.BLOB_RECORD.bad
    if r.blob_index != index:
        raise bad("blob_index", f"{r.blob_index} instead of {index}", base)
    if r.chunk_size != sb.chunk_size:
        raise bad("chunk_size", f"{r.chunk_size} instead of the image's {sb.chunk_size}", base)
    if r.chunk_count > c.CHUNKS_MAX:
        raise bad("chunk_count", f"{r.chunk_count}, at most {c.CHUNKS_MAX}", base)
    for field in ("compression_algo", "ci_compressor"):
        if getattr(r, field) not in c.Compressor.__members__.values():
            raise bad(field, f"{getattr(r, field)} is unknown", base)
    if r.digest_algo not in c.Digester.__members__.values():
        raise bad("digest_algo", f"{r.digest_algo} is unknown", base)
    known = 0  # a plain number: ~ of an IntFlag knows nothing of the unknown bits
    for feature in c.BlobFeatures:
        known |= feature.value
    if unknown := r.features & c.INCOMPATIBLE_BLOB_FEATURES & ~known:
        raise bad("features", f"unknown bits {unknown:#x}", base)
    if unserved := r.features & _UNSERVED:
        raise UnsupportedFeature(f"blob {index} uses {c.BlobFeatures(unserved)!r}")
    if r.cipher_algo:
        raise UnsupportedFeature(f"blob {index} is encrypted")
    if not r.features & c.BlobFeatures.ALIGNED:
        raise bad("features", "ALIGNED is not set", base)
    if r.uncompressed_size > c.UNCOMPRESSED_BLOB_MAX:
        raise bad("uncompressed_size", f"{r.uncompressed_size} is above {c.UNCOMPRESSED_BLOB_MAX}", base)
    if r.compressed_size > c.COMPRESSED_BLOB_MAX:
        raise bad("compressed_size", f"{r.compressed_size} is above {c.COMPRESSED_BLOB_MAX}", base)
    if r.ci_offset > c.COMPRESSED_BLOB_MAX or r.ci_offset + r.ci_compressed_size > c.COMPRESSED_BLOB_MAX:
        raise bad(
            "ci_offset", f"{r.ci_offset} + {r.ci_compressed_size} is above {c.COMPRESSED_BLOB_MAX}", base
        )
    if r.ci_compressed_size > r.ci_uncompressed_size:
        raise bad("ci_compressed_size", f"{r.ci_compressed_size} is above the uncompressed size", base)
    # Each chunk takes a block of the address space at least, so that this bounds what a reader sets aside.
    if r.chunk_count > -(-r.uncompressed_size // c.BLOCK_SIZE):
        raise bad("chunk_count", f"{r.chunk_count} chunks in {r.uncompressed_size} bytes", base)
    # A chunk dictionary counts the chunks it was asked for, the array all that the blob has.
    expected = r.chunk_count * (24 if r.features & c.BlobFeatures.CHUNK_INFO_V2 else 16)
    if not r.features & c.BlobFeatures.IS_CHUNKDICT_GENERATED and r.ci_uncompressed_size != expected:
        raise bad("ci_uncompressed_size", f"{r.ci_uncompressed_size} instead of {expected}", base)
    tar_header = _TAR_HEADER_SIZE if r.features & c.BlobFeatures.HAS_TAR_HEADER else 0
    if r.ci_compressed_size and r.ci_uncompressed_size and r.ci_offset < tar_header:
        raise bad("ci_offset", f"{r.ci_offset} leaves no room for the tar header before it", base)
