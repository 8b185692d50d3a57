//! The bounded memory that stands in when there is no cache disk or it is full.
//!
//! One memfd per daemon, used as a ring: chunks are laid one behind the other, and what is in the way (the chunks
//! filled longest ago) goes. A chunk's spill word is cleared before its bytes are overwritten and carries a
//! generation that no other filling of the same place has, so a reader that copied meanwhile sees that it must look
//! again.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::layout::{EXTENT_HEADER, EXTENT_SIZE, SPILL_UNIT, spill_word, split_spill};
use crate::mapping::Mapping;
use crate::sys;
use crate::tables::{Tables, spill_at};

/// Generations live in the 24 bits above the offset.
const MAX_GENERATION: u32 = (1 << 24) - 1;

#[derive(Debug)]
struct Slot {
    offset: u64,
    len: u64,
    word: u64,
    extents: Arc<Mapping>,
    chunk: u32,
}

impl Slot {
    /// Clears the chunk's spill word, unless the chunk has been filled again elsewhere.
    fn evict(&self) {
        if let Some(word) = self.extents.u64_at(spill_at(self.chunk)) {
            let _ = word.compare_exchange(self.word, 0, Ordering::SeqCst, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Ring {
    /// Where the next chunk goes.
    head: u64,
    generation: u32,
    /// In the order of filling, which is also the order in which they stand in the ring.
    slots: VecDeque<Slot>,
    /// Bytes of all slots.
    used: u64,
    evicted: u64,
}

/// See the module's comment.
#[derive(Debug)]
pub struct Spill {
    file: File,
    capacity: u64,
    ring: Mutex<Ring>,
    /// Of the ring: who only asks does not wait until somebody has filled a place.
    stats: Mutex<SpillStats>,
}

/// Numbers about the spill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpillStats {
    pub capacity: u64,
    pub used: u64,
    pub chunks: u64,
    pub evicted: u64,
}

fn rounded(len: u64) -> u64 {
    len.div_ceil(SPILL_UNIT) * SPILL_UNIT
}

impl Spill {
    /// An empty spill of `capacity` bytes (rounded up to whole units, at least one). Memory is used as it fills.
    pub fn new(capacity: u64) -> io::Result<Spill> {
        let capacity = rounded(capacity.max(1));
        let file = sys::sealed_memfd(c"rafs-spill", capacity)?;
        Ok(Spill::with(file, capacity, Ring::default()))
    }

    /// The spill of a predecessor: what its extent tables speak of stays.
    pub fn adopt(fd: BorrowedFd<'_>, tables: &[&Tables]) -> io::Result<Spill> {
        let file = File::from(sys::reopen(fd, libc::O_RDWR)?);
        let capacity = sys::identity(file.as_fd())?.1 / SPILL_UNIT * SPILL_UNIT;
        let mut slots = Vec::new();
        for table in tables {
            for chunk in 0..table.count() {
                let Some(word) = table.spill(chunk).map(|w| w.load(Ordering::Acquire)) else {
                    continue;
                };
                if word == 0 {
                    continue;
                }
                let size = table
                    .extents()
                    .u32_at(EXTENT_HEADER + chunk as usize * EXTENT_SIZE + 8);
                let len = rounded(u64::from(size.map_or(0, |w| w.load(Ordering::Relaxed))));
                let offset = split_spill(word).map_or(u64::MAX, |(_, offset)| offset);
                slots.push(Slot {
                    offset,
                    len,
                    word,
                    extents: table.extents().clone(),
                    chunk,
                });
            }
        }
        slots.sort_by_key(|slot| slot.word >> crate::layout::SPILL_GENERATION_SHIFT);
        let mut ring = Ring::default();
        if let Some(newest) = slots.last() {
            ring.generation = split_spill(newest.word).map_or(0, |(generation, _)| generation);
            ring.head = newest.offset.saturating_add(newest.len);
        }
        // Filling order and ring order are the same, so they read: [head, capacity) then [0, head), each ascending.
        // What does not fit into that (a generation that wrapped) is dropped: it will be fetched again.
        let head = ring.head;
        let place = |offset: u64| {
            if offset >= head {
                (0, offset)
            } else {
                (1, offset)
            }
        };
        let mut end = (0, head);
        for slot in slots {
            let fits = slot
                .offset
                .checked_add(slot.len)
                .is_some_and(|e| e <= capacity)
                && place(slot.offset) >= end;
            if fits {
                end = (place(slot.offset).0, slot.offset + slot.len);
                ring.push(slot);
            } else {
                slot.evict();
            }
        }
        if ring.head > capacity {
            ring.head = 0;
        }
        Ok(Spill::with(file, capacity, ring))
    }

    fn with(file: File, capacity: u64, ring: Ring) -> Spill {
        Spill {
            file,
            capacity,
            stats: Mutex::new(ring.stats(capacity)),
            ring: Mutex::new(ring),
        }
    }

    /// A read-only descriptor for a worker.
    pub fn share(&self) -> io::Result<OwnedFd> {
        sys::reopen(self.file.as_fd(), libc::O_RDONLY)
    }

    /// Stores the bytes of `chunk` and publishes them in its extent. Errors when they exceed the capacity, or memory
    /// is short.
    pub fn put(&self, tables: &Tables, chunk: u32, bytes: &[u8]) -> io::Result<()> {
        let len = rounded(bytes.len() as u64);
        if len > self.capacity || len == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let Some(target) = tables.spill(chunk) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        // Held while the bytes are written, so that nobody takes the place before it is published.
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = ring.head;
        if start + len > self.capacity {
            // The rest of the ring's end stays unused this time round.
            ring.drop_overlapping(start, self.capacity);
            start = 0;
        }
        ring.drop_overlapping(start, start + len);
        *self.lock_stats() = ring.stats(self.capacity);
        // Every cleared word must be visible before the first byte is overwritten.
        fence(Ordering::SeqCst);
        self.file.write_all_at(bytes, start)?;
        ring.head = start + len;
        ring.generation = if ring.generation >= MAX_GENERATION {
            1
        } else {
            ring.generation + 1
        };
        let word = spill_word(ring.generation, start);
        target.store(word, Ordering::Release);
        ring.push(Slot {
            offset: start,
            len,
            word,
            extents: tables.extents().clone(),
            chunk,
        });
        *self.lock_stats() = ring.stats(self.capacity);
        Ok(())
    }

    /// Capacity, use and evictions.
    pub fn stats(&self) -> SpillStats {
        *self.lock_stats()
    }

    fn lock_stats(&self) -> MutexGuard<'_, SpillStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn push(&mut self, slot: Slot) {
        self.used += slot.len;
        self.slots.push_back(slot);
    }

    fn stats(&self, capacity: u64) -> SpillStats {
        SpillStats {
            capacity,
            used: self.used,
            chunks: self.slots.len() as u64,
            evicted: self.evicted,
        }
    }

    /// Evicts the oldest slots as long as they stand in `[start, end)`.
    fn drop_overlapping(&mut self, start: u64, end: u64) {
        while let Some(slot) = self.slots.front() {
            if slot.offset >= end || slot.offset + slot.len <= start {
                break;
            }
            slot.evict();
            self.used -= slot.len;
            self.slots.pop_front();
            self.evicted += 1;
        }
    }
}
