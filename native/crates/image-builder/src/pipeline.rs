//! From file ranges to a blob: workers read, digest and compress, one thread puts the results in order, stores every
//! chunk once and hashes the blob as it grows. What is written depends on the order of the jobs alone, never on the
//! number of workers or on which of them was first.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::Options;
use crate::codec::{Packer, digest};
use crate::dedup::Tags;
use crate::error::BuildError;
use crate::source::{self, Stat};

/// Small files are handed over together, up to so many and so many bytes.
const BATCH_FILES: usize = 64;
const BATCH_BYTES: u64 = 256 << 10;
/// A large file is handed over in pieces of at least this size, unless its chunks are larger.
const RANGE_BYTES: u64 = 1 << 20;
/// Content between the reader of the tree and the writer of the blob.
const IN_FLIGHT_BYTES: u64 = 16 << 20;
/// Memory for what workers hold: a piece of input, its result, the compressor's state.
const WORKERS_BYTES: u64 = 48 << 20;
const ZERO_RUN: u64 = 1 << 16;

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

enum Work {
    /// A file of one chunk, to be opened.
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

struct Piece {
    path: FilePath,
    stat: Stat,
    work: Work,
    /// Where the places of the chunks are kept, for files that are not read in the order of the inodes.
    keep: Option<u32>,
}

#[derive(Default)]
struct Job {
    pieces: Vec<Piece>,
    bytes: u64,
}

enum Stored {
    /// Compressed; the range in the buffer of results.
    Packed(usize, usize),
    /// As it is, because that is not longer.
    Plain(usize, usize),
    /// As it is, because a chunk with this digest seems to be stored.
    Known(usize, usize),
    Zeros,
}

struct Chunk {
    piece: usize,
    number: u64,
    repeat: u64,
    digest: [u8; 32],
    size: u32,
    stored: Stored,
}

#[derive(Default)]
struct Done {
    job: Job,
    bytes: Vec<u8>,
    chunks: Vec<Chunk>,
    failure: Option<BuildError>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(u64, Job)>,
    done: BTreeMap<u64, Done>,
    submitted: u64,
    in_flight: u64,
    closed: bool,
    failure: Option<BuildError>,
    spare: Vec<Vec<u8>>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    ready: Condvar,
    room: Condvar,
    tags: Mutex<Tags>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere is reported on its own.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn fail(&self, failure: BuildError) {
        let mut state = lock(&self.state);
        state.failure.get_or_insert(failure);
        self.stop.store(true, Ordering::Relaxed);
        self.work.notify_all();
        self.ready.notify_all();
        self.room.notify_all();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Takes the files to store, in order, from one thread.
pub struct Feeder<'a> {
    shared: &'a Shared,
    options: &'a Options,
    progress: &'a Progress,
    top: BorrowedFd<'a>,
    batch: Job,
}

/// The build has failed or been cancelled elsewhere; what happened is reported at the end.
pub struct Stopped;

impl Feeder<'_> {
    /// Stores a file that is not empty, all of it.
    pub fn file(&mut self, path: FilePath, stat: Stat) -> Result<(), Feed> {
        let chunk_size = u64::from(self.options.chunk_size);
        if stat.size <= chunk_size {
            let work = Work::Whole;
            return Ok(self.push(
                Piece {
                    path,
                    stat,
                    work,
                    keep: None,
                },
                stat.size,
            )?);
        }
        let count = stat.size.div_ceil(chunk_size);
        self.range(&path, &stat, 0, count, None)
    }

    /// Stores `count` chunks of a file from chunk `first` on; `keep` says where their places are to be kept.
    pub fn range(
        &mut self,
        path: &FilePath,
        stat: &Stat,
        first: u64,
        count: u64,
        keep: Option<u32>,
    ) -> Result<(), Feed> {
        let size = u64::from(self.options.chunk_size);
        let name = path.full();
        let file = source::open_file(self.top, &name).map_err(|e| BuildError::system(&name, &e))?;
        let file = Arc::new(file);
        let (mut at, end) = (first, first + count);
        let sparse = stat.blocks.saturating_mul(512) < stat.size;
        while at < end {
            let (mut zeros, mut data) = (0, end - at);
            if sparse {
                let start = source::next_data(file.as_fd(), at * size, stat.size);
                // A chunk that is data in part is read as a whole.
                zeros = if start >= stat.size {
                    end - at
                } else {
                    (start / size).clamp(at, end) - at
                };
                data = match zeros {
                    0 => {
                        let hole = source::next_hole(file.as_fd(), start, stat.size);
                        hole.div_ceil(size).clamp(at + 1, end) - at
                    }
                    _ => 0,
                };
            }
            if zeros > 0 {
                self.zeros(path, stat, &file, at, zeros, keep)?;
            }
            let each = (RANGE_BYTES / size).max(1);
            let (mut from, to) = (at + zeros, at + zeros + data);
            at = to;
            while from < to {
                let count = each.min(to - from);
                let work = Work::Range {
                    file: file.clone(),
                    first: from,
                    count,
                };
                let bytes = count * size;
                self.push(
                    Piece {
                        path: path.clone(),
                        stat: *stat,
                        work,
                        keep,
                    },
                    bytes,
                )?;
                from += count;
            }
        }
        Ok(())
    }

    fn zeros(
        &mut self,
        path: &FilePath,
        stat: &Stat,
        file: &Arc<File>,
        first: u64,
        count: u64,
        keep: Option<u32>,
    ) -> Result<(), Stopped> {
        let size = u64::from(self.options.chunk_size);
        let (mut at, end) = (first, first + count);
        // The last chunk of the file may be shorter.
        let whole_end = end.min(stat.size / size);
        while at < end {
            let whole = at < whole_end;
            let count = if whole {
                (whole_end - at).min(ZERO_RUN)
            } else {
                1
            };
            let len = if whole { size } else { stat.size - at * size } as u32;
            let work = Work::Zeros {
                file: file.clone(),
                first: at,
                count,
                len,
            };
            self.push(
                Piece {
                    path: path.clone(),
                    stat: *stat,
                    work,
                    keep,
                },
                4096,
            )?;
            at += count;
        }
        Ok(())
    }

    fn push(&mut self, piece: Piece, bytes: u64) -> Result<(), Stopped> {
        let batch = &mut self.batch;
        if batch.pieces.len() >= BATCH_FILES
            || (batch.bytes > 0 && batch.bytes + bytes > BATCH_BYTES)
        {
            self.submit()?;
        }
        self.batch.pieces.push(piece);
        self.batch.bytes += bytes;
        Ok(())
    }

    fn submit(&mut self) -> Result<(), Stopped> {
        let job = std::mem::take(&mut self.batch);
        if job.pieces.is_empty() {
            return self.alive();
        }
        let mut state = lock(&self.shared.state);
        while state.in_flight > 0
            && state.in_flight + job.bytes > IN_FLIGHT_BYTES
            && !self.shared.stopped()
        {
            state = self
                .shared
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.in_flight += job.bytes;
        let number = state.submitted;
        state.submitted += 1;
        state.queue.push_back((number, job));
        drop(state);
        self.shared.work.notify_one();
        self.alive()
    }

    /// Whether there is a reason to go on.
    pub fn alive(&self) -> Result<(), Stopped> {
        if self.progress.cancelled.load(Ordering::Relaxed) {
            self.shared.fail(BuildError::Cancelled);
        }
        if self.shared.stopped() {
            Err(Stopped)
        } else {
            Ok(())
        }
    }
}

/// Why a feeder takes no more.
pub enum Feed {
    Stopped,
    Failed(BuildError),
}

impl From<Stopped> for Feed {
    fn from(_: Stopped) -> Feed {
        Feed::Stopped
    }
}

impl From<BuildError> for Feed {
    fn from(e: BuildError) -> Feed {
        Feed::Failed(e)
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
        let mut feeder = Feeder {
            shared,
            options,
            progress,
            top,
            batch: Job::default(),
        };
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

fn work(
    shared: &Shared,
    top: BorrowedFd<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<(), BuildError> {
    let mut worker = Worker {
        shared,
        top,
        options,
        packer: Packer::new(options.compressor)?,
        buffer: Vec::new(),
        zero_digest: None,
    };
    loop {
        let mut state = lock(&shared.state);
        let (number, job, bytes) = loop {
            if shared.stopped() {
                return Ok(());
            }
            if let Some((number, job)) = state.queue.pop_front() {
                break (number, job, state.spare.pop().unwrap_or_default());
            }
            if state.closed {
                return Ok(());
            }
            state = shared
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let mut done = Done {
            job,
            bytes,
            ..Done::default()
        };
        done.failure = worker.process(&mut done, progress).err();
        lock(&shared.state).done.insert(number, done);
        shared.ready.notify_one();
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    top: BorrowedFd<'a>,
    options: &'a Options,
    packer: Packer,
    buffer: Vec<u8>,
    /// Of the zeros of so many bytes that came last.
    zero_digest: Option<(u32, [u8; 32])>,
}

impl Worker<'_> {
    fn process(&mut self, done: &mut Done, progress: &Progress) -> Result<(), BuildError> {
        let job = std::mem::take(&mut done.job);
        let size = u64::from(self.options.chunk_size);
        let mut result = Ok(());
        for (number, piece) in job.pieces.iter().enumerate() {
            let (n, outcome) = match &piece.work {
                Work::Whole => {
                    let path = piece.path.full();
                    match source::open_file(self.top, &path) {
                        Ok(file) => self.range(piece, number, &file, 0, 1, done),
                        Err(e) => (0, Err(BuildError::system(&path, &e))),
                    }
                }
                Work::Range { file, first, count } => {
                    self.range(piece, number, file, *first, *count, done)
                }
                Work::Zeros {
                    file,
                    first,
                    count,
                    len,
                } => {
                    let digest = match self.zero_digest {
                        Some((known, digest)) if known == *len => digest,
                        _ => digest(self.options.digester, &vec![0; *len as usize]),
                    };
                    self.zero_digest = Some((*len, digest));
                    done.chunks.push(Chunk {
                        piece: number,
                        number: *first,
                        repeat: *count,
                        digest,
                        size: *len,
                        stored: Stored::Zeros,
                    });
                    (count * u64::from(*len), unchanged(piece, file))
                }
            };
            progress
                .bytes
                .fetch_add(n.min(piece.stat.size.max(size)), Ordering::Relaxed);
            result = outcome;
            if result.is_err() {
                break;
            }
        }
        done.job = job;
        result
    }

    /// Reads and packs `count` chunks of a file; returns the bytes read.
    fn range(
        &mut self,
        piece: &Piece,
        number: usize,
        file: &File,
        first: u64,
        count: u64,
        done: &mut Done,
    ) -> (u64, Result<(), BuildError>) {
        let size = u64::from(self.options.chunk_size);
        let start = first * size;
        let want = (count * size).min(piece.stat.size.saturating_sub(start)) as usize;
        let mut buffer = std::mem::take(&mut self.buffer);
        if buffer.len() < want {
            buffer.resize(want, 0);
        }
        let read = source::read_at(file, &mut buffer[..want], start);
        let outcome = match read {
            Ok(n) if n == want => buffer[..want]
                .chunks(size as usize)
                .zip(first..)
                .try_for_each(|(data, chunk)| self.chunk(data, number, chunk, done))
                .and_then(|()| unchanged(piece, file)),
            Ok(_) => Err(changed(piece)),
            // What cannot be read like a file may be none any more.
            Err(e) => unchanged(piece, file)
                .and_then(|()| Err(BuildError::system(&piece.path.full(), &e))),
        };
        self.buffer = buffer;
        (want as u64, outcome)
    }

    fn chunk(
        &mut self,
        data: &[u8],
        piece: usize,
        number: u64,
        done: &mut Done,
    ) -> Result<(), BuildError> {
        let digest = digest(self.options.digester, data);
        let known = lock(&self.shared.tags).candidates(&digest).next().is_some();
        let at = done.bytes.len();
        let packed = if known { None } else { self.packer.pack(data)? };
        done.bytes.extend_from_slice(packed.unwrap_or(data));
        let end = done.bytes.len();
        let stored = match packed {
            Some(_) => Stored::Packed(at, end),
            None if known => Stored::Known(at, end),
            None => Stored::Plain(at, end),
        };
        done.chunks.push(Chunk {
            piece,
            number,
            repeat: 1,
            digest,
            size: data.len() as u32,
            stored,
        });
        Ok(())
    }
}

fn changed(piece: &Piece) -> BuildError {
    BuildError::source(
        &piece.path.full(),
        "the file changed while the image was built",
    )
}

/// Refuses a file that is not any more what it was when the tree was read.
fn unchanged(piece: &Piece, file: &File) -> Result<(), BuildError> {
    match source::stat_fd(file.as_fd()) {
        Ok(now) if now.same_content(&piece.stat) => Ok(()),
        Ok(_) => Err(changed(piece)),
        Err(e) => Err(BuildError::system(&piece.path.full(), &e)),
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
        state.spare.push(done.bytes);
        drop(state);
        shared.room.notify_one();
    }
    Ok(())
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
