//! Rings in shared memory between a worker thread (producer) and control (consumer).
//!
//! One producer and one consumer each, so that a process that dies in the middle leaves nothing half done: the
//! position is stored after the entry. Both rings are hints. A post that is lost or never read is posted again by
//! the worker; a trace that is overwritten is only missing in a report.

use std::sync::atomic::{AtomicU64, Ordering};

const POSTS: usize = 1024;
const TRACES: usize = 256;

/// A chunk that a parked request waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Post {
    pub mount: u8,
    pub blob_index: u16,
    pub chunk_index: u32,
    /// Node whose data is wanted, for reports and read-ahead.
    pub nodeid: u64,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
    /// When the request was taken from its ring, CLOCK_MONOTONIC.
    pub time_ns: u64,
}

/// A parked request that has been answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    pub nodeid: u64,
    pub offset: u64,
    pub len: u64,
    pub parked_ns: u64,
    pub done_ns: u64,
}

#[repr(C)]
struct Ring<const N: usize, const WORDS: usize> {
    produced: AtomicU64,
    consumed: AtomicU64,
    entries: [[AtomicU64; WORDS]; N],
}

impl<const N: usize, const WORDS: usize> Ring<N, WORDS> {
    fn push(&self, words: [u64; WORDS], overwrite: bool) -> bool {
        let at = self.produced.load(Ordering::Relaxed);
        let waiting = at.wrapping_sub(self.consumed.load(Ordering::Acquire));
        if !overwrite && waiting >= N as u64 {
            return false;
        }
        for (slot, word) in self.entries[at as usize % N].iter().zip(words) {
            slot.store(word, Ordering::Relaxed);
        }
        self.produced.store(at.wrapping_add(1), Ordering::Release);
        true
    }

    fn pop(&self) -> Option<[u64; WORDS]> {
        let end = self.produced.load(Ordering::Acquire);
        let mut at = self.consumed.load(Ordering::Relaxed);
        if end == at {
            return None;
        }
        if end.wrapping_sub(at) > N as u64 {
            at = end.wrapping_sub(N as u64);
        }
        let words =
            std::array::from_fn(|i| self.entries[at as usize % N][i].load(Ordering::Relaxed));
        self.consumed.store(at.wrapping_add(1), Ordering::Release);
        Some(words)
    }
}

/// Chunks wanted by one worker thread.
#[repr(C)]
pub struct PostRing(Ring<POSTS, 4>);

impl PostRing {
    /// False when the ring is full: try again later.
    pub fn push(&self, post: &Post) -> bool {
        let key = u64::from(post.mount) << 56
            | u64::from(post.blob_index) << 32
            | u64::from(post.chunk_index);
        self.0
            .push([key, post.nodeid, post.file_offset, post.time_ns], false)
    }

    /// The oldest post that nobody has seen.
    pub fn pop(&self) -> Option<Post> {
        let [key, nodeid, file_offset, time_ns] = self.0.pop()?;
        Some(Post {
            mount: (key >> 56) as u8,
            blob_index: (key >> 32) as u16,
            chunk_index: key as u32,
            nodeid,
            file_offset,
            time_ns,
        })
    }
}

/// Answered requests of one worker thread; old ones are overwritten.
#[repr(C)]
pub struct TraceRing(Ring<TRACES, 5>);

impl TraceRing {
    /// Notes a request.
    pub fn push(&self, t: &Trace) {
        self.0
            .push([t.nodeid, t.offset, t.len, t.parked_ns, t.done_ns], true);
    }

    /// The oldest trace that nobody has seen.
    pub fn pop(&self) -> Option<Trace> {
        let [nodeid, offset, len, parked_ns, done_ns] = self.0.pop()?;
        Some(Trace {
            nodeid,
            offset,
            len,
            parked_ns,
            done_ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posts_come_back_in_order_and_a_full_ring_says_so() {
        // SAFETY: all-zero bytes are valid atomics.
        let ring: Box<PostRing> = Box::new(unsafe { std::mem::zeroed() });
        let post = |i| Post {
            mount: 1,
            blob_index: 2,
            chunk_index: i,
            nodeid: 3,
            file_offset: 4,
            time_ns: 5,
        };
        for i in 0..POSTS as u32 {
            assert!(ring.push(&post(i)));
        }
        assert!(!ring.push(&post(0)));
        assert_eq!(ring.pop(), Some(post(0)));
        assert!(ring.push(&post(7)));
    }

    #[test]
    fn traces_overwrite_the_oldest() {
        // SAFETY: all-zero bytes are valid atomics.
        let ring: Box<TraceRing> = Box::new(unsafe { std::mem::zeroed() });
        for i in 0..TRACES as u64 + 3 {
            ring.push(&Trace {
                nodeid: i,
                ..Trace::default()
            });
        }
        assert_eq!(ring.pop().map(|t| t.nodeid), Some(3));
    }

    /// A worker that a guest has taken over writes any positions; a reader gets entries, not an endless supply of
    /// old ones.
    #[test]
    fn any_positions_are_read_to_an_end() {
        // SAFETY: all-zero bytes are valid atomics.
        let ring: Box<PostRing> = Box::new(unsafe { std::mem::zeroed() });
        for (produced, consumed) in [
            (u64::MAX, 0),
            (0, u64::MAX),
            (5, 6),
            (1 << 40, 1 << 41),
            (u64::MAX / 2, u64::MAX),
        ] {
            ring.0.produced.store(produced, Ordering::Relaxed);
            ring.0.consumed.store(consumed, Ordering::Relaxed);
            let found = (0..=POSTS).take_while(|_| ring.pop().is_some()).count();
            assert!(found <= POSTS, "{produced} {consumed}");
            let _ = ring.push(&Post::default());
        }
    }
}
