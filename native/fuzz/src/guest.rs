//! Guest memory that the fuzzer owns, with a shadow: what the device wrote, and what it may write.

use std::ops::Range;
use std::os::fd::AsRawFd as _;

use virtq::testing::{Guest, INDIRECT, NEXT, WRITE};

/// Rings and descriptor tables, 32 KiB.
pub const RINGS: u64 = 0x10_0000;
pub const RINGS_LEN: u64 = 0x8000;
/// Buffers: two regions that are neighbours in the guest and not in the host. Before and behind them there is nothing.
pub const BUFFERS: u64 = 0x20_0000;
pub const BUFFERS_LEN: u64 = 0x1_4000;
pub const REGIONS: [(u64, u64); 3] = [
    (RINGS, RINGS_LEN),
    (BUFFERS, 0x1_0000),
    (BUFFERS + 0x1_0000, 0x4000),
];
/// Bytes of each file before its region.
const LEAD: usize = 4096;
/// Entries of an indirect table that are looked at.
const TABLE_MAX: u64 = 4096;

/// A range of guest addresses.
pub type Span = Range<u64>;

/// A descriptor, as the driver wrote it.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A chain that a well-meaning device follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    pub readable: Vec<Span>,
    pub writable: Vec<Span>,
}

fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|s| s.end - s.start).sum()
}

impl Walked {
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }
}

struct Part {
    start: u64,
    base: *mut u8,
    len: usize,
    shadow: Vec<u8>,
}

/// The mapped memory. One thread uses it.
pub struct Memory {
    parts: Vec<Part>,
}

impl Memory {
    /// Maps the memory of `guest` a second time.
    pub fn new(guest: &Guest) -> Memory {
        let parts = guest.regions().map(|(spec, file)| {
            let len = LEAD + spec.size as usize;
            // SAFETY: a fresh mapping of a file that is so long; the result is checked.
            let base = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert!(base != libc::MAP_FAILED);
            Part {
                start: spec.guest_addr,
                base: base.cast(),
                len,
                shadow: vec![0; len],
            }
        });
        Memory {
            parts: parts.collect(),
        }
    }

    /// Zeroes everything.
    pub fn clear(&mut self) {
        for part in &mut self.parts {
            // SAFETY: our mapping; the device is not running.
            unsafe { std::ptr::write_bytes(part.base, 0, part.len) };
        }
    }

    fn place(&self, addr: u64) -> Option<(&Part, usize)> {
        let part = self
            .parts
            .iter()
            .find(|p| addr >= p.start && addr - p.start < (p.len - LEAD) as u64)?;
        Some((part, LEAD + (addr - part.start) as usize))
    }

    /// Whether a byte is memory.
    pub fn has(&self, addr: u64) -> bool {
        self.place(addr).is_some()
    }

    /// Writes what lies in memory.
    pub fn write(&self, mut addr: u64, mut bytes: &[u8]) {
        while let Some((part, at)) = self.place(addr) {
            let n = bytes.len().min(part.len - at);
            if n == 0 {
                return;
            }
            // SAFETY: `at + n` is inside our mapping; the device is not running.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), part.base.add(at), n) };
            addr += n as u64;
            bytes = &bytes[n..];
        }
    }

    /// Reads; None when a part is no memory.
    pub fn read(&self, mut addr: u64, len: usize) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let (part, at) = self.place(addr)?;
            let n = (len - out.len()).min(part.len - at);
            // SAFETY: `at + n` is inside our mapping; the device is not running.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(part.base.add(at), n) });
            addr += n as u64;
        }
        Some(out)
    }

    pub fn read_u16(&self, addr: u64) -> u16 {
        let bytes = self.read(addr, 2).expect("memory");
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub fn read_u32(&self, addr: u64) -> u32 {
        let bytes = self.read(addr, 4).expect("memory");
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// The descriptor at `addr`.
    pub fn descriptor(&self, addr: u64) -> Option<Descriptor> {
        let (part, at) = self.place(addr)?;
        let mut raw = [0; 16];
        if part.len - at < 16 {
            // No table of a real driver crosses the border of a region.
            return None;
        }
        // SAFETY: inside our mapping; the device is not running.
        unsafe { std::ptr::copy_nonoverlapping(part.base.add(at), raw.as_mut_ptr(), 16) };
        let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        Some(Descriptor {
            addr: u64::from(word(0)) | u64::from(word(4)) << 32,
            len: word(8),
            flags: word(12) as u16,
            next: (word(12) >> 16) as u16,
        })
    }

    /// What a write descriptor of the table at `table` may name: every descriptor with the flag counts, whether a chain
    /// leads to it or not. Also the places of all indirect tables.
    pub fn writable(&self, table: u64, size: u16) -> (Vec<Span>, Vec<Span>) {
        let (mut spans, mut tables) = (Vec::new(), Vec::new());
        let note = |d: &Descriptor, spans: &mut Vec<Span>| {
            if d.flags & WRITE != 0 && d.len > 0 {
                spans.push(d.addr..d.addr.saturating_add(d.len.into()));
            }
        };
        for i in 0..u64::from(size) {
            let Some(d) = self.descriptor(table + 16 * i) else {
                continue;
            };
            note(&d, &mut spans);
            if d.flags & INDIRECT != 0 {
                let span = d.addr..d.addr.saturating_add(d.len.into());
                if tables.contains(&span) {
                    continue;
                }
                for at in (0..(u64::from(d.len) / 16).min(TABLE_MAX)).map(|i| 16 * i) {
                    let inner = d.addr.checked_add(at).and_then(|at| self.descriptor(at));
                    let Some(inner) = inner else { break };
                    note(&inner, &mut spans);
                }
                tables.push(span);
            }
        }
        (spans, tables)
    }

    /// The chain at `head`, by the words of virtio 1.2, section 2.7.5; None when it is malformed.
    pub fn walk(&self, table: u64, size: u16, head: u16) -> Option<Walked> {
        let mut walked = Walked::default();
        let (mut table, mut entries, mut index) = (table, u64::from(size), u64::from(head));
        let mut indirect = false;
        for _ in 0..=entries.max(TABLE_MAX) {
            if index >= entries {
                return None;
            }
            let d = self.descriptor(table.checked_add(16 * index)?)?;
            if d.flags & INDIRECT != 0 {
                if indirect || d.flags & NEXT != 0 || d.len == 0 || d.len % 16 != 0 {
                    return None;
                }
                // Longer than any queue is, which a driver must not make it.
                if d.len / 16 > 65_536 {
                    return None;
                }
                (table, entries, index) = (d.addr, u64::from(d.len) / 16, 0);
                indirect = true;
                continue;
            }
            let end = d.addr.checked_add(d.len.into())?;
            let write = d.flags & WRITE != 0;
            if !write && !walked.writable.is_empty() {
                return None;
            }
            if d.len > 0 {
                let mut at = d.addr;
                while at < end {
                    let (part, place) = self.place(at)?;
                    at += (part.len - place) as u64;
                }
                let list = if write {
                    &mut walked.writable
                } else {
                    &mut walked.readable
                };
                list.push(d.addr..end);
            }
            if d.flags & NEXT == 0 {
                return Some(walked);
            }
            index = u64::from(d.next);
        }
        None
    }

    /// The bytes of `spans`, one behind the other.
    pub fn gather(&self, spans: &[Span]) -> Vec<u8> {
        let read = |s: &Span| self.read(s.start, (s.end - s.start) as usize);
        spans.iter().filter_map(read).flatten().collect()
    }

    /// Notes what memory holds now.
    pub fn remember(&mut self) {
        for part in &mut self.parts {
            // SAFETY: our mapping; the device is not running.
            let now = unsafe { std::slice::from_raw_parts(part.base, part.len) };
            part.shadow.copy_from_slice(now);
        }
    }

    /// Runs of bytes that are not what [`Memory::remember`] noted. Bytes before a region have addresses before it.
    pub fn changed(&self) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for part in &self.parts {
            // SAFETY: our mapping; the device is not running.
            let now = unsafe { std::slice::from_raw_parts(part.base, part.len) };
            if now == part.shadow {
                continue;
            }
            let first = part.start - LEAD as u64;
            for (i, (a, b)) in now.chunks(64).zip(part.shadow.chunks(64)).enumerate() {
                if a == b {
                    continue;
                }
                for (j, _) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
                    let at = first + (64 * i + j) as u64;
                    match spans.last_mut() {
                        Some(last) if last.end == at => last.end += 1,
                        _ => spans.push(at..at + 1),
                    }
                }
            }
        }
        spans
    }
}

/// `spans` sorted and joined.
pub fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|s| s.start);
    let mut merged: Vec<Span> = Vec::new();
    for span in spans.into_iter().filter(|s| s.start < s.end) {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

/// Whether `merged` (sorted, joined) has all of `span`.
pub fn covers(merged: &[Span], span: &Span) -> bool {
    let at = merged.partition_point(|s| s.start <= span.start);
    at > 0 && span.end <= merged[at - 1].end
}

/// Whether two sets of spans share an address.
pub fn meet(a: &[Span], b: &[Span]) -> bool {
    a.iter()
        .any(|a| b.iter().any(|b| a.start < b.end && b.start < a.end))
}
