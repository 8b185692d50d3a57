//! What travels through the pipeline: files, pieces of them, jobs, chunks; and what its threads share.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::dedup::Tags;
use crate::error::BuildError;
use crate::source::Stat;

/// A large file is handed over in pieces of at least this size, unless its chunks are larger.
pub const RANGE_BYTES: u64 = 1 << 20;
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

/// Where finished chunks go, in order; see the blob's writer.
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
