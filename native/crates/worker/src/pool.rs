//! Disk reads that would block. They go into buffers of their own, never into guest memory: a ring can be stopped
//! at once, whatever a disk does, and only ring threads write to the guest.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;

use crate::fds::write_event;

/// A part of a request's data: bytes of a file.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub fd: RawFd,
    pub offset: u64,
    pub len: u32,
    pub blob_index: u16,
    pub chunk_index: u32,
    pub stamp: u64,
    /// The file is a memfd: reading it never blocks.
    pub in_memory: bool,
}

/// Which request a read belongs to. `epoch` tells whether the queue has been stopped since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub queue: usize,
    pub epoch: u64,
    pub head: u16,
}

fn bytes_of(pieces: &[Piece]) -> usize {
    pieces.iter().map(|p| p.len as usize).sum()
}

/// A read on its way.
pub struct Job {
    pub thread: usize,
    pub ticket: Ticket,
    pub pieces: Vec<Piece>,
    /// When the request was taken, and whether it has waited for chunks.
    pub taken_ns: u64,
    pub waited: bool,
}

/// A read that has ended: the bytes of all pieces, or the errno.
pub struct Finished {
    pub ticket: Ticket,
    pub pieces: Vec<Piece>,
    pub data: Result<Vec<u8>, i32>,
    pub taken_ns: u64,
    pub waited: bool,
}

/// A read whose data is on its way from the disk, and the buffer for it.
struct Begun {
    job: Job,
    data: Vec<u8>,
}

/// What a thread does next.
enum Step {
    Begin(Job),
    Wait(Begun),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// What nobody waits for yet.
    begun: VecDeque<Begun>,
    /// Reads that were begun since one of these was waited for.
    streak: usize,
    /// Pieces of all jobs that wait.
    pieces: usize,
    /// Bytes of all reads that have begun and were not taken back by a ring thread.
    bytes: usize,
    idle: usize,
    running: usize,
}

/// Threads that block instead of ring threads. None exists until the first read needs one.
pub struct Pool {
    state: Mutex<State>,
    available: Condvar,
    finished: Vec<Mutex<VecDeque<Finished>>>,
    events: Vec<RawFd>,
}

/// Disks profit from a few reads at a time; more threads would only cost memory.
const MAX_THREADS: usize = 4;
/// Memory for reads that have begun, in bytes; one read may be larger. A guest decides how much it asks for at once.
const MAX_BYTES: usize = 16 << 20;
/// So many reads are begun, at most, before one of those that were begun earlier is waited for.
const MAX_STREAK: usize = 64;
/// Pieces that may wait: a few MiB. A driver that asks for more in smallest chunks has to be patient.
const MAX_PIECES: usize = 1 << 16;

fn eventfd() -> RawFd {
    // SAFETY: plain system call. A failure (-1) shows as an epoll error in the ring thread.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }
}

impl Pool {
    /// A pool that reports to `threads` ring threads.
    pub fn new(threads: usize) -> Pool {
        Pool {
            state: Mutex::default(),
            available: Condvar::new(),
            finished: (0..threads).map(|_| Mutex::default()).collect(),
            events: (0..threads).map(|_| eventfd()).collect(),
        }
    }

    /// eventfd that becomes readable when reads of `thread` have ended.
    pub fn event(&self, thread: usize) -> RawFd {
        self.events[thread]
    }

    /// Hands a read over; false when too much waits already: try again later.
    pub fn submit(&'static self, job: Job) -> bool {
        let mut state = self.lock();
        if state.pieces > 0 && state.pieces + job.pieces.len() > MAX_PIECES {
            return false;
        }
        if state.idle == 0 && state.running < MAX_THREADS {
            let spawned = thread::Builder::new()
                .name("rafs-pool".into())
                .stack_size(128 * 1024)
                .spawn(move || self.work());
            if spawned.is_ok() {
                state.running += 1;
            } else if state.running == 0 {
                return false;
            }
        }
        state.pieces += job.pieces.len();
        state.jobs.push_back(job);
        self.wake_one(state);
        true
    }

    /// The read of `thread` that ended first, if there is one.
    pub fn take_finished(&self, thread: usize) -> Option<Finished> {
        let finished = self.finished[thread]
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .pop_front()?;
        let mut state = self.lock();
        state.bytes -= bytes_of(&finished.pieces);
        // Threads that wait for a job need not hear of memory.
        if !state.jobs.is_empty() && state.idle > 0 {
            self.available.notify_all();
        }
        Some(finished)
    }

    /// What to do next: what memory is left for is begun before anything is waited for, so that the disk has it all to
    /// choose from; but reads that need no disk, one after the other, keep nobody waiting.
    fn next_step(&self) -> Step {
        let mut state = self.lock();
        loop {
            if state.streak >= MAX_STREAK {
                if let Some(begun) = state.begun.pop_front() {
                    state.streak = 0;
                    return Step::Wait(begun);
                }
            }
            let next = state.jobs.front().map(|job| bytes_of(&job.pieces));
            if let Some(bytes) = next.filter(|n| state.bytes == 0 || state.bytes + n <= MAX_BYTES) {
                if let Some(job) = state.jobs.pop_front() {
                    state.streak += 1;
                    state.bytes += bytes;
                    state.pieces -= job.pieces.len();
                    return Step::Begin(job);
                }
            }
            if let Some(begun) = state.begun.pop_front() {
                state.streak = 0;
                return Step::Wait(begun);
            }
            state.idle += 1;
            state = self
                .available
                .wait(state)
                .unwrap_or_else(|e| e.into_inner());
            state.idle -= 1;
        }
    }

    /// Leaves a read to whoever has nothing to begin.
    fn wait_later(&self, begun: Begun) {
        let mut state = self.lock();
        state.begun.push_back(begun);
        self.wake_one(state);
    }

    /// Waking a thread is a system call even when none sleeps.
    fn wake_one(&self, state: MutexGuard<'_, State>) {
        let sleeps = state.idle > 0;
        drop(state);
        if sleeps {
            self.available.notify_one();
        }
    }

    /// Whether reads wait, run, or have not been taken back.
    #[cfg(any(test, feature = "testing"))]
    pub fn is_busy(&self) -> bool {
        let state = self.lock();
        !state.jobs.is_empty() || state.bytes > 0
    }

    /// How many reads of `thread` have ended and were not taken back.
    #[cfg(test)]
    pub fn ended(&self, thread: usize) -> usize {
        self.finished[thread].lock().unwrap().len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self) {
        loop {
            match self.next_step() {
                Step::Begin(job) => {
                    let mut data = vec![0; bytes_of(&job.pieces)];
                    match read_all(&job.pieces, &mut data, libc::RWF_NOWAIT) {
                        Ok(()) => self.finish(job, Ok(data)),
                        // Not there, or a file system that cannot tell: who reads it has to wait.
                        Err(libc::EAGAIN | libc::EOPNOTSUPP) => {
                            self.wait_later(Begun { job, data });
                        }
                        Err(errno) => self.finish(job, Err(errno)),
                    }
                }
                Step::Wait(Begun { job, mut data }) => {
                    let result = read_all(&job.pieces, &mut data, 0);
                    self.finish(job, result.map(|()| data));
                }
            }
            // A fast disk never lets this thread sleep: ring threads would wait until its slice is over.
            thread::yield_now();
        }
    }

    fn finish(&self, job: Job, data: Result<Vec<u8>, i32>) {
        let Job {
            thread,
            ticket,
            pieces,
            taken_ns,
            waited,
        } = job;
        let done = Finished {
            ticket,
            pieces,
            data,
            taken_ns,
            waited,
        };
        self.finished[thread]
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push_back(done);
        write_event(self.events[thread]);
    }
}

/// Fills `data` with the bytes of `pieces`; the errno if that cannot be. `flags` are those of preadv2, for what has a
/// disk behind it.
fn read_all(pieces: &[Piece], data: &mut [u8], flags: i32) -> Result<(), i32> {
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.len as usize;
        let mut offset = piece.offset;
        while at < end {
            let part = libc::iovec {
                iov_base: data[at..end].as_mut_ptr().cast(),
                iov_len: end - at,
            };
            // A memfd knows no RWF_NOWAIT, and never makes anybody wait.
            let flags = if piece.in_memory { 0 } else { flags };
            // SAFETY: reads at most `end - at` bytes into the buffer from `at`.
            let n = unsafe { libc::preadv2(piece.fd, &part, 1, offset as libc::off_t, flags) };
            match n {
                0 => return Err(libc::EIO),
                n if n > 0 => {
                    at += n as usize;
                    offset += n as u64;
                }
                _ => {
                    let errno = std::io::Error::last_os_error()
                        .raw_os_error()
                        .unwrap_or(libc::EIO);
                    if errno != libc::EINTR {
                        return Err(errno);
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
