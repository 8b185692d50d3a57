//! What is known about one chunk of a blob, and the checks that hold wherever it was read.

use crate::blob::BlobEntry;
use crate::chunk::{ChunkRecord, chunk_flag};
use crate::error::{FormatError, Result};
use crate::format::*;

/// A chunk of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Number in the blob.
    pub index: u32,
    /// Bits of [`chunk_flag`]: COMPRESSED and HAS_CRC32.
    pub flags: u32,
    pub compressed_offset: u64,
    pub uncompressed_offset: u64,
    pub compressed_size: u32,
    pub uncompressed_size: u32,
    /// CRC-32C of the uncompressed bytes, when HAS_CRC32 is set.
    pub crc32: u32,
    /// Digest of the uncompressed bytes by the blob's digester; None when the image does not promise any.
    pub digest: Option<[u8; 32]>,
}

impl ChunkInfo {
    /// Whether the stored bytes are compressed.
    pub fn is_compressed(&self) -> bool {
        self.flags & chunk_flag::COMPRESSED != 0
    }

    /// Checks the chunk against its blob. `at` and `what` say where it was read.
    pub(crate) fn check(&self, blob: &BlobEntry, what: &'static str, at: u64) -> Result<()> {
        let bad = |message: String| Err(FormatError::malformed(what, at, message));
        let index = self.index;
        if index >= blob.chunk_count {
            return bad(format!(
                "chunk {index} of {} of blob {}",
                blob.chunk_count, blob.index
            ));
        }
        if self.flags & !chunk_flag::KNOWN != 0 || self.flags & chunk_flag::HOLE != 0 {
            return bad(format!("chunk {index}: flags {:#x}", self.flags));
        }
        if self.flags & (chunk_flag::ENCRYPTED | chunk_flag::BATCH) != 0 {
            return Err(FormatError::unsupported(
                what,
                at,
                "encrypted and batched chunks are not supported",
            ));
        }
        if self.uncompressed_size == 0 || self.uncompressed_size > blob.chunk_size {
            return bad(format!(
                "chunk {index}: {} uncompressed bytes",
                self.uncompressed_size
            ));
        }
        if self.compressed_size == 0
            || self.compressed_size > CHUNK_SIZE_MAX
            || (!self.is_compressed() && self.compressed_size != self.uncompressed_size)
        {
            return bad(format!(
                "chunk {index}: {} stored bytes",
                self.compressed_size
            ));
        }
        if self.uncompressed_offset % BLOCK_SIZE != 0
            || self
                .uncompressed_offset
                .checked_add(self.uncompressed_size.into())
                .is_none_or(|end| end > blob.uncompressed_size)
        {
            return bad(format!(
                "chunk {index}: uncompressed offset {}",
                self.uncompressed_offset
            ));
        }
        if self
            .compressed_offset
            .checked_add(self.compressed_size.into())
            .is_none_or(|end| end > blob.data_size())
        {
            return bad(format!(
                "chunk {index}: offset {} is beyond the data",
                self.compressed_offset
            ));
        }
        Ok(())
    }
}

impl From<&ChunkRecord> for ChunkInfo {
    fn from(record: &ChunkRecord) -> ChunkInfo {
        ChunkInfo {
            index: record.index,
            flags: record.flags,
            compressed_offset: record.compressed_offset,
            uncompressed_offset: record.uncompressed_offset,
            compressed_size: record.compressed_size,
            uncompressed_size: record.uncompressed_size,
            crc32: record.crc32,
            digest: Some(record.digest),
        }
    }
}
