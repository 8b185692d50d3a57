//! What an image promises about one blob: sizes, places and digests of its chunks, checked before anything is stored.
//!
//! The promise comes from somebody else, so everything that later becomes a file name, an offset or an allocation is
//! checked here, once: the blob id, sizes, sums, and that no two different chunks share bytes of the address space
//! (the second one written would silently replace verified bytes of the first).

use rafs_format::{BlobEntry, ChunkMap};
use sha2::{Digest as _, Sha256};

pub use rafs_format::{Compressor, Digester};

/// Largest uncompressed chunk of the format (16 MiB).
pub const MAX_CHUNK_SIZE: u32 = 16 << 20;
/// Largest compressed chunk that is accepted: the codecs store what does not shrink, so this is generous.
pub const MAX_COMPRESSED_SIZE: u32 = 17 << 20;
/// Most chunks in one blob (the format's index is 24 bits wide).
pub const MAX_CHUNKS: usize = 1 << 24;
/// Largest address space of a blob: EROFS block numbers are 32 bits of 4 KiB blocks.
pub const MAX_DATA_SIZE: u64 = 1 << 44;

/// The image promises this chunk.
pub const CHUNK_VALID: u8 = 1;
/// The stored bytes are compressed.
pub const CHUNK_COMPRESSED: u8 = 2;
/// The image promises a digest.
pub const CHUNK_DIGEST: u8 = 4;

/// A promise that makes no sense; the text names the field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError(pub String);

impl std::fmt::Display for SpecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SpecError {}

/// One chunk of a [`BlobSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSpec {
    /// Byte offset in the blob file.
    pub compressed_offset: u64,
    /// Bytes in the blob file.
    pub compressed_size: u32,
    /// Byte offset in the uncompressed address space (the data file).
    pub data_offset: u64,
    /// Uncompressed bytes.
    pub size: u32,
    /// `CHUNK_*` bits.
    pub flags: u8,
    /// Zeros without [`CHUNK_DIGEST`].
    pub digest: [u8; 32],
}

/// The promise for one blob, one array per field (Python reads some of them in place).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobSpec {
    pub blob_id: String,
    pub data_size: u64,
    pub compressor: Compressor,
    pub digester: Digester,
    /// Chunks that the blob table counts, described or not; nydusd sizes its files by it.
    pub table_count: u32,
    pub compressed_offset: Vec<u64>,
    pub compressed_size: Vec<u32>,
    pub data_offset: Vec<u64>,
    pub size: Vec<u32>,
    pub flags: Vec<u8>,
    pub digest: Vec<[u8; 32]>,
}

impl BlobSpec {
    /// A blob of `count` chunks about which nothing is promised yet. Errors when the id cannot be a file name or a
    /// count or size is out of range.
    pub fn new(
        blob_id: &str,
        data_size: u64,
        compressor: Compressor,
        digester: Digester,
        count: usize,
    ) -> Result<BlobSpec, SpecError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if blob_id.is_empty()
            || blob_id.len() > 64
            || blob_id.starts_with('.')
            || !blob_id.bytes().all(plain)
        {
            return Err(SpecError(format!(
                "blob_id: {blob_id:?} is not usable as a file name"
            )));
        }
        if data_size > MAX_DATA_SIZE {
            return Err(SpecError(format!(
                "uncompressed_size: {data_size} exceeds {MAX_DATA_SIZE}"
            )));
        }
        if count > MAX_CHUNKS {
            return Err(SpecError(format!(
                "chunk_count: {count} exceeds {MAX_CHUNKS}"
            )));
        }
        Ok(BlobSpec {
            blob_id: blob_id.to_owned(),
            data_size,
            compressor,
            digester,
            table_count: count as u32,
            compressed_offset: vec![0; count],
            compressed_size: vec![0; count],
            data_offset: vec![0; count],
            size: vec![0; count],
            flags: vec![0; count],
            digest: vec![[0; 32]; count],
        })
    }

    /// The promise that an image's blob table and chunk map make. It ends with the last described chunk, whatever
    /// the table counts: memory is set aside for what was read, not for what is claimed.
    pub fn from_map(entry: &BlobEntry, map: &ChunkMap) -> Result<BlobSpec, SpecError> {
        let count = map
            .iter()
            .next_back()
            .map_or(0, |last| last.index as usize + 1);
        let mut spec = BlobSpec::new(
            entry.id(),
            entry.uncompressed_size,
            entry.compressor,
            entry.digester,
            count,
        )?;
        for info in map.iter() {
            let chunk = ChunkSpec {
                compressed_offset: info.compressed_offset,
                compressed_size: info.compressed_size,
                data_offset: info.uncompressed_offset,
                size: info.uncompressed_size,
                flags: if info.is_compressed() {
                    CHUNK_COMPRESSED
                } else {
                    0
                } | if info.digest.is_some() {
                    CHUNK_DIGEST
                } else {
                    0
                },
                digest: info.digest.unwrap_or_default(),
            };
            spec.set(info.index as usize, chunk)?;
        }
        spec.table_count = entry.chunk_count.min(MAX_CHUNKS as u32);
        spec.check_overlap()?;
        Ok(spec)
    }

    /// Number of chunks, whether promised or not.
    pub fn count(&self) -> usize {
        self.flags.len()
    }

    /// Sets chunk `index`. Errors when it is out of range or its sizes make no sense.
    pub fn set(&mut self, index: usize, chunk: ChunkSpec) -> Result<(), SpecError> {
        let bad = |what: &str| {
            Err(SpecError(format!(
                "chunk {index} of blob {}: {what}",
                self.blob_id
            )))
        };
        if index >= self.flags.len() {
            return bad("index is beyond the blob's chunk count");
        }
        if chunk.size == 0 || chunk.size > MAX_CHUNK_SIZE {
            return bad("uncompressed size is 0 or above 16 MiB");
        }
        if chunk.compressed_size == 0 || chunk.compressed_size > MAX_COMPRESSED_SIZE {
            return bad("compressed size is 0 or above 17 MiB");
        }
        if chunk.flags & CHUNK_COMPRESSED == 0 && chunk.compressed_size != chunk.size {
            return bad("stored uncompressed, but the sizes differ");
        }
        if chunk.compressed_offset > MAX_DATA_SIZE {
            return bad("compressed offset is out of range");
        }
        if chunk
            .data_offset
            .checked_add(u64::from(chunk.size))
            .is_none_or(|end| end > self.data_size)
        {
            return bad("ends behind the blob's uncompressed size");
        }
        self.compressed_offset[index] = chunk.compressed_offset;
        self.compressed_size[index] = chunk.compressed_size;
        self.data_offset[index] = chunk.data_offset;
        self.size[index] = chunk.size;
        self.flags[index] = chunk.flags | CHUNK_VALID;
        self.digest[index] = chunk.digest;
        Ok(())
    }

    /// Chunk `index`, if the image promises it.
    pub fn chunk(&self, index: usize) -> Option<ChunkSpec> {
        let flags = *self.flags.get(index)?;
        if flags & CHUNK_VALID == 0 {
            return None;
        }
        Some(ChunkSpec {
            compressed_offset: *self.compressed_offset.get(index)?,
            compressed_size: *self.compressed_size.get(index)?,
            data_offset: *self.data_offset.get(index)?,
            size: *self.size.get(index)?,
            flags,
            digest: *self.digest.get(index)?,
        })
    }

    /// Number of promised chunks, and how many of them have no digest.
    pub fn promised(&self) -> (usize, usize) {
        let valid = self.flags.iter().filter(|f| **f & CHUNK_VALID != 0).count();
        let digests = self
            .flags
            .iter()
            .filter(|f| **f & (CHUNK_VALID | CHUNK_DIGEST) == CHUNK_VALID | CHUNK_DIGEST)
            .count();
        (valid, valid - digests)
    }

    /// Errors when two chunks that are not the same share bytes of the address space.
    pub fn check_overlap(&self) -> Result<(), SpecError> {
        let mut order: Vec<u32> = (0..self.count() as u32)
            .filter(|i| self.flags[*i as usize] & CHUNK_VALID != 0)
            .collect();
        // Nearly always sorted already, which the sort notices in one pass.
        order.sort_by_key(|i| self.data_offset[*i as usize]);
        let mut end = 0u64;
        let mut last: Option<usize> = None;
        for index in order {
            let index = index as usize;
            let start = self.data_offset[index];
            if start < end {
                let same = last.is_some_and(|l| {
                    self.data_offset[l] == start
                        && self.size[l] == self.size[index]
                        && self.flags[l] & CHUNK_DIGEST != 0
                        && self.flags[index] & CHUNK_DIGEST != 0
                        && self.digest[l] == self.digest[index]
                });
                if !same {
                    return Err(SpecError(format!(
                        "chunk {index} of blob {} overlaps another chunk at byte {start}",
                        self.blob_id
                    )));
                }
            }
            end = end.max(start + u64::from(self.size[index]));
            last = Some(index);
        }
        Ok(())
    }

    /// Which chunks share no byte of the address space with another one.
    pub fn alone(&self) -> Vec<bool> {
        let mut alone: Vec<bool> = self.flags.iter().map(|f| f & CHUNK_VALID != 0).collect();
        let mut order: Vec<usize> = (0..self.count()).filter(|i| alone[*i]).collect();
        order.sort_by_key(|i| self.data_offset[*i]);
        for pair in order.windows(2) {
            // Chunks that overlap are the same chunk (`check_overlap`), so neighbours in this order are enough.
            if self.data_offset[pair[1]] < self.data_offset[pair[0]] + u64::from(self.size[pair[0]])
            {
                alone[pair[0]] = false;
                alone[pair[1]] = false;
            }
        }
        alone
    }

    /// sha256 over everything that the image promises about the blob. Cache files are shared only between images
    /// whose promises are the same, so that no image can plant bytes for another.
    pub fn map_digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"virtiofsd-rafs chunk map v1\0");
        let mut id = [0u8; 64];
        id[..self.blob_id.len()].copy_from_slice(self.blob_id.as_bytes());
        hash.update(id);
        hash.update(self.data_size.to_le_bytes());
        hash.update((self.compressor as u32).to_le_bytes());
        hash.update((self.digester as u32).to_le_bytes());
        hash.update((self.count() as u32).to_le_bytes());
        let mut row = [0u8; 57];
        for i in 0..self.count() {
            row[..8].copy_from_slice(&self.compressed_offset[i].to_le_bytes());
            row[8..12].copy_from_slice(&self.compressed_size[i].to_le_bytes());
            row[12..20].copy_from_slice(&self.data_offset[i].to_le_bytes());
            row[20..24].copy_from_slice(&self.size[i].to_le_bytes());
            row[24] = self.flags[i];
            row[25..57].copy_from_slice(&self.digest[i]);
            hash.update(row);
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, size: u32) -> ChunkSpec {
        ChunkSpec {
            compressed_offset: offset,
            compressed_size: size,
            data_offset: offset,
            size,
            flags: CHUNK_DIGEST,
            digest: [offset as u8; 32],
        }
    }

    fn spec(count: usize) -> BlobSpec {
        BlobSpec::new("ab12", 1 << 20, Compressor::Zstd, Digester::Blake3, count).unwrap()
    }

    #[test]
    fn ids_that_could_leave_the_cache_are_refused() {
        for id in ["", ".", "..", ".x", "a/b", "a\0", "ä", &"a".repeat(65)] {
            assert!(
                BlobSpec::new(id, 0, Compressor::None, Digester::Sha256, 0).is_err(),
                "{id:?}"
            );
        }
    }

    #[test]
    fn chunks_out_of_range_are_refused() {
        let mut s = spec(2);
        assert!(s.set(2, chunk(0, 1)).is_err());
        assert!(s.set(0, chunk(0, 0)).is_err());
        assert!(s.set(0, chunk(0, MAX_CHUNK_SIZE + 1)).is_err());
        assert!(s.set(0, chunk((1 << 20) - 1, 2)).is_err());
        assert!(s.set(0, chunk(u64::MAX, 2)).is_err());
        assert!(
            s.set(
                0,
                ChunkSpec {
                    compressed_size: 3,
                    ..chunk(0, 4)
                }
            )
            .is_err()
        );
        assert!(
            s.set(
                0,
                ChunkSpec {
                    compressed_size: 3,
                    flags: CHUNK_COMPRESSED,
                    ..chunk(0, 4)
                }
            )
            .is_ok()
        );
        assert_eq!(s.promised(), (1, 1));
        assert!(s.chunk(1).is_none());
    }

    #[test]
    fn overlap_is_refused_unless_the_chunks_are_the_same() {
        let mut s = spec(3);
        s.set(0, chunk(0, 4096)).unwrap();
        s.set(2, chunk(8192, 10)).unwrap();
        assert!(s.check_overlap().is_ok());
        s.set(1, chunk(8192, 10)).unwrap();
        assert!(s.check_overlap().is_ok(), "the same chunk twice");
        s.set(
            1,
            ChunkSpec {
                digest: [9; 32],
                ..chunk(8192, 10)
            },
        )
        .unwrap();
        assert!(s.check_overlap().is_err(), "same place, other bytes");
        s.set(1, chunk(4095, 10)).unwrap();
        assert!(s.check_overlap().is_err());
    }

    #[test]
    fn every_promise_changes_the_map_digest() {
        let mut base = spec(2);
        base.set(0, chunk(0, 4096)).unwrap();
        let digest = base.map_digest();
        let mut others = Vec::new();
        for f in [
            |s: &mut BlobSpec| s.blob_id.push('x'),
            |s: &mut BlobSpec| s.data_size += 1,
            |s: &mut BlobSpec| s.compressor = Compressor::Gzip,
            |s: &mut BlobSpec| s.digester = Digester::Sha256,
            |s: &mut BlobSpec| s.compressed_offset[0] += 1,
            |s: &mut BlobSpec| s.compressed_size[0] += 1,
            |s: &mut BlobSpec| s.data_offset[0] += 1,
            |s: &mut BlobSpec| s.size[0] += 1,
            |s: &mut BlobSpec| s.flags[0] ^= CHUNK_COMPRESSED,
            |s: &mut BlobSpec| s.digest[0][31] ^= 1,
            |s: &mut BlobSpec| s.flags[1] ^= CHUNK_VALID,
        ] {
            let mut other = base.clone();
            f(&mut other);
            others.push(other.map_digest());
        }
        assert!(others.iter().all(|d| *d != digest));
        assert_eq!(base.clone().map_digest(), digest);
    }
}
