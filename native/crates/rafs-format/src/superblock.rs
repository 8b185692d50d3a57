//! EROFS superblock and RAFS extended superblock.

use crate::algorithm::{Compressor, Digester};
use crate::error::{FormatError, Result};
use crate::format::*;

const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_RAFS_V6: u32 = 0x4000_0000;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
const BLOCK_BITS: u8 = 12;
const BLOCK_BITS_TARFS: u8 = 9;
const NSEC_PER_SEC: u32 = 1_000_000_000;

/// Bits of the extended superblock's `flags`.
pub mod flag {
    pub const COMPRESSION_NONE: u64 = 0x1;
    pub const COMPRESSION_LZ4: u64 = 0x2;
    pub const HASH_BLAKE3: u64 = 0x4;
    pub const HASH_SHA256: u64 = 0x8;
    pub const EXPLICIT_UID_GID: u64 = 0x10;
    pub const HAS_XATTR: u64 = 0x20;
    pub const COMPRESSION_GZIP: u64 = 0x40;
    pub const COMPRESSION_ZSTD: u64 = 0x80;
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    pub const TARFS_MODE: u64 = 0x200;
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
    pub const ENCRYPTION_AES_128_XTS: u64 = 0x0200_0000;
    /// Bits that a reader may ignore.
    pub const COMPATIBLE: u64 = 0xfc00_0000;
    /// All bits with a meaning; any other one makes the image unreadable.
    pub const KNOWN: u64 = 0x3ff | ENCRYPTION_NONE | ENCRYPTION_AES_128_XTS | COMPATIBLE;

    pub(super) const COMPRESSION: u64 =
        COMPRESSION_NONE | COMPRESSION_LZ4 | COMPRESSION_GZIP | COMPRESSION_ZSTD;
    pub(super) const HASH: u64 = HASH_BLAKE3 | HASH_SHA256;
}

/// Both superblocks, checked.
#[derive(Clone, Copy, Debug)]
pub struct SuperBlock {
    /// Bits of [`flag`].
    pub flags: u64,
    /// Stride of the chunk indexes of all files, a power of two of 4 KiB to 16 MiB.
    pub chunk_size: u32,
    pub root_nid: u64,
    /// Number of inodes, as the builder counted them.
    pub inos: u64,
    /// Seconds and nanoseconds since the epoch; the modification time of every compact inode.
    pub build_time: i64,
    pub build_time_nsec: u32,
    /// Byte offset that node ids count from.
    pub meta_offset: u64,
    /// Data blocks of all blobs together, for statfs.
    pub blocks: u32,
    pub blob_count: u32,
    pub blob_table_offset: u64,
    pub chunk_table_offset: u64,
    /// Bytes, a multiple of 80.
    pub chunk_table_size: u64,
    pub prefetch_table_offset: u64,
    /// Bytes, a multiple of 4.
    pub prefetch_table_size: u32,
    compressor: Compressor,
    digester: Digester,
}

impl SuperBlock {
    /// Reads and checks both superblocks of `image`.
    pub fn parse(image: &[u8]) -> Result<SuperBlock> {
        let size = image.len() as u64;
        let sb: &[u8; SUPER_SIZE as usize] = need(image, SUPER_OFFSET, "superblock")?;
        let bad = |what, message: String| Err(FormatError::malformed(what, SUPER_OFFSET, message));

        if le32(sb, 0) != MAGIC {
            return bad(
                "superblock.magic",
                format!("{:#010x} is not that of EROFS", le32(sb, 0)),
            );
        }
        if size > BOOTSTRAP_MAX {
            return bad(
                "superblock",
                format!("the bootstrap has {size} bytes, at most {BOOTSTRAP_MAX} are read"),
            );
        }
        if sb[12] == BLOCK_BITS_TARFS {
            return Err(FormatError::unsupported(
                "superblock.blkszbits",
                SUPER_OFFSET,
                "tarfs images (512-byte blocks) are not supported",
            ));
        }
        if sb[12] != BLOCK_BITS {
            return bad(
                "superblock.blkszbits",
                format!("{}, not {BLOCK_BITS}", sb[12]),
            );
        }
        if size % BLOCK_SIZE != 0 {
            return bad(
                "superblock",
                format!("the bootstrap's size {size} is not a multiple of {BLOCK_SIZE}"),
            );
        }
        if le32(sb, 4) != 0 {
            return bad(
                "superblock.checksum",
                "not 0, although RAFS does not use it".into(),
            );
        }
        if le32(sb, 8) & COMPAT_RAFS_V6 == 0 {
            return bad(
                "superblock.feature_compat",
                format!("{:#x} lacks the RAFS v6 bit", le32(sb, 8)),
            );
        }
        if sb[13] != 0 {
            return bad("superblock.extslots", format!("{}, not 0", sb[13]));
        }
        if le32(sb, 80) != INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE {
            return bad(
                "superblock.feature_incompat",
                format!("{:#x}, not 0xc", le32(sb, 80)),
            );
        }
        if le16(sb, 84) != 0 {
            return bad("superblock.u", format!("{}, not 0", le16(sb, 84)));
        }
        if le32(sb, 44) != 0 {
            return bad(
                "superblock.xattr_blkaddr",
                "shared extended attributes are not part of RAFS".into(),
            );
        }
        if u64::from(le16(sb, 88)) * DEVICE_SLOT_SIZE != DEVICE_TABLE_OFFSET {
            return bad(
                "superblock.devt_slotoff",
                format!("{}, not 11", le16(sb, 88)),
            );
        }
        let inos = le64(sb, 16);
        if inos == 0 {
            return bad("superblock.inos", "an image has at least its root".into());
        }
        let meta_offset = u64::from(le32(sb, 40)) * BLOCK_SIZE;
        if meta_offset >= size {
            return bad(
                "superblock.meta_blkaddr",
                format!("{meta_offset} lies beyond the end at {size}"),
            );
        }
        let build_time_nsec = le32(sb, 32);
        if build_time_nsec >= NSEC_PER_SEC {
            return bad(
                "superblock.build_time_nsec",
                format!("{build_time_nsec} is a second or more"),
            );
        }

        let ext = ExtSuperBlock::parse(image, u64::from(le16(sb, 86)))?;
        Ok(SuperBlock {
            flags: ext.flags,
            chunk_size: ext.chunk_size,
            root_nid: u64::from(le16(sb, 14)),
            inos,
            build_time: le64(sb, 24) as i64,
            build_time_nsec,
            meta_offset,
            blocks: le32(sb, 36),
            blob_count: ext.blob_count,
            blob_table_offset: ext.blob_table_offset,
            chunk_table_offset: ext.chunk_table_offset,
            chunk_table_size: ext.chunk_table_size,
            prefetch_table_offset: ext.prefetch_table_offset,
            prefetch_table_size: ext.prefetch_table_size,
            compressor: ext.compressor,
            digester: ext.digester,
        })
    }

    /// Compressor of chunks that their blob does not override.
    pub fn compressor(&self) -> Compressor {
        self.compressor
    }

    /// Digester of chunks that their blob does not override.
    pub fn digester(&self) -> Digester {
        self.digester
    }

    /// Whether some inode has extended attributes.
    pub fn has_xattr(&self) -> bool {
        self.flags & flag::HAS_XATTR != 0
    }

    /// Whether the owners in the inodes are meant; otherwise every file belongs to whoever serves it.
    pub fn explicit_uid_gid(&self) -> bool {
        self.flags & flag::EXPLICIT_UID_GID != 0
    }

    /// Whether every blob carries the digests of its chunks.
    pub fn inlined_chunk_digest(&self) -> bool {
        self.flags & flag::INLINED_CHUNK_DIGEST != 0
    }
}

struct ExtSuperBlock {
    flags: u64,
    chunk_size: u32,
    blob_count: u32,
    blob_table_offset: u64,
    chunk_table_offset: u64,
    chunk_table_size: u64,
    prefetch_table_offset: u64,
    prefetch_table_size: u32,
    compressor: Compressor,
    digester: Digester,
}

impl ExtSuperBlock {
    fn parse(image: &[u8], devices: u64) -> Result<ExtSuperBlock> {
        let size = image.len() as u64;
        let ext: &[u8; EXT_SUPER_SIZE as usize] = need(image, EXT_SUPER_OFFSET, "ext_superblock")?;
        let bad =
            |what, message: String| Err(FormatError::malformed(what, EXT_SUPER_OFFSET, message));
        let unsupported = |message| {
            Err(FormatError::unsupported(
                "ext_superblock.flags",
                EXT_SUPER_OFFSET,
                message,
            ))
        };

        let flags = le64(ext, 0);
        if flags & !flag::KNOWN != 0 {
            return bad(
                "ext_superblock.flags",
                format!("unknown bits {:#x}", flags & !flag::KNOWN),
            );
        }
        if flags & flag::TARFS_MODE != 0 {
            return unsupported("tarfs images are not supported");
        }
        if flags & flag::ENCRYPTION_AES_128_XTS != 0 {
            return unsupported("encrypted images are not supported");
        }
        let compressor = match flags & flag::COMPRESSION {
            flag::COMPRESSION_NONE => Compressor::None,
            flag::COMPRESSION_LZ4 => Compressor::Lz4Block,
            flag::COMPRESSION_GZIP => Compressor::Gzip,
            flag::COMPRESSION_ZSTD => Compressor::Zstd,
            other => {
                return bad(
                    "ext_superblock.flags",
                    format!("not exactly one compressor: {other:#x}"),
                );
            }
        };
        let digester = match flags & flag::HASH {
            flag::HASH_BLAKE3 => Digester::Blake3,
            flag::HASH_SHA256 => Digester::Sha256,
            other => {
                return bad(
                    "ext_superblock.flags",
                    format!("not exactly one digester: {other:#x}"),
                );
            }
        };

        let chunk_size = le32(ext, 20);
        if !chunk_size.is_power_of_two() || !(CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&chunk_size)
        {
            return bad(
                "ext_superblock.chunk_size",
                format!("{chunk_size} is not a power of two of 4 KiB to 16 MiB"),
            );
        }

        let (blob_table_offset, blob_table_size) = (le64(ext, 8), u64::from(le32(ext, 16)));
        let blob_count = blob_table_size / BLOB_ENTRY_SIZE;
        if blob_table_size % BLOB_ENTRY_SIZE != 0 || blob_count > BLOB_COUNT_MAX {
            return bad(
                "ext_superblock.blob_table_size",
                format!("{blob_table_size} is not that of up to {BLOB_COUNT_MAX} entries"),
            );
        }
        if blob_count != devices {
            return bad(
                "superblock.extra_devices",
                format!("{devices} device slots, but {blob_count} entries in the blob table"),
            );
        }
        let tables_start = DEVICE_TABLE_OFFSET + devices * DEVICE_SLOT_SIZE;
        let inside = |offset: u64, len: u64| {
            offset >= tables_start.max(BLOCK_SIZE)
                && offset.checked_add(len).is_some_and(|end| end <= size)
        };
        if blob_count > 0
            && (blob_table_offset % BLOCK_SIZE != 0 || !inside(blob_table_offset, blob_table_size))
        {
            return bad(
                "ext_superblock.blob_table_offset",
                format!("{blob_table_offset} is out of place"),
            );
        }

        let (chunk_table_offset, chunk_table_size) = (le64(ext, 24), le64(ext, 32));
        if chunk_table_size % CHUNK_ENTRY_SIZE != 0 {
            return bad(
                "ext_superblock.chunk_table_size",
                format!("{chunk_table_size} is not a multiple of {CHUNK_ENTRY_SIZE}"),
            );
        }
        if chunk_table_size > 0
            && (chunk_table_offset % BLOCK_SIZE != 0
                || !inside(chunk_table_offset, chunk_table_size))
        {
            return bad(
                "ext_superblock.chunk_table_offset",
                format!("{chunk_table_offset} is out of place"),
            );
        }

        // Builders of the first v6 images left a size without an offset when there was nothing to prefetch.
        let prefetch_table_offset = le64(ext, 40);
        let prefetch_table_size = if prefetch_table_offset == 0 {
            0
        } else {
            le32(ext, 48)
        };
        if prefetch_table_size % 4 != 0
            || (prefetch_table_size > 0
                && !inside(prefetch_table_offset, prefetch_table_size.into()))
        {
            return bad(
                "ext_superblock.prefetch_table_offset",
                format!("{prefetch_table_offset} with {prefetch_table_size} bytes is out of place"),
            );
        }

        Ok(ExtSuperBlock {
            flags,
            chunk_size,
            blob_count: blob_count as u32,
            blob_table_offset,
            chunk_table_offset,
            chunk_table_size,
            prefetch_table_offset,
            prefetch_table_size,
            compressor,
            digester,
        })
    }
}
