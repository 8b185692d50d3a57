//! The guest's memory as the VMM shared it: regions, mapped from the fds of ADD_MEM_REG / SET_MEM_TABLE.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Away;
use crate::error::ChainError;

/// One region as vhost-user describes it. Addresses and sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the region in the VMM's address space; vring addresses are given in it.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    /// Whether `self` and `other` share guest physical addresses.
    pub fn overlaps(&self, other: &RegionSpec) -> bool {
        self.guest_addr < other.guest_addr.saturating_add(other.size)
            && other.guest_addr < self.guest_addr.saturating_add(self.size)
    }

    /// The first guest physical address behind it.
    pub fn guest_end(&self) -> u64 {
        self.guest_addr.saturating_add(self.size)
    }

    /// Whether it is empty, or its end is no address.
    pub fn is_absurd(&self) -> bool {
        self.size == 0
            || [self.guest_addr, self.user_addr, self.mmap_offset]
                .iter()
                .any(|start| start.checked_add(self.size).is_none())
    }
}

struct Region {
    spec: RegionSpec,
    map: *mut u8,
    map_len: usize,
    host: *mut u8,
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `map` and `map_len` are those of a successful mmap that nobody else unmaps.
        unsafe { libc::munmap(self.map.cast(), self.map_len) };
    }
}

/// What an address needs to be translated: a region without what only its owner needs.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    guest_addr: u64,
    size: u64,
    host: *mut u8,
}

impl Window {
    const NONE: Window = Window {
        guest_addr: 0,
        size: 0,
        host: std::ptr::null_mut(),
    };

    /// As [`GuestMemory::translate`], in this region alone.
    #[inline(always)]
    pub(crate) fn translate(&self, addr: u64, len: u64) -> Option<(*mut u8, u64)> {
        let into = addr.wrapping_sub(self.guest_addr);
        if into >= self.size {
            return None;
        }
        // SAFETY: `into` is inside the region.
        let host = unsafe { self.host.add(into as usize) };
        Some((host, len.min(self.size - into)))
    }
}

/// All regions that are shared at the moment, sorted by guest address.
pub struct GuestMemory {
    regions: Vec<Region>,
    away: Away,
    /// The region that was used last: a request lies in one, and so does the next one mostly.
    last: Cell<Window>,
}

impl Default for GuestMemory {
    fn default() -> Self {
        GuestMemory {
            regions: Vec::new(),
            away: Away::default(),
            last: Cell::new(Window::NONE),
        }
    }
}

// SAFETY: the mappings are plain memory; a `GuestMemory` is owned and used by one thread at a time.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Maps one more region. Fails on overlap, on overflow and when the file cannot be mapped.
    pub fn add(&mut self, spec: RegionSpec, fd: BorrowedFd<'_>) -> io::Result<()> {
        let invalid = |what: &str| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("memory region: {what}"),
            )
        };
        if spec.is_absurd() {
            return Err(invalid("size is zero or the end overflows"));
        }
        if self.regions.iter().any(|r| r.spec.overlaps(&spec)) {
            return Err(invalid("overlaps a region that is already there"));
        }
        let map_len = spec
            .mmap_offset
            .checked_add(spec.size)
            .ok_or_else(|| invalid("mmap offset overflows"))?;
        let map_len = usize::try_from(map_len).map_err(|_| invalid("too large"))?;
        // The file must really be that long: a page behind its end would be a SIGBUS later.
        // The call itself: what a C library makes of fstat may take a path, which a worker's sandbox refuses.
        // SAFETY: fstat(2) writes into a zeroed stat that we own.
        let file_len = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), &raw mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
                stat.st_size as u64
            } else {
                u64::MAX
            }
        };
        if (map_len as u64) > file_len {
            return Err(invalid("is longer than its file"));
        }
        // Mapped from the file's start: mmap_offset need not be aligned to a huge page, offset 0 always is.
        // SAFETY: a fresh shared mapping, checked against MAP_FAILED.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: mmap_offset is smaller than map_len.
        let host = unsafe { map.cast::<u8>().add(spec.mmap_offset as usize) };
        self.away.give(spec.guest_addr, spec.guest_end());
        let at = self
            .regions
            .partition_point(|r| r.spec.guest_addr < spec.guest_addr);
        self.regions.insert(
            at,
            Region {
                spec,
                map: map.cast(),
                map_len,
                host,
            },
        );
        Ok(())
    }

    /// Unmaps the region with these addresses; false when there is none.
    pub fn remove(&mut self, guest_addr: u64, size: u64, user_addr: u64) -> bool {
        let found = self.regions.iter().position(|r| {
            r.spec.guest_addr == guest_addr && r.spec.size == size && r.spec.user_addr == user_addr
        });
        if let Some(at) = found {
            self.last.set(Window::NONE);
            let spec = self.regions.remove(at).spec;
            self.away.take(spec.guest_addr, spec.guest_end());
        }
        found.is_some()
    }

    /// Takes over what somebody else has seen of memory that went away.
    pub fn set_away(&mut self, away: Away) {
        self.away = away;
    }

    /// Why `addr` cannot be translated.
    pub(crate) fn missing(&self, addr: u64) -> ChainError {
        if self.away.contains(addr) {
            ChainError::MemoryAway
        } else {
            ChainError::BadAddress
        }
    }

    /// Gives back the page tables of the mappings; the memory itself is the guest's and stays as it is. The next
    /// access to each page costs a minor fault.
    pub fn release_pages(&self) {
        for region in &self.regions {
            // SAFETY: on a shared file mapping this only drops page table entries.
            unsafe { libc::madvise(region.map.cast(), region.map_len, libc::MADV_DONTNEED) };
        }
    }

    /// Host address and length of the longest run from guest address `addr` that lies in one region, at most `len`.
    #[inline]
    pub fn translate(&self, addr: u64, len: u64) -> Option<(*mut u8, u64)> {
        if let Some(found) = self.last.get().translate(addr, len) {
            return Some(found);
        }
        let window = self.find(addr)?;
        self.last.set(window);
        window.translate(addr, len)
    }

    /// The region that was used last.
    #[inline]
    pub(crate) fn last(&self) -> Window {
        self.last.get()
    }

    #[cold]
    fn find(&self, addr: u64) -> Option<Window> {
        let at = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
        let region = self.regions.get(at.checked_sub(1)?)?;
        (addr - region.spec.guest_addr < region.spec.size).then_some(Window {
            guest_addr: region.spec.guest_addr,
            size: region.spec.size,
            host: region.host,
        })
    }

    /// Host address of `len` bytes at the VMM's address `addr`, which must lie in one region.
    pub fn translate_user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = self
            .regions
            .iter()
            .find(|r| addr >= r.spec.user_addr && addr - r.spec.user_addr < r.spec.size)?;
        let into = addr - region.spec.user_addr;
        if len > region.spec.size - into {
            return None;
        }
        // SAFETY: `into + len` is inside the region.
        Some(unsafe { region.host.add(into as usize) })
    }
}
