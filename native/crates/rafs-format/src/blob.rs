//! Device slots and the blob table: which blobs an image has, and where in them the sections lie.

use crate::algorithm::{Compressor, Digester};
use crate::error::{FormatError, Result};
use crate::format::*;
use crate::superblock::SuperBlock;

/// Bits of a blob's `features`.
pub mod feature {
    pub const ALIGNED: u32 = 0x1;
    pub const INLINED_FS_META: u32 = 0x2;
    pub const CHUNK_INFO_V2: u32 = 0x4;
    pub const ZRAN: u32 = 0x8;
    pub const SEPARATE: u32 = 0x10;
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    pub const TARFS: u32 = 0x40;
    pub const BATCH: u32 = 0x80;
    pub const ENCRYPTED: u32 = 0x100;
    pub const IS_CHUNKDICT_GENERATED: u32 = 0x200;
    pub const IS_SEPARATED_WITH_PREFETCH_FILES: u32 = 0x400;
    pub const EXTERNAL: u32 = 0x800;
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    pub const HAS_TOC: u32 = 0x2000_0000;
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;

    /// The half of the word in which an unknown bit makes a blob unreadable, and the known bits of it.
    pub const INCOMPATIBLE_MASK: u32 = 0xffff;
    pub const INCOMPATIBLE_KNOWN: u32 = 0xfff;

    pub(super) const UNSUPPORTED: [(u32, &str); 5] = [
        (
            ZRAN,
            "blobs over untouched gzip layers (zran) are not supported",
        ),
        (TARFS, "tarfs blobs are not supported"),
        (BATCH, "batched chunks are not supported"),
        (ENCRYPTED, "encrypted blobs are not supported"),
        (EXTERNAL, "external blobs are not supported"),
    ];
}

/// An entry of the blob table, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    /// Place in the table; chunk indexes name a blob by it.
    pub index: u16,
    id: [u8; BLOB_ID_SIZE],
    id_len: u8,
    pub chunk_size: u32,
    /// Chunk numbers in this blob are below this.
    pub chunk_count: u32,
    pub compressor: Compressor,
    pub digester: Digester,
    /// Bits of [`feature`].
    pub features: u32,
    /// Size of the blob, or only of its data: see [`BlobEntry::data_size`].
    pub compressed_size: u64,
    /// Size of the uncompressed address space, in which every chunk starts at a multiple of 4 KiB.
    pub uncompressed_size: u64,
    /// Bytes at the end of the blob that hold the table of contents and its tar header; 0 when unknown.
    pub toc_size: u32,
    /// SHA-256 of these bytes; all zero when unknown.
    pub toc_digest: [u8; 32],
    /// Chunk-info array: place in the blob, sizes and compressor.
    pub ci_compressor: Compressor,
    pub ci_offset: u64,
    pub ci_compressed_size: u64,
    pub ci_uncompressed_size: u64,
    pub meta_digest: [u8; 32],
    pub meta_size: u64,
}

impl BlobEntry {
    /// Reads entry `index` of the blob table and the device slot that belongs to it.
    pub fn parse(image: &[u8], sb: &SuperBlock, index: u32) -> Result<BlobEntry> {
        let at = sb.blob_table_offset + u64::from(index) * BLOB_ENTRY_SIZE;
        if index >= sb.blob_count {
            return Err(FormatError::malformed(
                "blob",
                at,
                format!("there is no blob {index}"),
            ));
        }
        let e: &[u8; BLOB_ENTRY_SIZE as usize] = need(image, at, "blob")?;
        let bad = |what, message: String| Err(FormatError::malformed(what, at, message));

        let id: [u8; BLOB_ID_SIZE] = bytes_at(e, 0);
        let Some(id_len) = id_length(&id) else {
            return bad("blob.blob_id", "not of letters, digits, '-' and '_'".into());
        };
        let slot_at = DEVICE_TABLE_OFFSET + u64::from(index) * DEVICE_SLOT_SIZE;
        if need::<BLOB_ID_SIZE>(image, slot_at, "device_slot")? != &id {
            return Err(FormatError::malformed(
                "device_slot.blob_id",
                slot_at,
                format!("not that of entry {index} of the blob table"),
            ));
        }
        if le32(e, 64) != index {
            return bad(
                "blob.blob_index",
                format!("{} in entry {index}", le32(e, 64)),
            );
        }
        let chunk_size = le32(e, 68);
        if chunk_size != sb.chunk_size {
            return bad(
                "blob.chunk_size",
                format!("{chunk_size}, but {} in the superblock", sb.chunk_size),
            );
        }
        let chunk_count = le32(e, 72);
        if chunk_count > CHUNK_COUNT_MAX {
            return bad(
                "blob.chunk_count",
                format!("{chunk_count} is above {CHUNK_COUNT_MAX}"),
            );
        }
        let features = le32(e, 84);
        let unknown = features & feature::INCOMPATIBLE_MASK & !feature::INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return bad("blob.features", format!("unknown bits {unknown:#x}"));
        }
        for (bit, message) in feature::UNSUPPORTED {
            if features & bit != 0 {
                return Err(FormatError::unsupported("blob.features", at, message));
            }
        }
        if features & feature::ALIGNED == 0 {
            return bad("blob.features", "chunks are not aligned to 4 KiB".into());
        }
        if le32(e, 216) != 0 {
            return Err(FormatError::unsupported(
                "blob.cipher_algo",
                at,
                "encrypted blobs are not supported",
            ));
        }
        let Some(compressor) = Compressor::from_u32(le32(e, 76)) else {
            return bad(
                "blob.compression_algo",
                format!("{} is unknown", le32(e, 76)),
            );
        };
        let Some(digester) = Digester::from_u32(le32(e, 80)) else {
            return bad("blob.digest_algo", format!("{} is unknown", le32(e, 80)));
        };
        let Some(ci_compressor) = Compressor::from_u32(le32(e, 108)) else {
            return bad("blob.ci_compressor", format!("{} is unknown", le32(e, 108)));
        };

        let blob = BlobEntry {
            index: index as u16,
            id,
            id_len,
            chunk_size,
            chunk_count,
            compressor,
            digester,
            features,
            compressed_size: le64(e, 88),
            uncompressed_size: le64(e, 96),
            toc_size: le32(e, 104),
            toc_digest: bytes_at(e, 136),
            ci_compressor,
            ci_offset: le64(e, 112),
            ci_compressed_size: le64(e, 120),
            ci_uncompressed_size: le64(e, 128),
            meta_digest: bytes_at(e, 168),
            meta_size: le64(e, 200),
        };
        blob.check_sizes(at)?;
        Ok(blob)
    }

    fn check_sizes(&self, at: u64) -> Result<()> {
        let bad = |what, message: String| Err(FormatError::malformed(what, at, message));
        if self.compressed_size > BLOB_STORED_MAX {
            return bad(
                "blob.compressed_size",
                format!("{} is above 1 TiB", self.compressed_size),
            );
        }
        if self.uncompressed_size > BLOB_SPACE_MAX {
            return bad(
                "blob.uncompressed_size",
                format!("{} is above 16 TiB", self.uncompressed_size),
            );
        }
        // Each chunk takes at least one block of the address space, so that this bounds what readers set aside.
        if u64::from(self.chunk_count) > self.uncompressed_size.div_ceil(BLOCK_SIZE) {
            return bad(
                "blob.chunk_count",
                format!(
                    "{} chunks do not fit into {} bytes",
                    self.chunk_count, self.uncompressed_size
                ),
            );
        }
        if self
            .ci_offset
            .checked_add(self.ci_compressed_size)
            .is_none_or(|end| end > BLOB_STORED_MAX)
        {
            return bad(
                "blob.ci_offset",
                format!("{} is beyond any blob", self.ci_offset),
            );
        }
        if self.ci_compressed_size > self.ci_uncompressed_size {
            return bad(
                "blob.ci_compressed_size",
                format!(
                    "{} is above the uncompressed {}",
                    self.ci_compressed_size, self.ci_uncompressed_size
                ),
            );
        }
        let expected = u64::from(self.chunk_count) * self.chunk_info_size();
        // A chunk dictionary counts the chunks that it was asked for, the array all that the blob has.
        if self.features & feature::IS_CHUNKDICT_GENERATED == 0
            && self.ci_uncompressed_size != expected
        {
            return bad(
                "blob.ci_uncompressed_size",
                format!(
                    "{}, but {} chunks need {expected}",
                    self.ci_uncompressed_size, self.chunk_count
                ),
            );
        }
        if self.has_chunk_info()
            && self.features & feature::HAS_TAR_HEADER != 0
            && self.ci_offset < TAR_HEADER_SIZE
        {
            return bad(
                "blob.ci_offset",
                format!("{} leaves no place for a tar header", self.ci_offset),
            );
        }
        Ok(())
    }

    /// The blob's id: 1 to 64 letters, digits, '-' or '_', and so safe as a file name.
    pub fn id(&self) -> &str {
        let id = self.id.get(..usize::from(self.id_len)).unwrap_or_default();
        std::str::from_utf8(id).unwrap_or_default()
    }

    /// Whether the bit of [`feature`] is set.
    pub fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    /// Size of an element of the chunk-info array: 24 in version 2, 16 in version 1.
    pub fn chunk_info_size(&self) -> u64 {
        if self.has(feature::CHUNK_INFO_V2) {
            24
        } else {
            16
        }
    }

    /// Whether the blob has a chunk-info array.
    pub fn has_chunk_info(&self) -> bool {
        self.ci_compressed_size != 0 && self.ci_uncompressed_size != 0
    }

    /// Bytes at the start of the blob that hold chunks. What `compressed_size` counts depends on the builder's
    /// age: builders before 2.2 count the data alone, later ones the whole blob.
    pub fn data_size(&self) -> u64 {
        if self.has(feature::SEPARATE) || !self.has(feature::CAP_TAR_TOC) {
            return self.compressed_size;
        }
        let end = if self.has_chunk_info() {
            self.ci_offset
        } else {
            self.compressed_size
        };
        if self.has(feature::HAS_TAR_HEADER) {
            end.saturating_sub(TAR_HEADER_SIZE)
        } else {
            end
        }
    }

    /// SHA-256 that authenticates the table of contents, when the image has one.
    pub fn trusted_toc(&self) -> Option<(u32, &[u8; 32])> {
        let known = self.has(feature::HAS_TOC) && self.toc_size != 0 && self.toc_digest != [0; 32];
        known.then_some((self.toc_size, &self.toc_digest))
    }
}

/// Length of a NUL-padded id of safe characters.
fn id_length(id: &[u8; BLOB_ID_SIZE]) -> Option<u8> {
    let len = id.iter().position(|&b| b == 0).unwrap_or(BLOB_ID_SIZE);
    let (name, padding) = id.split_at_checked(len)?;
    let safe = name
        .iter()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    (len > 0 && safe && padding.iter().all(|&b| b == 0)).then_some(len as u8)
}

/// Where the numbers of chunks of all blobs stand, without the rest of their entries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlobCounts {
    table: u64,
    blobs: u32,
}

impl BlobCounts {
    #[inline]
    pub(crate) fn of(sb: &SuperBlock) -> BlobCounts {
        BlobCounts {
            table: sb.blob_table_offset,
            blobs: sb.blob_count,
        }
    }

    /// Number of chunks of blob `index`; None when there is no such blob.
    #[inline]
    pub(crate) fn chunk_count(&self, image: &[u8], index: u32) -> Option<u32> {
        if index >= self.blobs {
            return None;
        }
        let at = self.table + u64::from(index) * BLOB_ENTRY_SIZE + 72;
        array::<4>(image, at).map(|b| u32::from_le_bytes(*b))
    }
}
