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

/// The parked requests of one ring thread, and which chunks it has asked for.
#[derive(Default)]
pub struct Parking {
    pub list: Vec<Parked>,
    spare: Vec<Parked>,
    posted: HashSet<ChunkId>,
    /// Something was posted since control was last told.
    pub tell_control: bool,
}

impl Parking {
    /// Asks control for `chunk` unless this was done before; false when the ring is full.
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

    /// A request has failed: control may have given up each of its chunks by now, not only the one that was
    /// looked at. Whoever wants one of them has to ask again.
    pub fn forget_all_posts(&mut self) {
        self.posted.clear();
    }

    /// All waiting requests, oldest first, to be looked at; those that go on waiting are pushed again.
    pub fn take_all(&mut self) -> Vec<Parked> {
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
