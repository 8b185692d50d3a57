//! The disposable process that serves FUSE from virtqueues.
//!
//! Forked by the keeper, which keeps everything that must survive. A worker maps guest memory, the image's metadata
//! and the chunk tables, and answers requests; it opens nothing, connects to nothing, and may die at any moment.
//!
//! * `channel`: commands from the keeper, one socket per ring thread;
//! * `thread`: the loop of a ring thread; `budget`: what it does at a stretch; `commands`: what the keeper tells it;
//! * `queue`: one ring with its log and its batch;
//! * `serve`: one request from chain to reply; `ops` answers from metadata, `read` from chunks;
//! * `parked`: requests that wait for data; `pool`: disk reads that would block;
//! * `mount`: the image; `spin`: the short wait before a sleep.

mod budget;
pub mod channel;
mod commands;
mod fds;
#[cfg(test)]
mod fuzz_tests;
mod memory_map;
mod mount;
mod ops;
mod parked;
mod pool;
mod queue;
mod read;
mod residency;
mod serve;
mod spin;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod thread;

use std::os::fd::RawFd;

use session::Shared;
use virtq::{Away, RegionSpec, RingAddresses};

pub use mount::{BlobFds, MountFds};

/// One queue as the keeper knows it.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup {
    /// Index of the virtqueue: 0 is hiprio.
    pub queue: usize,
    pub size: u16,
    pub at: RingAddresses,
    /// Next avail position, as SET_VRING_BASE said; ignored where `resume` is set.
    pub base: u16,
    /// The in-flight log is that of this very ring: go on from it.
    pub resume: bool,
    pub enabled: bool,
    pub event_idx: bool,
    pub kick: Option<RawFd>,
    pub call: Option<RawFd>,
}

/// Everything a new worker needs. Descriptors are inherited by the fork and owned by the worker from then on.
pub struct Setup {
    pub shared: &'static Shared,
    pub regions: Vec<(RegionSpec, RawFd)>,
    /// Memory that was there and may come back.
    pub away: Away,
    pub rings: Vec<RingSetup>,
    pub mount: MountFds,
    /// One command socket per ring thread.
    pub channels: Vec<RawFd>,
    /// One eventfd per ring thread: control writes it when chunks have become ready.
    pub wakes: Vec<RawFd>,
    /// eventfd by which control learns of posts.
    pub post: RawFd,
    /// eventfd by which the keeper learns that a thread rests no more.
    pub awake: RawFd,
}

/// Which ring thread serves a queue: hiprio and the first request queue share thread 0.
pub fn thread_of(queue: usize, threads: usize) -> usize {
    queue.saturating_sub(1) % threads.max(1)
}

/// Serves until the keeper ends the process or closes the channels. Returns the exit code when nothing can be served.
pub fn run(setup: Setup) -> i32 {
    end_with_any_thread();
    // The process lives as long as these: leaking them gives every thread plain references.
    let setup: &'static Setup = Box::leak(Box::new(setup));
    let mount: &'static mount::Mount = match mount::Mount::open(&setup.mount) {
        Ok(mount) => Box::leak(Box::new(mount)),
        Err(e) => {
            session::say!("rafs-worker: the image cannot be mapped: {e}");
            return 1;
        }
    };
    let threads = setup.channels.len();
    let pool: &'static pool::Pool = Box::leak(Box::new(pool::Pool::new(threads)));
    for index in 1..threads {
        let spawned = std::thread::Builder::new()
            .name(format!("rafs-ring-{index}"))
            .stack_size(256 * 1024)
            .spawn(move || run_thread(index, setup, mount, pool));
        if let Err(e) = spawned {
            session::say!("rafs-worker: a ring thread cannot be started: {e}");
            return 1;
        }
    }
    run_thread(0, setup, mount, pool)
}

/// A thread that panics would leave queues unserved, or reads that nobody ends: the process ends with it, and its
/// successor goes on from the log.
fn end_with_any_thread() {
    std::panic::set_hook(Box::new(|info| {
        session::say!("rafs-worker: {info}");
        std::process::abort();
    }));
}

/// One thread without the others would leave queues unserved: its end is the end of the worker.
fn run_thread(
    index: usize,
    setup: &'static Setup,
    mount: &'static mount::Mount,
    pool: &'static pool::Pool,
) -> ! {
    let code = match thread::RingThread::new(index, setup, mount, pool)
        .and_then(thread::RingThread::run)
    {
        Ok(()) => 0,
        Err(e) => {
            session::say!("rafs-worker: ring thread {index}: {e}");
            1
        }
    };
    // SAFETY: ends the process without the exit handlers of the interpreter whose fork it is.
    unsafe { libc::_exit(code) }
}
