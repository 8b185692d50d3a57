//! A device for the unit tests: it plays the other side of the ring through guest-physical addresses alone.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::exchange::{Framing, Layout};
use crate::fault::Faults;
use crate::memory::{Memory, Region, new_file};
use crate::queue::{Queue, QueueOptions};
use crate::ring::{Desc, RingOptions};
use crate::sys;

/// Two regions of 4 MiB with a hole between them.
pub fn memory() -> Memory {
    let memory = Memory::default();
    for gpa in [0x10_0000u64, 0x1_0000_0000] {
        memory
            .add(Region::new(gpa, 4 << 20, new_file(4 << 20, false).unwrap(), 0).unwrap())
            .unwrap();
    }
    memory
}

/// The device's side of a split ring.
pub struct FakeRing {
    desc: u64,
    avail: u64,
    used: u64,
    size: u16,
    event_idx: bool,
    last_avail: u16,
    used_idx: u16,
}

fn read<const N: usize>(memory: &Memory, gpa: u64) -> [u8; N] {
    let mut b = [0u8; N];
    memory.read(gpa, &mut b).unwrap();
    b
}

fn read_u16(memory: &Memory, gpa: u64) -> u16 {
    u16::from_le_bytes(read(memory, gpa))
}

impl FakeRing {
    pub fn new([desc, avail, used]: [u64; 3], size: u16, event_idx: bool, base: u16) -> Self {
        FakeRing {
            desc,
            avail,
            used,
            size,
            event_idx,
            last_avail: base,
            used_idx: base,
        }
    }

    /// The next available chain: its head and descriptors, indirect tables followed.
    pub fn take(&mut self, memory: &Memory) -> Option<(u16, Vec<Desc>)> {
        if read_u16(memory, self.avail + 2) == self.last_avail {
            return None;
        }
        let slot = u64::from(self.last_avail % self.size);
        let head = read_u16(memory, self.avail + 4 + 2 * slot);
        self.last_avail = self.last_avail.wrapping_add(1);
        let (mut table, mut index) = (self.desc, head);
        let mut descs = Vec::new();
        loop {
            let b: [u8; 16] = read(memory, table + 16 * u64::from(index));
            let gpa = u64::from_le_bytes(b[0..8].try_into().unwrap());
            let len = u32::from_le_bytes(b[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(b[12..14].try_into().unwrap());
            if flags & 4 != 0 {
                assert_eq!((flags, len % 16), (4, 0));
                (table, index) = (gpa, 0);
                continue;
            }
            descs.push(Desc {
                gpa,
                len,
                writable: flags & 2 != 0,
                indirect: false,
            });
            if flags & 1 == 0 {
                return Some((head, descs));
            }
            index = u16::from_le_bytes(b[14..16].try_into().unwrap());
        }
    }

    /// Puts a used element and moves the index; whether the driver wants an interrupt for it.
    pub fn complete(&mut self, memory: &Memory, id: u32, len: u32) -> bool {
        let slot = u64::from(self.used_idx % self.size);
        memory
            .write(self.used + 4 + 8 * slot, &id.to_le_bytes())
            .unwrap();
        memory
            .write(self.used + 8 + 8 * slot, &len.to_le_bytes())
            .unwrap();
        let old = self.used_idx;
        self.used_idx = old.wrapping_add(1);
        memory
            .write(self.used + 2, &self.used_idx.to_le_bytes())
            .unwrap();
        if self.event_idx {
            read_u16(memory, self.avail + 4 + 2 * u64::from(self.size)) == old
        } else {
            read_u16(memory, self.avail) & 1 == 0
        }
    }

    /// Sets avail_event.
    pub fn want_kick_at(&self, memory: &Memory, index: u16) {
        memory
            .write(
                self.used + 4 + 8 * u64::from(self.size),
                &index.to_le_bytes(),
            )
            .unwrap();
    }

    /// Sets VIRTQ_USED_F_NO_NOTIFY.
    pub fn suppress_kicks(&self, memory: &Memory) {
        memory.write(self.used, &1u16.to_le_bytes()).unwrap();
    }
}

/// The readable bytes of a chain.
pub fn readable(memory: &Memory, descs: &[Desc]) -> Vec<u8> {
    let mut all = Vec::new();
    for d in descs.iter().filter(|d| !d.writable) {
        let mut part = vec![0u8; d.len as usize];
        memory.read(d.gpa, &mut part).unwrap();
        all.extend(part);
    }
    all
}

/// Writes `bytes` into the writable part of a chain, from its start.
pub fn answer(memory: &Memory, descs: &[Desc], mut bytes: &[u8]) {
    for d in descs.iter().filter(|d| d.writable) {
        let (now, later) = bytes.split_at(bytes.len().min(d.len as usize));
        memory.write(d.gpa, now).unwrap();
        bytes = later;
    }
    assert!(bytes.is_empty(), "the answer does not fit");
}

/// A FUSE answer: out header and body.
pub fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut b = ((16 + body.len()) as u32).to_le_bytes().to_vec();
    b.extend(error.to_le_bytes());
    b.extend(unique.to_le_bytes());
    b.extend(body);
    b
}

/// The other side of a whole queue; when and how it answers is the test's choice.
pub struct FakeDevice {
    queue: Arc<Queue>,
    ring: FakeRing,
    /// It sends no interrupts.
    pub mute: bool,
}

impl FakeDevice {
    pub fn new(queue: &Arc<Queue>) -> Self {
        let size = queue.options.ring.size;
        let ring = FakeRing::new(queue.addresses().0, size, queue.options.ring.event_idx, 0);
        FakeDevice {
            queue: queue.clone(),
            ring,
            mute: false,
        }
    }

    /// The next request: its head, descriptors and readable bytes.
    pub fn take(&mut self) -> Option<(u16, Vec<Desc>, Vec<u8>)> {
        let memory = self.queue.memory.clone();
        let (head, descs) = self.ring.take(&memory)?;
        let request = readable(&memory, &descs);
        Some((head, descs, request))
    }

    /// As [`FakeDevice::take`], waiting up to ten seconds.
    pub fn expect(&mut self) -> (u16, Vec<Desc>, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(taken) = self.take() {
                return taken;
            }
            assert!(Instant::now() < deadline, "no request came");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Answers with `bytes` and a used length of `used`, and signals the driver if it wants that.
    pub fn answer(&mut self, head: u16, descs: &[Desc], bytes: &[u8], used: u32) {
        let memory = self.queue.memory.clone();
        answer(&memory, descs, bytes);
        let wanted = self.ring.complete(&memory, u32::from(head), used);
        if wanted && !self.mute {
            sys::signal(self.queue.call_fd().as_fd()).unwrap();
        }
    }

    /// Answers a well-formed reply with `body`.
    pub fn reply(&mut self, head: u16, descs: &[Desc], request: &[u8], body: &[u8]) {
        let unique = u64::from_le_bytes(request[8..16].try_into().unwrap());
        let bytes = reply(unique, 0, body);
        self.answer(head, descs, &bytes, bytes.len() as u32);
    }
}

/// A queue of `size` in a memory of its own.
pub fn queue(size: u16) -> Arc<Queue> {
    let options = QueueOptions {
        ring: RingOptions {
            size,
            event_idx: true,
            reuse_newest: true,
        },
        layout: Layout {
            framing: Framing::Linux,
            indirect: true,
        },
    };
    Arc::new(
        Queue::new(
            1,
            options,
            0,
            Arc::new(memory()),
            Arc::new(Faults::default()),
        )
        .unwrap(),
    )
}
