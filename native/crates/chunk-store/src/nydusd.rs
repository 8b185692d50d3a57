//! nydusd's record of which chunks are stored: `<blob id>.blob.data.chunk_map`.
//!
//! A header of 4096 bytes, then one bit per chunk, the most significant bit of a byte first (nydus:
//! storage/src/cache/state/persist_map.rs). nydusd sets a bit after a write that nothing verified and nothing ordered,
//! and trusts it for ever. So a bit that is found means "present" at best, and a bit that is written must stay true: the
//! bytes of a blob that has such a file are never given back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::mapping::Mapping;
use crate::sys;

const MAGIC: u32 = 0x424D_4150;
const MAGIC2: u32 = 0x434D_4150;
const ALL_READY: u32 = 0x4D4D_4150;
const VERSION: u32 = 1;
/// Bytes before the bits.
pub const HEADER: usize = 4096;
/// What nydusd appends to the name of the data file.
pub const SUFFIX: &str = ".chunk_map";

/// Bytes of the file for `count` chunks.
pub const fn map_len(count: u32) -> usize {
    HEADER + count.div_ceil(8) as usize
}

/// The file for `count` chunks of which none is stored.
pub fn empty(count: u32) -> Vec<u8> {
    let mut bytes = vec![0; map_len(count)];
    for (at, word) in [(0, MAGIC), (4, VERSION), (8, MAGIC2)] {
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn place(chunk: u32) -> (usize, u8) {
    (HEADER + chunk as usize / 8, 0x80 >> (chunk % 8))
}

/// The bits of a file for `count` chunks; `None` when it is no such file.
#[derive(Debug, Clone, Copy)]
pub struct Bits<'a> {
    bytes: &'a [u8],
    count: u32,
    all: bool,
}

impl Bits<'_> {
    /// Checks header and size.
    pub fn parse(bytes: &[u8], count: u32) -> Option<Bits<'_>> {
        let word = |at: usize| {
            let four = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(four.try_into().ok()?))
        };
        let known = bytes.len() == map_len(count)
            && (word(0), word(4), word(8)) == (Some(MAGIC), Some(VERSION), Some(MAGIC2));
        let all = word(12) == Some(ALL_READY);
        known.then_some(Bits { bytes, count, all })
    }

    /// Whether nydusd has stored `chunk`, as it believes.
    pub fn is_set(&self, chunk: u32) -> bool {
        let (at, mask) = place(chunk);
        chunk < self.count && (self.all || self.bytes.get(at).is_some_and(|b| b & mask != 0))
    }
}

/// Sets or clears the bit of `chunk`; `byte` finds a byte of the mapped file.
pub fn mark<'a>(chunk: u32, on: bool, byte: impl Fn(usize) -> Option<&'a AtomicU8>) {
    let (at, mask) = place(chunk);
    if let Some(byte) = byte(at) {
        if on {
            byte.fetch_or(mask, Ordering::Release);
        } else {
            byte.fetch_and(!mask, Ordering::Release);
        }
    }
}

/// The mapped file of a blob, kept right as long as it is there.
#[derive(Debug)]
pub(crate) struct Record {
    map: Mapping,
    id: (u64, u64),
}

impl Record {
    /// Maps the file beside the data file `data_name`; `None` when there is none, or what is there is no such file.
    /// With `make` a missing one is made.
    pub fn open(
        dir: BorrowedFd<'_>,
        data_name: &str,
        count: u32,
        make: bool,
    ) -> io::Result<Option<Record>> {
        let name = format!("{data_name}{SUFFIX}");
        let file = match sys::open_existing_at(dir, &name)? {
            Some(file) => file,
            // nydusd makes none for a blob without chunks.
            None if make && count > 0 => {
                let file = sys::open_file_at(dir, &name)?;
                file.write_all_at(&empty(count), 0)?;
                file
            }
            None => return Ok(None),
        };
        let mut bytes = vec![0; map_len(count)];
        if sys::identity(file.as_fd())?.1 != bytes.len() as u64
            || file.read_exact_at(&mut bytes, 0).is_err()
            || Bits::parse(&bytes, count).is_none()
        {
            return Ok(None);
        }
        sys::reserve(file.as_fd(), bytes.len() as u64)?;
        let map = Mapping::new(file.as_fd(), bytes.len(), true)?;
        // The descriptor is not kept: an open one means that nydusd runs.
        let id = sys::file_id(&file)?;
        Ok(Some(Record { map, id }))
    }

    /// The bytes of `chunk` are stored and verified.
    pub fn set(&self, chunk: u32) {
        mark(chunk, true, |at| self.map.u8_at(at));
    }

    /// The bytes of `chunk` are bad. A nydusd that runs counts bits down to "all are set" and never up again, so its
    /// record is left as it is; the bytes will be replaced by good ones.
    pub fn clear(&self, chunk: u32) {
        if !sys::open_elsewhere(self.id) {
            mark(chunk, false, |at| self.map.u8_at(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_what_nydusd_writes() {
        let file = empty(9);
        assert_eq!(file.len(), 4098);
        assert_eq!(file[..16], *b"PAMB\x01\0\0\0PAMC\0\0\0\0");
        assert!(file[16..].iter().all(|b| *b == 0));
        let bytes: Vec<AtomicU8> = file.into_iter().map(AtomicU8::new).collect();
        for chunk in [0, 3, 8] {
            mark(chunk, true, |at| bytes.get(at));
        }
        mark(0, false, |at| bytes.get(at));
        mark(64, true, |at| bytes.get(at));
        let file: Vec<u8> = bytes.into_iter().map(AtomicU8::into_inner).collect();
        assert_eq!(file[HEADER..], [0b0001_0000, 0b1000_0000]);
        let bits = Bits::parse(&file, 9).unwrap();
        let set: Vec<u32> = (0..20).filter(|c| bits.is_set(*c)).collect();
        assert_eq!(set, [3, 8]);
    }

    #[test]
    fn other_files_are_refused() {
        let file = empty(9);
        assert!(Bits::parse(&file, 17).is_none(), "another size");
        assert!(Bits::parse(&file[..4097], 9).is_none(), "cut");
        assert!(Bits::parse(&[], 0).is_none());
        for at in [0, 4, 8] {
            let mut other = file.clone();
            other[at] ^= 1;
            assert!(Bits::parse(&other, 9).is_none(), "byte {at}");
        }
        let mut all = file;
        all[12..16].copy_from_slice(&ALL_READY.to_le_bytes());
        let bits = Bits::parse(&all, 9).unwrap();
        assert!(bits.is_set(8) && !bits.is_set(9));
    }
}
