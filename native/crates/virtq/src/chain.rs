//! One descriptor chain, translated into host memory without allocating per request.

use std::mem::MaybeUninit;

use crate::error::ChainError;
use crate::memory::{GuestMemory, Window};

/// A run of host memory that stands for a part of a descriptor.
pub type Segment = libc::iovec;

/// Linux builds at most 1024-entry tables; a descriptor may straddle regions, hence some room.
pub(crate) const MAX_SEGMENTS: usize = 4096;

/// Readable and writable segments of a chain. Reused from request to request: the capacity stays.
#[derive(Default)]
pub struct Chain {
    /// The readable ones first.
    segments: Vec<Segment>,
    readable: usize,
    readable_len: usize,
    writable_len: usize,
}

// SAFETY: segments point into guest memory that the owner of the chain also owns.
unsafe impl Send for Chain {}

/// A chain while its descriptors are being read.
pub(crate) struct Builder<'a> {
    chain: &'a mut Chain,
    mem: &'a GuestMemory,
    window: Window,
    /// The segment that may grow still; empty at first.
    last: Segment,
    writable: bool,
}

impl<'a> Builder<'a> {
    #[inline]
    pub(crate) fn new(chain: &'a mut Chain, mem: &'a GuestMemory) -> Self {
        chain.segments.clear();
        chain.readable = 0;
        chain.readable_len = 0;
        chain.writable_len = 0;
        Builder {
            chain,
            mem,
            window: mem.last(),
            last: Segment {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
            writable: false,
        }
    }

    /// Adds what one descriptor names.
    #[inline(always)]
    pub(crate) fn push(&mut self, addr: u64, len: u32, write: bool) -> Result<(), ChainError> {
        if self.writable && !write {
            return Err(ChainError::BadOrder);
        }
        if len == 0 {
            return Ok(());
        }
        if write && !self.writable {
            self.end_segment()?;
            self.chain.readable = self.chain.segments.len();
            self.writable = true;
        }
        match self.window.translate(addr, u64::from(len)) {
            // All of it in the region that was used last: nearly always.
            Some((host, run)) if run == u64::from(len) => self.append(host, run as usize),
            _ => self.push_parts(addr, len),
        }
    }

    #[cold]
    fn push_parts(&mut self, addr: u64, len: u32) -> Result<(), ChainError> {
        let (mut addr, mut left) = (addr, u64::from(len));
        while left > 0 {
            let (host, run) = self
                .mem
                .translate(addr, left)
                .ok_or_else(|| self.mem.missing(addr))?;
            self.append(host, run as usize)?;
            left -= run;
            addr = addr.checked_add(run).ok_or(ChainError::BadAddress)?;
        }
        self.window = self.mem.last();
        Ok(())
    }

    #[inline(always)]
    fn append(&mut self, host: *mut u8, run: usize) -> Result<(), ChainError> {
        // Pages that are neighbours in the guest become one segment: fewer iovecs for preadv2.
        if self.last.iov_base as usize + self.last.iov_len == host as usize {
            self.last.iov_len += run;
            return Ok(());
        }
        self.end_segment()?;
        self.last = Segment {
            iov_base: host.cast(),
            iov_len: run,
        };
        Ok(())
    }

    #[inline]
    fn end_segment(&mut self) -> Result<(), ChainError> {
        if self.last.iov_len == 0 {
            return Ok(());
        }
        if self.chain.segments.len() >= MAX_SEGMENTS {
            return Err(ChainError::TooLong);
        }
        self.chain.segments.push(self.last);
        // At most 2^16 descriptors of 2^32 bytes: no overflow.
        if self.writable {
            self.chain.writable_len += self.last.iov_len;
        } else {
            self.chain.readable_len += self.last.iov_len;
        }
        self.last.iov_len = 0;
        self.last.iov_base = std::ptr::null_mut();
        Ok(())
    }

    /// All descriptors have been read.
    #[inline]
    pub(crate) fn finish(mut self) -> Result<(), ChainError> {
        self.end_segment()?;
        if !self.writable {
            self.chain.readable = self.chain.segments.len();
        }
        Ok(())
    }
}

impl Chain {
    #[inline]
    fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    #[inline]
    fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Copies readable bytes from `offset` into `out`; returns how many there were.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        for_each_run(self.readable(), offset, out.len(), |base, len| {
            // SAFETY: the run lies in a mapped region; `done + len` never exceeds `out.len()`. The guest may write
            // at the same time: then we have a mixture, which later checks treat as any other input.
            unsafe { std::ptr::copy_nonoverlapping(base, out[done..].as_mut_ptr(), len) };
            done += len;
        });
        done
    }

    /// As [`Chain::read_at`], into memory that holds nothing yet; the bytes that were copied.
    #[inline]
    pub fn read_into<'a>(&self, offset: usize, out: &'a mut [MaybeUninit<u8>]) -> &'a [u8] {
        let mut done = 0;
        for_each_run(self.readable(), offset, out.len(), |base, len| {
            let to = out[done..].as_mut_ptr().cast();
            // SAFETY: as in `read_at`.
            unsafe { std::ptr::copy_nonoverlapping(base, to, len) };
            done += len;
        });
        // SAFETY: the first `done` bytes have been written.
        unsafe { std::slice::from_raw_parts(out.as_ptr().cast(), done) }
    }

    /// Copies `data` to the writable bytes from `offset`; returns how much found room.
    ///
    /// This and [`Chain::write_segments`] are the only ways by which request data reaches guest memory.
    #[inline]
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for_each_run(self.writable(), offset, data.len(), |base, len| {
            // SAFETY: the run lies in a mapped region that the device may write; `done + len <= data.len()`.
            unsafe { std::ptr::copy_nonoverlapping(data[done..].as_ptr(), base, len) };
            done += len;
        });
        done
    }

    /// Appends to `out` the host segments of `len` writable bytes from `offset`; false when they are not all there.
    pub fn write_segments(&self, offset: usize, len: usize, out: &mut Vec<Segment>) -> bool {
        let mut done = 0;
        for_each_run(self.writable(), offset, len, |base, run| {
            out.push(Segment {
                iov_base: base.cast(),
                iov_len: run,
            });
            done += run;
        });
        done == len
    }

    /// Zeroes `len` writable bytes from `offset`.
    pub fn zero_at(&self, offset: usize, len: usize) {
        for_each_run(self.writable(), offset, len, |base, run| {
            // SAFETY: as in `write_at`.
            unsafe { std::ptr::write_bytes(base, 0, run) };
        });
    }
}

#[inline(always)]
fn for_each_run(
    segments: &[Segment],
    offset: usize,
    len: usize,
    mut run: impl FnMut(*mut u8, usize),
) {
    let (mut skip, mut left) = (offset, len);
    for segment in segments {
        if left == 0 {
            return;
        }
        if skip >= segment.iov_len {
            skip -= segment.iov_len;
            continue;
        }
        let n = (segment.iov_len - skip).min(left);
        // SAFETY: `skip` is inside the segment.
        run(unsafe { segment.iov_base.cast::<u8>().add(skip) }, n);
        left -= n;
        skip = 0;
    }
}
