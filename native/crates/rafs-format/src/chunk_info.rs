//! Chunk-info ("ci") array of a blob, version 1 (16 bytes each) and 2 (24 bytes each), and its 4096-byte header.

use crate::blob::{BlobEntry, feature};
use crate::chunk::chunk_flag;
use crate::chunk_entry::ChunkInfo;
use crate::error::{FormatError, Result};
use crate::format::*;

/// Size of the header behind the array.
pub const HEADER_SIZE: u64 = 4096;
const MAGIC: u32 = 0xb10b_b10b;
const V1_SIZE: usize = 16;
const V2_SIZE: usize = 24;

const V2_COMPRESSED: u64 = 0x1;
const V2_ZRAN: u64 = 0x2;
const V2_BATCH: u64 = 0x4;
const V2_ENCRYPTED: u64 = 0x8;
const V2_HAS_CRC32: u64 = 0x10;

/// Finds the array in a `blob.meta` file, as the bootstrap layer or a cache directory holds it: the uncompressed
/// array padded to 4 KiB, then the header. The header must agree with the blob table.
pub fn from_meta_file<'a>(blob: &BlobEntry, file: &'a [u8]) -> Result<&'a [u8]> {
    let size = blob.ci_uncompressed_size;
    let header_at = size
        .checked_next_multiple_of(BLOCK_SIZE)
        .unwrap_or(u64::MAX);
    check_header(blob, need(file, header_at, "blob_meta.header")?, header_at)?;
    need_slice(file, 0, size, "blob_meta")
}

/// Checks the 4096-byte header at `at` (for messages) against the blob table.
pub fn check_header(blob: &BlobEntry, header: &[u8; HEADER_SIZE as usize], at: u64) -> Result<()> {
    let bad = |what, message: String| Err(FormatError::malformed(what, at, message));
    if le32(header, 0) != MAGIC || le32(header, 4092) != MAGIC {
        return bad("blob_meta.magic", "not that of a chunk-info header".into());
    }
    // Only what decides how the array is read: builders before 2.2 did not repeat the other bits here.
    let difference = (le32(header, 4) ^ blob.features) & feature::CHUNK_INFO_V2;
    if difference != 0 {
        return bad(
            "blob_meta.features",
            format!("{:#x} differs from the blob table", le32(header, 4)),
        );
    }
    if le32(header, 8) != blob.ci_compressor as u32 {
        return bad(
            "blob_meta.ci_compressor",
            format!("{} differs from the blob table", le32(header, 8)),
        );
    }
    if le32(header, 12) != blob.chunk_count && !blob.has(feature::IS_CHUNKDICT_GENERATED) {
        return bad(
            "blob_meta.ci_entries",
            format!("{} differs from the blob table", le32(header, 12)),
        );
    }
    let fields = [
        ("blob_meta.ci_offset", le64(header, 16), blob.ci_offset),
        (
            "blob_meta.ci_compressed_size",
            le64(header, 24),
            blob.ci_compressed_size,
        ),
        (
            "blob_meta.ci_uncompressed_size",
            le64(header, 32),
            blob.ci_uncompressed_size,
        ),
    ];
    for (what, found, expected) in fields {
        if found != expected {
            return bad(what, format!("{found}, but {expected} in the blob table"));
        }
    }
    Ok(())
}

/// Chunks of an uncompressed array; each one is checked against the blob. They have no digests yet.
pub(crate) fn parse(blob: &BlobEntry, array: &[u8]) -> Result<Vec<ChunkInfo>> {
    let needed = u64::from(blob.chunk_count) * blob.chunk_info_size();
    let array = need_slice(array, 0, needed, "chunk_info")?;
    let numbers = 0..blob.chunk_count;
    let chunks: Result<Vec<ChunkInfo>> = if blob.has(feature::CHUNK_INFO_V2) {
        records_of::<V2_SIZE>(array)
            .zip(numbers)
            .map(|(raw, index)| v2(raw, index))
            .collect()
    } else {
        records_of::<V1_SIZE>(array)
            .zip(numbers)
            .map(|(raw, index)| Ok(v1(raw, index)))
            .collect()
    };
    let chunks = chunks?;
    for chunk in &chunks {
        chunk.check(
            blob,
            "chunk_info",
            u64::from(chunk.index) * blob.chunk_info_size(),
        )?;
    }
    Ok(chunks)
}

fn v1(raw: &[u8; V1_SIZE], index: u32) -> ChunkInfo {
    let (place, stored) = (le64(raw, 0), le64(raw, 8));
    let uncompressed_size = ((place >> 44) as u32 | ((place >> 8 & 0xf) as u32) << 20) + 1;
    let compressed_size = ((stored >> 44) as u32 | ((stored >> 40 & 0xf) as u32) << 20) + 1;
    ChunkInfo {
        index,
        flags: if compressed_size == uncompressed_size {
            0
        } else {
            chunk_flag::COMPRESSED
        },
        compressed_offset: stored & 0xff_ffff_ffff,
        uncompressed_offset: place & 0xfff_ffff_f000,
        compressed_size,
        uncompressed_size,
        crc32: 0,
        digest: None,
    }
}

fn v2(raw: &[u8; V2_SIZE], index: u32) -> Result<ChunkInfo> {
    let (place, stored, data) = (le64(raw, 0), le64(raw, 8), le64(raw, 16));
    let at = u64::from(index) * V2_SIZE as u64;
    let bits = place >> 56;
    if bits & (V2_ZRAN | V2_BATCH | V2_ENCRYPTED) != 0 {
        return Err(FormatError::unsupported(
            "chunk_info.flags",
            at,
            "zran, batched and encrypted chunks are not supported",
        ));
    }
    if bits & !(V2_COMPRESSED | V2_HAS_CRC32) != 0 {
        return Err(FormatError::malformed(
            "chunk_info.flags",
            at,
            format!("unknown bits {bits:#x}"),
        ));
    }
    let mut flags = if bits & V2_COMPRESSED != 0 {
        chunk_flag::COMPRESSED
    } else {
        0
    };
    let has_crc32 = bits & V2_HAS_CRC32 != 0;
    if has_crc32 {
        flags |= chunk_flag::HAS_CRC32;
    }
    Ok(ChunkInfo {
        index,
        flags,
        compressed_offset: stored & 0xff_ffff_ffff,
        uncompressed_offset: (place & 0xffff_ffff) * BLOCK_SIZE,
        // Stored as it is, while the uncompressed size is stored less one.
        compressed_size: (stored >> 40) as u32,
        uncompressed_size: (place >> 32 & 0xff_ffff) as u32 + 1,
        crc32: if has_crc32 { data as u32 } else { 0 },
        digest: None,
    })
}
