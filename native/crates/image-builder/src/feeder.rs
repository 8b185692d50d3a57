//! Cuts files into jobs, in the order in which they are handed over.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::Options;
use crate::error::BuildError;
use crate::job::{FilePath, Job, Piece, Progress, RANGE_BYTES, Shared, Work, lock};
use crate::source::{self, Stat};

/// Small files are handed over together, up to so many and so many bytes.
const BATCH_FILES: usize = 64;
const BATCH_BYTES: u64 = 256 << 10;
/// Content between the reader of the tree and the writer of the blob.
const IN_FLIGHT_BYTES: u64 = 16 << 20;
/// What a piece counts at least, and one that holds an open file: they must neither fill memory nor use up descriptors.
const PIECE_BYTES: u64 = 1 << 10;
const OPEN_BYTES: u64 = 128 << 10;
const ZERO_RUN: u64 = 1 << 16;

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

impl<'a> Feeder<'a> {
    pub fn new(
        shared: &'a Shared,
        options: &'a Options,
        progress: &'a Progress,
        top: BorrowedFd<'a>,
    ) -> Feeder<'a> {
        Feeder {
            shared,
            options,
            progress,
            top,
            batch: Job::default(),
        }
    }

    /// Stores a file that is not empty, all of it.
    pub fn file(&mut self, path: FilePath, stat: Stat) -> Result<(), Feed> {
        let chunk_size = u64::from(self.options.chunk_size);
        if stat.size <= chunk_size.max(RANGE_BYTES) && !is_sparse(&stat) {
            let piece = Piece {
                path,
                stat,
                work: Work::Whole,
                keep: None,
            };
            return Ok(self.push(piece, stat.size)?);
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
        let sparse = is_sparse(stat);
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
                0,
            )?;
            at += count;
        }
        Ok(())
    }

    fn push(&mut self, piece: Piece, bytes: u64) -> Result<(), Stopped> {
        let bytes = match piece.work {
            Work::Whole => bytes + PIECE_BYTES,
            Work::Range { .. } | Work::Zeros { .. } => bytes.max(OPEN_BYTES),
        };
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

    /// Hands over what is left of a batch.
    pub fn submit(&mut self) -> Result<(), Stopped> {
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

/// Whether the file may have holes: it has less on the disk than its size.
fn is_sparse(stat: &Stat) -> bool {
    stat.blocks.saturating_mul(512) < stat.size
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
