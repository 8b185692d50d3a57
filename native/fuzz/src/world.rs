//! A worker over the built image, three queues, and guest memory with a shadow. Made once per thread and set back for each
//! input, because an eventfd, a memfd and a mapping per run would be all that a fuzzer does.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use rafs_format::Tree;
use session::inflight::PHASE_SERVING;
use virtq::testing::{Driver, Guest};
use worker::RingSetup;
use worker::channel::{Command, Op};
use worker::testing::{Bench, Worker, ring};

use crate::guest::{self, Memory, RINGS, Span};
use crate::image;

pub const QUEUES: usize = 3;
const STRIDE: u64 = 0x2000;
/// Longest ring that fits.
pub const MOST: u16 = 128;
const HOUR_NS: u64 = 3_600_000_000_000;

/// One queue as its driver knows it.
pub struct Queue {
    pub driver: Driver,
    pub event_idx: bool,
    /// Heads that were offered and not answered. Only meaningful while the driver is lawful.
    pub offered: HashSet<u16>,
    /// The driver has kept the rules since it set up the ring.
    pub lawful: bool,
}

/// Everything around one worker.
pub struct World {
    pub bench: Bench,
    pub memory: Memory,
    pub worker: Worker,
    pub queues: Vec<Queue>,
    /// Node ids of all files, and some that are none.
    pub nodes: Vec<u64>,
    pub chunks: u64,
    /// An eventfd for calls.
    pub call: std::os::fd::OwnedFd,
    /// Guest addresses of the regions that are not there.
    away: Vec<u64>,
}

impl World {
    pub fn new() -> World {
        let image = &image::built().bootstrap;
        let tree = Tree::parse(image).expect("the image");
        let chunks = tree.blob(0).expect("a blob").chunk_count;
        let mut bench = Bench::new(image, u64::from(image::CHUNK_SIZE), &[chunks]);
        bench.guest = Guest::new(&guest::REGIONS);
        let memory = Memory::new(&bench.guest);
        let mut nodes = vec![1, 0, 2, u64::MAX, 1 << 48];
        let mut waiting = vec![tree.root()];
        while let Some(nid) = waiting.pop() {
            let inode = tree.inode(nid).expect("an inode");
            for entry in tree.entries(&inode, 0) {
                let entry = entry.expect("an entry");
                let id = entry.nid + 2;
                if entry.name != b"." && entry.name != b".." && !nodes.contains(&id) {
                    nodes.push(id);
                    if entry.d_type == libc::DT_DIR {
                        waiting.push(entry.nid);
                    }
                }
            }
        }
        let queues: Vec<Queue> = (0..QUEUES)
            .map(|i| Queue {
                driver: Driver::new(&bench.guest, RINGS + STRIDE * i as u64, 64, 0),
                event_idx: i % 2 == 0,
                offered: HashSet::new(),
                lawful: true,
            })
            .collect();
        let worker = Worker::start(&bench, Vec::new());
        World {
            bench,
            memory,
            worker,
            queues,
            nodes,
            chunks: chunks.into(),
            call: worker::testing::call_fd(),
            away: Vec::new(),
        }
    }

    fn setups(&self, resume: bool) -> Vec<RingSetup> {
        let setup = |(i, queue): (usize, &Queue)| RingSetup {
            resume,
            event_idx: queue.event_idx,
            ..ring(&queue.driver, i)
        };
        self.queues.iter().enumerate().map(setup).collect()
    }

    /// As after a boot: memory is zero, rings are empty, no chunk is there.
    pub fn reset(&mut self) {
        self.set_away(&[]);
        self.memory.clear();
        for chunk in 0..self.chunks {
            self.bench.blobs[0].discard(chunk);
        }
        self.bench
            .shared
            .record()
            .initialised
            .store(0, Ordering::Relaxed);
        for i in 0..QUEUES {
            self.set_up(i, 64, 0, i % 2 == 0);
        }
    }

    /// A new driver takes queue `i` over.
    pub fn set_up(&mut self, i: usize, size: u16, start: u16, event_idx: bool) {
        let at = RINGS + STRIDE * i as u64;
        self.memory.write(at, &vec![0; STRIDE as usize]);
        let driver = Driver::new(&self.bench.guest, at, size, start);
        self.queues[i] = Queue {
            driver,
            event_idx,
            offered: HashSet::new(),
            lawful: true,
        };
        let setup = self.setups(false)[i];
        let answer = self.bench.set_ring(self.worker.thread(), &setup);
        assert_eq!(answer.status, 0, "a ring in memory is taken");
    }

    /// GET_VRING_BASE, then a start there.
    pub fn stop_and_start(&mut self, i: usize, resume: bool) {
        let answer = self.bench.stop(self.worker.thread(), i);
        assert_eq!(answer.status, 0);
        let setup = RingSetup {
            base: answer.value as u16,
            ..self.setups(resume)[i]
        };
        let answer = self.bench.set_ring(self.worker.thread(), &setup);
        assert_eq!(answer.status, 0);
        // A driver that stops a ring and does not go on with its log has given up what was in flight.
        self.queues[i].lawful &= resume;
    }

    /// The worker dies and is replaced, as the keeper does it.
    pub fn crash(&mut self) {
        for i in 0..QUEUES {
            self.bench.shared.log(i).count_crash();
        }
        let setups = self.setups(true);
        self.worker.restart(&self.bench, setups);
        self.away.clear();
    }

    /// Takes the regions of `which` away, and brings the others back.
    pub fn set_away(&mut self, which: &[u64]) {
        let thread = self.worker.thread();
        let back = |addr: &u64| self.away.contains(addr) && !which.contains(addr);
        self.bench.add_regions(thread, |addr| back(&addr));
        let gone = |addr: &u64| which.contains(addr) && !self.away.contains(addr);
        self.bench.remove_regions(thread, |addr| gone(&addr));
        self.away = which.to_vec();
    }

    /// What control and keeper say now and then: another call fd, or that control is another one.
    pub fn tell(&mut self, i: usize, op: Op, fds: &[std::os::fd::RawFd]) {
        let command = Command::new(op, i);
        let answer = self.bench.tell(self.worker.thread(), &command, fds);
        assert_eq!(answer.status, 0);
    }

    /// The worker dies of `head`, as far as anybody can tell.
    pub fn crash_of(&mut self, i: usize, head: u16) {
        self.bench.shared.log(i).set_phase(head, PHASE_SERVING);
        self.crash();
    }

    pub fn enable(&mut self, i: usize, on: bool) {
        let command = Command::new(Op::Enable, i).with([u64::from(on), 0, 0, 0]);
        let answer = self.bench.tell(self.worker.thread(), &command, &[]);
        assert_eq!(answer.status, 0);
    }

    pub fn is_broken(&self, i: usize) -> bool {
        self.bench.shared.queue(i).broken.load(Ordering::Relaxed) != 0
    }

    /// Waiting requests have all the time in the world, or none. Counts from the next crash on.
    pub fn set_patience(&self, patient: bool) {
        let deadline = if patient { HOUR_NS } else { 0 };
        let record = self.bench.shared.record();
        record.io_deadline_ns.store(deadline, Ordering::Relaxed);
    }

    /// Offers `head` in queue `i`.
    pub fn offer(&mut self, i: usize, head: u16) {
        let queue = &mut self.queues[i];
        queue.driver.offer(&self.bench.guest, head);
        // Another index, or a head that is in flight: the device may break the ring, and need not before it has seen it.
        queue.lawful &= head < queue.driver.size && queue.offered.insert(head);
        queue.lawful &= queue.offered.len() <= usize::from(queue.driver.size);
    }

    fn tables(&self) -> Vec<(u64, u16)> {
        let table = |(i, q): (usize, &Queue)| (RINGS + STRIDE * i as u64, q.driver.size);
        self.queues.iter().enumerate().map(table).collect()
    }

    /// One turn of the worker, and a look at everything that it wrote.
    pub fn turn(&mut self) {
        self.memory.remember();
        let broken: Vec<bool> = (0..QUEUES).map(|i| self.is_broken(i)).collect();
        let (mut allowed, mut structures): (Vec<Span>, Vec<Span>) = (Vec::new(), Vec::new());
        for (table, size) in self.tables() {
            let (spans, tables) = self.memory.writable(table, size);
            allowed.extend(spans);
            structures.push(table..table + 16 * u64::from(size) + 6 + 2 * u64::from(size));
            structures.extend(tables);
        }
        let used: Vec<Span> = self
            .queues
            .iter()
            .map(|q| q.driver.used_gpa()..q.driver.used_gpa() + 6 + 8 * u64::from(q.driver.size))
            .collect();
        // A driver that lets the device write into its tables decides by the answers what is written next.
        let strange = meet_any(&allowed, &structures) || meet_any(&allowed, &used);
        self.worker.turn();
        let changed = self.memory.changed();
        let mut may = allowed.clone();
        may.extend(used.iter().cloned());
        let may = guest::merge(may);
        for span in &changed {
            // Bytes before a region belong to nobody, whatever descriptors say.
            assert!(self.memory.has(span.start), "{span:x?}: before a region");
            if !strange {
                assert!(guest::covers(&may, span), "{span:x?}: nobody named it");
            }
        }
        if strange {
            for queue in &mut self.queues {
                queue.lawful = false;
            }
            return;
        }
        for (i, was_broken) in broken.iter().enumerate() {
            self.look_at_answers(i, *was_broken);
        }
    }

    fn look_at_answers(&mut self, i: usize, was_broken: bool) {
        let in_flight = self.bench.shared.log(i).in_flight();
        assert!(in_flight <= 1024);
        if !self.queues[i].lawful {
            return;
        }
        assert!(
            !was_broken,
            "a ring broke although its driver keeps the rules"
        );
        assert!(
            !self.is_broken(i),
            "a ring broke although its driver keeps the rules"
        );
        let (table, size) = self.tables()[i];
        let queue = &mut self.queues[i];
        for (head, len) in queue.driver.answers(&self.bench.guest) {
            let head = u16::try_from(head).expect("a head");
            assert!(queue.offered.remove(&head), "{head}: nobody asked");
            let room = self
                .memory
                .walk(table, size, head)
                .map_or(0, |walked| walked.writable_len());
            assert!(u64::from(len) <= room, "{head}: {len} bytes in {room}");
        }
    }

    /// Whatever came before: a new driver gets its answer.
    pub fn is_alive(&mut self) {
        self.set_away(&[]);
        self.set_up(2, 64, 5, true);
        let at = guest::BUFFERS;
        let message = worker::testing::message(fuse_abi::opcode::GETATTR, 1, &[0; 16]);
        self.memory.write(at, &message);
        let (driver, bench) = (&self.queues[2].driver, &self.bench);
        driver.describe(&bench.guest, 0, at, message.len() as u32, 1, 1);
        driver.describe(&bench.guest, 1, at + 4096, 120, 2, 0);
        // Other queues may hold anything; what they do is not looked at here.
        self.queues[2].driver.offer(&self.bench.guest, 0);
        self.worker.turn();
        let answers = self.queues[2].driver.answers(&self.bench.guest);
        assert_eq!(answers, [(0, 120)], "a new driver is served");
    }
}

impl Default for World {
    fn default() -> World {
        World::new()
    }
}

fn meet_any(a: &[Span], b: &[Span]) -> bool {
    let a = guest::merge(a.to_vec());
    guest::meet(&a, b)
}

/// Calls `body` with this thread's world, as new.
pub fn with_world(body: impl FnOnce(&mut World)) {
    thread_local! {
        static WORLD: std::cell::RefCell<Option<World>> = const { std::cell::RefCell::new(None) };
    }
    WORLD.with(|cell| {
        let mut world = cell.borrow_mut();
        let world = world.get_or_insert_with(World::new);
        world.reset();
        body(world);
    });
}
