//! From file ranges to a blob: workers read, digest and compress, one thread puts the results in order, stores every
//! chunk once and hashes the blob as it grows. What is written depends on the order of the jobs alone, never on the
//! number of workers or on which of them was first.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::Options;
use crate::dedup::Tags;
use crate::error::BuildError;
use crate::feeder::{Feed, Feeder};
use crate::source::Stat;
use crate::worker::work;

/// A large file is handed over in pieces of at least this size, unless its chunks are larger.
pub const RANGE_BYTES: u64 = 1 << 20;
/// Memory for what workers hold: a piece of input, its result, the compressor's state.
const WORKERS_BYTES: u64 = 36 << 20;
/// Buffers of results kept for the next job.
const SPARE: usize = 8;

/// What a build has done so far; anybody may look, and ask for its end.
#[derive(Default)]
pub struct Progress {
    pub inodes: AtomicU64,
    /// Of file content, holes included.
    pub bytes: AtomicU64,
    /// Of the blob.
    pub stored: AtomicU64,
    pub cancelled: AtomicBool,
}

/// A file for reading and for messages.
#[derive(Clone)]
pub struct FilePath {
    pub folder: Arc<[u8]>,
    pub name: Box<[u8]>,
}

impl FilePath {
    pub fn full(&self) -> Vec<u8> {
        join(&self.folder, &self.name)
    }
}

/// `folder/name`, without the slash when the folder is the top.
pub fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(folder.len() + name.len() + 1);
    path.extend_from_slice(folder);
    if !folder.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

pub enum Work {
    /// A file of up to a chunk or [`RANGE_BYTES`], to be opened.
    Whole,
    Range {
        file: Arc<File>,
        first: u64,
        count: u64,
    },
    /// Chunks in a hole, each of `len` bytes.
    Zeros {
        file: Arc<File>,
        first: u64,
        count: u64,
        len: u32,
    },
}

pub struct Piece {
    pub path: FilePath,
    pub stat: Stat,
    pub work: Work,
    /// Where the places of the chunks are kept, for files that are not read in the order of the inodes.
    pub keep: Option<u32>,
}

#[derive(Default)]
pub struct Job {
    pub pieces: Vec<Piece>,
    pub bytes: u64,
}

pub enum Stored {
    /// Compressed; the range in the buffer of results.
    Packed(usize, usize),
    /// As it is, because that is not longer.
    Plain(usize, usize),
    /// As it is, because a chunk with this digest seems to be stored.
    Known(usize, usize),
    Zeros,
}

pub struct Chunk {
    pub piece: usize,
    pub number: u64,
    pub repeat: u64,
    pub digest: [u8; 32],
    pub size: u32,
    pub stored: Stored,
}

#[derive(Default)]
pub struct Done {
    pub job: Job,
    pub bytes: Vec<u8>,
    pub chunks: Vec<Chunk>,
    pub failure: Option<BuildError>,
}

#[derive(Default)]
pub struct State {
    pub queue: VecDeque<(u64, Job)>,
    pub done: BTreeMap<u64, Done>,
    pub submitted: u64,
    pub in_flight: u64,
    pub closed: bool,
    pub failure: Option<BuildError>,
    pub spare: Vec<Vec<u8>>,
}

pub struct Shared {
    pub state: Mutex<State>,
    pub work: Condvar,
    pub ready: Condvar,
    pub room: Condvar,
    pub tags: Mutex<Tags>,
    pub stop: AtomicBool,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere is reported on its own.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn fail(&self, failure: BuildError) {
        let mut state = lock(&self.state);
        state.failure.get_or_insert(failure);
        self.stop.store(true, Ordering::Relaxed);
        self.work.notify_all();
        self.ready.notify_all();
        self.room.notify_all();
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Where finished chunks go, in order; see [`crate::blob::BlobWriter`].
pub trait Sink: Send {
    /// Stores the chunk, or finds it stored: 8 bytes that stand for it in a file (the chunk index of EROFS).
    fn place(
        &mut self,
        known: &[u32],
        digest: &[u8; 32],
        file_offset: u64,
        size: u32,
        bytes: Bytes<'_>,
    ) -> Result<Placed, BuildError>;
    /// Notes the place of the next chunk, or of chunk `number` of `of` of a file that is kept apart.
    fn note(
        &mut self,
        index: [u8; 8],
        repeat: u64,
        keep: Option<(u32, u64, u64)>,
    ) -> io::Result<()>;
}

/// The bytes of a chunk on their way to a [`Sink`].
pub enum Bytes<'a> {
    Packed(&'a [u8]),
    Plain(&'a [u8]),
    /// Not compressed yet.
    Raw(&'a [u8]),
    Zeros,
}

/// What [`Sink::place`] did.
pub struct Placed {
    pub index: [u8; 8],
    /// The number of the chunk, when it is new.
    pub new: Option<u32>,
}

/// Runs `feed` in this thread beside workers and a writer that fills `sink`.
///
/// # Errors
/// The first failure in the order of the jobs, or of `feed`.
pub fn run<S: Sink>(
    top: BorrowedFd<'_>,
    options: &Options,
    progress: &Progress,
    sink: &mut S,
    feed: impl FnOnce(&mut Feeder<'_>) -> Result<(), Feed>,
) -> Result<(), BuildError> {
    let shared = Shared {
        state: Mutex::default(),
        work: Condvar::new(),
        ready: Condvar::new(),
        room: Condvar::new(),
        tags: Mutex::default(),
        stop: AtomicBool::new(false),
    };
    let piece = u64::from(options.chunk_size).max(RANGE_BYTES);
    let n_workers = options
        .jobs
        .clamp(1, (WORKERS_BYTES / (3 * piece)).max(1) as usize);
    std::thread::scope(|scope| {
        let shared = &shared;
        for _ in 0..n_workers {
            scope.spawn(move || guarded(shared, || work(shared, top, options, progress)));
        }
        scope.spawn(move || guarded(shared, || write(shared, options, sink)));
        let mut feeder = Feeder::new(shared, options, progress, top);
        let fed = catch_unwind(AssertUnwindSafe(|| {
            feed(&mut feeder)?;
            Ok::<_, Feed>(feeder.submit()?)
        }));
        match fed {
            Ok(Ok(()) | Err(Feed::Stopped)) => {}
            Ok(Err(Feed::Failed(e))) => shared.fail(e),
            Err(panic) => shared.fail(panicked(&*panic)),
        }
        lock(&shared.state).closed = true;
        shared.work.notify_all();
        shared.ready.notify_all();
    });
    match lock(&shared.state).failure.take() {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> BuildError {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    BuildError::Panicked(
        text.or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default(),
    )
}

/// Runs a thread's `body`; whatever ends it early ends the build.
fn guarded(shared: &Shared, body: impl FnOnce() -> Result<(), BuildError>) {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => {}
        Ok(Err(e)) => shared.fail(e),
        Err(panic) => shared.fail(panicked(&*panic)),
    }
}

fn write<S: Sink>(shared: &Shared, options: &Options, sink: &mut S) -> Result<(), BuildError> {
    let chunk_size = u64::from(options.chunk_size);
    for number in 0.. {
        let mut state = lock(&shared.state);
        let mut done = loop {
            if shared.stopped() {
                return Ok(());
            }
            if let Some(done) = state.done.remove(&number) {
                break done;
            }
            if state.closed && state.submitted == number {
                return Ok(());
            }
            state = shared
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        for chunk in &done.chunks {
            let piece = &done.job.pieces[chunk.piece];
            let known: Vec<u32> = lock(&shared.tags).candidates(&chunk.digest).collect();
            let bytes = match chunk.stored {
                Stored::Packed(at, end) => Bytes::Packed(&done.bytes[at..end]),
                Stored::Plain(at, end) => Bytes::Plain(&done.bytes[at..end]),
                Stored::Known(at, end) => Bytes::Raw(&done.bytes[at..end]),
                Stored::Zeros => Bytes::Zeros,
            };
            let offset = chunk.number * chunk_size;
            let placed = sink
                .place(&known, &chunk.digest, offset, chunk.size, bytes)
                .map_err(|e| match e {
                    BuildError::Source { reason, remedy, .. } => BuildError::Source {
                        path: piece.path.full(),
                        reason,
                        remedy,
                    },
                    other => other,
                })?;
            if let Some(new) = placed.new {
                lock(&shared.tags).insert(&chunk.digest, new);
            }
            let total = piece.stat.size.div_ceil(chunk_size);
            let keep = piece.keep.map(|slot| (slot, chunk.number, total));
            sink.note(placed.index, chunk.repeat, keep)?;
        }
        if let Some(failure) = done.failure.take() {
            return Err(failure);
        }
        let mut state = lock(&shared.state);
        state.in_flight -= done.job.bytes;
        done.bytes.clear();
        // More than are filled at a time would only hold memory.
        if state.spare.len() < options.jobs.min(SPARE) {
            state.spare.push(done.bytes);
        }
        drop(state);
        shared.room.notify_one();
    }
    Ok(())
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
