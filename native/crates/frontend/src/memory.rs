//! Guest memory: regions of guest-physical addresses, each a shared mapping of a memfd, with an allocator.
//!
//! The device is another process and may write anywhere at any time. So guest memory is never lent out as a
//! reference: every access copies, through raw pointers, after a bounds check.
//!
//! Buffers are *poisoned* before the device may write to them: every byte gets a value that follows from its
//! address. A byte that should not have been written is then found by comparing, even when the device wrote the
//! same bytes as somewhere else.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::error::Error;
use crate::sys::{self, Mapping};

/// One region of guest memory. Its mapping lives as long as anybody holds the region, also after its removal
/// from the [`Memory`].
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Offset of the region in its file.
    pub file_offset: u64,
    file: OwnedFd,
    map: Mapping,
    free: Mutex<FreeList>,
}

impl Region {
    /// A region of `size` bytes at `gpa`, backed by `file` from `file_offset`.
    ///
    /// Everything but the offset inside a huge page must be a multiple of the page size; mmap checks that.
    pub fn new(gpa: u64, size: u64, file: OwnedFd, file_offset: u64) -> Result<Self, Error> {
        if size == 0 || gpa.checked_add(size).is_none() {
            return Err(Error::Invalid(format!(
                "a region of {size} bytes at {gpa:#x} is empty or wraps"
            )));
        }
        let len = usize::try_from(size).map_err(|_| Error::Invalid("region too large".into()))?;
        let map = Mapping::new(file.as_fd(), file_offset, len, false)?;
        Ok(Region {
            gpa,
            file_offset,
            file,
            map,
            free: Mutex::new(FreeList::new(size)),
        })
    }

    pub fn size(&self) -> u64 {
        self.map.size() as u64
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The address of the region in this process: what vhost-user calls the user address.
    pub fn user_address(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// The address of byte `offset`, after checking that `len` bytes from there lie inside.
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let end = offset.checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.size()),
            "guest access at {offset:#x}+{len:#x} is outside its region"
        );
        // SAFETY: offset ≤ size, checked just now, so the result is inside the mapping or one past its end.
        unsafe { self.map.as_ptr().add(offset as usize) }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let p = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is our memory, the mapping is not, so they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len()) }
    }

    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let p = self.at(offset, bytes.len());
        // SAFETY: as in `write`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The 16-bit little-endian word at `offset` (even), shared with the device.
    pub fn atomic_u16(&self, offset: u64) -> &AtomicU16 {
        let p = self.at(offset, 2);
        assert!(p as usize % 2 == 0, "ring index at an odd address");
        // SAFETY: in bounds and aligned; the mapping lives as long as `self`; both sides use it atomically.
        unsafe { AtomicU16::from_ptr(p.cast()) }
    }

    fn take(&self, len: u64, align: u64) -> Option<u64> {
        let base = self.gpa;
        self.free
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take(len, align, base)
    }
}

/// Free extents of a region by offset. Next fit: allocation goes on where the last one ended, so that in time
/// all of the memory is used and a device that kept a stale translation is caught.
struct FreeList {
    extents: BTreeMap<u64, u64>,
    cursor: u64,
}

impl FreeList {
    fn new(size: u64) -> Self {
        FreeList {
            extents: BTreeMap::from([(0, size)]),
            cursor: 0,
        }
    }

    fn take(&mut self, len: u64, align: u64, base: u64) -> Option<u64> {
        let fit = |start: u64, size: u64, from: u64| {
            let aligned = (base + start.max(from)).checked_next_multiple_of(align)? - base;
            (aligned.checked_add(len)? <= start + size).then_some((start, size, aligned))
        };
        // The extent around the cursor first, from the cursor on; in the end all from the beginning.
        let around = self.extents.range(..self.cursor).next_back();
        let found = around
            .and_then(|(&start, &size)| fit(start, size, self.cursor))
            .or_else(|| {
                self.extents
                    .range(self.cursor..)
                    .find_map(|(&start, &size)| fit(start, size, 0))
            })
            .or_else(|| {
                self.extents
                    .range(..self.cursor)
                    .find_map(|(&start, &size)| fit(start, size, 0))
            });
        let (start, size, aligned) = found?;
        self.carve(start, size, aligned, len);
        self.cursor = aligned + len;
        Some(aligned)
    }

    fn take_at(&mut self, offset: u64, len: u64) -> bool {
        let Some((&start, &size)) = self.extents.range(..=offset).next_back() else {
            return false;
        };
        if offset.checked_add(len).is_none_or(|end| end > start + size) {
            return false;
        }
        self.carve(start, size, offset, len);
        true
    }

    /// Removes [offset, offset + len) from the extent (start, size) that holds it.
    fn carve(&mut self, start: u64, size: u64, offset: u64, len: u64) {
        self.extents.remove(&start);
        if offset > start {
            self.extents.insert(start, offset - start);
        }
        if start + size > offset + len {
            self.extents
                .insert(offset + len, start + size - offset - len);
        }
    }

    fn give(&mut self, offset: u64, len: u64) {
        let (mut start, mut end) = (offset, offset + len);
        let before = self
            .extents
            .range(..offset)
            .next_back()
            .map(|(&start, &size)| (start, size));
        if let Some((before, _)) = before.filter(|&(start, size)| start + size == offset) {
            self.extents.remove(&before);
            start = before;
        }
        if let Some(size) = self.extents.remove(&end) {
            end += size;
        }
        self.extents.insert(start, end - start);
    }
}

/// An allocated extent of guest memory inside one region, given back when dropped.
pub struct Span {
    region: Arc<Region>,
    offset: u64,
    len: u64,
}

impl Span {
    pub fn gpa(&self) -> u64 {
        self.region.gpa + self.offset
    }

    /// Address in this process (vhost-user's user address).
    pub fn user_address(&self) -> u64 {
        self.region.user_address() + self.offset
    }

    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, at: usize, len: usize) {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len()),
            "access outside of a span"
        );
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len());
        self.region.write(self.offset + at as u64, bytes);
    }

    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        self.check(at, bytes.len());
        self.region.read(self.offset + at as u64, bytes);
    }

    /// The atomic 16-bit word at byte `at`.
    pub fn atomic_u16(&self, at: usize) -> &AtomicU16 {
        self.check(at, 2);
        self.region.atomic_u16(self.offset + at as u64)
    }

    /// Whether `expected` stands at byte `at`.
    pub fn equals(&self, at: usize, expected: &[u8]) -> bool {
        self.check(at, expected.len());
        let p = self.region.at(self.offset + at as u64, expected.len());
        // SAFETY: memcmp reads `len` bytes on both sides, both checked; a device that writes meanwhile can only
        // change the outcome.
        unsafe { libc::memcmp(p.cast(), expected.as_ptr().cast(), expected.len()) == 0 }
    }

    /// Fills [at, at + len) with poison.
    pub fn poison(&self, at: usize, len: usize) {
        self.check(at, len);
        let start = self.gpa() + at as u64;
        let p = self.region.at(self.offset + at as u64, len);
        let (head, words) = split(start, len);
        let fill = |from: usize, to: usize| {
            for i in from..to {
                // SAFETY: i < len, inside the checked range.
                unsafe { p.add(i).write_volatile(poison_byte(start + i as u64)) }
            }
        };
        fill(0, head);
        let mut word = poison_word(start + head as u64);
        for i in 0..words {
            // SAFETY: head + i*8 + 8 ≤ len; the write is unaligned-safe.
            unsafe { p.add(head + i * 8).cast::<u64>().write_unaligned(word) }
            word = word.wrapping_add(POISON_STEP);
        }
        fill(head + words * 8, len);
    }

    /// The guest-physical address of the first byte in [at, at + len) that is no longer poison.
    pub fn first_unpoisoned(&self, at: usize, len: usize) -> Option<u64> {
        self.check(at, len);
        let start = self.gpa() + at as u64;
        let p = self.region.at(self.offset + at as u64, len);
        let (head, words) = split(start, len);
        let scan = |from: usize, to: usize| {
            (from..to).find_map(|i| {
                let address = start + i as u64;
                // SAFETY: i < len, inside the checked range.
                (unsafe { p.add(i).read_volatile() } != poison_byte(address)).then_some(address)
            })
        };
        if let Some(bad) = scan(0, head) {
            return Some(bad);
        }
        // Blocks of words are compared without a branch in between, so that the compiler can vectorise.
        const BLOCK: usize = 64;
        let mut i = 0;
        while i < words {
            let n = BLOCK.min(words - i);
            let mut word = poison_word(start + (head + i * 8) as u64);
            let mut difference = 0u64;
            for k in 0..n {
                // SAFETY: head + (i + k)*8 + 8 ≤ len; the read is unaligned-safe.
                let found = unsafe { p.add(head + (i + k) * 8).cast::<u64>().read_unaligned() };
                difference |= found ^ word;
                word = word.wrapping_add(POISON_STEP);
            }
            if difference != 0 {
                return scan(head + i * 8, head + (i + n) * 8)
                    .or(Some(start + (head + i * 8) as u64));
            }
            i += n;
        }
        scan(head + words * 8, len)
    }

    /// A hash of [at, at + len), to notice changes (FNV-1a over words; not against an adversary).
    pub fn fingerprint(&self, at: usize, len: usize) -> u64 {
        let mut bytes = vec![0u8; len];
        self.read(at, &mut bytes);
        bytes
            .chunks(8)
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, chunk| {
                let mut word = [0u8; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                (hash ^ u64::from_le_bytes(word))
                    .wrapping_mul(0x0000_0100_0000_01b3)
                    .rotate_left(23)
            })
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.region
            .free
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .give(self.offset, self.len);
    }
}

const POISON_STEP: u64 = 8u64.wrapping_mul(0x9e37_79b9_7f4a_7c15);

/// The poison of the aligned word that holds `address`: an affine function, so that filling needs one addition
/// per word.
fn poison_word(address: u64) -> u64 {
    (address & !7)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(0xd1b5_4a32_d192_ed03)
}

fn poison_byte(address: u64) -> u8 {
    poison_word(address).to_le_bytes()[(address % 8) as usize]
}

/// (bytes up to the first aligned word, whole words) of `len` bytes at `start`.
fn split(start: u64, len: usize) -> (usize, usize) {
    let head = ((8 - start % 8) % 8).min(len as u64) as usize;
    (head, (len - head) / 8)
}

/// All regions of a guest, in the order in which they were added.
#[derive(Default)]
pub struct Memory {
    regions: RwLock<Vec<Arc<Region>>>,
}

impl Memory {
    /// Adds a region; it must not overlap another one.
    pub fn add(&self, region: Region) -> Result<Arc<Region>, Error> {
        let mut regions = self.regions.write().unwrap_or_else(|e| e.into_inner());
        if let Some(other) = regions
            .iter()
            .find(|r| region.gpa < r.gpa + r.size() && r.gpa < region.gpa + region.size())
        {
            return Err(Error::Invalid(format!(
                "region {:#x} overlaps region {:#x}",
                region.gpa, other.gpa
            )));
        }
        let region = Arc::new(region);
        regions.push(region.clone());
        Ok(region)
    }

    /// Removes the region that starts at `gpa`. Spans of it stay usable for whoever holds them.
    pub fn remove(&self, gpa: u64) -> Result<Arc<Region>, Error> {
        let mut regions = self.regions.write().unwrap_or_else(|e| e.into_inner());
        let i = regions
            .iter()
            .position(|r| r.gpa == gpa)
            .ok_or_else(|| Error::Invalid(format!("no region starts at {gpa:#x}")))?;
        Ok(regions.remove(i))
    }

    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.regions
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .clone()
    }

    /// `len` bytes (at least 1) aligned to `align`, from the region that starts at `region`, or from any.
    ///
    /// Larger regions are asked first: small ones are odd bits of a PC's memory map.
    pub fn alloc(&self, len: usize, align: usize, region: Option<u64>) -> Result<Span, Error> {
        let mut regions = self.regions();
        regions.sort_by_key(|r| std::cmp::Reverse(r.size()));
        let len = len.max(1) as u64;
        regions
            .into_iter()
            .filter(|r| region.is_none_or(|gpa| r.gpa == gpa))
            .find_map(|r| {
                r.take(len, align.max(1) as u64).map(|offset| Span {
                    region: r,
                    offset,
                    len,
                })
            })
            .ok_or(Error::OutOfMemory(len))
    }

    /// Exactly [gpa, gpa + len), if it is free and lies in one region.
    pub fn alloc_at(&self, gpa: u64, len: u64) -> Result<Span, Error> {
        let region = self.find(gpa)?;
        let offset = gpa - region.gpa;
        if len == 0
            || !region
                .free
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .take_at(offset, len)
        {
            return Err(Error::Invalid(format!(
                "{len} bytes at {gpa:#x} are not free in one region"
            )));
        }
        Ok(Span {
            region,
            offset,
            len,
        })
    }

    fn find(&self, gpa: u64) -> Result<Arc<Region>, Error> {
        self.regions
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .iter()
            .find(|r| gpa >= r.gpa && gpa - r.gpa < r.size())
            .cloned()
            .ok_or_else(|| Error::Invalid(format!("no guest memory at {gpa:#x}")))
    }

    /// Runs `access(region, offset in region, range of the buffer)` for each piece of [gpa, gpa + len).
    fn pieces(
        &self,
        gpa: u64,
        len: usize,
        mut access: impl FnMut(&Region, u64, std::ops::Range<usize>),
    ) -> Result<(), Error> {
        let mut done = 0;
        while done < len {
            let address = gpa
                .checked_add(done as u64)
                .ok_or_else(|| Error::Invalid("address wraps".into()))?;
            let region = self.find(address)?;
            let offset = address - region.gpa;
            let n = (region.size() - offset).min((len - done) as u64) as usize;
            access(&region, offset, done..done + n);
            done += n;
        }
        Ok(())
    }

    /// Copies `bytes` to guest-physical `gpa`, across regions if they touch.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), Error> {
        self.pieces(gpa, bytes.len(), |region, offset, range| {
            region.write(offset, bytes.get(range).unwrap_or_default());
        })
    }

    /// Copies guest memory from `gpa` on, across regions if they touch.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.pieces(gpa, bytes.len(), |region, offset, range| {
            if let Some(part) = bytes.get_mut(range) {
                region.read(offset, part);
            }
        })
    }
}

/// A new memfd of `size` bytes for guest memory.
pub fn new_file(size: u64, huge: bool) -> Result<OwnedFd, Error> {
    sys::memfd(c"frontend-memory", size, huge)
}

/// Loads the word with acquire semantics, from little-endian.
pub fn load_le(word: &AtomicU16) -> u16 {
    u16::from_le(word.load(Ordering::Acquire))
}

/// Stores the word with release semantics, as little-endian.
pub fn store_le(word: &AtomicU16, value: u16) {
    word.store(value.to_le(), Ordering::Release);
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
