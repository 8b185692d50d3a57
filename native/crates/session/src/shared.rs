//! Layout and mapping of the shared memory.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::failpoint::Failpoint;
use crate::inflight::QueueLog;
use crate::rings::{PostRing, TraceRing};

/// Queues that a device can have: hiprio and 64 request queues. A constant, because GET_QUEUE_NUM must not change
/// between hosts (a guest may be migrated).
pub const MAX_QUEUES: usize = 65;
/// Entries of a queue, at most (QEMU's own limit for virtio-fs).
pub const MAX_QUEUE_SIZE: usize = 1024;
/// Ring threads of a worker, at most.
pub const MAX_THREADS: usize = 8;

const MAGIC: u64 = u64::from_le_bytes(*b"VRSESSN1");
const OPCODES: usize = 64;

/// What a new worker or control must know, and what `status` shows. Times are CLOCK_MONOTONIC in ns, 0 = not yet.
#[repr(C)]
pub struct SessionRecord {
    /// 1 once INIT has been answered; the fields below are valid then.
    pub initialised: AtomicU32,
    /// FUSE minor that both sides speak.
    pub minor: AtomicU32,
    /// FUSE INIT flags that both sides agreed on.
    pub flags: AtomicU64,
    /// Seconds after which a request that waits for data gets EIO.
    pub io_deadline_ns: AtomicU64,
    /// How long a ring thread looks for more requests before it sleeps, at most, in ns; 0: not at all.
    pub poll_ns: AtomicU64,
    pub keeper_pid: AtomicU32,
    pub worker_pid: AtomicU32,
    pub control_pid: AtomicU32,
    /// How many workers there have been.
    pub worker_generation: AtomicU32,
    /// How many workers died or hung (not counting those that the keeper ended on purpose).
    pub worker_crashes: AtomicU32,
    /// How many control processes there have been.
    pub control_generation: AtomicU32,
    pub frontend_connected: AtomicU32,
    pub start_ns: AtomicU64,
    pub bound_ns: AtomicU64,
    pub connected_ns: AtomicU64,
    pub mounted_ns: AtomicU64,
    pub init_ns: AtomicU64,
    /// First READ of a regular file that is executable.
    pub first_exec_ns: AtomicU64,
    /// When the last dead worker had been reaped, and when its successor was ready to serve.
    pub worker_reaped_ns: AtomicU64,
    pub worker_ready_ns: AtomicU64,
}

/// One ring thread of the worker. Aligned so that no thread writes to a cache line of another one.
#[repr(C, align(128))]
pub struct ThreadRecord {
    /// Since when the thread has been busy; 0 while it sleeps. With `progress` this is the heartbeat.
    pub busy_since_ns: AtomicU64,
    /// 1 while it sleeps without a clock: it tells the keeper when it wakes up.
    pub resting: AtomicU32,
    /// Grows with every step the thread makes.
    pub progress: AtomicU64,
    pub wakeups: AtomicU64,
    pub signals: AtomicU64,
    pub parks: AtomicU64,
    pub pool_reads: AtomicU64,
    pub bytes_read: AtomicU64,
    pub errors: AtomicU64,
    pub deadline_errors: AtomicU64,
    pub requests: [AtomicU64; OPCODES],
    pub posts: PostRing,
    pub traces: TraceRing,
}

/// Adds `n` to a counter that one thread writes. What a predecessor has left there may be any number.
#[inline]
pub fn add(counter: &AtomicU64, n: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(n);
    counter.store(sum, Ordering::Relaxed);
}

impl ThreadRecord {
    /// Counts a request.
    #[inline]
    pub fn count(&self, opcode: u32) {
        add(&self.requests[(opcode as usize).min(OPCODES - 1)], 1);
    }
}

/// One queue as `status` shows it; aligned as [`ThreadRecord`] is.
#[repr(C, align(128))]
pub struct QueueRecord {
    pub size: AtomicU32,
    pub enabled: AtomicU32,
    /// A ring whose memory or indexes make no sense is left alone until it is set up anew.
    pub broken: AtomicU32,
    pub completed: AtomicU64,
}

#[repr(C)]
struct Layout {
    magic: u64,
    len: u64,
    failpoint: Failpoint,
    record: SessionRecord,
    threads: [ThreadRecord; MAX_THREADS],
    queues: [QueueRecord; MAX_QUEUES],
    logs: [QueueLog; MAX_QUEUES],
}

/// The mapped shared memory. Children of the process that made it inherit the mapping.
pub struct Shared {
    fd: OwnedFd,
    map: *const Layout,
}

// SAFETY: the mapping holds atomics only.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// New shared memory, all zero but for the magic. Only touched pages cost memory.
    pub fn create() -> io::Result<Shared> {
        // SAFETY: a NUL-terminated name; the result is checked.
        let fd = unsafe {
            libc::memfd_create(
                c"rafs-session".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system call on our descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size_of::<Layout>() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // A worker that a guest has taken over must not be able to cut the file: SIGBUS for everybody.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain system call on our descriptor.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let shared = Shared::map(fd)?;
        // SAFETY: nobody else knows the mapping yet.
        unsafe {
            let layout = shared.map.cast_mut();
            (&raw mut (*layout).len).write(size_of::<Layout>() as u64);
            (&raw mut (*layout).magic).write(MAGIC);
        }
        Ok(shared)
    }

    /// Maps the memory of a running daemon (tests and tools).
    pub fn attach(fd: OwnedFd) -> io::Result<Shared> {
        let shared = Shared::map(fd)?;
        let layout = shared.layout();
        if layout.magic != MAGIC || layout.len != size_of::<Layout>() as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "no session memory of this version",
            ));
        }
        Ok(shared)
    }

    fn map(fd: OwnedFd) -> io::Result<Shared> {
        // SAFETY: fstat writes into a zeroed stat that we own.
        let len = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd.as_raw_fd(), &mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat.st_size as usize
        };
        if len < size_of::<Layout>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "session memory is too small",
            ));
        }
        // SAFETY: a fresh shared mapping of the right length, checked against MAP_FAILED.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Layout>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Shared {
            fd,
            map: map.cast(),
        })
    }

    #[inline]
    fn layout(&self) -> &Layout {
        // SAFETY: mapped for the life of self; all shared fields are atomics.
        unsafe { &*self.map }
    }

    /// The descriptor, to be kept open in children that need it.
    pub fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    #[inline]
    pub fn failpoint(&self) -> &Failpoint {
        &self.layout().failpoint
    }

    #[inline]
    pub fn record(&self) -> &SessionRecord {
        &self.layout().record
    }

    /// `index` is reduced to the valid range.
    #[inline]
    pub fn thread(&self, index: usize) -> &ThreadRecord {
        &self.layout().threads[index % MAX_THREADS]
    }

    /// `index` is reduced to the valid range.
    #[inline]
    pub fn queue(&self, index: usize) -> &QueueRecord {
        &self.layout().queues[index % MAX_QUEUES]
    }

    /// `index` is reduced to the valid range.
    #[inline]
    pub fn log(&self, index: usize) -> &QueueLog {
        &self.layout().logs[index % MAX_QUEUES]
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our mapping, unmapped once.
        unsafe { libc::munmap(self.map.cast_mut().cast(), size_of::<Layout>()) };
    }
}
