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

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// How often bytes are written anew because the word changed meanwhile; it never does so for long.
const WRITE_TRIES: usize = 8;

/// What became of bytes that were to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// They were written and published.
    Written,
    /// Somebody else had published them.
    Known,
    /// The chunk is being evicted, or its word would not rest.
    Elsewhere,
}

/// Has `write` write verified bytes, and publishes them in `word`, unless somebody else has or is in the way.
pub fn store_bytes(
    word: &AtomicU32,
    mut write: impl FnMut() -> io::Result<()>,
) -> io::Result<Stored> {
    for _ in 0..WRITE_TRIES {
        let seen = word.load(Ordering::Acquire);
        match write_step(seen) {
            WriteStep::Done => return Ok(Stored::Known),
            WriteStep::Elsewhere => return Ok(Stored::Elsewhere),
            WriteStep::Write(next) => {
                write()?;
                if word
                    .compare_exchange(seen, next, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
                {
                    return Ok(Stored::Written);
                }
            }
        }
    }
    Ok(Stored::Elsewhere)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::FETCHING;

    /// Stores while something happens to the word during the first write; the result, and how often was written.
    fn store_while(start: u32, happens: impl Fn(&AtomicU32)) -> (Stored, usize, u32) {
        let word = AtomicU32::new(next_word(0, start));
        let mut writes = 0;
        let stored = store_bytes(&word, || {
            writes += 1;
            if writes == 1 {
                happens(&word);
            }
            Ok(())
        });
        (stored.unwrap(), writes, state_of(word.into_inner()))
    }

    fn change(word: &AtomicU32, states: &[u32]) {
        for state in states {
            word.store(
                next_word(word.load(Ordering::Relaxed), *state),
                Ordering::Relaxed,
            );
        }
    }

    #[test]
    fn bytes_are_written_again_when_anything_happened_meanwhile() {
        let quiet = store_while(ABSENT, |_| {});
        assert_eq!(quiet, (Stored::Written, 1, VERIFIED));
        // Stored by another, evicted whole: what was written before has a hole.
        let evicted = store_while(ABSENT, |w| change(w, &[VERIFIED, EVICTING, ABSENT]));
        assert_eq!(evicted, (Stored::Written, 2, VERIFIED));
        let hinted = store_while(FETCHING, |w| change(w, &[ABSENT]));
        assert_eq!(hinted, (Stored::Written, 2, VERIFIED));
        let quicker = store_while(PRESENT, |w| change(w, &[VERIFIED]));
        assert_eq!(quicker, (Stored::Known, 1, VERIFIED));
        let punched = store_while(ABSENT, |w| change(w, &[VERIFIED, EVICTING]));
        assert_eq!(punched, (Stored::Elsewhere, 1, EVICTING));
        assert_eq!(
            store_while(EVICTING, |_| {}),
            (Stored::Elsewhere, 0, EVICTING)
        );
        assert_eq!(store_while(VERIFIED, |_| {}), (Stored::Known, 0, VERIFIED));
    }

    #[test]
    fn a_word_that_never_rests_does_not_hold_anybody_up() {
        let word = AtomicU32::new(0);
        let stored = store_bytes(&word, || {
            change(&word, &[FETCHING]);
            Ok(())
        });
        assert_eq!(stored.unwrap(), Stored::Elsewhere);
        assert!(store_bytes(&word, || Err(io::ErrorKind::StorageFull.into())).is_err());
    }
}
