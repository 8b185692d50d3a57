//! Random rings, descriptors, messages and commands against a ring thread. Nothing may panic, run for ever, or be
//! written that no writable descriptor names.
//!
//! Guest memory is divided: areas that only readable descriptors name, rings included, must stay as they are.

use std::sync::atomic::Ordering;

use virtq::testing::{Driver, Guest, INDIRECT, NEXT, Random, WRITE, descriptor};

use crate::RingSetup;
use crate::channel::{Command, Op};
use crate::testing::*;
use crate::thread::RingThread;

/// Only read by the device: messages and indirect tables.
const READABLE: u64 = PLACES;
const READABLE_LEN: u64 = 0x2_0000;
/// Named by no descriptor at all.
const CANARY: u64 = READABLE + READABLE_LEN;
const CANARY_LEN: u64 = 0x1_0000;
/// Named by writable descriptors, to the end of the region.
const WRITABLE: u64 = CANARY + CANARY_LEN;
const WRITABLE_LEN: u64 = 0x30_0000;

struct Fuzz {
    random: Random,
    bench: Bench,
    drivers: Vec<Driver>,
    thread: Option<RingThread>,
    /// What the readable area holds.
    readable: Vec<u8>,
    nodes: Vec<u64>,
}

fn setups(drivers: &[Driver], resume: bool) -> Vec<RingSetup> {
    let setup = |(queue, driver): (usize, &Driver)| RingSetup {
        resume,
        event_idx: queue % 2 == 0,
        ..ring(driver, queue)
    };
    drivers.iter().enumerate().map(setup).collect()
}

impl Fuzz {
    fn new(seed: u64) -> Fuzz {
        let mut random = Random::new(seed);
        let bench = Bench::sample();
        for (blob, chunks) in [(0, 3), (1, 1)] {
            for chunk in 0..chunks {
                match random.below(3) {
                    0 => bench.blobs[blob].store(chunk, 0x11),
                    1 => bench.blobs[blob].store_in_file(chunk, 0x22),
                    _ => {}
                }
            }
        }
        let sizes: Vec<u16> = (0..3).map(|_| 1 << random.below(8)).collect();
        let starts: Vec<u16> = (0..3).map(|_| random.draw() as u16).collect();
        let drivers: Vec<Driver> = (0..3)
            .map(|q| bench.driver(q as u64, sizes[q], starts[q]))
            .collect();
        bench.guest.write(CANARY, &vec![0xca; CANARY_LEN as usize]);
        let nodes = [&b"big"[..], b"small", b"dir", b"link", b"inline", b"plain"]
            .map(|name| node(bench.mount, name));
        let thread = Some(bench.thread(setups(&drivers, false)));
        let mut fuzz = Fuzz {
            random,
            bench,
            drivers,
            thread,
            readable: vec![0; READABLE_LEN as usize],
            nodes: [&nodes[..], &[1, 0, 2, 1 << 48, u64::MAX]].concat(),
        };
        fuzz.random.fill(&mut fuzz.readable);
        fuzz.bench.guest.write(READABLE, &fuzz.readable);
        fuzz
    }

    fn write_readable(&mut self, at: u64, bytes: &[u8]) {
        let at = at.min(READABLE_LEN - bytes.len() as u64);
        self.readable[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        self.bench.guest.write(READABLE + at, bytes);
    }

    /// A message that is right but for some of its parts.
    fn message(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        let opcode = match random.below(8) {
            0 => random.below(256) as u32,
            1 => random.draw() as u32,
            _ => {
                [1, 2, 3, 5, 15, 15, 15, 17, 22, 23, 26, 28, 42, 44, 46][random.below(15) as usize]
            }
        };
        let nodeid = self.nodes[random.below(self.nodes.len() as u64) as usize];
        let mut args = match random.below(4) {
            0 => b"big\0small\0".to_vec(),
            1 => {
                let bits = random.below(64);
                let size = random.draw() as u32 >> random.below(32);
                read_args(random.draw() >> bits, size)
            }
            2 => [
                7u32,
                20 + random.below(30) as u32,
                1 << 17,
                random.draw() as u32,
            ]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect(),
            _ => {
                let mut bytes = vec![0; random.below(600) as usize];
                random.fill(&mut bytes);
                bytes
            }
        };
        args.truncate(if random.below(8) == 0 { 5 } else { 600 });
        let mut out = message(opcode, nodeid, &args);
        if random.below(16) == 0 {
            let at = random.below(out.len() as u64) as usize;
            out[at] = random.draw() as u8;
        }
        out
    }

    /// Address and length that a descriptor with `flags` names.
    fn place(&mut self, flags: u16) -> (u64, u32) {
        let random = &mut self.random;
        if random.below(24) == 0 {
            let bits = random.below(64);
            // Far from memory, so that nothing that must not be written is named.
            return ((random.draw() >> bits) | 1 << 40, random.draw() as u32);
        }
        let (base, len) = if flags & WRITE != 0 {
            (WRITABLE, WRITABLE_LEN)
        } else {
            (READABLE, READABLE_LEN)
        };
        let at = random.below(len);
        let bits = random.below(22);
        let most = (len - at).min(1 << bits);
        (base + at, (1 + random.below(most)) as u32)
    }

    fn descriptor(&mut self, table_len: u64, allow_indirect: bool) -> [u8; 16] {
        let mut flags = [0, NEXT, NEXT, WRITE, WRITE | NEXT][self.random.below(5) as usize];
        if allow_indirect && self.random.below(4) == 0 {
            flags = INDIRECT;
        }
        let (addr, mut len) = self.place(flags & !INDIRECT);
        if flags == INDIRECT && self.random.below(4) != 0 {
            len = 16 * (1 + self.random.below(64) as u32);
        }
        descriptor(addr, len, flags, self.random.below(table_len + 1) as u16)
    }

    /// A request with a proper frame: message, then room for the answer, perhaps in an indirect table.
    fn proper(&mut self, queue: usize) -> u16 {
        let message = self.message();
        let at = self.random.below(READABLE_LEN / 2);
        self.write_readable(at, &message);
        let (room, len) = self.place(WRITE);
        let size = self.drivers[queue].size;
        let head = self.random.below(u64::from(size)) as u16;
        let first = descriptor(READABLE + at, message.len() as u32, NEXT, 1);
        let table = [first, descriptor(room, len, WRITE, 0)].concat();
        let place = READABLE_LEN / 2 + 32 * self.random.below(READABLE_LEN / 64 - 2);
        self.write_readable(place, &table);
        let (guest, driver) = (&self.bench.guest, &self.drivers[queue]);
        driver.describe(guest, head, READABLE + place, 32, INDIRECT, 0);
        head
    }

    fn offer(&mut self) {
        let queue = self.random.below(3) as usize;
        let size = u64::from(self.drivers[queue].size);
        let head = match self.random.below(12) {
            0 => self.random.draw() as u16,
            1..4 => {
                let index = self.random.below(size);
                let bytes = self.descriptor(size, true);
                let addr = RINGS + RING_STRIDE * queue as u64 + 16 * index;
                self.bench.guest.write(addr, &bytes);
                index as u16
            }
            _ => self.proper(queue),
        };
        let (driver, guest) = (&mut self.drivers[queue], &self.bench.guest);
        match self.random.below(64) {
            0 => driver.set_avail(guest, self.random.draw() as u16),
            1 => driver.set_used_index(guest, self.random.draw() as u16),
            2 => driver.set_used_event(guest, self.random.draw() as u16),
            _ => driver.offer(guest, head),
        }
    }

    /// A new driver takes queue `queue` over.
    fn new_driver(&mut self, queue: usize, size: u16) {
        let start = self.random.draw() as u16;
        self.drivers[queue] = self.bench.driver(queue as u64, size, start);
        let setup = setups(&self.drivers, false)[queue];
        let thread = self.thread.as_mut().expect("a thread");
        assert_eq!(self.bench.set_ring(thread, &setup).status, 0);
    }

    fn disturb(&mut self) {
        let queue = self.random.below(3) as usize;
        let resume = self.random.below(2) == 0;
        match self.random.below(10) {
            0 => {
                // The worker dies at some head; another one goes on.
                self.thread = None;
                for queue in 0..3 {
                    self.bench.shared.log(queue).count_crash();
                }
                self.thread = Some(self.bench.thread(setups(&self.drivers, resume)));
            }
            1 => {
                let bits = self.random.below(11);
                self.new_driver(queue, 1 << bits);
            }
            2 => {
                let Some(thread) = self.thread.as_mut() else {
                    return;
                };
                let answer = self.bench.stop(thread, queue);
                assert_eq!(answer.status, 0);
                let setup = RingSetup {
                    base: answer.value as u16,
                    ..setups(&self.drivers, resume)[queue]
                };
                assert_eq!(self.bench.set_ring(thread, &setup).status, 0);
            }
            3 => {
                let Some(thread) = self.thread.as_mut() else {
                    return;
                };
                self.bench.remove_memory(thread);
                turn(thread);
                self.bench.add_memory(thread);
            }
            4 => {
                let on = u64::from(self.random.below(2) == 0);
                let enable = Command::new(Op::Enable, queue).with([on, 0, 0, 0]);
                if let Some(thread) = self.thread.as_mut() {
                    self.bench.tell(thread, &enable, &[]);
                }
            }
            5 => self.bench.blobs[0].store(self.random.below(3), 0x33),
            6 => self.bench.blobs[0].discard(self.random.below(3)),
            _ => {
                if self
                    .bench
                    .shared
                    .queue(queue)
                    .broken
                    .load(Ordering::Relaxed)
                    != 0
                {
                    self.new_driver(queue, 64);
                }
            }
        }
    }

    fn check(&self, what: &str) {
        let guest: &Guest = &self.bench.guest;
        let readable = guest.read(READABLE, READABLE_LEN as usize);
        assert!(readable == self.readable, "{what}: written to what is read");
        let canary = guest.read(CANARY, CANARY_LEN as usize);
        assert!(canary.iter().all(|&b| b == 0xca), "{what}: the canary");
        for (spec, file) in guest.regions() {
            let mut before = vec![0; spec.mmap_offset as usize];
            std::os::unix::fs::FileExt::read_exact_at(file, &mut before, 0).unwrap();
            assert!(before.iter().all(|&b| b == 0), "{what}: before a region");
        }
        for queue in 0..3 {
            assert!(self.bench.shared.log(queue).in_flight() <= 1024);
        }
    }
}

/// One turn of the thread's loop; it must say by itself that there is no more.
fn turn(thread: &mut RingThread) {
    thread.finish_pool();
    thread.unpark();
    let rounds = (0..10_000).take_while(|_| thread.round()).count();
    assert!(rounds < 10_000, "the thread finds no end");
}

#[test]
fn random_drivers_do_no_harm() {
    for seed in 1..=25 {
        let mut fuzz = Fuzz::new(seed);
        for step in 0..400 {
            for _ in 0..fuzz.random.below(8) {
                fuzz.offer();
            }
            if let Some(thread) = fuzz.thread.as_mut() {
                turn(thread);
            }
            if fuzz.random.below(4) == 0 {
                fuzz.disturb();
            }
            if step % 50 == 0 {
                fuzz.check(&format!("seed {seed}, step {step}"));
            }
        }
        while fuzz.bench.pool_is_busy() {
            if let Some(thread) = fuzz.thread.as_mut() {
                turn(thread);
            }
        }
        fuzz.check(&format!("seed {seed}"));
    }
}

/// The same with proper drivers: every head is answered once, whatever happens to the worker.
#[test]
fn proper_drivers_get_every_answer_once() {
    for seed in 100..120 {
        let mut fuzz = Fuzz::new(seed);
        let mut waiting = vec![std::collections::HashSet::new(); 3];
        for _ in 0..300 {
            for _ in 0..fuzz.random.below(8) {
                let queue = fuzz.random.below(3) as usize;
                let size = usize::from(fuzz.drivers[queue].size);
                if waiting[queue].len() < size {
                    // Heads are descriptors of their own, each with one indirect table.
                    let head = (0..size as u16)
                        .find(|h| !waiting[queue].contains(h))
                        .expect("a free one");
                    let message = fuzz.message();
                    let at = 0x400 * (size as u64 - 1 + u64::from(head)) % (READABLE_LEN - 0x400);
                    fuzz.write_readable(at, &message);
                    let (room, len) = fuzz.place(WRITE);
                    let place = at + 0x3e0;
                    let table = [
                        descriptor(READABLE + at, message.len() as u32, NEXT, 1),
                        descriptor(room, len, WRITE, 0),
                    ];
                    fuzz.write_readable(place, &table.concat());
                    let (guest, driver) = (&fuzz.bench.guest, &mut fuzz.drivers[queue]);
                    driver.describe(guest, head, READABLE + place, 32, INDIRECT, 0);
                    driver.offer(guest, head);
                    waiting[queue].insert(head);
                }
            }
            let thread = fuzz.thread.as_mut().expect("a thread");
            turn(thread);
            match fuzz.random.below(12) {
                0 => {
                    fuzz.thread = None;
                    fuzz.thread = Some(fuzz.bench.thread(setups(&fuzz.drivers, true)));
                }
                1 => {
                    let queue = fuzz.random.below(3) as usize;
                    let answer = fuzz.bench.stop(thread, queue);
                    let setup = RingSetup {
                        base: answer.value as u16,
                        ..setups(&fuzz.drivers, true)[queue]
                    };
                    assert_eq!(fuzz.bench.set_ring(thread, &setup).status, 0);
                }
                2 => {
                    fuzz.bench.remove_memory(thread);
                    turn(thread);
                    fuzz.bench.add_memory(thread);
                }
                3 => fuzz.bench.blobs[0].store(fuzz.random.below(3), 0x33),
                4 => fuzz.bench.blobs[0].discard(fuzz.random.below(3)),
                _ => {}
            }
            answers(&mut fuzz, &mut waiting, seed);
        }
        for chunk in 0..3 {
            fuzz.bench.blobs[0].store(chunk, 0x33);
        }
        fuzz.bench.blobs[1].store(0, 0x33);
        while waiting.iter().any(|w| !w.is_empty()) {
            turn(fuzz.thread.as_mut().expect("a thread"));
            answers(&mut fuzz, &mut waiting, seed);
        }
        fuzz.check(&format!("seed {seed}"));
        for (queue, driver) in fuzz.drivers.iter().enumerate() {
            let log = fuzz.bench.shared.log(queue);
            assert_eq!((log.in_flight(), log.next_avail()), (0, driver.offered));
        }
    }
}

fn answers(fuzz: &mut Fuzz, waiting: &mut [std::collections::HashSet<u16>], seed: u64) {
    for (driver, waiting) in fuzz.drivers.iter_mut().zip(waiting) {
        for (head, len) in driver.answers(&fuzz.bench.guest) {
            assert!(
                waiting.remove(&(head as u16)),
                "seed {seed}: {head} was answered twice"
            );
            assert!(len == 0 || len >= 16, "seed {seed}: {len} bytes");
        }
    }
}
