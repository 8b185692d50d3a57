//! Reads, digests and compresses the pieces of jobs; any number of workers, each in its thread.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::Options;
use crate::codec::{Packer, digest};
use crate::error::BuildError;
use crate::job::{Chunk, Done, Piece, Progress, Shared, Stored, Work, lock};
use crate::source;

/// Works on jobs until there are none, or the build has failed.
pub fn work(
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
                        Ok(file) => {
                            let count = piece.stat.size.div_ceil(size);
                            self.range(piece, number, &file, 0, count, done)
                        }
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
            progress.bytes.fetch_add(n, Ordering::Relaxed);
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
            Ok(_) => Err(changed(&piece.path.full())),
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

/// The file at `path` is not any more what it was.
pub fn changed(path: &[u8]) -> BuildError {
    BuildError::source(path, "the file changed while the image was built")
}

/// Refuses a file that is not any more what it was when the tree was read.
fn unchanged(piece: &Piece, file: &File) -> Result<(), BuildError> {
    match source::stat_fd(file.as_fd()) {
        Ok(now) if now.same_content(&piece.stat) => Ok(()),
        Ok(_) => Err(changed(&piece.path.full())),
        Err(e) => Err(BuildError::system(&piece.path.full(), &e)),
    }
}
