//! The chunks of a blob: where each one lies in the blob and in the uncompressed address space, and its digest.
//!
//! There are two sources. The bootstrap's chunk table has everything, and is as trustworthy as the bootstrap. The
//! chunk-info array of the blob has no digests; they come from the blob's digest section, when its table of
//! contents is authenticated. A chunk without a digest says so, and it is for the caller to refuse it.

use crate::blob::BlobEntry;
use crate::chunk::{ChunkRef, records};
use crate::chunk_entry::ChunkInfo;
use crate::chunk_info;
use crate::error::{FormatError, Result};
use crate::format::*;
use crate::tree::Tree;

/// The known chunks of a blob, by number. A chunk that no file of the image uses may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkMap {
    chunk_count: u32,
    /// Ascending by `index`, each once. Sized by what was read, never by what a header claims.
    chunks: Vec<ChunkInfo>,
}

impl ChunkMap {
    /// Chunks by number, of `records` that were checked one by one. Two records of one chunk must say the same;
    /// no two chunks may share a byte of the address space.
    fn assemble(
        blob: &BlobEntry,
        mut chunks: Vec<ChunkInfo>,
        what: &'static str,
        at: u64,
    ) -> Result<ChunkMap> {
        chunks.sort_by_key(|c| c.index);
        chunks.dedup();
        let twice = chunks
            .iter()
            .zip(chunks.iter().skip(1))
            .find(|(a, b)| a.index == b.index);
        if let Some((a, _)) = twice {
            return Err(FormatError::malformed(
                what,
                at,
                format!(
                    "chunk {} of blob {} is described in two ways",
                    a.index, blob.index
                ),
            ));
        }
        // Builders place chunks in the order of their numbers; then the second sort is not needed.
        let overlap = if chunks.is_sorted_by_key(|c| c.uncompressed_offset) {
            first_overlap(chunks.iter())
        } else {
            let mut by_place: Vec<&ChunkInfo> = chunks.iter().collect();
            by_place.sort_by_key(|c| c.uncompressed_offset);
            first_overlap(by_place.iter().copied())
        };
        if let Some((a, b)) = overlap {
            return Err(FormatError::malformed(
                what,
                at,
                format!(
                    "chunks {a} and {b} of blob {} share uncompressed bytes",
                    blob.index
                ),
            ));
        }
        Ok(ChunkMap {
            chunk_count: blob.chunk_count,
            chunks,
        })
    }

    /// The map by the chunk-info array (uncompressed) of `blob`, and the digest section, 32 bytes per chunk.
    ///
    /// Pass digests only after their source was authenticated: the bootstrap does not cover them.
    pub fn from_chunk_info(
        blob: &BlobEntry,
        array: &[u8],
        digests: Option<&[u8]>,
    ) -> Result<ChunkMap> {
        let count = blob.chunk_count;
        if let Some(digests) = digests.filter(|d| d.len() as u64 != u64::from(count) * 32) {
            return Err(FormatError::malformed(
                "blob.digest",
                0,
                format!("{} bytes, but {count} chunks need 32 each", digests.len()),
            ));
        }
        let mut chunks = chunk_info::parse(blob, array)?;
        if let Some(digests) = digests {
            for (chunk, digest) in chunks.iter_mut().zip(records_of::<32>(digests)) {
                chunk.digest = Some(*digest);
            }
        }
        ChunkMap::assemble(blob, chunks, "chunk_info", 0)
    }

    /// Chunk `index`, when the map knows it.
    pub fn get(&self, index: u32) -> Option<&ChunkInfo> {
        match self.chunks.get(index as usize) {
            Some(chunk) if chunk.index == index => Some(chunk),
            _ => self
                .chunks
                .binary_search_by_key(&index, |c| c.index)
                .ok()
                .and_then(|at| self.chunks.get(at)),
        }
    }

    /// Number of chunks of the blob; numbers are below it.
    pub fn chunk_count(&self) -> u32 {
        self.chunk_count
    }

    /// The known chunks, ascending by number.
    pub fn iter(&self) -> std::slice::Iter<'_, ChunkInfo> {
        self.chunks.iter()
    }

    /// Number of known chunks.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether no chunk is known.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Whether every known chunk has a digest.
    pub fn has_all_digests(&self) -> bool {
        self.chunks.iter().all(|c| c.digest.is_some())
    }

    /// The chunk that a part of a file needs; an error when it is not known, lies elsewhere, or is too short.
    pub fn resolve(&self, part: &ChunkRef) -> Result<&ChunkInfo> {
        let bad = |message: String| Err(FormatError::malformed("chunk_index", 0, message));
        let name = || format!("chunk {} of blob {}", part.chunk_index, part.blob_index);
        let Some(chunk) = self.get(part.chunk_index) else {
            return bad(format!("{} is not described", name()));
        };
        if chunk.uncompressed_offset != part.data_offset {
            return bad(format!(
                "{} lies at {}, not at {}",
                name(),
                chunk.uncompressed_offset,
                part.data_offset
            ));
        }
        if u64::from(part.chunk_offset) + u64::from(part.len) > u64::from(chunk.uncompressed_size) {
            return bad(format!(
                "{} has {} bytes, fewer than a file needs",
                name(),
                chunk.uncompressed_size
            ));
        }
        Ok(chunk)
    }

    /// Feeds `sink` with the map in a fixed form, to make a digest of all that the image promises about the blob:
    /// for each chunk its number, flags, offsets, sizes (little-endian, 4 + 4 + 8 + 8 + 4 + 4 bytes), a byte that
    /// says whether there is a digest, and the digest or zeros.
    pub fn canonical(&self, mut sink: impl FnMut(&[u8])) {
        for c in &self.chunks {
            sink(&c.index.to_le_bytes());
            sink(&c.flags.to_le_bytes());
            sink(&c.compressed_offset.to_le_bytes());
            sink(&c.uncompressed_offset.to_le_bytes());
            sink(&c.compressed_size.to_le_bytes());
            sink(&c.uncompressed_size.to_le_bytes());
            sink(&[u8::from(c.digest.is_some())]);
            sink(&c.digest.unwrap_or_default());
        }
    }
}

fn first_overlap<'a>(chunks: impl Iterator<Item = &'a ChunkInfo>) -> Option<(u32, u32)> {
    let mut end = 0;
    let mut last = 0;
    for c in chunks {
        if c.uncompressed_offset < end {
            return Some((last, c.index));
        }
        (end, last) = (
            c.uncompressed_offset + u64::from(c.uncompressed_size),
            c.index,
        );
    }
    None
}

/// The chunk maps of all blobs, by the chunk table of the bootstrap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkTable {
    maps: Vec<ChunkMap>,
}

impl ChunkTable {
    /// Reads the chunk table of `tree`. Memory is bounded by the size of the table.
    pub fn parse(tree: &Tree<'_>) -> Result<ChunkTable> {
        let at = tree.superblock().chunk_table_offset;
        let blobs = tree.blobs()?;
        let mut chunks: Vec<Vec<ChunkInfo>> = vec![Vec::new(); blobs.len()];
        for record in records(tree.image(), tree.superblock())? {
            let slot = blobs
                .get(record.blob_index as usize)
                .zip(chunks.get_mut(record.blob_index as usize));
            let Some((blob, chunks)) = slot else {
                return Err(FormatError::malformed(
                    "chunk_table.blob_index",
                    record.offset,
                    format!("no blob {}", record.blob_index),
                ));
            };
            let chunk = ChunkInfo::from(&record);
            chunk.check(blob, "chunk_table", record.offset)?;
            chunks.push(chunk);
        }
        let maps = blobs
            .iter()
            .zip(chunks)
            .map(|(b, c)| ChunkMap::assemble(b, c, "chunk_table", at));
        Ok(ChunkTable {
            maps: maps.collect::<Result<_>>()?,
        })
    }

    /// The map of a blob; empty when the bootstrap has no chunk table.
    pub fn map(&self, blob_index: u16) -> Option<&ChunkMap> {
        self.maps.get(usize::from(blob_index))
    }

    /// The maps of all blobs, in the order of the blob table.
    pub fn into_maps(self) -> Vec<ChunkMap> {
        self.maps
    }
}
