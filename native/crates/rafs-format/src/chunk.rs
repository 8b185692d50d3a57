//! Chunk indexes behind chunk-based files, and the chunk table at the end of the bootstrap.

use crate::blob::BlobCounts;
use crate::error::{FormatError, Result};
use crate::format::*;
use crate::inode::{Inode, Layout};
use crate::superblock::SuperBlock;

/// Flags of a chunk, as in the chunk table.
pub mod chunk_flag {
    /// The stored bytes are compressed; without it they are the chunk.
    pub const COMPRESSED: u32 = 0x1;
    pub const HOLE: u32 = 0x2;
    pub const ENCRYPTED: u32 = 0x4;
    pub const BATCH: u32 = 0x8;
    pub const HAS_CRC32: u32 = 0x10;
    pub const KNOWN: u32 = 0x1f;
}

/// The part of a chunk that a range of a file covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    pub blob_index: u16,
    /// Number of the chunk in its blob; below the blob's `chunk_count`.
    pub chunk_index: u32,
    /// Where the part starts inside the chunk.
    pub chunk_offset: u32,
    /// Bytes of the part. Whether the chunk is that long is for its holder to check: the index does not say.
    pub len: u32,
    /// Where the chunk starts in the blob's uncompressed address space, by the index; a well-formed image says
    /// the same in its chunk table.
    pub data_offset: u64,
}

/// The parts of chunks that a range of a file covers, in file order. Ends after the first error.
///
/// The stride is the superblock's chunk size. The chunk bits of the inode are ignored: builders write those of the
/// next power of two of the file's size there, for the kernel, when all chunks are neighbours, and one index per
/// stride all the same.
pub struct Chunks<'a> {
    image: &'a [u8],
    /// The stride of the indexes is 2 to this power.
    stride_bits: u32,
    blobs: BlobCounts,
    indexes: u64,
    position: u64,
    end: u64,
    /// What the first step yields instead of a chunk.
    failure: Option<FormatError>,
}

impl<'a> Chunks<'a> {
    #[inline]
    pub(crate) fn new(
        image: &'a [u8],
        sb: &SuperBlock,
        inode: &Inode,
        offset: u64,
        len: u64,
    ) -> Self {
        let failure = if inode.layout == Layout::ChunkBased && inode.is_file() {
            None
        } else {
            Some(FormatError::malformed(
                "inode.i_format",
                inode.offset,
                "not a file in chunks",
            ))
        };
        Chunks {
            image,
            stride_bits: sb.chunk_size.trailing_zeros(),
            blobs: BlobCounts::of(sb),
            indexes: inode.chunk_index_offset(),
            position: offset,
            end: offset.saturating_add(len).min(inode.size),
            failure,
        }
    }

    #[inline]
    fn advance(&mut self) -> Result<ChunkRef> {
        let stride = 1u64 << self.stride_bits;
        let at = self.indexes + (self.position >> self.stride_bits) * CHUNK_INDEX_SIZE;
        let raw: &[u8; CHUNK_INDEX_SIZE as usize] = need(self.image, at, "chunk_index")?;
        let Some(blob_index) = u32::from(raw[2]).checked_sub(1) else {
            return Err(FormatError::malformed(
                "chunk_index.device_id",
                at,
                "0: holes are not part of RAFS",
            ));
        };
        let chunk_index = u32::from(le16(raw, 0)) | u32::from(raw[3]) << 16;
        match self.blobs.chunk_count(self.image, blob_index) {
            None => {
                return Err(FormatError::malformed(
                    "chunk_index.device_id",
                    at,
                    format!("no blob {blob_index}"),
                ));
            }
            Some(count) if chunk_index >= count => {
                return Err(FormatError::malformed(
                    "chunk_index.ci_index",
                    at,
                    format!("chunk {chunk_index} of {count} of blob {blob_index}"),
                ));
            }
            Some(_) => {}
        }
        let chunk_offset = self.position & (stride - 1);
        let len = (stride - chunk_offset).min(self.end - self.position);
        self.position += len;
        Ok(ChunkRef {
            blob_index: blob_index as u16,
            chunk_index,
            chunk_offset: chunk_offset as u32,
            len: len as u32,
            data_offset: u64::from(le32(raw, 4)) * BLOCK_SIZE,
        })
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<ChunkRef>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if let Some(failure) = self.failure.take() {
            self.position = self.end;
            return Some(Err(failure));
        }
        if self.position >= self.end {
            return None;
        }
        let item = self.advance();
        if item.is_err() {
            self.position = self.end;
        }
        Some(item)
    }
}

impl std::iter::FusedIterator for Chunks<'_> {}

/// A record of the chunk table (the chunk information of RAFS v5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkRecord {
    pub offset: u64,
    pub digest: [u8; 32],
    pub blob_index: u32,
    pub flags: u32,
    pub compressed_size: u32,
    pub uncompressed_size: u32,
    pub compressed_offset: u64,
    pub uncompressed_offset: u64,
    pub index: u32,
    pub crc32: u32,
}

/// All records of the chunk table, in their stored order.
pub(crate) fn records<'a>(
    image: &'a [u8],
    sb: &SuperBlock,
) -> Result<impl Iterator<Item = ChunkRecord> + use<'a>> {
    let start = sb.chunk_table_offset;
    let table = if sb.chunk_table_size == 0 {
        &[][..]
    } else {
        need_slice(image, start, sb.chunk_table_size, "chunk_table")?
    };
    Ok(records_of::<{ CHUNK_ENTRY_SIZE as usize }>(table)
        .enumerate()
        .map(move |(i, r)| ChunkRecord {
            offset: start + i as u64 * CHUNK_ENTRY_SIZE,
            digest: bytes_at(r, 0),
            blob_index: le32(r, 32),
            flags: le32(r, 36),
            compressed_size: le32(r, 40),
            uncompressed_size: le32(r, 44),
            compressed_offset: le64(r, 48),
            uncompressed_offset: le64(r, 56),
            index: le32(r, 72),
            crc32: le32(r, 76),
        }))
}
