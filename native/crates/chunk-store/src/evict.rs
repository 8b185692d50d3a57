//! Keeps a cache directory below a limit: the chunks that were used longest ago give their bytes back.
//!
//! One process at a time does it, under the lock of [`LOCK_NAME`]; chunks of all blobs in the directory take part,
//! whoever serves them, because their places and times of use are in the state files. Nobody waits for it: readers see
//! the changed word and look again, writers that meet a chunk being evicted keep their bytes in memory. Left alone are
//! chunks that a request waits for (their time of use lies ahead), chunks that share bytes with others, and every blob
//! with a record of nydusd's, which would believe in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::disk::{BootId, has_sections};
use crate::layout::{
    EVICTING, MAX_HOLD_S, PLACE_ALONE, PRESENT, STATE_HEADER, STATE_MAGIC, VERIFIED, VERSION,
    full_len, place_at, state_header, state_of, used_at,
};
use crate::mapping::Mapping;
use crate::protocol::{evict_step, evicted, reclaim_step};
use crate::{nydusd, sys};

/// The file whose `flock` the evicting process holds.
pub const LOCK_NAME: &str = ".eviction.lock";
const STATE_SUFFIX: &str = ".chunk_state";
const DATA_SUFFIX: &str = ".blob.data";
/// Free space that a nearly full disk is brought back to: this part of it, but no more than [`MAX_RESERVE`].
const RESERVE_SHIFT: u32 = 6;
const MAX_RESERVE: u64 = 1 << 30;

/// What a sweep is to achieve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Goal {
    /// Most bytes of the file system that the files of blobs may use; 0: no limit.
    pub limit: u64,
    /// Give chunks back that an eviction left behind which was interrupted.
    pub recover: bool,
}

/// What a sweep has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Another process sweeps: nothing was done.
    pub busy: bool,
    /// Bytes that the files of blobs use on the disk, before and after.
    pub before: u64,
    pub after: u64,
    pub chunks: u64,
    /// Bytes of chunks that requests wait for, and of blobs that are left to nydusd.
    pub held: u64,
    /// Why the file system gives nothing back (0: it does).
    pub errno: i32,
}

/// Files of one blob, whoever serves it.
#[derive(Debug)]
struct Pair<'a> {
    dir: BorrowedFd<'a>,
    /// Name of nydusd's record, which must not be there.
    record: String,
    state: File,
    states: Mapping,
    count: u32,
    data: File,
    data_len: u64,
    /// Some daemon has opened it since the machine was booted: places were checked, states are in use.
    entered: bool,
}

impl<'a> Pair<'a> {
    /// `None` when its chunks cannot be evicted.
    fn open(dir: BorrowedFd<'a>, stem: &str, boot_id: &BootId) -> io::Result<Option<Pair<'a>>> {
        let data_name = format!("{stem}{DATA_SUFFIX}");
        let record = format!("{data_name}{}", nydusd::SUFFIX);
        if sys::inode_at(dir, &record)?.is_some() {
            return Ok(None);
        }
        let state = sys::open_existing_at(dir, &format!("{stem}{STATE_SUFFIX}"))?;
        let data = sys::open_existing_at(dir, &data_name)?;
        let (Some(state), Some(data)) = (state, data) else {
            return Ok(None);
        };
        if !has_sections(&state)? {
            return Ok(None);
        }
        let head = Mapping::new(state.as_fd(), STATE_HEADER, false)?;
        let word = |at| head.u32_at(at).map_or(0, |w| w.load(Ordering::Acquire));
        let long = |at| head.u64_at(at).map_or(0, |w| w.load(Ordering::Acquire));
        let count = word(state_header::CHUNK_COUNT);
        let (data_ino, data_len) = sys::identity(data.as_fd())?;
        if long(state_header::MAGIC) != STATE_MAGIC
            || word(state_header::VERSION) != VERSION
            || long(state_header::DATA_INO) != data_ino
        {
            return Ok(None);
        }
        let entered = head.read::<16>(state_header::BOOT_ID) == Some(*boot_id);
        let states = Mapping::new(state.as_fd(), full_len(count), true)?;
        Ok(Some(Pair {
            dir,
            record,
            state,
            states,
            count,
            data,
            data_len,
            entered,
        }))
    }

    fn word(&self, chunk: u32) -> Option<&AtomicU32> {
        self.states.u32_at(STATE_HEADER + chunk as usize * 4)
    }

    fn used(&self, chunk: u32) -> u32 {
        let used = self.states.u32_at(used_at(self.count, chunk));
        used.map_or(0, |w| w.load(Ordering::Relaxed))
    }

    /// Offset and size of the chunk in the data file, if it can be evicted by itself.
    fn place(&self, chunk: u32) -> Option<(u64, u32)> {
        let place = self.states.read::<16>(place_at(self.count, chunk))?;
        let word = |at: usize| {
            u32::from_le_bytes([place[at], place[at + 1], place[at + 2], place[at + 3]])
        };
        let offset = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (size, flags) = (word(8), word(12));
        let inside = offset
            .checked_add(u64::from(size))
            .is_some_and(|end| end <= self.data_len);
        (size > 0 && inside && flags & PLACE_ALONE != 0).then_some((offset, size))
    }

    /// Gives the bytes of a chunk back if `step` allows it for its word; their number.
    fn give_back(&self, chunk: u32, step: fn(u32) -> Option<u32>) -> io::Result<u64> {
        let (Some(word), Some((offset, size))) = (self.word(chunk), self.place(chunk)) else {
            return Ok(0);
        };
        let seen = word.load(Ordering::Acquire);
        let Some(owned) = step(seen) else {
            return Ok(0);
        };
        if word
            .compare_exchange(seen, owned, Ordering::SeqCst, Ordering::Relaxed)
            .is_err()
        {
            return Ok(0);
        }
        let punched = sys::punch(self.data.as_fd(), offset, u64::from(size));
        // The bytes are of no use any more even if some of them are still there.
        let _ = word.compare_exchange(owned, evicted(owned), Ordering::SeqCst, Ordering::Relaxed);
        punched.map(|()| u64::from(size))
    }

    /// [`Pair::give_back`], in peace with a daemon that opens the blob for the first time since the boot and must not be
    /// told wrong places.
    fn give_back_safely(
        &self,
        chunk: u32,
        step: fn(u32) -> Option<u32>,
        boot_id: &BootId,
    ) -> io::Result<u64> {
        // A nydusd that has just been started makes its record before it writes the first chunk.
        if sys::inode_at(self.dir, &self.record)?.is_some() {
            return Ok(0);
        }
        if self.entered {
            return self.give_back(chunk, step);
        }
        if !sys::try_lock_exclusive(self.state.as_fd())? {
            return Ok(0);
        }
        let entered = self.states.read::<16>(state_header::BOOT_ID) == Some(*boot_id);
        let done = if entered {
            Ok(0) // the next sweep knows more
        } else {
            self.give_back(chunk, step)
        };
        sys::unlock(self.state.as_fd());
        done
    }

    /// Whether the file system takes bytes back.
    fn probe(&self) -> io::Result<()> {
        sys::punch(
            self.data.as_fd(),
            self.data_len.next_multiple_of(4096),
            4096,
        )
    }
}

fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<(String, u64)>> {
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)?.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if name.ends_with(STATE_SUFFIX) || name.ends_with(DATA_SUFFIX) {
            // A file that has just been removed uses nothing.
            let blocks = entry.metadata().map_or(0, |m| m.blocks());
            found.push((name, blocks * 512));
        }
    }
    Ok(found)
}

fn lock(dir: BorrowedFd<'_>) -> io::Result<Option<File>> {
    let lock = sys::open_file_at(dir, LOCK_NAME)?;
    Ok(sys::try_lock_exclusive(lock.as_fd())?.then_some(lock))
}

struct Candidate {
    used: u32,
    pair: u32,
    chunk: u32,
}

/// Bytes to give back of `usage`, on a disk of `size` bytes of which `free` are left.
fn excess(limit: u64, usage: u64, free: u64, size: u64) -> u64 {
    if limit == 0 {
        return 0;
    }
    let (high, low) = (limit - limit / 16, limit - limit / 8);
    let over = if usage > high { usage - low } else { 0 };
    let reserve = (size >> RESERVE_SHIFT).min(MAX_RESERVE);
    // The disk may be full of something else: the cache does not give itself up for that.
    let short = if free < reserve {
        (reserve + reserve / 2 - free).min(usage.saturating_sub(limit / 4))
    } else {
        0
    };
    over.max(short)
}

/// Brings the blobs in `dir` below `goal.limit`, or gives the disk air. `now` is the time in seconds since the epoch;
/// `stop` ends it early.
///
/// Blocking, and takes memory for a moment: 12 bytes per stored chunk.
pub fn sweep(
    dir: BorrowedFd<'_>,
    goal: &Goal,
    boot_id: &BootId,
    now: u32,
    stop: &AtomicBool,
) -> io::Result<Sweep> {
    let Some(_lock) = lock(dir)? else {
        return Ok(Sweep {
            busy: true,
            ..Sweep::default()
        });
    };
    let files = names(dir)?;
    let mut done = Sweep {
        before: files.iter().map(|f| f.1).sum(),
        ..Sweep::default()
    };
    done.after = done.before;
    let (free, size) = sys::free_bytes(dir)?;
    let need = excess(goal.limit, done.before, free, size);
    if need == 0 && !goal.recover {
        return Ok(done);
    }
    let mut pairs = Vec::new();
    let mut candidates = Vec::new();
    for (name, _) in &files {
        let Some(stem) = name.strip_suffix(STATE_SUFFIX) else {
            continue;
        };
        // One blob's damaged files are no reason to keep all the others.
        let Ok(Some(pair)) = Pair::open(dir, stem, boot_id) else {
            let data = files
                .iter()
                .find(|f| f.0.strip_suffix(DATA_SUFFIX) == Some(stem));
            done.held += data.map_or(0, |f| f.1);
            continue;
        };
        for chunk in 0..pair.count {
            let state = pair
                .word(chunk)
                .map_or(0, |w| state_of(w.load(Ordering::Relaxed)));
            let used = match state {
                EVICTING => 0,
                VERIFIED | PRESENT if need > 0 => pair.used(chunk),
                _ => continue,
            };
            if used > now && used <= now.saturating_add(MAX_HOLD_S) {
                done.held += pair.place(chunk).map_or(0, |p| u64::from(p.1));
                continue;
            }
            candidates.push(Candidate {
                used: if used > now { 0 } else { used },
                pair: pairs.len() as u32,
                chunk,
            });
        }
        pairs.push(pair);
    }
    candidates.sort_unstable_by_key(|c| (c.used, c.pair, c.chunk));
    if let Some(Err(e)) = pairs.first().map(Pair::probe) {
        done.errno = e.raw_os_error().unwrap_or(libc::EIO);
        return Ok(done);
    }
    let mut freed = 0;
    for candidate in candidates {
        let Some(pair) = pairs.get(candidate.pair as usize) else {
            continue;
        };
        let stale = pair
            .word(candidate.chunk)
            .is_some_and(|w| state_of(w.load(Ordering::Relaxed)) == EVICTING);
        if (freed >= need && !stale) || stop.load(Ordering::Relaxed) {
            break;
        }
        match pair.give_back_safely(candidate.chunk, evict_step, boot_id) {
            Ok(0) => {}
            Ok(bytes) => {
                freed += bytes;
                done.chunks += 1;
            }
            Err(e) => done.errno = e.raw_os_error().unwrap_or(libc::EIO),
        }
    }
    done.after = names(dir)?.iter().map(|f| f.1).sum();
    Ok(done)
}

/// Gives back what chunks of blob `stem` still use although they are absent: bad bytes, the rest of an interrupted
/// eviction. Their number; `None` when another process sweeps, or the files are not ours to change.
pub fn reclaim(dir: BorrowedFd<'_>, stem: &str, boot_id: &BootId) -> io::Result<Option<u64>> {
    let Some(_lock) = lock(dir)? else {
        return Ok(None);
    };
    let Some(pair) = Pair::open(dir, stem, boot_id)? else {
        return Ok(None);
    };
    let mut chunks = 0;
    for chunk in 0..pair.count {
        let Some((offset, size)) = pair.place(chunk) else {
            continue;
        };
        let absent = pair
            .word(chunk)
            .is_some_and(|w| reclaim_step(w.load(Ordering::Relaxed)).is_some());
        if absent
            && sys::has_data(pair.data.as_fd(), offset, u64::from(size))
            && pair.give_back_safely(chunk, reclaim_step, boot_id)? > 0
        {
            chunks += 1;
        }
    }
    Ok(Some(chunks))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn marks_of_the_limit() {
        let of = |usage| excess(16 * GIB, usage, 100 * GIB, 200 * GIB);
        assert_eq!(of(0), 0);
        assert_eq!(of(15 * GIB), 0);
        assert_eq!(of(15 * GIB + 1), GIB + 1);
        assert_eq!(of(20 * GIB), 6 * GIB);
        assert_eq!(excess(0, u64::MAX, 0, GIB), 0, "no limit");
        assert_eq!(excess(1, 100, GIB, GIB), 99);
    }

    #[test]
    fn a_nearly_full_disk() {
        let of = |usage, free| excess(100 * GIB, usage, free, 64 * GIB);
        assert_eq!(of(50 * GIB, GIB), 0);
        assert_eq!(of(50 * GIB, GIB - 1), GIB / 2 + 1);
        assert_eq!(of(50 * GIB, 0), GIB + GIB / 2);
        assert_eq!(of(25 * GIB + 7, 0), 7, "a quarter of the limit stays");
        assert_eq!(of(GIB, 0), 0);
        // A huge disk is not kept empty.
        assert_eq!(excess(GIB, GIB / 2, GIB, u64::MAX), 0);
    }
}
