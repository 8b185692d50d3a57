//! The driver's side of one split virtqueue (virtio 1.2, section 2.7): descriptor table, available ring, used
//! ring, chained and indirect descriptors, event indices; and a check of everything that the device returns.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::error::Error;
use crate::fault::FaultKind;
use crate::memory::{Memory, Span, load_le, store_le};

const DESC_SIZE: usize = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// In `avail.flags`: no interrupts, please (without EVENT_IDX).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// In `used.flags`: no kicks, please (without EVENT_IDX).
const USED_F_NO_NOTIFY: u16 = 1;

/// A buffer of a chain, by guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    pub gpa: u64,
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
    /// It is a table of descriptors. Without `writable`, as a driver should have it.
    pub indirect: bool,
}

impl Desc {
    /// Bytes of a table entry with these flags and successor added.
    fn encode(self, flags: u16, next: u16) -> [u8; DESC_SIZE] {
        let write = if self.writable { F_WRITE } else { 0 };
        let indirect = if self.indirect { F_INDIRECT } else { 0 };
        raw_desc(self.gpa, self.len, flags | write | indirect, next)
    }
}

fn raw_desc(gpa: u64, len: u32, flags: u16, next: u16) -> [u8; DESC_SIZE] {
    let mut b = [0u8; DESC_SIZE];
    b[0..8].copy_from_slice(&gpa.to_le_bytes());
    b[8..12].copy_from_slice(&len.to_le_bytes());
    b[12..14].copy_from_slice(&flags.to_le_bytes());
    b[14..16].copy_from_slice(&next.to_le_bytes());
    b
}

/// Writes `descs` as an indirect table into `table`, which must hold 16 bytes for each.
pub fn write_table(table: &Span, descs: &[Desc]) {
    for (i, desc) in descs.iter().enumerate() {
        let last = i + 1 == descs.len();
        table.write(
            i * DESC_SIZE,
            &desc.encode(
                if last { 0 } else { F_NEXT },
                if last { 0 } else { i as u16 + 1 },
            ),
        );
    }
}

/// Bytes of an indirect table of `n` descriptors.
pub fn table_size(n: usize) -> usize {
    n * DESC_SIZE
}

/// What the driver negotiated, and how it plays.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    /// Entries, a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Free descriptors are taken newest first, as Linux does, so that a head is soon used again. Oldest first
    /// makes stale completions easier to tell.
    pub reuse_newest: bool,
}

/// A chain in flight.
pub struct InFlight {
    /// The owner's own mark.
    pub tag: u64,
    /// Memory that the device may write until it completes the chain; kept alive here, and looked at when the
    /// queue stops.
    pub watch: Option<Arc<Span>>,
    n_descs: u16,
}

/// A valid completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub tag: u64,
    pub head: u16,
    pub len: u32,
}

/// A completion that the specification does not allow.
#[derive(Debug)]
pub struct BadUsed {
    pub kind: FaultKind,
    pub text: String,
}

/// The ring. Not shared: its owner locks.
pub struct Ring {
    options: RingOptions,
    desc: Span,
    avail: Span,
    used: Span,
    /// Successor of each descriptor in its chain; ours, the device cannot touch it.
    next: Vec<u16>,
    free: VecDeque<u16>,
    in_flight: Vec<Option<InFlight>>,
    n_in_flight: usize,
    avail_idx: u16,
    last_used: u16,
    broken: bool,
}

impl Ring {
    /// Lays out a ring in guest memory, all indices at `base`.
    pub fn new(memory: &Memory, options: RingOptions, base: u16) -> Result<Self, Error> {
        let size = options.size;
        if !size.is_power_of_two() || size > 1 << 15 {
            return Err(Error::Invalid(format!(
                "queue size {size} is no power of two up to 32768"
            )));
        }
        let n = usize::from(size);
        let ring = Ring {
            options,
            desc: memory.alloc(n * DESC_SIZE, 16, None)?,
            // flags, idx, ring, used_event; flags, idx, ring, avail_event
            avail: memory.alloc(6 + 2 * n, 2, None)?,
            used: memory.alloc(6 + 8 * n, 4, None)?,
            next: vec![0; n],
            free: (0..size).collect(),
            in_flight: (0..size).map(|_| None).collect(),
            n_in_flight: 0,
            avail_idx: base,
            last_used: base,
            broken: false,
        };
        for span in [&ring.desc, &ring.avail, &ring.used] {
            span.write(0, &vec![0; span.len()]);
        }
        store_le(ring.avail.atomic_u16(2), base);
        store_le(ring.used.atomic_u16(2), base);
        if options.event_idx {
            // As if both sides had come here one by one: each wants to be told of the very next entry.
            store_le(ring.avail.atomic_u16(4 + 2 * n), base);
            store_le(ring.used.atomic_u16(4 + 8 * n), base);
        }
        Ok(ring)
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring.
    pub fn gpas(&self) -> [u64; 3] {
        [self.desc.gpa(), self.avail.gpa(), self.used.gpa()]
    }

    /// The same as addresses in this process, as SET_VRING_ADDR wants them.
    pub fn user_addresses(&self) -> [u64; 3] {
        [
            self.desc.user_address(),
            self.avail.user_address(),
            self.used.user_address(),
        ]
    }

    pub fn size(&self) -> u16 {
        self.options.size
    }

    pub fn n_in_flight(&self) -> usize {
        self.n_in_flight
    }

    pub fn in_flight(&self) -> impl Iterator<Item = &InFlight> {
        self.in_flight.iter().flatten()
    }

    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The used index as it stands in memory.
    pub fn used_idx(&self) -> u16 {
        load_le(self.used.atomic_u16(2))
    }

    /// Remembers the used index that the device must leave alone from now on.
    pub fn freeze(&mut self) {
        self.last_used = self.used_idx();
    }

    /// The used index at [`Ring::freeze`].
    pub fn frozen_used_idx(&self) -> u16 {
        self.last_used
    }

    /// Forgets all chains in flight; returns the memory that the device was allowed to write.
    pub fn drain_watched(&mut self) -> Vec<Arc<Span>> {
        self.n_in_flight = 0;
        self.in_flight
            .iter_mut()
            .filter_map(|f| f.take().and_then(|f| f.watch))
            .collect()
    }

    /// Whether completions wait to be popped.
    pub fn has_used(&self) -> bool {
        !self.broken && self.used_idx() != self.last_used
    }

    fn take_free(&mut self) -> u16 {
        let taken = if self.options.reuse_newest {
            self.free.pop_back()
        } else {
            self.free.pop_front()
        };
        taken.expect("the caller counted the free descriptors")
    }

    /// Makes a chain available; returns its head. With `table`, `descs` already stand in that indirect table and
    /// the chain is one descriptor that points at it.
    pub fn add(
        &mut self,
        descs: &[Desc],
        table: Option<(u64, u32)>,
        tag: u64,
        watch: Option<Arc<Span>>,
    ) -> Result<u16, Error> {
        let n = if table.is_some() { 1 } else { descs.len() };
        if n == 0 {
            return Err(Error::Invalid(
                "a chain needs at least one descriptor".into(),
            ));
        }
        if n > self.free.len() {
            return Err(Error::RingFull);
        }
        let head = self.take_free();
        if let Some((gpa, len)) = table {
            self.desc.write(
                usize::from(head) * DESC_SIZE,
                &raw_desc(gpa, len, F_INDIRECT, 0),
            );
        } else {
            let mut at = head;
            for (i, desc) in descs.iter().enumerate() {
                let last = i + 1 == n;
                let next = if last { 0 } else { self.take_free() };
                self.desc.write(
                    usize::from(at) * DESC_SIZE,
                    &desc.encode(if last { 0 } else { F_NEXT }, next),
                );
                self.next[usize::from(at)] = next;
                at = next;
            }
        }
        self.in_flight[usize::from(head)] = Some(InFlight {
            tag,
            watch,
            n_descs: n as u16,
        });
        self.n_in_flight += 1;
        let slot = usize::from(self.avail_idx & (self.options.size - 1));
        self.avail.write(4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        store_le(self.avail.atomic_u16(2), self.avail_idx);
        Ok(head)
    }

    /// Whether the device wants a kick for the chains added since the available index was `old`.
    pub fn needs_kick(&self, old: u16) -> bool {
        // The index must be visible before the device's wish is read: virtio 1.2, 2.7.13.4.1.
        fence(Ordering::SeqCst);
        if self.options.event_idx {
            let event = load_le(self.used.atomic_u16(4 + 8 * usize::from(self.options.size)));
            need_event(event, self.avail_idx, old)
        } else {
            self.avail_idx != old && load_le(self.used.atomic_u16(0)) & USED_F_NO_NOTIFY == 0
        }
    }

    /// Asks for an interrupt at the next completion; true when one arrived meanwhile, so that no interrupt
    /// may come for it.
    pub fn enable_interrupts(&self) -> bool {
        if self.options.event_idx {
            store_le(
                self.avail
                    .atomic_u16(4 + 2 * usize::from(self.options.size)),
                self.last_used,
            );
        } else {
            store_le(self.avail.atomic_u16(0), 0);
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts. A hint: the device may have looked already.
    pub fn disable_interrupts(&self) {
        if self.options.event_idx {
            // An index just passed is not reached again before 65535 more completions.
            store_le(
                self.avail
                    .atomic_u16(4 + 2 * usize::from(self.options.size)),
                self.last_used.wrapping_sub(1),
            );
        } else {
            store_le(self.avail.atomic_u16(0), AVAIL_F_NO_INTERRUPT);
        }
    }

    /// The next completion, with its descriptors freed; `None` when there is none.
    pub fn pop(&mut self) -> Option<Result<Used, BadUsed>> {
        if self.broken {
            return None;
        }
        let pending = self.used_idx().wrapping_sub(self.last_used);
        if pending == 0 {
            return None;
        }
        if usize::from(pending) > usize::from(self.options.size) {
            self.broken = true;
            let text = format!(
                "used index moved by {pending} in a ring of {}",
                self.options.size
            );
            return Some(Err(BadUsed {
                kind: FaultKind::UsedIndexJump,
                text,
            }));
        }
        let slot = usize::from(self.last_used & (self.options.size - 1));
        let mut element = [0u8; 8];
        self.used.read(4 + 8 * slot, &mut element);
        self.last_used = self.last_used.wrapping_add(1);
        let [i0, i1, i2, i3, l0, l1, l2, l3] = element;
        let (id, len) = (
            u32::from_le_bytes([i0, i1, i2, i3]),
            u32::from_le_bytes([l0, l1, l2, l3]),
        );
        let Some(entry) = self.in_flight.get_mut(id as usize) else {
            let text = format!(
                "used id {id} in a ring of {} (length {len})",
                self.options.size
            );
            return Some(Err(BadUsed {
                kind: FaultKind::UsedIdRange,
                text,
            }));
        };
        let Some(entry) = entry.take() else {
            let text = format!(
                "head {id} (length {len}) is not in flight: completed twice or never made available"
            );
            return Some(Err(BadUsed {
                kind: FaultKind::NotInFlight,
                text,
            }));
        };
        self.n_in_flight -= 1;
        let head = id as u16;
        let mut at = head;
        for _ in 0..entry.n_descs {
            self.free.push_back(at);
            at = self.next[usize::from(at)];
        }
        Some(Ok(Used {
            tag: entry.tag,
            head,
            len,
        }))
    }
}

/// `vring_need_event` of virtio 1.2, 2.7.7.2: whether index `event` was passed on the way from `old` to `new`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
