//! What a ring thread does at a stretch.

/// A round takes at most so many heads, or about so many bytes, before answers are published and hiprio has its turn.
pub const ROUND_HEADS: usize = 64;
const ROUND_BYTES: usize = 1 << 20;

/// What was served since a round began.
#[derive(Default)]
pub struct Budget {
    pub heads: usize,
    pub bytes: usize,
}

impl Budget {
    /// One more head, and bytes that were copied for it.
    pub fn spend(&mut self, bytes: usize) {
        self.heads += 1;
        self.bytes += bytes;
    }

    /// Whether the round is over.
    pub fn is_spent(&self) -> bool {
        self.heads >= ROUND_HEADS || self.bytes >= ROUND_BYTES
    }
}
