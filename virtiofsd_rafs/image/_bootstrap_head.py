"""The head of a bootstrap: superblocks, device slot, blob table and prefetch table.

::

    0      superblock @1024, extended superblock, device slot
    4096   blob table and prefetch table, if there is a blob
           metadata, from metadata_offset() on
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILD_TIME = 0  # constant, so that the same tree gives the same bytes
# Of blobs in the address space that flattens bootstrap and blobs; as nydus-image does.
_MAPPED_ALIGNMENT = 0x80000
_PREFETCH_OFFSET = c.BLOCK_SIZE + c.BLOB_RECORD_SIZE


def metadata_offset(*, has_blob: bool, n_prefetch: int) -> int:
    """Where the metadata begins; *n_prefetch* entries of the prefetch table stand before it."""
    if not has_blob:
        return c.BLOCK_SIZE
    return align_up(_PREFETCH_OFFSET + 4 * n_prefetch, c.BLOCK_SIZE)


def build_head(
    *,
    size: int,
    chunk_table_offset: int,
    n_inodes: int,
    root_nid: int,
    has_xattr: bool,
    chunk_size: int,
    compressor: c.Compressor,
    digester: c.Digester,
    record: c.BlobRecord | None,
    prefetch_nids: Sequence[int] = (),
) -> bytes:
    """The bytes before the metadata of a bootstrap of *size* bytes; *record* describes its only blob."""
    prefetch_size = 4 * len(prefetch_nids) if record else 0
    meta_offset = metadata_offset(has_blob=record is not None, n_prefetch=len(prefetch_nids))
    head = bytearray(meta_offset)

    def put(offset: int, data: bytes) -> None:
        head[offset : offset + len(data)] = data

    put(
        c.SUPER_OFFSET,
        c.SUPER_BLOCK.build(
            c.ErofsSuperBlock(
                magic=c.SUPER_MAGIC,
                checksum=0,
                feature_compat=c.FEATURE_COMPAT_RAFS_V6,
                blkszbits=c.BLOCK_BITS,
                sb_extslots=0,
                root_nid=root_nid,
                inos=n_inodes,
                build_time=BUILD_TIME,
                build_time_nsec=0,
                blocks=size >> c.BLOCK_BITS,
                meta_blkaddr=meta_offset >> c.BLOCK_BITS,
                xattr_blkaddr=0,
                uuid=bytes(16),
                volume_name=bytes(16),
                feature_incompat=c.FEATURE_INCOMPAT,
                union=0,
                extra_devices=1 if record else 0,
                devt_slotoff=c.DEVICE_TABLE_OFFSET // c.DEVICE_SLOT_SIZE,
            )
        ),
    )
    flags = c.COMPRESSOR_FLAGS[compressor] | c.DIGESTER_FLAGS[digester] | c.SuperFlags.EXPLICIT_UID_GID
    if has_xattr:
        flags |= c.SuperFlags.HAS_XATTR
    if record:
        flags |= c.SuperFlags.INLINED_CHUNK_DIGEST
    put(
        c.EXT_SUPER_OFFSET,
        c.EXT_SUPER_BLOCK.build(
            c.ExtSuperBlock(
                flags=flags,
                blob_table_offset=c.BLOCK_SIZE,
                blob_table_size=c.BLOB_RECORD_SIZE if record else 0,
                chunk_size=chunk_size,
                chunk_table_offset=chunk_table_offset,
                chunk_table_size=record.chunk_count * c.CHUNK_RECORD.size if record else 0,
                prefetch_table_offset=_PREFETCH_OFFSET if prefetch_size else 0,
                prefetch_table_size=prefetch_size,
            )
        ),
    )
    if record:
        device = c.DeviceSlot(
            blob_id=record.blob_id,
            blocks=record.uncompressed_size >> c.BLOCK_BITS,
            mapped_blkaddr=align_up(size, _MAPPED_ALIGNMENT) >> c.BLOCK_BITS,
        )
        put(c.DEVICE_TABLE_OFFSET, c.DEVICE_SLOT.build(device))
        put(c.BLOCK_SIZE, c.BLOB_RECORD.build(record))
        put(_PREFETCH_OFFSET, struct.pack(f"<{prefetch_size // 4}I", *prefetch_nids[: prefetch_size // 4]))
    return bytes(head)
