//! Making, opening and adopting a blob's state file, data file and extent table.
//!
//! Everything that could confuse two writers happens under the state file's `flock`: making the files, and marking
//! "verified" as "present" after another boot. The lock is held for that moment only; afterwards daemons meet in the
//! state words.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::layout::{
    ABSENT, EXTENT_HEADER, EXTENT_MAGIC, EXTENT_SIZE, EXTENT_VALID, FETCHING, PRESENT,
    STATE_HEADER, STATE_MAGIC, TOUCHED_BEFORE, TOUCHED_NOW, VERIFIED, VERSION, extent_len,
    next_word, state_header, state_len, state_of, touched_len,
};
use crate::mapping::Mapping;
use crate::spec::{BlobSpec, CHUNK_VALID};
use crate::store::TableFds;
use crate::sys;
use crate::view::map_table;

/// What distinguishes two boots of a machine: /proc/sys/kernel/random/boot_id as bytes.
pub type BootId = [u8; 16];

/// The boot id of the running kernel.
pub fn kernel_boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut id = BootId::default();
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        let hex = std::str::from_utf8(pair).unwrap_or("00");
        *byte = u8::from_str_radix(hex, 16).unwrap_or(0);
    }
    Ok(id)
}

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
}

/// How often a file that somebody else replaces meanwhile is opened again.
const OPEN_TRIES: usize = 16;

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

fn state_bytes(spec: &BlobSpec, map_digest: &[u8; 32], boot_id: &BootId, data_ino: u64) -> Vec<u8> {
    let mut head = vec![0u8; state_header::DATA_INO + 8];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(state_header::VERSION, &VERSION.to_le_bytes());
    put(
        state_header::CHUNK_COUNT,
        &(spec.count() as u32).to_le_bytes(),
    );
    put(state_header::BOOT_ID, boot_id);
    put(state_header::MAP_DIGEST, map_digest);
    put(state_header::BLOB_ID, spec.blob_id.as_bytes());
    put(state_header::DATA_SIZE, &spec.data_size.to_le_bytes());
    put(state_header::DATA_INO, &data_ino.to_le_bytes());
    head
}

/// Writes header and zero words; the magic comes last, so that a half-made file is recognised.
fn make_state(
    file: &File,
    spec: &BlobSpec,
    map_digest: &[u8; 32],
    boot_id: &BootId,
    data_ino: u64,
) -> io::Result<()> {
    let head = state_bytes(spec, map_digest, boot_id, data_ino);
    file.write_all_at(&head[state_header::VERSION..], state_header::VERSION as u64)?;
    file.write_all_at(&STATE_MAGIC.to_le_bytes(), state_header::MAGIC as u64)
}

/// What the lock holder finds in a state file.
enum Found {
    /// Nothing, or the rest of a creation that was interrupted.
    Fresh,
    /// A file for exactly this promise, bound to the data file with this inode number.
    Ours { data_ino: u64 },
    /// A file for another promise, or of another version.
    Other,
}

fn examine(file: &File, spec: &BlobSpec, map_digest: &[u8; 32]) -> io::Result<Found> {
    let want = state_bytes(spec, map_digest, &[0; 16], 0);
    let mut head = vec![0u8; want.len()];
    let size = sys::identity(file.as_fd())?.1;
    if size < head.len() as u64 {
        return Ok(Found::Fresh);
    }
    file.read_exact_at(&mut head, 0)?;
    let field = |bytes: &[u8], at: usize, len: usize| bytes[at..at + len].to_vec();
    if head[..8] == [0; 8] {
        return Ok(Found::Fresh);
    }
    let same = |at: usize, len: usize| field(&head, at, len) == field(&want, at, len);
    let ours = head[..8] == STATE_MAGIC.to_le_bytes()
        && same(state_header::VERSION, 8)
        && same(state_header::MAP_DIGEST, 32)
        && same(state_header::BLOB_ID, 64)
        && same(state_header::DATA_SIZE, 8)
        && size >= state_len(spec.count() as u32) as u64;
    if !ours {
        return Ok(Found::Other);
    }
    let mut ino = [0u8; 8];
    ino.copy_from_slice(&head[state_header::DATA_INO..]);
    Ok(Found::Ours {
        data_ino: u64::from_le_bytes(ino),
    })
}

/// After another boot nothing is known to have reached the disk: verified → present, fetching → absent. A crash in
/// the middle leaves the old boot id, and the next one does it again.
fn enter_boot(states: &Mapping, count: u32, boot_id: &BootId) -> io::Result<()> {
    if states.read::<16>(state_header::BOOT_ID) == Some(*boot_id) {
        return Ok(());
    }
    for chunk in 0..count {
        let Some(word) = states.u32_at(STATE_HEADER + chunk as usize * 4) else {
            break;
        };
        let old = word.load(Ordering::Acquire);
        match state_of(old) {
            VERIFIED => word.store(next_word(old, PRESENT), Ordering::Release),
            PRESENT | ABSENT => {}
            _ => word.store(next_word(old, ABSENT), Ordering::Release),
        }
    }
    std::sync::atomic::fence(Ordering::SeqCst);
    states.write(state_header::BOOT_ID, boot_id)
}

struct OnDisk {
    state: File,
    states: Mapping,
    data: File,
}

/// Opens or makes `<stem>.chunk_state` and `<stem>.blob.data`; `None` when the name belongs to another promise.
fn open_pair(
    dir: BorrowedFd<'_>,
    stem: &str,
    replace: bool,
    spec: &BlobSpec,
    map_digest: &[u8; 32],
    boot_id: &BootId,
) -> io::Result<Option<OnDisk>> {
    let state_name = format!("{stem}.chunk_state");
    let data_name = format!("{stem}.blob.data");
    let len = state_len(spec.count() as u32);
    for _ in 0..OPEN_TRIES {
        let state = sys::open_file_at(dir, &state_name)?;
        sys::lock_exclusive(state.as_fd())?;
        if sys::inode_at(dir, &state_name)? != Some(sys::identity(state.as_fd())?.0) {
            continue; // replaced between open and lock
        }
        let found = examine(&state, spec, map_digest)?;
        if matches!(found, Found::Other) {
            if !replace {
                return Ok(None);
            }
            // The name is for this promise alone: the file is damaged. Whoever has it open keeps the old one.
            sys::unlink_at(dir, &state_name)?;
            sys::unlink_at(dir, &data_name)?;
            continue;
        }
        if matches!(found, Found::Fresh) {
            // A data file without states may be in use by a daemon whose state file was removed, and for another
            // promise: what would be written here must not show up there.
            sys::unlink_at(dir, &data_name)?;
        }
        let data = sys::open_file_at(dir, &data_name)?;
        let (data_ino, data_len) = sys::identity(data.as_fd())?;
        if let Found::Ours { data_ino: bound } = found {
            if bound != data_ino || data_len < spec.data_size {
                // States that speak of a data file which is gone (somebody made room), or was cut. Other daemons may
                // still use that pair, so it is left to them and a new one is made.
                sys::unlink_at(dir, &state_name)?;
                if data_len < spec.data_size {
                    sys::unlink_at(dir, &data_name)?;
                }
                continue;
            }
            sys::reserve(state.as_fd(), len as u64)?;
        } else {
            state.set_len(0)?;
            state.set_len(len as u64)?;
            sys::reserve(state.as_fd(), len as u64)?;
            if data_len < spec.data_size {
                data.set_len(spec.data_size)?;
            }
            make_state(&state, spec, map_digest, boot_id, data_ino)?;
        }
        let states = Mapping::new(state.as_fd(), len, true)?;
        enter_boot(&states, spec.count() as u32, boot_id)?;
        sys::unlock(state.as_fd());
        return Ok(Some(OnDisk {
            state,
            states,
            data,
        }));
    }
    Err(invalid(format!(
        "{state_name}: replaced again and again by somebody else"
    )))
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

/// The descriptors of one blob's tables, shared with a worker. Only the touched table may be written by it.
#[derive(Debug)]
pub struct SharedFds {
    pub state: OwnedFd,
    pub extents: OwnedFd,
    pub touched: OwnedFd,
    pub data: Option<OwnedFd>,
}

impl Tables {
    /// Tables whose states and data live in `dir` and are shared with every other daemon that uses it.
    pub fn on_disk(
        dir: BorrowedFd<'_>,
        spec: &BlobSpec,
        map_digest: &[u8; 32],
        boot_id: &BootId,
    ) -> io::Result<Tables> {
        let pair = match open_pair(dir, &spec.blob_id, false, spec, map_digest, boot_id)? {
            Some(pair) => pair,
            None => {
                let [a, b, c, d, e, f, g, h, ..] = *map_digest;
                let tag = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
                open_pair(
                    dir,
                    &format!("{}-{tag:016x}", spec.blob_id),
                    true,
                    spec,
                    map_digest,
                    boot_id,
                )?
                .ok_or_else(|| {
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
        })
    }

    /// The tables that a predecessor made and a worker has mapped. Errors when they are not for this promise.
    pub fn adopt(spec: &BlobSpec, map_digest: &[u8; 32], fds: TableFds<'_>) -> io::Result<Tables> {
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
            state_len,
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
        Ok(Tables {
            states: Arc::new(states),
            extents: Arc::new(extents),
            touched,
            count,
            state_fd,
            extent_fd,
            touched_fd,
            data,
        })
    }

    /// Descriptors for a worker: read-only, except that of the touched table.
    pub fn share(&self) -> io::Result<SharedFds> {
        let read = |file: &File| sys::reopen(file.as_fd(), libc::O_RDONLY);
        Ok(SharedFds {
            state: read(&self.state_fd)?,
            extents: read(&self.extent_fd)?,
            touched: sys::reopen(self.touched_fd.as_fd(), libc::O_RDWR)?,
            data: self.data.as_ref().map(read).transpose()?,
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

    /// Publishes `state` for `chunk`, whatever it was. The bytes must have been written before.
    pub fn publish(&self, chunk: u32, state: u32) {
        if let Some(word) = self.state(chunk) {
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                (state_of(old) != state).then(|| next_word(old, state))
            });
        }
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
