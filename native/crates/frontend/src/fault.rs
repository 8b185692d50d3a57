//! What a device did that the virtio or virtio-fs specification does not allow.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One class of misbehaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum FaultKind {
    /// The used index moved by more than what is in flight.
    UsedIndexJump,
    /// A used element names a descriptor beyond the ring.
    UsedIdRange,
    /// A used element names a head that is not in flight: completed twice, or never submitted.
    NotInFlight,
    /// The used length is not the length in the FUSE out header (0 for a request without reply).
    UsedLength,
    /// The used length exceeds the request's writable bytes.
    UsedLengthRange,
    /// The out header's `unique` is not the request's.
    Unique,
    /// The out header's error is positive or no errno.
    ErrorRange,
    /// A byte past the used length, or around the buffers, was written.
    WriteOutside,
    /// The readable part of a request was written.
    RequestModified,
    /// A buffer was written after its completion.
    LateWrite,
    /// Guest memory or the used ring changed although the queue was stopped.
    WriteWhileStopped,
    /// A read answered bytes other than the expected ones.
    WrongData,
    /// A driver that had asked for an interrupt slept until its time was over, beside a completion.
    InterruptMissing,
}

/// All kinds in the order of their numbers, with the names that reports use.
pub const KINDS: [(FaultKind, &str); 13] = [
    (FaultKind::UsedIndexJump, "used_index_jump"),
    (FaultKind::UsedIdRange, "used_id_range"),
    (FaultKind::NotInFlight, "not_in_flight"),
    (FaultKind::UsedLength, "used_length"),
    (FaultKind::UsedLengthRange, "used_length_range"),
    (FaultKind::Unique, "unique"),
    (FaultKind::ErrorRange, "error_range"),
    (FaultKind::WriteOutside, "write_outside"),
    (FaultKind::RequestModified, "request_modified"),
    (FaultKind::LateWrite, "late_write"),
    (FaultKind::WriteWhileStopped, "write_while_stopped"),
    (FaultKind::WrongData, "wrong_data"),
    (FaultKind::InterruptMissing, "interrupt_missing"),
];

/// How many texts are kept; counters go on beyond.
const MAX_TEXTS: usize = 100;

/// Counters per kind, and the texts of the first faults. Shared by all queues of a front-end.
#[derive(Default)]
pub struct Faults {
    counts: [AtomicU64; KINDS.len()],
    texts: Mutex<Vec<String>>,
    /// So that a back-end which commits one fault per request is not slowed down by a lock.
    n_texts: AtomicUsize,
}

impl Faults {
    /// Counts a fault; `text` is only made while texts are still kept.
    pub fn record(&self, kind: FaultKind, text: impl FnOnce() -> String) {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
        if self.n_texts.load(Ordering::Relaxed) >= MAX_TEXTS {
            return;
        }
        let mut texts = self.texts.lock().unwrap_or_else(|e| e.into_inner());
        if texts.len() < MAX_TEXTS {
            texts.push(format!("{}: {}", KINDS[kind as usize].1, text()));
            self.n_texts.store(texts.len(), Ordering::Relaxed);
        }
    }

    pub fn count(&self, kind: FaultKind) -> u64 {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).sum()
    }

    /// The texts of the first faults, oldest first; cleared together with the counters when `clear`.
    pub fn texts(&self, clear: bool) -> Vec<String> {
        let mut texts = self.texts.lock().unwrap_or_else(|e| e.into_inner());
        if !clear {
            return texts.clone();
        }
        self.counts
            .iter()
            .for_each(|c| c.store(0, Ordering::Relaxed));
        self.n_texts.store(0, Ordering::Relaxed);
        std::mem::take(&mut texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_in_the_order_of_their_numbers() {
        for (i, (kind, _)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, i);
        }
    }
}
