//! Making and opening a blob's state file and data file.
//!
//! Everything that could confuse two openers happens under the state file's `flock`: making the files, taking over what
//! nydusd left, and marking "verified" as "present" after another boot. The lock is held for that moment only; afterwards
//! daemons meet in the state words. The data file's `flock` is the lease: whoever uses the files shares it, whoever
//! removes them must have it alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::layout::{
    ABSENT, PLACE_ALONE, PRESENT, SECTIONS, STATE_HEADER, STATE_MAGIC, VERIFIED, VERSION, full_len,
    next_word, place_at, state_header, state_len, state_of,
};
use crate::mapping::Mapping;
use crate::nydusd::{self, Record};
use crate::spec::{BlobSpec, CHUNK_VALID};
use crate::sys;

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

/// How often a file that somebody else replaces meanwhile is opened again.
const OPEN_TRIES: usize = 16;

pub(crate) fn invalid(text: impl Into<String>) -> io::Error {
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
pub(crate) fn make_state(
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
pub(crate) enum Found {
    /// Nothing, or the rest of a creation that was interrupted.
    Fresh,
    /// A file for exactly this promise, bound to the data file with this inode number.
    Ours { data_ino: u64 },
    /// A file for another promise, or of another version.
    Other,
}

pub(crate) fn examine(file: &File, spec: &BlobSpec, map_digest: &[u8; 32]) -> io::Result<Found> {
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
    ino.copy_from_slice(&head[state_header::DATA_INO..state_header::DATA_INO + 8]);
    Ok(Found::Ours {
        data_ino: u64::from_le_bytes(ino),
    })
}

/// Whether the state file has the tables behind its words.
pub(crate) fn has_sections(file: &File) -> io::Result<bool> {
    let mut head = [0; state_header::SECTIONS + 4];
    let size = sys::identity(file.as_fd())?.1;
    if size < head.len() as u64 {
        return Ok(false);
    }
    file.read_exact_at(&mut head, 0)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    Ok(word(state_header::SECTIONS) == SECTIONS
        && size >= full_len(word(state_header::CHUNK_COUNT)) as u64)
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

/// Writes the table of places unless it is right already; power loss may have left anything there.
fn write_places(states: &Mapping, spec: &BlobSpec) -> io::Result<()> {
    let count = spec.count() as u32;
    let alone = spec.alone();
    let flag = states.u32_at(state_header::SECTIONS);
    for chunk in 0..count {
        let i = chunk as usize;
        let mut place = [0u8; 16];
        if spec.flags[i] & CHUNK_VALID != 0 {
            place[..8].copy_from_slice(&spec.data_offset[i].to_le_bytes());
            place[8..12].copy_from_slice(&spec.size[i].to_le_bytes());
            place[12] = if alone[i] { PLACE_ALONE as u8 } else { 0 };
        }
        let at = place_at(count, chunk);
        if states.read::<16>(at) != Some(place) {
            if let Some(flag) = flag {
                flag.store(0, Ordering::SeqCst);
            }
            states.write(at, &place)?;
        }
    }
    if let Some(flag) = flag {
        flag.store(SECTIONS, Ordering::SeqCst);
    }
    Ok(())
}

/// What a caller of [`open`] may choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Keep a record for nydusd of what is stored.
    pub for_nydusd: bool,
}

/// Files of one blob, open and leased.
pub(crate) struct OnDisk {
    pub state: File,
    pub states: Mapping,
    pub data: File,
    /// nydusd's record of what is stored, kept right as long as it is there.
    pub nydusd: Option<Record>,
}

/// What is to be done with a data file that no states speak of.
enum Orphan {
    /// Nobody needs it.
    Drop,
    /// nydusd made it: the chunks that it says it stored.
    Take(Vec<u8>),
    /// nydusd made it and may use it, or it does not fit: leave it alone.
    Leave,
}

fn examine_orphan(dir: BorrowedFd<'_>, data_name: &str, spec: &BlobSpec) -> io::Result<Orphan> {
    let map_name = format!("{data_name}{}", nydusd::SUFFIX);
    let (data, map) = (
        sys::open_existing_at(dir, data_name)?,
        sys::open_existing_at(dir, &map_name)?,
    );
    let (Some(data), Some(map)) = (data, map) else {
        // Bits without bytes would tell nydusd that it has what it has not.
        sys::unlink_at(dir, &map_name)?;
        return Ok(Orphan::Drop);
    };
    let data_len = sys::identity(data.as_fd())?.1;
    let mut bits = vec![0; nydusd::map_len(spec.table_count)];
    if data_len != spec.data_size
        || sys::identity(map.as_fd())?.1 != bits.len() as u64
        || map.read_exact_at(&mut bits, 0).is_err()
        || nydusd::Bits::parse(&bits, spec.table_count).is_none()
        // A daemon whose state file was removed may serve this file, even for another promise.
        || !sys::try_lock_exclusive(data.as_fd())?
        || sys::in_use_elsewhere(&data)?
    {
        return Ok(Orphan::Leave);
    }
    Ok(Orphan::Take(bits))
}

/// nydusd's record beside the data file, with what is verified noted in it.
pub(crate) fn open_record(
    dir: BorrowedFd<'_>,
    data_name: &str,
    spec: &BlobSpec,
    states: &Mapping,
    make: bool,
) -> io::Result<Option<Record>> {
    let record = Record::open(dir, data_name, spec.table_count, make)?;
    if let Some(record) = &record {
        for chunk in 0..spec.count() as u32 {
            let word = states.u32_at(STATE_HEADER + chunk as usize * 4);
            if word.is_some_and(|w| state_of(w.load(Ordering::Acquire)) == VERIFIED) {
                record.set(chunk);
            }
        }
    }
    Ok(record)
}

/// Removes the data file, and nydusd's record of what is in it first.
fn unlink_data(dir: BorrowedFd<'_>, data_name: &str) -> io::Result<()> {
    sys::unlink_at(dir, &format!("{data_name}{}", nydusd::SUFFIX))?;
    sys::unlink_at(dir, data_name)
}

/// Opens or makes `<stem>.chunk_state` and `<stem>.blob.data`; `None` when the name is somebody else's: another
/// promise's, or nydusd's.
pub(crate) fn open_pair(
    dir: BorrowedFd<'_>,
    stem: &str,
    replace: bool,
    spec: &BlobSpec,
    map_digest: &[u8; 32],
    boot_id: &BootId,
    options: Options,
) -> io::Result<Option<OnDisk>> {
    let state_name = format!("{stem}.chunk_state");
    let data_name = format!("{stem}.blob.data");
    let len = full_len(spec.count() as u32);
    for _ in 0..OPEN_TRIES {
        let state = sys::open_file_at(dir, &state_name)?;
        sys::lock_exclusive(state.as_fd())?;
        if sys::inode_at(dir, &state_name)? != Some(sys::identity(state.as_fd())?.0) {
            continue; // replaced between open and lock
        }
        let found = examine(&state, spec, map_digest)?;
        let mut imported = None;
        match found {
            Found::Other if !replace => return Ok(None),
            Found::Other => {
                // The name is for this promise alone: the file is damaged. Whoever has it open keeps the old one.
                sys::unlink_at(dir, &state_name)?;
                unlink_data(dir, &data_name)?;
                continue;
            }
            Found::Fresh => match examine_orphan(dir, &data_name, spec)? {
                // A data file without states may be in use by a daemon whose state file was removed, and for another
                // promise: what would be written here must not show up there.
                Orphan::Drop => sys::unlink_at(dir, &data_name)?,
                Orphan::Take(bits) => imported = Some(bits),
                Orphan::Leave if replace => unlink_data(dir, &data_name)?,
                Orphan::Leave => {
                    sys::unlink_at(dir, &state_name)?;
                    return Ok(None);
                }
            },
            Found::Ours { .. } => {}
        }
        let data = sys::open_file_at(dir, &data_name)?;
        let (data_ino, data_len) = sys::identity(data.as_fd())?;
        if !sys::try_lock_shared(data.as_fd())? {
            std::thread::sleep(std::time::Duration::from_millis(1));
            continue; // it is being removed
        }
        if let Found::Ours { data_ino: bound } = found {
            if bound != data_ino || data_len < spec.data_size {
                // States that speak of a data file which is gone (somebody made room), or was cut. Other daemons may
                // still use that pair, so it is left to them and a new one is made.
                sys::unlink_at(dir, &state_name)?;
                if data_len < spec.data_size {
                    unlink_data(dir, &data_name)?;
                }
                continue;
            }
            if sys::identity(state.as_fd())?.1 < len as u64 {
                state.set_len(len as u64)?;
            }
            sys::reserve(state.as_fd(), len as u64)?;
        } else {
            state.set_len(0)?;
            state.set_len(len as u64)?;
            sys::reserve(state.as_fd(), len as u64)?;
            if data_len < spec.data_size {
                data.set_len(spec.data_size)?;
            }
            if let Some(bits) = imported {
                write_imported(&state, spec, &bits)?;
            }
            make_state(&state, spec, map_digest, boot_id, data_ino)?;
        }
        let states = Mapping::new(state.as_fd(), len, true)?;
        write_places(&states, spec)?;
        enter_boot(&states, spec.count() as u32, boot_id)?;
        let nydusd = open_record(
            dir,
            &data_name,
            spec,
            &states,
            options.for_nydusd && !replace,
        )?;
        sys::unlock(state.as_fd());
        return Ok(Some(OnDisk {
            state,
            states,
            data,
            nydusd,
        }));
    }
    Err(invalid(format!(
        "{state_name}: replaced again and again by somebody else"
    )))
}

/// The states of chunks that nydusd has stored, as it believes: to be verified before they are served.
fn write_imported(state: &File, spec: &BlobSpec, bits: &[u8]) -> io::Result<()> {
    let Some(bits) = nydusd::Bits::parse(bits, spec.table_count) else {
        return Ok(());
    };
    let mut words = Vec::with_capacity(spec.count() * 4);
    for chunk in 0..spec.count() as u32 {
        let promised = spec.flags[chunk as usize] & CHUNK_VALID != 0;
        let word = if promised && bits.is_set(chunk) {
            next_word(0, PRESENT)
        } else {
            0
        };
        words.extend(word.to_le_bytes());
    }
    state.write_all_at(&words, STATE_HEADER as u64)
}
