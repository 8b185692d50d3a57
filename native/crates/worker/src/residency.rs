//! Whether the page cache has what a ring thread is about to read.
//!
//! preadv2(RWF_NOWAIT) does not wait for the disk, but since Linux 5.12 it starts the read, and that takes the time of
//! ten warm requests. Where a read has missed, the next ones ask cachestat(2) first, which starts nothing, and leave the
//! rest to the pool. Warm chunks are not asked about.

use crate::pool::Piece;

/// Chunks that are told apart, by a hash.
const SLOTS: usize = 1024;
/// So many reads after the last miss are asked about.
const ASKED: u8 = 8;

/// linux/mman.h; one number for all architectures that we build for.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// What a ring thread has learned from reads that missed.
pub struct Residency {
    /// How many of the next reads of a chunk are to be asked about.
    slots: Box<[u8; SLOTS]>,
    /// The kernel answers: it has the call (Linux 6.5), and the files are ours.
    answers: bool,
}

impl Default for Residency {
    fn default() -> Self {
        Residency {
            slots: Box::new([0; SLOTS]),
            answers: true,
        }
    }
}

impl Residency {
    /// A read of `piece` has found a page missing.
    pub fn missed(&mut self, piece: &Piece) {
        if self.answers {
            self.slots[slot(piece)] = ASKED;
        }
    }

    /// Whether `len` bytes from the start of `piece` are known not to be in the page cache as a whole.
    pub fn is_absent(&mut self, piece: &Piece, len: u64) -> bool {
        let left = &mut self.slots[slot(piece)];
        if *left == 0 {
            return false;
        }
        match cached_pages(piece, len) {
            Some(cached) if cached < n_pages(piece.offset, len) => {
                *left = ASKED;
                true
            }
            Some(_) => {
                *left -= 1;
                false
            }
            None => {
                self.answers = false;
                self.slots.fill(0);
                false
            }
        }
    }
}

fn slot(piece: &Piece) -> usize {
    // Neighbours in a blob have slots of their own.
    (piece.chunk_index as usize).wrapping_add(usize::from(piece.blob_index).wrapping_mul(389))
        % SLOTS
}

fn n_pages(offset: u64, len: u64) -> u64 {
    // SAFETY: plain call, without memory.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as u64;
    (offset + len).div_ceil(page) - offset / page
}

/// Pages of the range that are in the page cache, also those that are only on their way; None when the kernel does not
/// tell.
fn cached_pages(piece: &Piece, len: u64) -> Option<u64> {
    let range = Range {
        offset: piece.offset,
        len,
    };
    let mut counts = Counts::default();
    // SAFETY: the kernel reads one structure and writes the other; both have its layout.
    let rc = unsafe { libc::syscall(SYS_CACHESTAT, piece.fd, &range, &mut counts, 0) };
    (rc == 0).then_some(counts.cached)
}

#[cfg(test)]
#[path = "residency_tests.rs"]
mod tests;
