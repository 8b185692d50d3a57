//! A private, read-only mapping of a sealed memfd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The mapped bytes of a file that cannot change any more.
pub struct MemoryMap {
    base: *const u8,
    len: usize,
}

// SAFETY: read-only memory.
unsafe impl Send for MemoryMap {}
// SAFETY: read-only memory.
unsafe impl Sync for MemoryMap {}

impl MemoryMap {
    /// Maps all of `fd`, which must be sealed against writing and shrinking: then neither the bytes change after they
    /// have been verified, nor can a truncation turn an access into SIGBUS.
    pub fn sealed(fd: BorrowedFd<'_>) -> io::Result<MemoryMap> {
        // SAFETY: plain system call.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        let needed = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK;
        if seals < 0 || seals & needed != needed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the image's memfd is not sealed",
            ));
        }
        // The call itself: what a C library makes of fstat may take a path, which a worker's sandbox refuses.
        // SAFETY: fstat(2) writes into a zeroed stat that we own.
        let len = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), &raw mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat.st_size as usize
        };
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the image's memfd is empty",
            ));
        }
        // SAFETY: a fresh read-only mapping, checked against MAP_FAILED.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(MemoryMap {
            base: base.cast(),
            len,
        })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for the life of self, and sealed.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl Drop for MemoryMap {
    fn drop(&mut self) {
        // SAFETY: our mapping, unmapped once.
        unsafe { libc::munmap(self.base.cast_mut().cast(), self.len) };
    }
}
