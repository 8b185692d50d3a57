//! One descriptor chain, translated into host memory without allocating per request.

use crate::memory::GuestMemory;

/// A run of host memory that stands for a part of a descriptor.
pub type Segment = libc::iovec;

/// Why a chain cannot be served. All but one are the driver's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is not below the table's size, or the chain loops.
    BadIndex,
    /// An address is not in shared memory.
    BadAddress,
    /// An address lies in a region that the VMM has removed: it may come back.
    MemoryAway,
    /// A readable descriptor follows a writable one.
    BadOrder,
    /// An indirect table is malformed (size, nesting, NEXT beside INDIRECT).
    BadIndirect,
    /// More parts than any real request has.
    TooLong,
}

/// Linux builds at most 1024-entry tables; a descriptor may straddle regions, hence some room.
pub(crate) const MAX_SEGMENTS: usize = 4096;

/// Readable and writable segments of a chain. Reused from request to request: `clear` keeps the capacity.
#[derive(Default)]
pub struct Chain {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: usize,
    writable_len: usize,
}

// SAFETY: segments point into guest memory that the owner of the chain also owns.
unsafe impl Send for Chain {}

impl Chain {
    pub(crate) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
    }

    pub(crate) fn push(
        &mut self,
        mem: &GuestMemory,
        addr: u64,
        len: u32,
        write: bool,
    ) -> Result<(), ChainError> {
        if !write && !self.writable.is_empty() {
            return Err(ChainError::BadOrder);
        }
        let (mut addr, mut left) = (addr, u64::from(len));
        while left > 0 {
            let (host, run) = mem.translate(addr, left).ok_or_else(|| mem.missing(addr))?;
            if self.readable.len() + self.writable.len() >= MAX_SEGMENTS {
                return Err(ChainError::TooLong);
            }
            let (list, total) = if write {
                (&mut self.writable, &mut self.writable_len)
            } else {
                (&mut self.readable, &mut self.readable_len)
            };
            *total = total.checked_add(run as usize).ok_or(ChainError::TooLong)?;
            match list.last_mut() {
                // Pages that are neighbours in the guest become one segment: fewer iovecs for preadv2.
                Some(last) if last.iov_base as usize + last.iov_len == host as usize => {
                    last.iov_len += run as usize
                }
                _ => list.push(Segment {
                    iov_base: host.cast(),
                    iov_len: run as usize,
                }),
            }
            left -= run;
            addr = addr.checked_add(run).ok_or(ChainError::BadAddress)?;
        }
        Ok(())
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
        for_each_run(&self.readable, offset, out.len(), |base, len| {
            // SAFETY: the run lies in a mapped region; `done + len` never exceeds `out.len()`. The guest may write
            // at the same time: then we have a mixture, which later checks treat as any other input.
            unsafe { std::ptr::copy_nonoverlapping(base, out[done..].as_mut_ptr(), len) };
            done += len;
        });
        done
    }

    /// Copies `data` to the writable bytes from `offset`; returns how much found room.
    ///
    /// This and [`Chain::write_segments`] are the only ways by which request data reaches guest memory.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for_each_run(&self.writable, offset, data.len(), |base, len| {
            // SAFETY: the run lies in a mapped region that the device may write; `done + len <= data.len()`.
            unsafe { std::ptr::copy_nonoverlapping(data[done..].as_ptr(), base, len) };
            done += len;
        });
        done
    }

    /// Appends to `out` the host segments of `len` writable bytes from `offset`; false when they are not all there.
    pub fn write_segments(&self, offset: usize, len: usize, out: &mut Vec<Segment>) -> bool {
        let mut done = 0;
        for_each_run(&self.writable, offset, len, |base, run| {
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
        for_each_run(&self.writable, offset, len, |base, run| {
            // SAFETY: as in `write_at`.
            unsafe { std::ptr::write_bytes(base, 0, run) };
        });
    }
}

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
