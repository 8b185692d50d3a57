//! A split virtqueue, device side (virtio 1.2, section 2.7).

use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::chain::{Builder, Chain, MAX_SEGMENTS};
use crate::error::{ChainError, RingError};
use crate::memory::GuestMemory;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where a ring lies, in the VMM's addresses (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

/// A mapped ring with the device's own positions.
pub struct Vring {
    size: u16,
    event_idx: bool,
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    /// Next position of the avail ring to take (free-running).
    next_avail: u16,
    /// Copy of the driver's avail index, so that it is read once per batch.
    seen_avail: u16,
    /// Next position of the used ring to fill (free-running).
    next_used: u16,
    /// Used index that the driver has been shown.
    published_used: u16,
    /// Used index at the last decision about a signal.
    signalled_used: u16,
}

// SAFETY: a ring is owned by one thread; the memory behind it is shared with the guest anyway.
unsafe impl Send for Vring {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Eight bytes in an indirect table, wherever that begins.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned(u64);

impl Vring {
    /// Maps a ring of `size` entries. Positions start at the driver's used index and `next_avail`.
    pub fn new(
        mem: &GuestMemory,
        size: u16,
        at: RingAddresses,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Vring, RingError> {
        if size == 0 || !size.is_power_of_two() {
            return Err(RingError::BadSize);
        }
        if at.desc % 16 != 0 || at.avail % 2 != 0 || at.used % 4 != 0 {
            return Err(RingError::BadAddress);
        }
        let n = u64::from(size);
        // The mapping decides about alignment in the end: a region's address need not be one of a page.
        let part = |addr, len, align| {
            mem.translate_user(addr, len)
                .filter(|host| *host as usize % align == 0)
                .ok_or(RingError::BadAddress)
        };
        let mut ring = Vring {
            size,
            event_idx,
            desc: part(at.desc, 16 * n, 16)?,
            avail: part(at.avail, 6 + 2 * n, 2)?,
            used: part(at.used, 6 + 8 * n, 4)?,
            next_avail,
            seen_avail: next_avail,
            next_used: 0,
            published_used: 0,
            signalled_used: 0,
        };
        ring.next_used = ring.used_word(2).load(Ordering::Acquire);
        ring.published_used = ring.next_used;
        ring.signalled_used = ring.next_used;
        Ok(ring)
    }

    fn avail_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass even offsets below 6 + 2 * size; the mapping outlives the ring.
        unsafe { &*self.avail.add(offset).cast::<AtomicU16>() }
    }

    fn used_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass even offsets below 6 + 8 * size; the mapping outlives the ring.
        unsafe { &*self.used.add(offset).cast::<AtomicU16>() }
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Next avail position to take: what GET_VRING_BASE answers.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Sets the next avail position (after heads that were taken before have been counted).
    pub fn set_next_avail(&mut self, position: u16) {
        self.next_avail = position;
        self.seen_avail = position;
    }

    /// The used index as the driver sees it.
    pub fn published_used(&self) -> u16 {
        self.published_used
    }

    /// Takes the next head, `None` when the driver has offered nothing more.
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_avail == self.seen_avail {
            let avail = u16::from_le(self.avail_word(2).load(Ordering::Acquire));
            let offered = avail.wrapping_sub(self.next_avail);
            if offered == 0 {
                return Ok(None);
            }
            if offered > self.size {
                return Err(RingError::BadAvail);
            }
            self.seen_avail = avail;
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = u16::from_le(self.avail_word(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(RingError::BadAvail);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Translates the chain at `head` into `chain`, which holds nothing useful after an error.
    #[inline]
    pub fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut builder = Builder::new(chain, mem);
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(ChainError::BadIndex);
            }
            // SAFETY: index < size, and the table of 16 * size bytes is mapped.
            let d = unsafe {
                self.desc
                    .add(16 * usize::from(index))
                    .cast::<Descriptor>()
                    .read_volatile()
            };
            let (addr, len, flags) = (
                u64::from_le(d.addr),
                u32::from_le(d.len),
                u16::from_le(d.flags),
            );
            if flags & DESC_F_INDIRECT != 0 {
                if flags & DESC_F_NEXT != 0 {
                    return Err(ChainError::BadIndirect);
                }
                return walk_indirect(mem, addr, len, builder);
            }
            builder.push(addr, len, flags & DESC_F_WRITE != 0)?;
            if flags & DESC_F_NEXT == 0 {
                return builder.finish();
            }
            index = u16::from_le(d.next);
        }
        Err(ChainError::BadIndex)
    }

    /// Writes one used entry; the driver sees it only after [`Vring::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: slot < size; the used ring of 6 + 8 * size bytes is mapped and 4-byte aligned.
        unsafe {
            let entry = self.used.add(4 + 8 * slot).cast::<u32>();
            entry.write_volatile(u32::from(head).to_le());
            entry.add(1).write_volatile(len.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all used entries written so far.
    pub fn publish(&mut self) {
        self.used_word(2)
            .store(self.next_used.to_le(), Ordering::Release);
        self.published_used = self.next_used;
    }

    /// Whether entries have been published since the last call for which the driver wants a signal.
    pub fn needs_signal(&mut self) -> bool {
        let (old, new) = (self.signalled_used, self.published_used);
        if old == new {
            return false;
        }
        self.signalled_used = new;
        // The index must be visible before the driver's wish is read, or a signal is lost.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return u16::from_le(self.avail_word(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT
                == 0;
        }
        let event = u16::from_le(
            self.avail_word(4 + 2 * usize::from(self.size))
                .load(Ordering::Relaxed),
        );
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Answers that the driver has been shown since the last decision about a signal.
    #[inline]
    pub fn unsignalled(&self) -> u16 {
        self.published_used.wrapping_sub(self.signalled_used)
    }

    /// How many heads the driver has offered that were not taken yet; any number when its index makes no sense.
    #[inline]
    pub fn waiting(&self) -> u16 {
        u16::from_le(self.avail_word(2).load(Ordering::Acquire)).wrapping_sub(self.next_avail)
    }

    /// Whether the driver has offered more heads.
    pub fn has_more(&self) -> bool {
        self.waiting() != 0
    }

    /// Asks the driver for a kick at its next buffer; true when one is there already (look again, do not sleep).
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.used_word(4 + 8 * usize::from(self.size))
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        u16::from_le(self.avail_word(2).load(Ordering::Acquire)) != self.next_avail
    }

    /// Tells the driver not to kick while buffers are being taken anyway.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.used_word(0)
                .store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }
}

#[inline]
fn walk_indirect(
    mem: &GuestMemory,
    table: u64,
    len: u32,
    mut builder: Builder<'_>,
) -> Result<(), ChainError> {
    let entries = len / 16;
    if entries == 0 || len % 16 != 0 || entries > 65536 {
        return Err(ChainError::BadIndirect);
    }
    // One look at the region for the whole table; one that reaches into another is translated piece by piece.
    let whole = mem
        .translate(table, u64::from(len))
        .filter(|&(_, run)| run == u64::from(len))
        .map(|(host, _)| host);
    let mut index = 0u32;
    // Empty descriptors make no segment: the steps are bounded too, or one head could cost a millisecond.
    for _ in 0..entries.min(MAX_SEGMENTS as u32) {
        if index >= entries {
            return Err(ChainError::BadIndex);
        }
        let host = match whole {
            // SAFETY: index < entries, and all of the table is mapped.
            Some(host) => unsafe { host.add(16 * index as usize) },
            None => translate_entry(mem, table, index)?,
        };
        let words = host.cast::<Unaligned>();
        // SAFETY: 16 bytes are mapped at `host`; guest addresses need not be aligned. Volatile, as the guest may write at
        // the same time: what is checked has to be what is used.
        let (addr, rest) = unsafe { (words.read_volatile().0, words.add(1).read_volatile().0) };
        // `Descriptor`, from its length on.
        let (addr, rest) = (u64::from_le(addr), u64::from_le(rest));
        let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
        if flags & DESC_F_INDIRECT != 0 {
            return Err(ChainError::BadIndirect);
        }
        builder.push(addr, len, flags & DESC_F_WRITE != 0)?;
        if flags & DESC_F_NEXT == 0 {
            return builder.finish();
        }
        index = u32::from(next);
    }
    Err(if entries as usize > MAX_SEGMENTS {
        ChainError::TooLong
    } else {
        ChainError::BadIndex
    })
}

/// Host address of entry `index` of an indirect table that does not lie in one region.
#[cold]
fn translate_entry(mem: &GuestMemory, table: u64, index: u32) -> Result<*mut u8, ChainError> {
    let addr = table
        .checked_add(16 * u64::from(index))
        .ok_or(ChainError::BadAddress)?;
    let (host, run) = mem.translate(addr, 16).ok_or_else(|| mem.missing(addr))?;
    if run < 16 {
        return Err(mem.missing(addr + run));
    }
    Ok(host)
}
