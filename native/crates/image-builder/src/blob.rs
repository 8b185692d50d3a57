//! The blob as it grows: chunks, each stored once, and behind them whatever the caller appends.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use rafs_format::Compressor;
use sha2::Digest as _;

use crate::codec::Packer;
use crate::error::BuildError;
use crate::job::{Bytes, Placed, Progress, Sink};
use crate::spool::Spool;
use crate::{Limits, Options};

pub const CHUNK_RECORD: usize = 80;
const BLOCK: u64 = 4096;
const BUFFER: usize = 256 << 10;
/// The disk is asked to start writing whenever so much has come together, so that syncing at the end is short.
const WRITE_BACK: u64 = 8 << 20;
const CHUNK_COMPRESSED: u32 = 1;
/// What stands behind the data takes at most so much, beside chunk information and digest of each chunk.
const TAIL_MAX: u64 = 16 << 10;
const PER_CHUNK: u64 = 16 + 32;
const REMEDY: &str = "use a larger --chunk-size or split the tree";

/// The one blob of an image.
pub struct BlobWriter<'a> {
    out: File,
    buffer: Vec<u8>,
    hash: sha2::Sha256,
    packer: Packer,
    compressor: Compressor,
    limits: Limits,
    progress: &'a Progress,
    started: u64,
    pub blob: Blob,
}

/// What is known about the blob; see [`BlobWriter`].
pub struct Blob {
    /// Bytes stored so far.
    pub size: u64,
    /// The end of its uncompressed address space.
    pub uncompressed_size: u64,
    pub n_chunks: u32,
    pub n_duplicates: u64,
    /// The records of the chunk table (docs/formats/rafs-v6.md), by number.
    pub chunks: Spool,
    /// Chunk indexes of the files, in the order of the inodes, without those that are kept apart.
    pub indexes: Spool,
    /// Chunk indexes of files that were stored out of order.
    pub kept: Vec<Vec<[u8; 8]>>,
}

impl<'a> BlobWriter<'a> {
    pub fn new(
        out: File,
        folder: &Path,
        options: &Options,
        progress: &'a Progress,
    ) -> io::Result<BlobWriter<'a>> {
        Ok(BlobWriter {
            out,
            buffer: Vec::with_capacity(BUFFER),
            hash: sha2::Sha256::new(),
            packer: Packer::new(options.compressor)?,
            compressor: options.compressor,
            limits: options.limits,
            progress,
            started: 0,
            blob: Blob {
                size: 0,
                uncompressed_size: 0,
                n_chunks: 0,
                n_duplicates: 0,
                chunks: Spool::new(folder),
                indexes: Spool::new(folder),
                kept: Vec::new(),
            },
        })
    }

    /// Ends the data: what is known, and a blob that takes bytes only.
    pub fn into_tail(mut self) -> io::Result<(Blob, BlobTail)> {
        self.flush()?;
        let tail = BlobTail {
            out: self.out,
            hash: self.hash,
            size: self.blob.size,
        };
        Ok((self.blob, tail))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.blob.size += bytes.len() as u64;
        self.progress
            .stored
            .store(self.blob.size, Ordering::Relaxed);
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            return self.out.write_all(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        let new = self.blob.size - self.started;
        if new >= WRITE_BACK {
            // SAFETY: no memory is passed. It is a hint, so its result does not count.
            unsafe {
                libc::sync_file_range(
                    self.out.as_raw_fd(),
                    self.started as i64,
                    new as i64,
                    libc::SYNC_FILE_RANGE_WRITE,
                )
            };
            self.started = self.blob.size;
        }
        Ok(())
    }

    /// The place of the chunk with `digest` among the chunks `known`.
    fn find(&self, known: &[u32], digest: &[u8; 32]) -> io::Result<Option<[u8; 8]>> {
        for number in known {
            let mut record = [0; CHUNK_RECORD];
            self.blob
                .chunks
                .read_at(u64::from(*number) * CHUNK_RECORD as u64, &mut record)?;
            if record[..32] == *digest {
                let offset = record[56..64]
                    .iter()
                    .rev()
                    .fold(0, |v, b| v << 8 | u64::from(*b));
                return Ok(Some(chunk_index(*number, offset)));
            }
        }
        Ok(None)
    }

    fn full(&self, size: u64, stored: u64) -> Option<String> {
        let (number, limits) = (u64::from(self.blob.n_chunks), &self.limits);
        // One less than a reader takes: nydus-image leaves the last number unused.
        if number + 1 >= limits.chunks {
            return Some(format!(
                "the blob has {number} chunks, which is the most that an image can address"
            ));
        }
        let end = self.blob.uncompressed_size + size.next_multiple_of(BLOCK);
        let behind = (number + 1) * PER_CHUNK + TAIL_MAX;
        (end > limits.uncompressed || self.blob.size + stored + behind > limits.compressed)
            .then(|| "the blob would become larger than 1 TiB".into())
    }
}

/// The 8 bytes that name a chunk of blob 0 in a file.
fn chunk_index(number: u32, uncompressed_offset: u64) -> [u8; 8] {
    let [low, middle, high, _] = number.to_le_bytes();
    let [a, b, c, d] = ((uncompressed_offset / BLOCK) as u32).to_le_bytes();
    [low, middle, 1, high, a, b, c, d]
}

impl Sink for BlobWriter<'_> {
    fn place(
        &mut self,
        known: &[u32],
        digest: &[u8; 32],
        file_offset: u64,
        size: u32,
        bytes: Bytes<'_>,
    ) -> Result<Placed, BuildError> {
        if let Some(index) = self.find(known, digest)? {
            self.blob.n_duplicates += 1;
            return Ok(Placed { index, new: None });
        }
        let zeros;
        let (stored, compressed) = match bytes {
            Bytes::Packed(packed) => (Cow::Borrowed(packed), true),
            Bytes::Plain(plain) => (Cow::Borrowed(plain), false),
            Bytes::Raw(_) | Bytes::Zeros => {
                let raw = match bytes {
                    Bytes::Raw(raw) => raw,
                    _ => {
                        zeros = vec![0; size as usize];
                        &zeros
                    }
                };
                match self.packer.pack(raw)? {
                    Some(packed) => (Cow::Owned(packed.to_vec()), true),
                    None => (Cow::Borrowed(raw), false),
                }
            }
        };
        if let Some(reason) = self.full(size.into(), stored.len() as u64) {
            return Err(BuildError::Source {
                path: Vec::new(),
                reason,
                remedy: REMEDY,
            });
        }
        let number = self.blob.n_chunks;
        let (offset, uncompressed) = (self.blob.size, self.blob.uncompressed_size);
        let mut record = [0; CHUNK_RECORD];
        record[..32].copy_from_slice(digest);
        record[36..40]
            .copy_from_slice(&(if compressed { CHUNK_COMPRESSED } else { 0 }).to_le_bytes());
        record[40..44].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        record[44..48].copy_from_slice(&size.to_le_bytes());
        record[48..56].copy_from_slice(&offset.to_le_bytes());
        record[56..64].copy_from_slice(&uncompressed.to_le_bytes());
        record[64..72].copy_from_slice(&file_offset.to_le_bytes());
        record[72..76].copy_from_slice(&number.to_le_bytes());
        self.blob.chunks.push(&record)?;
        self.write(&stored)?;
        if self.compressor == Compressor::None {
            // The blob is its own address space then: the kernel's EROFS can read it as a device.
            let end = self.blob.size.next_multiple_of(BLOCK);
            self.write(&[0; BLOCK as usize][..(end - self.blob.size) as usize])?;
        }
        self.blob.uncompressed_size += u64::from(size).next_multiple_of(BLOCK);
        self.blob.n_chunks += 1;
        Ok(Placed {
            index: chunk_index(number, uncompressed),
            new: Some(number),
        })
    }

    fn note(
        &mut self,
        index: [u8; 8],
        repeat: u64,
        keep: Option<(u32, u64, u64)>,
    ) -> io::Result<()> {
        self.blob.n_duplicates += repeat - 1;
        let Some((slot, first, total)) = keep else {
            return (0..repeat).try_for_each(|_| self.blob.indexes.push(&index));
        };
        let slot = slot as usize;
        if self.blob.kept.len() <= slot {
            self.blob.kept.resize(slot + 1, Vec::new());
        }
        let places = &mut self.blob.kept[slot];
        places.resize(total as usize, [0; 8]);
        places[first as usize..(first + repeat) as usize].fill(index);
        Ok(())
    }
}

/// A blob whose data is complete.
pub struct BlobTail {
    out: File,
    hash: sha2::Sha256,
    pub size: u64,
}

impl BlobTail {
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// The SHA-256 of everything up to here.
    pub fn sha256(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }

    /// Appends the array of chunk information (version 1) of `blob`, compressed with `compressor` if that is shorter.
    pub fn append_chunk_info(
        &mut self,
        blob: &Blob,
        compressor: Compressor,
    ) -> io::Result<ChunkInfo> {
        let mut array = Vec::with_capacity(blob.n_chunks as usize * 16);
        let mut records = blob.chunks.reader(0);
        for _ in 0..blob.n_chunks {
            array.extend(chunk_info_v1(&records.array()?));
        }
        let sha256 = sha2::Sha256::digest(&array).into();
        let mut packer = Packer::new(compressor)?;
        let packed = packer.pack(&array)?;
        self.append(packed.unwrap_or(&array))?;
        let stored = packed.map_or(array.len(), <[u8]>::len);
        Ok(ChunkInfo {
            stored: stored as u64,
            size: array.len() as u64,
            packed: packed.is_some(),
            sha256,
        })
    }

    /// Appends the digests of the chunks of `blob`; returns their SHA-256.
    pub fn append_digests(&mut self, blob: &Blob) -> io::Result<[u8; 32]> {
        let mut hash = sha2::Sha256::new();
        let mut records = blob.chunks.reader(0);
        let mut piece = Vec::with_capacity(BUFFER);
        for _ in 0..blob.n_chunks {
            piece.extend_from_slice(&records.take(CHUNK_RECORD)?[..32]);
            if piece.len() >= BUFFER {
                hash.update(&piece);
                self.append(&piece)?;
                piece.clear();
            }
        }
        hash.update(&piece);
        self.append(&piece)?;
        Ok(hash.finalize().into())
    }
}

/// The array of chunk information as it was written; sizes in bytes, the digest that of the plain array.
pub struct ChunkInfo {
    pub stored: u64,
    pub size: u64,
    pub packed: bool,
    pub sha256: [u8; 32],
}

/// The 16 bytes of chunk information that a record of the chunk table stands for.
fn chunk_info_v1(record: &[u8; CHUNK_RECORD]) -> [u8; 16] {
    let number = |at: usize, len: usize| {
        record[at..at + len]
            .iter()
            .rev()
            .fold(0, |v: u64, b| v << 8 | u64::from(*b))
    };
    let (packed, size) = (number(40, 4) - 1, number(44, 4) - 1);
    let uncompressed = (size & 0xf_ffff) << 44 | number(56, 8) | (size >> 20) << 8;
    let compressed = (packed & 0xf_ffff) << 44 | (packed >> 20) << 40 | number(48, 8);
    let mut out = [0; 16];
    out[..8].copy_from_slice(&uncompressed.to_le_bytes());
    out[8..].copy_from_slice(&compressed.to_le_bytes());
    out
}
