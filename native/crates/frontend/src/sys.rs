//! The few system calls that the standard library does not offer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::Duration;

use crate::error::Error;

/// An anonymous file of `size` bytes; `huge` takes it from the pool of huge pages.
pub fn memfd(name: &std::ffi::CStr, size: u64, huge: bool) -> Result<OwnedFd, Error> {
    let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: `name` is a NUL-terminated string; the call touches nothing else of ours.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(Error::last_os("memfd_create"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let size =
        i64::try_from(size).map_err(|_| Error::Invalid("memfd size is beyond 2^63".into()))?;
    // SAFETY: plain system call on our descriptor.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } < 0 {
        return Err(Error::last_os("ftruncate(memfd)"));
    }
    Ok(fd)
}

/// A non-blocking eventfd with counter 0.
pub fn eventfd() -> Result<OwnedFd, Error> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(Error::last_os("eventfd"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds 1 to an eventfd's counter. A full counter is fine: the reader is due anyway.
pub fn signal(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let one = 1u64;
    // SAFETY: the buffer is 8 readable bytes.
    let n = unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
    if n == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
        return Ok(());
    }
    Err(Error::last_os("write(eventfd)"))
}

/// Takes an eventfd's counter; 0 when it was not signalled.
pub fn take_signal(fd: BorrowedFd<'_>) -> u64 {
    let mut count = 0u64;
    // SAFETY: the buffer is 8 writable bytes; the descriptor is non-blocking.
    let n = unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    if n == 8 { count } else { 0 }
}

/// What [`poll`] waits for on a descriptor.
#[derive(Clone, Copy)]
pub enum Until {
    Readable(RawFd),
    /// Only that the peer hung up; data may wait meanwhile.
    HungUp(RawFd),
}

/// Waits for one of `fds`; returns a bit mask of those that are ready, 0 after `timeout`.
///
/// An interrupted wait returns 0 as well: callers look at their condition and their clock again.
pub fn poll(fds: &[Until], timeout: Duration) -> Result<u64, Error> {
    debug_assert!(fds.len() <= 64);
    let entry = |until: &Until| match *until {
        Until::Readable(fd) => libc::pollfd {
            fd,
            events: libc::POLLIN | libc::POLLRDHUP,
            revents: 0,
        },
        Until::HungUp(fd) => libc::pollfd {
            fd,
            events: libc::POLLRDHUP,
            revents: 0,
        },
    };
    let mut set: Vec<libc::pollfd> = fds.iter().map(entry).collect();
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().min(1 << 40) as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    };
    // SAFETY: `set` and `timeout` live across the call; no signal mask is passed.
    let n = unsafe {
        libc::ppoll(
            set.as_mut_ptr(),
            set.len() as libc::nfds_t,
            &timeout,
            std::ptr::null(),
        )
    };
    if n < 0 {
        let e = io::Error::last_os_error();
        if e.kind() == io::ErrorKind::Interrupted {
            return Ok(0);
        }
        return Err(Error::Os("ppoll", e));
    }
    Ok(set
        .iter()
        .enumerate()
        .filter(|(_, p)| p.revents != 0)
        .fold(0, |mask, (i, _)| mask | 1 << i))
}

/// A mapping of a file, unmapped when dropped.
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory that is not tied to a thread; who touches its bytes synchronises.
unsafe impl Send for Mapping {}
// SAFETY: as above; the type itself has no interior state.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared; writable unless `read_only`.
    pub fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        read_only: bool,
    ) -> Result<Self, Error> {
        let offset = i64::try_from(offset)
            .map_err(|_| Error::Invalid("mapping offset is beyond 2^63".into()))?;
        let prot = if read_only {
            libc::PROT_READ
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last_os("mmap"));
        }
        let ptr = NonNull::new(p.cast::<u8>())
            .ok_or_else(|| Error::Invalid("mmap returned address 0".into()))?;
        Ok(Mapping { ptr, len })
    }

    /// Maps the whole of a file that is not empty, to be read.
    pub fn whole(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        // SAFETY: stat is plain data; all-zero is a value of it.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is writable for the call.
        if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } < 0 {
            return Err(Error::last_os("fstat"));
        }
        let len = usize::try_from(stat.st_size).map_err(|_| Error::Invalid("file size".into()))?;
        Mapping::new(fd, 0, len, true)
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub fn size(&self) -> usize {
        self.len
    }

    /// The bytes of a read-only mapping. Its file must not shrink: that is the caller's care, as it is with every
    /// file that a test compares with.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes long and lives as long as `self`; nobody of ours writes to it.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives its owner.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}
