//! What is done with descriptors in more than one place.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Another descriptor for the same object.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes an eventfd readable.
pub fn write_event(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes to an eventfd; it only fails when the counter is full, and then it is readable.
    unsafe { libc::write(fd, one.as_ptr().cast(), 8) };
}
