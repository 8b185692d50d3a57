//! The other side of the ring for tests: guest memory on memfds, and a driver that writes what it is told to, right or
//! wrong. It shares no code with the device side.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::FileExt;

use crate::{GuestMemory, RegionSpec, RingAddresses};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where the VMM sees guest address 0: any number that is not one of the guest's.
pub const USER_BASE: u64 = 0x7f00_0000_0000;

/// A pseudo-random number generator (xorshift64*), so that a failure comes back with its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.draw() >> 11) % n
    }

    pub fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            *byte = (self.draw() >> 32) as u8;
        }
    }
}

/// A memfd of `len` bytes.
pub fn memfd(len: u64) -> File {
    // SAFETY: a NUL-terminated name; the result is checked and owned by nobody else.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

struct Part {
    spec: RegionSpec,
    file: File,
}

/// Guest memory as a VMM has it.
#[derive(Default)]
pub struct Guest {
    parts: Vec<Part>,
}

impl Guest {
    /// Regions of (guest address, bytes), each behind a page that belongs to no region.
    pub fn new(regions: &[(u64, u64)]) -> Guest {
        let parts = regions.iter().map(|&(guest_addr, size)| Part {
            spec: RegionSpec {
                guest_addr,
                size,
                user_addr: USER_BASE + guest_addr,
                mmap_offset: 4096,
            },
            file: memfd(4096 + size),
        });
        Guest {
            parts: parts.collect(),
        }
    }

    pub fn regions(&self) -> impl Iterator<Item = (RegionSpec, &File)> {
        self.parts.iter().map(|part| (part.spec, &part.file))
    }

    /// The regions mapped, as the device has them.
    pub fn map(&self) -> GuestMemory {
        let mut mem = GuestMemory::default();
        for part in &self.parts {
            mem.add(part.spec, part.file.as_fd()).unwrap();
        }
        mem
    }

    fn part(&self, gpa: u64) -> (&File, u64) {
        let part = self
            .parts
            .iter()
            .find(|p| gpa >= p.spec.guest_addr && gpa - p.spec.guest_addr < p.spec.size)
            .expect("an address of guest memory");
        (&part.file, 4096 + gpa - part.spec.guest_addr)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let (file, at) = self.part(gpa);
        file.write_all_at(bytes, at).unwrap();
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let (file, at) = self.part(gpa);
        file.read_exact_at(&mut out, at).unwrap();
        out
    }

    pub fn read_u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa, 2).try_into().unwrap())
    }

    pub fn read_u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().unwrap())
    }
}

/// A descriptor: address, length, flags, next.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut out = [0; 16];
    out[0..8].copy_from_slice(&addr.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..14].copy_from_slice(&flags.to_le_bytes());
    out[14..16].copy_from_slice(&next.to_le_bytes());
    out
}

/// The driver's side of one ring.
pub struct Driver {
    pub size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    /// The driver's free-running indexes.
    pub offered: u16,
    pub seen: u16,
}

impl Driver {
    /// A ring of `size` entries whose parts lie one behind the other from `gpa` on, 4096-byte aligned. All indexes
    /// start at `start`.
    pub fn new(guest: &Guest, gpa: u64, size: u16, start: u16) -> Driver {
        let n = u64::from(size);
        let driver = Driver {
            size,
            desc: gpa,
            avail: gpa + 16 * n,
            used: (gpa + 16 * n + 6 + 2 * n).next_multiple_of(4096),
            offered: start,
            seen: start,
        };
        guest.write(driver.avail + 2, &start.to_le_bytes());
        guest.write(driver.used + 2, &start.to_le_bytes());
        driver
    }

    /// Bytes that the ring takes from `gpa` on.
    pub fn span(size: u16) -> u64 {
        let n = u64::from(size);
        (16 * n + 6 + 2 * n).next_multiple_of(4096) + 6 + 8 * n
    }

    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            desc: USER_BASE + self.desc,
            avail: USER_BASE + self.avail,
            used: USER_BASE + self.used,
        }
    }

    /// Guest address of the used ring.
    pub fn used_gpa(&self) -> u64 {
        self.used
    }

    pub fn describe(&self, guest: &Guest, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        guest.write(
            self.desc + 16 * u64::from(index),
            &descriptor(addr, len, flags, next),
        );
    }

    /// Offers `head`, whatever that is.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.offered % self.size);
        guest.write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail(guest, self.offered.wrapping_add(1));
    }

    pub fn set_avail(&mut self, guest: &Guest, index: u16) {
        self.offered = index;
        guest.write(self.avail + 2, &index.to_le_bytes());
    }

    pub fn set_no_interrupt(&self, guest: &Guest, on: bool) {
        guest.write(self.avail, &u16::from(on).to_le_bytes());
    }

    pub fn no_notify(&self, guest: &Guest) -> bool {
        guest.read_u16(self.used) & 1 != 0
    }

    /// Wants a signal when the used index passes `index`.
    pub fn set_used_event(&self, guest: &Guest, index: u16) {
        guest.write(
            self.avail + 4 + 2 * u64::from(self.size),
            &index.to_le_bytes(),
        );
    }

    /// The avail index at which the device wants a kick.
    pub fn avail_event(&self, guest: &Guest) -> u16 {
        guest.read_u16(self.used + 4 + 8 * u64::from(self.size))
    }

    pub fn used_index(&self, guest: &Guest) -> u16 {
        guest.read_u16(self.used + 2)
    }

    pub fn set_used_index(&self, guest: &Guest, index: u16) {
        guest.write(self.used + 2, &index.to_le_bytes());
    }

    /// Answers since the last call: head and length.
    pub fn answers(&mut self, guest: &Guest) -> Vec<(u32, u32)> {
        let end = self.used_index(guest);
        let mut out = Vec::new();
        while self.seen != end {
            let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
            out.push((guest.read_u32(at), guest.read_u32(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        out
    }
}
