//! What a ring thread does at a stretch: before others have their turn, before the driver sees its answers, before it is
//! signalled.

/// A round takes at most so many heads, or about so many bytes, before answers are published and hiprio has its turn.
pub const ROUND_HEADS: usize = 64;
const ROUND_BYTES: usize = 1 << 20;
/// Answers are shown to the driver after so many heads or bytes. A driver that finds one whenever it has worked off
/// the last ones never sleeps: with eight instead of two, lookups at depth 32 take three times the processor time.
pub const SHOW_HEADS: usize = 2;
pub const SHOW_BYTES: usize = 64 << 10;
/// A driver that asks for signals gets one when one of so many parts of its requests is answered: it sleeps perhaps, and
/// wakes up while the others are served. Eight small reads take about as long as that; of large ones half leaves time
/// enough, and a signal more would cost what it saves.
const SIGNAL_PARTS_SMALL: u32 = 4;
const SIGNAL_PARTS: u32 = 2;
/// And after so many bytes, whatever waits.
const SIGNAL_BYTES: usize = 2 << 20;

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

/// Whether a driver should learn of `untold` answers with `bytes` bytes, while `waiting` heads are left.
pub fn is_signal_due(bytes: usize, untold: u16, waiting: u16) -> bool {
    let parts = if bytes < SHOW_BYTES {
        SIGNAL_PARTS_SMALL
    } else {
        SIGNAL_PARTS
    };
    bytes >= SIGNAL_BYTES || u32::from(untold) * (parts - 1) >= u32::from(waiting)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer out of 32 with which the signal comes.
    fn signalled_after(bytes_each: usize) -> Option<u16> {
        (1..=32u16).find(|&n| is_signal_due(usize::from(n) * bytes_each, n, 32 - n))
    }

    #[test]
    fn a_driver_is_signalled_while_there_is_work_left() {
        assert_eq!(signalled_after(0), Some(8), "metadata");
        assert_eq!(
            signalled_after(4 << 10),
            Some(8),
            "a quarter of small reads"
        );
        assert_eq!(signalled_after(64 << 10), Some(16), "half of large ones");
        assert_eq!(signalled_after(1 << 20), Some(2), "so many bytes");
        assert!(is_signal_due(0, 1, 0), "nothing is left");
        assert!(
            !is_signal_due(0, 1, u16::MAX),
            "an index that makes no sense"
        );
    }
}
