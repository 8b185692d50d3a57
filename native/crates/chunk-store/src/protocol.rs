//! Who may do what with a chunk, by its state word: the rules that writers and eviction follow. Tested against all
//! interleavings in `tests/protocol.rs`.
//!
//! Three parties meet in a word without waiting for each other:
//!
//! * A **reader** takes the word, copies if it says verified, and takes it again: the same word means that the bytes
//!   were those.
//! * A **writer** takes the word, writes the bytes, and publishes only if the word is still the same. When it is not, a
//!   hole may have been punched into what was just written, so it starts again.
//! * **Eviction** first makes the chunk [`EVICTING`], then punches, then makes it absent. One process at a time does
//!   that, under a lock of the directory; a chunk that is found evicting under that lock was left by one that died.

use crate::layout::{ABSENT, EVICTING, PRESENT, VERIFIED, next_word, state_of};

/// What a writer that has verified bytes does with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteStep {
    /// Somebody else has stored them.
    Done,
    /// Write them to the data file, then exchange the word that was seen for this one.
    Write(u32),
    /// The place is being punched: keep them elsewhere.
    Elsewhere,
}

/// The step of a writer that sees `word`.
pub const fn write_step(word: u32) -> WriteStep {
    match state_of(word) {
        VERIFIED => WriteStep::Done,
        EVICTING => WriteStep::Elsewhere,
        _ => WriteStep::Write(next_word(word, VERIFIED)),
    }
}

/// The word for which eviction exchanges `word` before it punches; `None` when there is nothing to evict. A chunk that
/// is evicting already gets another generation, so that its earlier owner, should it live, owns it no more.
pub const fn evict_step(word: u32) -> Option<u32> {
    match state_of(word) {
        VERIFIED | PRESENT | EVICTING => Some(next_word(word, EVICTING)),
        _ => None,
    }
}

/// The same for a chunk whose bytes are in the way although nobody speaks of them.
pub const fn reclaim_step(word: u32) -> Option<u32> {
    match state_of(word) {
        VERIFIED | PRESENT => None,
        _ => Some(next_word(word, EVICTING)),
    }
}

/// The word that follows `word`, which one of the steps above gave, once the bytes are gone.
pub const fn evicted(word: u32) -> u32 {
    next_word(word, ABSENT)
}
