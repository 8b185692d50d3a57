//! Named places where a test can kill or hang the worker. One place is armed at a time, in shared memory, and is
//! disarmed before it acts for the last time: then the next worker passes.

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// Where the worker can be made to die. The order is that of a request's life.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// A new worker has repaired the log and taken nothing yet.
    Recovered = 1,
    /// A head was taken from the avail ring and is not in the log.
    Taken = 2,
    /// The head is in the log and nothing was done for it.
    Logged = 3,
    /// The request was found to miss chunks; nothing was posted.
    Parking = 4,
    /// The missing chunks are posted.
    Posted = 5,
    /// A parked request's chunks are there; it is about to be served again.
    Unparked = 6,
    /// Data is about to be copied into guest memory.
    Copying = 7,
    /// Data was copied, the out header not written.
    Copied = 8,
    /// The session record was written, INIT is not answered.
    InitRecorded = 9,
    /// The used entry is written, the index is not.
    UsedWritten = 10,
    /// The batch is noted in the log, the used index is not published.
    BatchNoted = 11,
    /// The used index is published, the log still says in flight.
    Published = 12,
    /// The log is cleared, the driver is not signalled.
    Cleared = 13,
    /// The driver is signalled.
    Signalled = 14,
    /// A ring is being stopped; the answer is not sent.
    Stopping = 15,
    /// A blocking read was handed to the pool.
    PoolSubmitted = 16,
}

/// All points, for tests that go through each of them.
pub const COUNT: u32 = 16;

/// The armed failpoint.
#[repr(C)]
pub struct Failpoint {
    point: AtomicU32,
    skip: AtomicI32,
    action: AtomicU32,
    times: AtomicI32,
}

/// The process kills itself.
pub const ACTION_KILL: u32 = 1;
/// The thread stops making progress.
pub const ACTION_HANG: u32 = 2;
/// The process aborts: a crash that counts against the request.
pub const ACTION_ABORT: u32 = 3;
/// The thread opens a file and makes a socket, says how far it came, and goes on if it still can.
pub const ACTION_BREAK_OUT: u32 = 4;

impl Failpoint {
    /// Arms `point` (0 disarms) to act when it is passed for the `skip + 1`-th time, and `times` times in all.
    pub fn arm(&self, point: u32, skip: i32, action: u32, times: i32) {
        self.point.store(0, Ordering::SeqCst);
        self.skip.store(skip, Ordering::SeqCst);
        self.action.store(action, Ordering::SeqCst);
        self.times.store(times, Ordering::SeqCst);
        self.point.store(point, Ordering::SeqCst);
    }

    /// The armed point, 0 when none is: whether it has acted.
    pub fn armed(&self) -> u32 {
        self.point.load(Ordering::SeqCst)
    }

    /// Called by the worker as it passes `point`: one relaxed load unless a test has armed something.
    #[inline]
    pub fn pass(&self, point: Point) {
        if self.point.load(Ordering::Relaxed) == point as u32 {
            self.act();
        }
    }

    #[cold]
    fn act(&self) {
        if self.skip.fetch_sub(1, Ordering::SeqCst) > 0 {
            return;
        }
        match self.times.fetch_sub(1, Ordering::SeqCst) {
            i32::MIN..=0 => return,
            1 => self.point.store(0, Ordering::SeqCst),
            _ => {}
        }
        match self.action.load(Ordering::SeqCst) {
            ACTION_HANG => loop {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            },
            ACTION_ABORT => std::process::abort(),
            ACTION_BREAK_OUT => return break_out(),
            _ => {}
        }
        // SAFETY: kill(2) on ourselves; SIGKILL cannot be caught, so nothing after this runs.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// What a worker that a guest has taken over would try first.
fn break_out() {
    let end = |result: libc::c_int| match result {
        0.. => "open".to_owned(),
        _ => std::io::Error::last_os_error().to_string(),
    };
    // SAFETY: a NUL-terminated path. What is opened stays open: this worker is not meant to live.
    let file = unsafe { libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    crate::say!("rafs-worker: break-out: file: {}", end(file));
    // SAFETY: plain system call.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    crate::say!("rafs-worker: break-out: socket: {}", end(socket));
    let mut to = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 9u16.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    let len = size_of_val(&to) as libc::socklen_t;
    // SAFETY: an address of the length that is named.
    let connected = unsafe { libc::connect(socket, (&raw mut to).cast(), len) };
    crate::say!("rafs-worker: break-out: connect: {}", end(connected));
}
