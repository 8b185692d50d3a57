//! Requests that wait for chunks.

use std::collections::HashSet;

use session::rings::{Post, PostRing};

/// A chunk of the mounted image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkId {
    pub blob_index: u16,
    pub chunk_index: u32,
}

/// One request that cannot be served yet.
#[derive(Clone, Copy, Debug)]
pub struct Parked {
    pub queue: usize,
    pub head: u16,
    /// The first chunk it misses. When it is there, the request is served again from the start and may find another.
    pub missing: ChunkId,
    pub nodeid: u64,
    pub offset: u64,
    /// When it was taken from the ring first, CLOCK_MONOTONIC.
    pub taken_ns: u64,
    /// When the request gets EIO, CLOCK_MONOTONIC.
    pub deadline_ns: u64,
    /// When its chunk was posted last.
    pub posted_ns: u64,
}

/// After this time without news a chunk is posted again: posts are hints and may be lost.
pub const REPOST_NS: u64 = 2_000_000_000;
/// How often a thread with parked requests looks at their chunks by itself, in ms.
pub const TICK_MS: i32 = 100;
/// Chunks that are asked for at a time: what a driver asks for beyond that waits until some of them have come.
pub const MAX_POSTED: usize = 16_384;

/// The parked requests of one ring thread, and which chunks it has asked for.
#[derive(Default)]
pub struct Parking {
    pub list: Vec<Parked>,
    spare: Vec<Parked>,
    posted: HashSet<ChunkId>,
    /// Something was posted since control was last told.
    pub tell_control: bool,
    /// A request waits because the pool had too much to do already.
    pub pool_was_full: bool,
}

impl Parking {
    /// Asks control for `chunk` unless this was done before; false when that has to wait.
    ///
    /// `since_ns` is when the request was taken: control tries until its time is over, not longer.
    pub fn post(
        &mut self,
        ring: &PostRing,
        chunk: ChunkId,
        nodeid: u64,
        file_offset: u64,
        since_ns: u64,
    ) -> bool {
        if self.posted.contains(&chunk) {
            return true;
        }
        if self.posted.len() >= MAX_POSTED {
            return false;
        }
        let pushed = ring.push(&Post {
            mount: 0,
            blob_index: chunk.blob_index,
            chunk_index: chunk.chunk_index,
            nodeid,
            file_offset,
            time_ns: since_ns,
        });
        if pushed {
            self.posted.insert(chunk);
            self.tell_control = true;
        }
        pushed
    }

    /// The chunk is there, or must be asked for anew.
    pub fn forget_post(&mut self, chunk: ChunkId) {
        self.posted.remove(&chunk);
    }

    /// Forgets the chunks that have come. A request that waits for another one may find them gone again (evicted, or
    /// overwritten where there is no disk), and then has to ask anew instead of waiting for what nobody fetches.
    pub fn forget_arrived(&mut self, has_come: impl Fn(ChunkId) -> bool) {
        self.posted.retain(|&chunk| !has_come(chunk));
    }

    /// A request has failed: control may have given up each of its chunks by now, not only the one that was
    /// looked at. Whoever wants one of them has to ask again.
    pub fn forget_all_posts(&mut self) {
        self.posted.clear();
    }

    /// All waiting requests, oldest first, to be looked at; those that go on waiting are pushed again.
    pub fn take_all(&mut self) -> Vec<Parked> {
        self.pool_was_full = false;
        std::mem::replace(&mut self.list, std::mem::take(&mut self.spare))
    }

    /// Ends the look at `looked_at`, whose memory is used again.
    pub fn looked_at(&mut self, mut looked_at: Vec<Parked>) {
        looked_at.clear();
        self.spare = looked_at;
        self.forget_all_if_idle();
    }

    fn forget_all_if_idle(&mut self) {
        if self.list.is_empty() {
            self.posted.clear();
        }
    }

    /// Drops the requests of `queue`, which is being stopped: they stay in the log.
    pub fn drop_queue(&mut self, queue: usize) {
        self.list.retain(|p| p.queue != queue);
        self.forget_all_if_idle();
    }

    /// Everything has to be posted again.
    pub fn forget_posts(&mut self) {
        self.posted.clear();
        for parked in &mut self.list {
            parked.posted_ns = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_chunks_are_asked_for_at_a_time() {
        // SAFETY: all-zero bytes are valid atomics.
        let ring: Box<PostRing> = Box::new(unsafe { std::mem::zeroed() });
        let mut parking = Parking::default();
        let post = |parking: &mut Parking, chunk_index| {
            let id = ChunkId {
                blob_index: 0,
                chunk_index,
            };
            parking.post(&ring, id, 2, 0, 1)
                && ring.pop().is_none_or(|p| p.chunk_index == chunk_index)
        };
        for chunk in 0..MAX_POSTED as u32 {
            assert!(post(&mut parking, chunk));
        }
        assert!(!post(&mut parking, MAX_POSTED as u32));
        assert!(post(&mut parking, 5), "it has been asked for");
        parking.forget_arrived(|chunk| chunk.chunk_index < 2);
        assert!(post(&mut parking, MAX_POSTED as u32));
        assert!(post(&mut parking, 1), "it came and went");
        assert!(!post(&mut parking, 0));
    }
}
