//! A shared memory mapping with atomic access to its words.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// A `MAP_SHARED` mapping of the first `len` bytes of a file. Other processes may change it at any time, so it
/// hands out atomics and copies, never references to plain bytes.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping lives until drop, and all access goes through atomics or volatile copies.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd`. Errors when the file is shorter (its end would raise SIGBUS) or `len` is 0.
    pub fn new(fd: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<Mapping> {
        // SAFETY: `stat` is plain old data, for which all zeros is a value.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // The call itself: what a C library makes of fstat may take a path, which a worker's sandbox refuses.
        // SAFETY: `fd` is open and `stat` is valid for writes.
        if unsafe { libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), &raw mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if len == 0 || u64::try_from(stat.st_size).is_ok_and(|size| size < len as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "a shared table of {len} bytes was expected, the file has {}",
                    stat.st_size
                ),
            ));
        }
        let prot = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Mapping {
                base,
                len,
                writable,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Start of the mapping, for callers that hand it across the C ABI.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The byte at `offset`; `None` outside the mapping. Store to it only when the mapping is writable.
    pub fn u8_at(&self, offset: usize) -> Option<&AtomicU8> {
        if offset >= self.len {
            return None;
        }
        // SAFETY: inside the mapping; atomics may alias shared memory.
        Some(unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU8>() })
    }

    /// The 32-bit word at byte `offset`; `None` outside the mapping or unaligned. Store to it only when the mapping is
    /// writable.
    pub fn u32_at(&self, offset: usize) -> Option<&AtomicU32> {
        if offset.checked_add(4)? > self.len || offset % 4 != 0 {
            return None;
        }
        // SAFETY: inside the mapping and aligned (the base is page aligned); atomics may alias shared memory.
        Some(unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU32>() })
    }

    /// The 64-bit word at byte `offset`; `None` outside the mapping or unaligned.
    pub fn u64_at(&self, offset: usize) -> Option<&AtomicU64> {
        if offset.checked_add(8)? > self.len || offset % 8 != 0 {
            return None;
        }
        // SAFETY: as in `u32_at`.
        Some(unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU64>() })
    }

    /// Copies `N` bytes from byte `offset`; `None` outside the mapping.
    pub fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset.checked_add(N)? > self.len {
            return None;
        }
        let mut out = [0u8; N];
        for (i, byte) in out.iter_mut().enumerate() {
            // SAFETY: `offset + i` lies inside the mapping; volatile because others may write.
            *byte = unsafe { self.base.as_ptr().add(offset + i).read_volatile() };
        }
        Some(out)
    }

    /// Writes `bytes` at byte `offset`; errors outside the mapping or when it is read-only.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        if !self.writable
            || offset
                .checked_add(bytes.len())
                .is_none_or(|end| end > self.len)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "write outside a shared table",
            ));
        }
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: `offset + i` lies inside the writable mapping.
            unsafe { self.base.as_ptr().add(offset + i).write_volatile(*byte) };
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
