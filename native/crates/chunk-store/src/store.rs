//! The agent's side: takes compressed bytes, keeps what verifies, publishes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use crate::decode::{Defect, digest_matches, with_decoded, with_scratch};
use crate::disk::{BootId, Options};
use crate::evict::{self, Goal, Sweep};
use crate::fds::TableFds;
use crate::layout::{ABSENT, FETCHING, MAX_HOLD_S, PRESENT, VERIFIED, state_of};
use crate::protocol::{Stored, store_bytes};
use crate::spec::BlobSpec;
use crate::spill::{Spill, SpillStats};
use crate::sys;
use crate::tables::Tables;
use crate::watch::Seen;

/// What became of one chunk of a fetched range. The numbers cross the C ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// Stored, verified, published (or it already was).
    Ok = 0,
    /// The bytes decode but are not those that the image promises.
    DigestMismatch = 1,
    /// The bytes do not decode to the promised size.
    DecodeError = 2,
    /// The fetched range does not hold the whole chunk.
    OutOfRange = 3,
    /// Neither disk nor memory takes it.
    NoSpace = 4,
    /// The image promises no such chunk.
    Invalid = 5,
}

/// Counts of chunks by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateCounts {
    pub absent: u64,
    pub fetching: u64,
    pub present: u64,
    pub verified: u64,
    /// In the spill and not (verified) in the data file.
    pub spilled: u64,
}

/// One blob of a [`Store`].
#[derive(Debug)]
pub struct Blob {
    pub spec: BlobSpec,
    pub tables: Tables,
}

/// Cache directory, spill and the blobs of one image. All methods may be called from any thread at once.
#[derive(Debug)]
pub struct Store {
    cache: Option<OwnedFd>,
    options: Options,
    boot_id: BootId,
    spill_size: u64,
    spill: OnceLock<Spill>,
    blobs: Vec<OnceLock<Blob>>,
    disk_errors: AtomicU64,
    last_disk_errno: AtomicI32,
    stored_bytes: AtomicU64,
    met_eviction: AtomicBool,
    stop_sweep: AtomicBool,
}

/// Seconds since the epoch.
fn now_s() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u32::try_from(d.as_secs()).unwrap_or(u32::MAX))
}

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Store {
    /// A store for `blobs` blobs. Without `cache` everything lives in memory. The spill is made when it is first
    /// asked for, with `spill_size` bytes, unless [`Store::adopt_spill`] came before.
    pub fn new(
        cache: Option<&str>,
        blobs: usize,
        spill_size: u64,
        boot_id: BootId,
    ) -> io::Result<Store> {
        Ok(Store {
            cache: cache.map(sys::open_dir).transpose()?,
            options: Options::default(),
            boot_id,
            spill_size,
            spill: OnceLock::new(),
            blobs: (0..blobs).map(|_| OnceLock::new()).collect(),
            disk_errors: AtomicU64::new(0),
            last_disk_errno: AtomicI32::new(0),
            stored_bytes: AtomicU64::new(0),
            met_eviction: AtomicBool::new(false),
            stop_sweep: AtomicBool::new(false),
        })
    }

    /// The same store with other options; before a blob is opened.
    pub fn with_options(self, options: Options) -> Store {
        Store { options, ..self }
    }

    /// Opens or makes the tables of blob `index`. Returns whether it has a data file on disk: when the cache
    /// directory refuses, memory stands in.
    pub fn open_blob(&self, index: usize, spec: BlobSpec) -> io::Result<bool> {
        let slot = self
            .blobs
            .get(index)
            .ok_or_else(|| bad("blob index out of range"))?;
        let digest = spec.map_digest();
        let on_disk = match &self.cache {
            Some(dir) => {
                match Tables::on_disk(dir.as_fd(), &spec, &digest, &self.boot_id, self.options) {
                    Ok(tables) => Some(tables),
                    Err(e) => {
                        self.note_disk_error(&e);
                        None
                    }
                }
            }
            None => None,
        };
        let tables = match on_disk {
            Some(tables) => tables,
            None => Tables::in_memory(&spec, &digest, &self.boot_id)?,
        };
        let has_data = tables.data().is_some();
        slot.set(Blob { spec, tables })
            .map_err(|_| bad("this blob is open already"))?;
        Ok(has_data)
    }

    /// Takes over the tables that a predecessor made for blob `index`. Returns whether it has a data file.
    pub fn adopt_blob(&self, index: usize, spec: BlobSpec, fds: TableFds<'_>) -> io::Result<bool> {
        let slot = self
            .blobs
            .get(index)
            .ok_or_else(|| bad("blob index out of range"))?;
        let dir = self.cache.as_ref().map(AsFd::as_fd);
        let tables = Tables::adopt(dir, &spec, &spec.map_digest(), fds)?;
        let has_data = tables.data().is_some();
        slot.set(Blob { spec, tables })
            .map_err(|_| bad("this blob is open already"))?;
        Ok(has_data)
    }

    /// Takes over a predecessor's spill; after all its blobs were adopted, before anything is ingested.
    pub fn adopt_spill(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let tables: Vec<&Tables> = self
            .blobs
            .iter()
            .filter_map(|b| b.get().map(|b| &b.tables))
            .collect();
        self.spill
            .set(Spill::adopt(fd, &tables)?)
            .map_err(|_| bad("the spill is in use already"))
    }

    /// Blob `index`, if it is open.
    pub fn blob(&self, index: usize) -> Option<&Blob> {
        self.blobs.get(index)?.get()
    }

    fn open(&self, index: usize) -> io::Result<&Blob> {
        self.blob(index).ok_or_else(|| bad("this blob is not open"))
    }

    fn spill(&self) -> io::Result<&Spill> {
        if let Some(spill) = self.spill.get() {
            return Ok(spill);
        }
        let made = Spill::new(self.spill_size)?;
        Ok(self.spill.get_or_init(|| made))
    }

    /// A read-only descriptor of the spill for a worker.
    pub fn share_spill(&self) -> io::Result<OwnedFd> {
        self.spill()?.share()
    }

    fn note_disk_error(&self, e: &io::Error) {
        self.disk_errors.fetch_add(1, Ordering::Relaxed);
        self.last_disk_errno
            .store(e.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
    }

    /// How often the cache disk refused, and its last errno (0: never).
    pub fn disk_errors(&self) -> (u64, i32) {
        (
            self.disk_errors.load(Ordering::Relaxed),
            self.last_disk_errno.load(Ordering::Relaxed),
        )
    }

    /// Stores verified bytes: on the disk, else in the spill.
    fn keep(&self, blob: &Blob, chunk: u32, offset: u64, bytes: &[u8]) -> Outcome {
        if let (Some(data), Some(word)) = (blob.tables.data(), blob.tables.state(chunk)) {
            let stored = store_bytes(word, || {
                data.write_all_at(bytes, offset)?;
                blob.tables.set_used(chunk, now_s());
                Ok(())
            });
            match stored {
                Ok(Stored::Written) => {
                    self.stored_bytes
                        .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    if let Some(record) = blob.tables.nydusd() {
                        record.set(chunk);
                    }
                    return Outcome::Ok;
                }
                Ok(Stored::Known) => return Outcome::Ok,
                Ok(Stored::Elsewhere) => self.met_eviction.store(true, Ordering::Relaxed),
                Err(e) => self.note_disk_error(&e),
            }
        }
        match self
            .spill()
            .and_then(|spill| spill.put(&blob.tables, chunk, bytes))
        {
            Ok(()) => Outcome::Ok,
            Err(_) => Outcome::NoSpace,
        }
    }

    /// Decodes, verifies and publishes `chunks` out of `bytes`, which start at byte `base` of the blob file. Writes
    /// one [`Outcome`] per chunk to `outcomes`; a bad chunk does not keep the others from being stored.
    pub fn ingest(
        &self,
        index: usize,
        base: u64,
        bytes: &[u8],
        chunks: &[u32],
        outcomes: &mut [u8],
    ) -> io::Result<()> {
        let blob = self.open(index)?;
        if outcomes.len() != chunks.len() {
            return Err(bad("one outcome per chunk"));
        }
        for (chunk, outcome) in chunks.iter().zip(outcomes) {
            *outcome = self.ingest_one(blob, base, bytes, *chunk) as u8;
        }
        Ok(())
    }

    fn ingest_one(&self, blob: &Blob, base: u64, bytes: &[u8], chunk: u32) -> Outcome {
        let Some(spec) = blob.spec.chunk(chunk as usize) else {
            return Outcome::Invalid;
        };
        if blob.tables.ready(chunk) {
            return Outcome::Ok;
        }
        let src = spec
            .compressed_offset
            .checked_sub(base)
            .and_then(|start| usize::try_from(start).ok())
            .and_then(|start| bytes.get(start..start.checked_add(spec.compressed_size as usize)?));
        let Some(src) = src else {
            return Outcome::OutOfRange;
        };
        let stored = with_decoded(
            blob.spec.compressor,
            blob.spec.digester,
            &spec,
            src,
            |plain| self.keep(blob, chunk, spec.data_offset, plain),
        );
        match stored {
            Ok(outcome) => outcome,
            Err(Defect::Digest) => Outcome::DigestMismatch,
            Err(Defect::Decode) => Outcome::DecodeError,
        }
    }

    /// Reads a stored chunk back and checks its digest: a present chunk becomes verified, or absent. `force` does it
    /// for a verified chunk as well. Returns whether the chunk may be served.
    pub fn verify_present(&self, index: usize, chunk: u32, force: bool) -> io::Result<bool> {
        let blob = self.open(index)?;
        let (Some(spec), Some(word)) = (blob.spec.chunk(chunk as usize), blob.tables.state(chunk))
        else {
            return Err(bad("the image promises no such chunk"));
        };
        let seen = word.load(Ordering::Acquire);
        match (state_of(seen), blob.tables.data()) {
            (VERIFIED, Some(_)) if !force => Ok(true),
            (PRESENT | VERIFIED, Some(data)) => {
                let good = read_matches(data, blob, &spec)?;
                // A chunk without digest cannot be checked, so it is fetched again.
                let state = if good { VERIFIED } else { ABSENT };
                if state_of(seen) != state && blob.tables.exchange(chunk, seen, state) {
                    match blob.tables.nydusd() {
                        Some(record) if good => record.set(chunk),
                        Some(record) => record.clear(chunk),
                        None => {}
                    }
                }
                Ok(blob.tables.ready(chunk))
            }
            _ => Ok(blob.tables.ready(chunk)),
        }
    }

    /// Marks or unmarks chunks as being fetched.
    pub fn hint_fetching(&self, index: usize, chunks: &[u32], on: bool) -> io::Result<()> {
        let blob = self.open(index)?;
        for chunk in chunks {
            blob.tables.hint_fetching(*chunk, on);
        }
        Ok(())
    }

    /// What became of a chunk that somebody else said they were fetching.
    pub fn seen(&self, index: usize, chunk: u32) -> Seen {
        let word = self.blob(index).and_then(|blob| blob.tables.state(chunk));
        match word.map(|word| state_of(word.load(Ordering::Acquire))) {
            Some(FETCHING) => Seen::Same,
            Some(VERIFIED) => Seen::Came,
            _ => Seen::Gone,
        }
    }

    /// Counts the promised chunks of blob `index` by state.
    pub fn states(&self, index: usize) -> io::Result<StateCounts> {
        let blob = self.open(index)?;
        let mut counts = StateCounts::default();
        for chunk in 0..blob.tables.count() {
            if blob.spec.chunk(chunk as usize).is_none() {
                continue;
            }
            let state = blob
                .tables
                .state(chunk)
                .map_or(0, |w| state_of(w.load(Ordering::Acquire)));
            match state {
                PRESENT => counts.present += 1,
                VERIFIED => counts.verified += 1,
                ABSENT => counts.absent += 1,
                _ => counts.fetching += 1,
            }
            let spilled = blob
                .tables
                .spill(chunk)
                .is_some_and(|w| w.load(Ordering::Acquire) != 0);
            if spilled && state != VERIFIED {
                counts.spilled += 1;
            }
        }
        Ok(counts)
    }

    /// Protects chunks of blob `index` from eviction for `seconds`, or until a read was answered from them: a request
    /// waits for them.
    pub fn hold(&self, index: usize, chunks: &[u32], seconds: u32) -> io::Result<()> {
        let blob = self.open(index)?;
        let until = now_s().saturating_add(seconds.min(MAX_HOLD_S));
        for chunk in chunks {
            blob.tables.set_used(*chunk, until);
        }
        Ok(())
    }

    /// Notes which chunks were used since the last call, where every daemon on the directory sees it. Returns their
    /// number.
    pub fn harvest(&self) -> u64 {
        let now = now_s();
        let blobs = self.blobs.iter().filter_map(OnceLock::get);
        let on_disk = blobs.filter(|b| b.tables.data().is_some());
        on_disk.map(|b| u64::from(b.tables.harvest(now))).sum()
    }

    /// Brings the directory below its limit, see [`evict::sweep`]; `None` without a directory.
    pub fn sweep(&self, goal: &Goal) -> io::Result<Option<Sweep>> {
        let Some(dir) = &self.cache else {
            return Ok(None);
        };
        self.harvest();
        let met = self.met_eviction.swap(false, Ordering::Relaxed);
        let done = evict::sweep(dir.as_fd(), goal, &self.boot_id, now_s(), &self.stop_sweep);
        if met && done.as_ref().map_or(true, |d| d.busy) {
            self.met_eviction.store(true, Ordering::Relaxed);
        }
        done.map(Some)
    }

    /// Ends a sweep that runs, and those to come: the agent is about to end.
    pub fn stop_sweep(&self) {
        self.stop_sweep.store(true, Ordering::Relaxed);
    }

    /// Bytes written to the directory since the start, and whether a chunk could not be, because it was being evicted.
    /// If that stays so, whoever evicted it died, and a sweep cures it.
    pub fn growth(&self) -> (u64, bool) {
        (
            self.stored_bytes.load(Ordering::Relaxed),
            self.met_eviction.load(Ordering::Relaxed),
        )
    }

    /// Numbers about the spill; zeros as long as nothing needed it.
    pub fn spill_stats(&self) -> SpillStats {
        self.spill.get().map(Spill::stats).unwrap_or_default()
    }
}

/// Whether the stored bytes have the promised digest; bytes that cannot be read do not.
fn read_matches(data: &File, blob: &Blob, spec: &crate::spec::ChunkSpec) -> io::Result<bool> {
    Ok(with_scratch(spec.size as usize, |buf| {
        data.read_exact_at(buf, spec.data_offset).is_ok()
            && digest_matches(blob.spec.digester, spec, buf).unwrap_or(false)
    }))
}
