//! A blob's tables as the agent has them: states, extents, touched bytes, data file.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::disk::{self, BootId, Found, Options, examine, has_sections, invalid, make_state};
use crate::fds::{SharedFds, TableFds, map_table};
use crate::layout::{
    ABSENT, EXTENT_HEADER, EXTENT_MAGIC, EXTENT_SIZE, EXTENT_VALID, FETCHING, MAX_HOLD_S,
    STATE_HEADER, STATE_MAGIC, TOUCHED_BEFORE, TOUCHED_NOW, VERIFIED, VERSION, extent_len,
    full_len, next_word, state_header, state_len, state_of, touched_len, used_at,
};
use crate::mapping::Mapping;
use crate::nydusd::Record;
use crate::spec::{BlobSpec, CHUNK_VALID};
use crate::sys;

/// Tables of one blob, mapped for writing.
#[derive(Debug)]
pub struct Tables {
    states: Arc<Mapping>,
    extents: Arc<Mapping>,
    touched: Mapping,
    count: u32,
    state_fd: File,
    extent_fd: File,
    touched_fd: File,
    data: Option<File>,
    nydusd: Option<Record>,
}

fn make_extents(spec: &BlobSpec) -> io::Result<(File, Mapping)> {
    let count = spec.count() as u32;
    let file = sys::sealed_memfd(c"rafs-extents", extent_len(count) as u64)?;
    let map = Mapping::new(file.as_fd(), extent_len(count), true)?;
    map.write(8, &VERSION.to_le_bytes())?;
    map.write(12, &count.to_le_bytes())?;
    for i in 0..spec.count() {
        let at = EXTENT_HEADER + i * EXTENT_SIZE;
        if spec.flags[i] & CHUNK_VALID != 0 {
            map.write(at, &spec.data_offset[i].to_le_bytes())?;
            map.write(at + 8, &spec.size[i].to_le_bytes())?;
            map.write(at + 12, &EXTENT_VALID.to_le_bytes())?;
        }
    }
    map.write(0, &EXTENT_MAGIC.to_le_bytes())?;
    Ok((file, map))
}

fn make_touched(count: u32) -> io::Result<(File, Mapping)> {
    let file = sys::sealed_memfd(c"rafs-touched", touched_len(count) as u64)?;
    let map = Mapping::new(file.as_fd(), touched_len(count), true)?;
    Ok((file, map))
}

impl Tables {
    /// Tables whose states and data live in `dir` and are shared with every other daemon that uses it.
    pub fn on_disk(
        dir: BorrowedFd<'_>,
        spec: &BlobSpec,
        map_digest: &[u8; 32],
        boot_id: &BootId,
        options: Options,
    ) -> io::Result<Tables> {
        let open = |stem: &str, replace: bool| {
            disk::open_pair(dir, stem, replace, spec, map_digest, boot_id, options)
        };
        let pair = match open(&spec.blob_id, false)? {
            Some(pair) => pair,
            None => {
                let [a, b, c, d, e, f, g, h, ..] = *map_digest;
                let tag = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
                open(&format!("{}-{tag:016x}", spec.blob_id), true)?.ok_or_else(|| {
                    invalid("a cache file that was just replaced belongs to another image")
                })?
            }
        };
        let (extent_fd, extents) = make_extents(spec)?;
        let (touched_fd, touched) = make_touched(spec.count() as u32)?;
        Ok(Tables {
            states: Arc::new(pair.states),
            extents: Arc::new(extents),
            touched,
            count: spec.count() as u32,
            state_fd: pair.state,
            extent_fd,
            touched_fd,
            data: Some(pair.data),
            nydusd: pair.nydusd,
        })
    }

    /// Tables for a daemon without cache directory: all data goes to the spill.
    pub fn in_memory(
        spec: &BlobSpec,
        map_digest: &[u8; 32],
        boot_id: &BootId,
    ) -> io::Result<Tables> {
        let count = spec.count() as u32;
        let state_fd = sys::sealed_memfd(c"rafs-states", state_len(count) as u64)?;
        make_state(&state_fd, spec, map_digest, boot_id, 0)?;
        let states = Mapping::new(state_fd.as_fd(), state_len(count), true)?;
        let (extent_fd, extents) = make_extents(spec)?;
        let (touched_fd, touched) = make_touched(count)?;
        Ok(Tables {
            states: Arc::new(states),
            extents: Arc::new(extents),
            touched,
            count,
            state_fd,
            extent_fd,
            touched_fd,
            data: None,
            nydusd: None,
        })
    }

    /// The tables that a predecessor made and a worker has mapped. Errors when they are not for this promise.
    pub fn adopt(
        dir: Option<BorrowedFd<'_>>,
        spec: &BlobSpec,
        map_digest: &[u8; 32],
        fds: TableFds<'_>,
    ) -> io::Result<Tables> {
        let state_fd = File::from(sys::reopen(fds.state, libc::O_RDWR)?);
        let extent_fd = File::from(sys::reopen(fds.extents, libc::O_RDWR)?);
        let touched_fd = File::from(sys::reopen(fds.touched, libc::O_RDWR)?);
        let data = fds
            .data
            .map(|fd| sys::reopen(fd, libc::O_RDWR))
            .transpose()?
            .map(File::from);
        if !matches!(examine(&state_fd, spec, map_digest)?, Found::Ours { .. }) {
            return Err(invalid("the state file to adopt belongs to another image"));
        }
        let head = state_header::DATA_SIZE + 8;
        let (states, count) = map_table(
            state_fd.as_fd(),
            STATE_MAGIC,
            head,
            if has_sections(&state_fd)? {
                full_len
            } else {
                state_len
            },
            true,
            "state file",
        )?;
        let (extents, extent_count) = map_table(
            extent_fd.as_fd(),
            EXTENT_MAGIC,
            EXTENT_HEADER,
            extent_len,
            true,
            "extent table",
        )?;
        if count as usize != spec.count() || extent_count != count {
            return Err(invalid("the tables to adopt have another number of chunks"));
        }
        let touched = Mapping::new(touched_fd.as_fd(), touched_len(count), true)?;
        let mut nydusd = None;
        if let (Some(dir), Some(data)) = (dir, &data) {
            if !sys::try_lock_shared(data.as_fd())? {
                return Err(invalid("the data file to adopt is being removed"));
            }
            let name = format!("{}.blob.data", spec.blob_id);
            if sys::inode_at(dir, &name)? == Some(sys::identity(data.as_fd())?.0) {
                nydusd = disk::open_record(dir, &name, spec, &states, false)?;
            }
        }
        Ok(Tables {
            states: Arc::new(states),
            extents: Arc::new(extents),
            touched,
            count,
            state_fd,
            extent_fd,
            touched_fd,
            data,
            nydusd,
        })
    }

    /// Descriptors for a worker: read-only, except that of the touched table. That of the data file holds the lease, so
    /// that the files stay as long as somebody reads them, whatever becomes of the agent.
    pub fn share(&self) -> io::Result<SharedFds> {
        let read = |file: &File| sys::reopen(file.as_fd(), libc::O_RDONLY);
        let data = self.data.as_ref().map(read).transpose()?;
        if let Some(data) = &data {
            sys::try_lock_shared(data.as_fd())?;
        }
        Ok(SharedFds {
            state: read(&self.state_fd)?,
            extents: read(&self.extent_fd)?,
            touched: sys::reopen(self.touched_fd.as_fd(), libc::O_RDWR)?,
            data,
        })
    }

    /// The mapped touched table.
    pub fn touched(&self) -> &Mapping {
        &self.touched
    }

    /// Whether a worker has answered a read from `chunk` since the last call for it: the clock's hand. That it was
    /// touched at some time stays visible.
    pub fn take_touched(&self, chunk: u32) -> bool {
        let Some(byte) = self
            .touched
            .u8_at(chunk as usize)
            .filter(|_| chunk < self.count)
        else {
            return false;
        };
        let taken = byte.load(Ordering::Relaxed) & TOUCHED_NOW != 0;
        if taken {
            // A worker that marks it in between is one read late: the chunk was in use anyway.
            byte.store(TOUCHED_BEFORE, Ordering::Relaxed);
        }
        taken
    }

    /// Number of chunks.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The data file, if there is one.
    pub fn data(&self) -> Option<&File> {
        self.data.as_ref()
    }

    /// The mapped extent table.
    pub fn extents(&self) -> &Arc<Mapping> {
        &self.extents
    }

    /// The mapped state file.
    pub fn states(&self) -> &Arc<Mapping> {
        &self.states
    }

    /// The state word of `chunk`.
    pub fn state(&self, chunk: u32) -> Option<&AtomicU32> {
        if chunk >= self.count {
            None
        } else {
            self.states.u32_at(STATE_HEADER + chunk as usize * 4)
        }
    }

    /// The spill word of `chunk`.
    pub fn spill(&self, chunk: u32) -> Option<&AtomicU64> {
        if chunk >= self.count {
            None
        } else {
            self.extents.u64_at(spill_at(chunk))
        }
    }

    /// Whether a worker may serve `chunk` right now.
    pub fn ready(&self, chunk: u32) -> bool {
        let stored = self.data.is_some()
            && self
                .state(chunk)
                .is_some_and(|w| state_of(w.load(Ordering::Acquire)) == VERIFIED);
        stored
            || self
                .spill(chunk)
                .is_some_and(|w| w.load(Ordering::Acquire) != 0)
    }

    /// Notes that `chunk` is in use until `when` (seconds since the epoch). Never moves a time to come backwards.
    pub fn set_used(&self, chunk: u32, when: u32) {
        if chunk < self.count {
            if let Some(used) = self.states.u32_at(used_at(self.count, chunk)) {
                let old = used.load(Ordering::Relaxed);
                if old < when || old > when.saturating_add(MAX_HOLD_S) {
                    used.store(when, Ordering::Relaxed);
                }
            }
        }
    }

    /// The chunks that reads were answered from since the last call were used `now`: nobody waits for them any more.
    /// Returns their number.
    pub fn harvest(&self, now: u32) -> u32 {
        let mut taken = 0;
        for chunk in 0..self.count {
            if self.take_touched(chunk) {
                taken += 1;
                if let Some(used) = self.states.u32_at(used_at(self.count, chunk)) {
                    used.store(now, Ordering::Relaxed);
                }
            }
        }
        taken
    }

    /// nydusd's record of the blob, if there is one.
    pub(crate) fn nydusd(&self) -> Option<&Record> {
        self.nydusd.as_ref()
    }

    /// Enters `state` only when the word is still `old`.
    pub fn exchange(&self, chunk: u32, old: u32, state: u32) -> bool {
        self.state(chunk).is_some_and(|word| {
            word.compare_exchange(
                old,
                next_word(old, state),
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
        })
    }

    /// Marks or unmarks `chunk` as being fetched: a hint, and only where nothing better is known.
    pub fn hint_fetching(&self, chunk: u32, on: bool) {
        let (from, to) = if on {
            (ABSENT, FETCHING)
        } else {
            (FETCHING, ABSENT)
        };
        if let Some(word) = self.state(chunk) {
            let old = word.load(Ordering::Acquire);
            if state_of(old) == from {
                self.exchange(chunk, old, to);
            }
        }
    }
}

/// Byte offset of a chunk's spill word in the extent table.
pub fn spill_at(chunk: u32) -> usize {
    EXTENT_HEADER + chunk as usize * EXTENT_SIZE + 16
}
