//! A ring thread without processes around it: an image on memfds, a driver that writes what it is told to, and the
//! keeper's end of the command socket.

use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use session::Shared;
use virtq::testing::{Driver, Guest, NEXT, WRITE, memfd};

use crate::channel::{self, Answer, Command, Op, RingWords};
use crate::mount::{BlobFds, MountFds};
use crate::{RingSetup, Setup};

mod requests;
mod steps;
pub use requests::*;
pub use steps::*;

pub use crate::mount::Mount;
pub use crate::pool::Pool;
pub use crate::thread::RingThread;

#[path = "../../rafs-format/tests/support/mod.rs"]
pub mod image;

/// Guest addresses: rings from here on, then a place of 16 KiB for each head of each queue.
pub const RINGS: u64 = 0x10_0000;
pub const RING_STRIDE: u64 = 0x1_0000;
pub const PLACES: u64 = 0x100_0000;
const PLACE: u64 = 0x4000;
pub const REGIONS: [(u64, u64); 2] = [(0x10_0000, 0x30_0000), (0x100_0000, 0x300_0000)];

/// The sample image with attributes: big (3 chunks of blob 0), small (1 of blob 1), dir, inline, link, ...
pub fn sample() -> Vec<u8> {
    let mut bytes = image::sample();
    let flags = u64::from_le_bytes(bytes[1152..1160].try_into().unwrap());
    bytes[1152..1160].copy_from_slice(&(flags | rafs_format::flag::HAS_XATTR).to_le_bytes());
    bytes
}

fn sealed(bytes: &[u8]) -> OwnedFd {
    // SAFETY: plain system calls; results are checked.
    unsafe {
        let fd = libc::memfd_create(
            c"image".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        );
        let file = <File as std::os::fd::FromRawFd>::from_raw_fd(fd);
        file.write_all_at(bytes, 0).unwrap();
        let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, seals), 0);
        file.into()
    }
}

/// Tables and data of one blob, in the layout of `chunk-store`.
pub struct Blob {
    state: File,
    extents: File,
    touched: File,
    data: File,
    spill: File,
    spill_base: u64,
    chunk_size: u64,
}

impl Blob {
    fn new(chunks: u32, chunk_size: u64, spill: File, spill_base: u64) -> Blob {
        let blob = Blob {
            state: memfd(4096 + 4 * u64::from(chunks)),
            extents: memfd(64 + 32 * u64::from(chunks)),
            touched: memfd(u64::from(chunks)),
            data: memfd(chunk_size * u64::from(chunks)),
            spill,
            spill_base,
            chunk_size,
        };
        for (file, magic) in [(&blob.state, b"VRCHSTAT"), (&blob.extents, b"VREXTENT")] {
            file.write_all_at(magic, 0).unwrap();
            file.write_all_at(&1u32.to_le_bytes(), 8).unwrap();
            file.write_all_at(&chunks.to_le_bytes(), 12).unwrap();
        }
        for i in 0..u64::from(chunks) {
            let mut extent = [0; 32];
            extent[0..8].copy_from_slice(&(i * chunk_size).to_le_bytes());
            extent[8..12].copy_from_slice(&(chunk_size as u32).to_le_bytes());
            extent[12..16].copy_from_slice(&1u32.to_le_bytes());
            blob.extents.write_all_at(&extent, 64 + 32 * i).unwrap();
        }
        blob
    }

    /// Stores chunk `index`, all bytes of which are `fill`, in memory: it is read at once.
    pub fn store(&self, index: u64, fill: u8) {
        let bytes = vec![fill; self.chunk_size as usize];
        let at = self.spill_base + index * self.chunk_size;
        self.spill.write_all_at(&bytes, at).unwrap();
        self.set_spill(index, 1 << 40 | (at / 4096 + 1));
    }

    /// The same in the data file. It is a memfd too, which knows no RWF_NOWAIT: the pool reads it.
    pub fn store_in_file(&self, index: u64, fill: u8) {
        let bytes = vec![fill; self.chunk_size as usize];
        self.data
            .write_all_at(&bytes, index * self.chunk_size)
            .unwrap();
        let verified = (8u32 | 3).to_le_bytes();
        self.state
            .write_all_at(&verified, 4096 + 4 * index)
            .unwrap();
    }

    /// Takes a chunk that was stored in memory away.
    pub fn discard(&self, index: u64) {
        self.set_spill(index, 0);
    }

    /// The touched byte of each chunk.
    pub fn touched(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.touched.metadata().unwrap().len() as usize];
        self.touched.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    pub fn clear_touched(&self) {
        self.touched.write_all_at(&[0], 0).unwrap();
    }

    fn set_spill(&self, index: u64, word: u64) {
        self.extents
            .write_all_at(&word.to_le_bytes(), 64 + 32 * index + 16)
            .unwrap();
    }
}

/// Everything around one ring thread.
pub struct Bench {
    pub guest: Guest,
    pub blobs: Vec<Blob>,
    pub shared: &'static Shared,
    pub keeper: OwnedFd,
    pub mount: &'static Mount,
    /// That of the newest thread: a worker's pool dies with it.
    pool: Mutex<&'static Pool>,
    theirs: RawFd,
    wake: RawFd,
    post: RawFd,
    awake: RawFd,
}

fn eventfd() -> RawFd {
    // SAFETY: plain system call; the result is checked where it is used.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }
}

/// An eventfd to be signalled by.
pub fn call_fd() -> OwnedFd {
    // SAFETY: a fresh descriptor that nobody else owns.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(eventfd()) }
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

impl Bench {
    /// `image` with one blob per entry of `chunks`, which is its number of chunks.
    pub fn new(image: &[u8], chunk_size: u64, chunks: &[u32]) -> Bench {
        let shared = leak(Shared::create().unwrap());
        shared
            .record()
            .io_deadline_ns
            .store(3_600_000_000_000, Ordering::Relaxed);
        let spill = memfd(chunk_size * chunks.iter().map(|&n| u64::from(n)).sum::<u64>());
        let mut base = 0;
        let mut blobs = Vec::new();
        for &n in chunks {
            blobs.push(Blob::new(n, chunk_size, spill.try_clone().unwrap(), base));
            base += chunk_size * u64::from(n);
        }
        let fds = MountFds {
            bootstrap: sealed(image).into_raw_fd(),
            spill: spill.into_raw_fd(),
            blobs: blobs
                .iter()
                .map(|b| BlobFds {
                    state: b.state.as_raw_fd(),
                    extents: b.extents.as_raw_fd(),
                    touched: b.touched.as_raw_fd(),
                    data: Some(b.data.as_raw_fd()),
                })
                .collect(),
        };
        let (keeper, theirs) = channel::pair().unwrap();
        Bench {
            guest: Guest::new(&REGIONS),
            shared,
            keeper,
            mount: leak(Mount::open(&fds).unwrap()),
            pool: Mutex::new(leak(Pool::new(1))),
            theirs: theirs.into_raw_fd(),
            wake: eventfd(),
            post: eventfd(),
            awake: eventfd(),
            blobs,
        }
    }

    pub fn sample() -> Bench {
        Bench::new(&sample(), 4096, &[3, 1])
    }

    /// A thread as a new worker starts it.
    pub fn thread(&self, rings: Vec<RingSetup>) -> RingThread {
        self.thread_with(rings, true)
    }

    /// The same, without memory unless `memory`.
    pub fn thread_with(&self, rings: Vec<RingSetup>, memory: bool) -> RingThread {
        let regions = self.guest.regions().filter(|_| memory);
        let setup = leak(Setup {
            shared: self.shared,
            regions: regions
                .map(|(spec, file)| (spec, file.as_raw_fd()))
                .collect(),
            away: virtq::Away::default(),
            rings,
            mount: MountFds::default(),
            channels: vec![self.theirs],
            wakes: vec![self.wake],
            post: self.post,
            awake: self.awake,
        });
        let pool = leak(Pool::new(1));
        *self.pool.lock().unwrap() = pool;
        RingThread::new(0, setup, self.mount, pool).unwrap()
    }

    /// How many reads the pool has ended that the thread has not taken back.
    #[cfg(test)]
    pub fn pool_has_ended(&self) -> usize {
        self.pool.lock().unwrap().ended(0)
    }

    pub fn pool_is_busy(&self) -> bool {
        self.pool.lock().unwrap().is_busy()
    }

    /// Queue `index` with a ring of `size` entries whose indexes start at `start`.
    pub fn driver(&self, index: u64, size: u16, start: u16) -> Driver {
        Driver::new(&self.guest, RINGS + RING_STRIDE * index, size, start)
    }

    /// Has `thread` carry out a command, as the keeper would.
    pub fn tell(&self, thread: &mut RingThread, command: &Command, fds: &[RawFd]) -> Answer {
        channel::send_command(self.keeper.as_raw_fd(), command, fds).unwrap();
        assert!(thread.commands().unwrap());
        channel::receive_answer(self.keeper.as_raw_fd(), 0).expect("an answer")
    }

    pub fn remove_memory(&self, thread: &mut RingThread) {
        self.remove_regions(thread, |_| true);
    }

    /// Takes the places of requests away; the rings stay.
    pub fn remove_places(&self, thread: &mut RingThread) {
        self.remove_regions(thread, |guest_addr| guest_addr == PLACES);
    }

    /// Takes those regions away whose guest address `which` accepts.
    pub fn remove_regions(&self, thread: &mut RingThread, which: impl Fn(u64) -> bool) {
        for (spec, _) in self.guest.regions().filter(|(r, _)| which(r.guest_addr)) {
            let args = [spec.guest_addr, spec.size, spec.user_addr, 0];
            let command = Command::new(Op::RemoveRegion, 0).with(args);
            assert_eq!(self.tell(thread, &command, &[]).status, 0);
        }
    }

    pub fn add_memory(&self, thread: &mut RingThread) {
        self.add_regions(thread, |_| true);
    }

    pub fn add_places(&self, thread: &mut RingThread) {
        self.add_regions(thread, |guest_addr| guest_addr == PLACES);
    }

    /// Brings those regions back whose guest address `which` accepts.
    pub fn add_regions(&self, thread: &mut RingThread, which: impl Fn(u64) -> bool) {
        for (spec, file) in self.guest.regions().filter(|(r, _)| which(r.guest_addr)) {
            let command = Command::new(Op::AddRegion, 0).with([
                spec.guest_addr,
                spec.size,
                spec.user_addr,
                spec.mmap_offset,
            ]);
            assert_eq!(self.tell(thread, &command, &[file.as_raw_fd()]).status, 0);
        }
    }

    pub fn enable(&self, thread: &mut RingThread, queue: usize, enabled: bool) {
        let command = Command::new(Op::Enable, queue).with([u64::from(enabled), 0, 0, 0]);
        assert_eq!(self.tell(thread, &command, &[]).status, 0);
    }

    pub fn stop(&self, thread: &mut RingThread, queue: usize) -> Answer {
        self.tell(thread, &Command::new(Op::Stop, queue), &[])
    }

    pub fn set_ring(&self, thread: &mut RingThread, ring: &RingSetup) -> Answer {
        let words = RingWords {
            size: ring.size,
            base: ring.base,
            resume: ring.resume,
            enabled: ring.enabled,
            event_idx: ring.event_idx,
            has_kick: ring.kick.is_some(),
            has_call: ring.call.is_some(),
        };
        let command = Command::new(Op::SetRing, ring.queue).with([
            ring.at.desc,
            ring.at.avail,
            ring.at.used,
            words.pack(),
        ]);
        let fds: Vec<RawFd> = [ring.kick, ring.call].into_iter().flatten().collect();
        self.tell(thread, &command, &fds)
    }

    /// Offers a request at `head` of `queue`: header and arguments in one descriptor, room for an answer in another.
    pub fn request(&self, driver: &mut Driver, queue: u64, head: u16, message: &[u8], room: u32) {
        let place = PLACES + PLACE * (1024 * queue + u64::from(head) / 2);
        self.guest.write(place, message);
        let (len, guest) = (message.len() as u32, &self.guest);
        driver.describe(guest, head, place, len, NEXT, head + 1);
        driver.describe(guest, head + 1, place + 0x1000, room, WRITE, 0);
        driver.offer(guest, head);
    }

    /// The out header at `head`'s place: length and errno.
    pub fn reply(&self, queue: u64, head: u16) -> (u32, i32) {
        let place = PLACES + PLACE * (1024 * queue + u64::from(head) / 2) + 0x1000;
        (
            self.guest.read_u32(place),
            -(self.guest.read_u32(place + 4) as i32),
        )
    }

    /// Bytes of the answer at `head`'s place behind the out header.
    pub fn answer(&self, queue: u64, head: u16, len: usize) -> Vec<u8> {
        let place = PLACES + PLACE * (1024 * queue + u64::from(head) / 2) + 0x1000;
        self.guest.read(place + 16, len)
    }
}

/// A ring thread that can be ended and started anew for ever: what a process leaks once, a fuzzer must not leak.
pub struct Worker {
    thread: Option<RingThread>,
    /// Borrowed by the thread as long as it lives.
    setup: *mut Setup,
    pool: &'static Pool,
}

impl Worker {
    /// A worker for the rings of `bench`, with the memory that is there.
    pub fn start(bench: &Bench, rings: Vec<RingSetup>) -> Worker {
        let mut worker = Worker {
            thread: None,
            setup: std::ptr::null_mut(),
            pool: leak(Pool::new(1)),
        };
        worker.restart(bench, rings);
        worker
    }

    /// The worker dies where it is, and another one takes over.
    pub fn restart(&mut self, bench: &Bench, rings: Vec<RingSetup>) {
        self.end();
        let setup = Box::new(Setup {
            shared: bench.shared,
            regions: bench
                .guest
                .regions()
                .map(|(spec, file)| (spec, file.as_raw_fd()))
                .collect(),
            away: virtq::Away::default(),
            rings,
            mount: MountFds::default(),
            channels: vec![bench.theirs],
            wakes: vec![bench.wake],
            post: bench.post,
            awake: bench.awake,
        });
        self.setup = Box::into_raw(setup);
        // SAFETY: freed by `end` alone, after the thread that borrows it.
        let setup: &'static Setup = unsafe { &*self.setup };
        self.thread = Some(RingThread::new(0, setup, bench.mount, self.pool).unwrap());
    }

    fn end(&mut self) {
        if self.thread.take().is_some() {
            // Results of the dead one's reads must not meet the tickets of its successor.
            while self.pool.is_busy() {
                self.pool.take_finished(0);
                std::thread::yield_now();
            }
            // SAFETY: made by `restart`, and its only borrower is gone.
            drop(unsafe { Box::from_raw(self.setup) });
        }
    }

    pub fn thread(&mut self) -> &mut RingThread {
        self.thread.as_mut().expect("a thread")
    }

    /// One round of the thread; false when it would sleep.
    pub fn round(&mut self) -> bool {
        self.thread().round()
    }

    /// Carries out the commands that wait, as the loop of a thread does.
    pub fn commands(&mut self) -> std::io::Result<bool> {
        self.thread().commands()
    }

    /// Serves until there is nothing more to do, disk reads included. Panics when that never comes.
    pub fn turn(&mut self) {
        assert!(self.turn_for(10_000), "the thread finds no end");
    }

    /// The same, for at most so many `rounds` at a time. False when there is more to do even then: where rings lie upon
    /// each other, each answer may be another request.
    pub fn turn_for(&mut self, rounds: usize) -> bool {
        loop {
            let thread = self.thread.as_mut().expect("a thread");
            thread.finish_pool();
            let mut left = rounds;
            while thread.unpark() || thread.round() {
                left -= 1;
                if left == 0 {
                    return false;
                }
            }
            if !self.pool.is_busy() {
                return true;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

/// Answers a request from metadata; the errno when that fails.
pub fn answer(
    tree: &rafs_format::Tree<'_>,
    opcode: u32,
    nodeid: u64,
    args: &[u8],
    room: usize,
    out: &mut Vec<u8>,
) -> Result<(), i32> {
    crate::ops::answer(tree, opcode, nodeid, args, room, out).map_err(|errno| errno.0)
}

/// Reads by `tree`, which need not be that of `mount`, into `chain`: how many bytes were copied, if the chunks are there.
pub fn read(
    mount: &Mount,
    tree: &rafs_format::Tree<'_>,
    nodeid: u64,
    args: &[u8],
    chain: &virtq::Chain,
) -> Result<Option<usize>, i32> {
    let mut reader = crate::read::Reader::default();
    match reader.read(mount, tree, nodeid, args, chain, 16) {
        Ok(crate::read::ReadOutcome::Copied(n)) => Ok(Some(n)),
        Ok(_) => Ok(None),
        Err(errno) => Err(errno.0),
    }
}

/// What a worker is told about `driver`'s ring as queue `queue`.
pub fn ring(driver: &Driver, queue: usize) -> RingSetup {
    RingSetup {
        queue,
        size: driver.size,
        at: driver.addresses(),
        base: driver.offered,
        resume: false,
        enabled: true,
        event_idx: true,
        kick: None,
        call: None,
    }
}
