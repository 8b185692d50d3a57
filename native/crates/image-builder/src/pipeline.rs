//! From file ranges to a blob: workers read, digest and compress, one thread puts the results in order, stores every
//! chunk once and hashes the blob as it grows. What is written depends on the order of the jobs alone, never on the
//! number of workers or on which of them was first.

use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::Options;
use crate::error::BuildError;
use crate::feeder::{Feed, Feeder};
use crate::job::{Bytes, Progress, RANGE_BYTES, Shared, Sink, Stored, lock};
use crate::worker::work;

/// Memory for what workers hold: a piece of input, its result, the compressor's state.
const WORKERS_BYTES: u64 = 36 << 20;
/// Buffers of results kept for the next job.
const SPARE: usize = 8;

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
