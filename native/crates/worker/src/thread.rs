//! The loop of a ring thread: commands, wake-ups, kicks; serve, publish, signal; sleep.
//!
//! A ring thread never blocks on data: what is missing is parked, what a disk must read goes to the pool.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use chunk_store::Location;
use session::clock::now_ns;
use session::failpoint::Point;
use session::inflight::Outstanding;
use virtq::{RegionSpec, RingAddresses};

use crate::channel::{self, Answer, Command, Op, Received, RingWords};
use crate::mount::Mount;
use crate::ops::Errno;
use crate::parked::{REPOST_NS, TICK_MS};
use crate::pool::Pool;
use crate::queue::{Queue, RingSpec};
use crate::serve::{Head, Server};
use crate::spin::Spin;
use crate::{RingSetup, Setup, thread_of};

/// A round takes at most so many heads, or about so many bytes, before answers are published and hiprio has its turn.
const ROUND_HEADS: usize = 64;
const ROUND_BYTES: usize = 1 << 20;
/// Answers are shown to the driver after so many heads or bytes: it works on them while the next are served. A signal
/// goes out only when the driver asks for one.
const FLUSH_HEADS: usize = 8;
const FLUSH_BYTES: usize = 64 << 10;
/// After so long without a request, in ms, what only a busy thread needs is given back.
const REST_MS: i32 = 3000;

const TOKEN_CHANNEL: u64 = 1 << 32;
const TOKEN_WAKE: u64 = 2 << 32;
const TOKEN_POOL: u64 = 3 << 32;

/// One ring thread with its queues.
pub struct RingThread {
    index: usize,
    server: Server,
    queues: Vec<Queue<'static>>,
    epoll: OwnedFd,
    channel: RawFd,
    wake: RawFd,
    post: RawFd,
    next_epoch: u64,
    outstanding: Vec<Outstanding>,
    spin: Spin,
}

impl RingThread {
    /// Maps memory and takes over the rings of this thread: repairs their logs, serves what was outstanding.
    pub fn new(
        index: usize,
        setup: &'static Setup,
        mount: &'static Mount,
        pool: &'static Pool,
    ) -> io::Result<Self> {
        // SAFETY: plain system call; the result is checked.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let mut server = Server::new(index, setup.shared, mount, mount.tree()?, pool);
        for (spec, fd) in &setup.regions {
            // SAFETY: the keeper's descriptors stay open in this process.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            server.mem.add(*spec, fd)?;
        }
        let mut this = RingThread {
            index,
            server,
            queues: Vec::new(),
            epoll,
            channel: setup.channels[index],
            wake: setup.wakes[index],
            post: setup.post,
            next_epoch: 0,
            outstanding: Vec::new(),
            spin: Spin::default(),
        };
        this.watch(this.channel, TOKEN_CHANNEL, libc::EPOLLIN as u32)?;
        this.watch(
            this.wake,
            TOKEN_WAKE,
            (libc::EPOLLIN | libc::EPOLLET) as u32,
        )?;
        this.watch(
            pool.event(index),
            TOKEN_POOL,
            (libc::EPOLLIN | libc::EPOLLET) as u32,
        )?;
        this.set_busy();
        let threads = setup.channels.len();
        for ring in setup
            .rings
            .iter()
            .filter(|r| thread_of(r.queue, threads) == index)
        {
            let own = |fd: Option<RawFd>| fd.map(duplicate).transpose();
            this.set_ring(ring, own(ring.kick)?, own(ring.call)?)?;
        }
        this.server.shared.failpoint().pass(Point::Recovered);
        Ok(this)
    }

    /// Serves until the keeper closes the channel.
    pub fn run(mut self) -> io::Result<()> {
        self.server
            .shared
            .record()
            .worker_ready_ns
            .store(now_ns(), Ordering::Relaxed);
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        let mut rested = false;
        loop {
            let more = self.round();
            if self.server.parking.tell_control {
                self.server.parking.tell_control = false;
                write_event(self.post);
            }
            let timeout = match (more, self.server.parking.list.is_empty()) {
                (true, _) => 0,
                (false, true) if rested => -1,
                (false, true) => REST_MS,
                (false, false) => TICK_MS,
            };
            let thread = self.server.shared.thread(self.index);
            if timeout != 0 {
                thread.busy_since_ns.store(0, Ordering::Relaxed);
            }
            // SAFETY: the kernel writes at most 16 events into our array.
            let n = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 16, timeout)
            };
            if n < 0 {
                let e = io::Error::last_os_error();
                if e.raw_os_error() == Some(libc::EINTR) {
                    continue;
                }
                return Err(e);
            }
            if n == 0 && timeout == REST_MS {
                rested = true;
                self.server.mem.release_pages();
                continue;
            }
            rested = false;
            self.set_busy();
            thread.wakeups.store(
                thread.wakeups.load(Ordering::Relaxed) + 1,
                Ordering::Relaxed,
            );
            for event in &events[..n as usize] {
                // Wake-ups of control and kicks need nothing here: all that waits is looked at below.
                if event.u64 == TOKEN_POOL {
                    self.finish_pool();
                } else if event.u64 == TOKEN_CHANNEL && !self.commands()? {
                    return Ok(());
                }
            }
            self.unpark();
        }
    }

    fn set_busy(&self) {
        self.server
            .shared
            .thread(self.index)
            .busy_since_ns
            .store(now_ns(), Ordering::Relaxed);
    }

    fn step(&self) {
        let progress = &self.server.shared.thread(self.index).progress;
        progress.store(progress.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Serves what the rings offer. False when they are empty and the driver will kick: the thread may sleep.
    fn round(&mut self) -> bool {
        let mut served = false;
        loop {
            // Index order: hiprio is queue 0, and comes first in every round.
            for i in 0..self.queues.len() {
                let heads = self.drain(i);
                served |= heads > 0;
                if heads >= ROUND_HEADS {
                    return true;
                }
            }
            let queues = &self.queues;
            if served && self.spin.wait(|| queues.iter().any(Queue::has_more)) {
                continue;
            }
            let mut more = false;
            for queue in &mut self.queues {
                more |= queue.arm();
            }
            if !more {
                return false;
            }
        }
    }

    /// Serves what queue `i` offers, up to the budget of a round; how many heads (`ROUND_HEADS` when it ran out).
    fn drain(&mut self, i: usize) -> usize {
        let queue = &mut self.queues[i];
        queue.disarm();
        let now = now_ns();
        let (mut heads, mut bytes, mut flushed) = (0, 0, 0);
        while let Some(head) = queue.take(now) {
            let at = Head {
                head,
                taken_ns: now,
                waited: false,
            };
            bytes += self.server.serve(queue, at);
            heads += 1;
            if bytes >= ROUND_BYTES {
                heads = ROUND_HEADS;
            }
            if heads >= ROUND_HEADS {
                break;
            }
            if heads % FLUSH_HEADS == 0 || bytes - flushed >= FLUSH_BYTES {
                flushed = bytes;
                queue.flush();
            }
        }
        self.flush(i);
        heads
    }

    fn flush(&mut self, i: usize) {
        if self.queues[i].flush() {
            let signals = &self.server.shared.thread(self.index).signals;
            signals.store(signals.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        self.step();
    }

    fn flush_all(&mut self) {
        for i in 0..self.queues.len() {
            self.flush(i);
        }
    }

    fn position(&self, queue: usize) -> Option<usize> {
        self.queues.iter().position(|q| q.index == queue)
    }

    /// Looks at every parked request: its chunk may have come, its time may be over, its post may be lost.
    fn unpark(&mut self) {
        if self.server.parking.list.is_empty() {
            return;
        }
        let now = now_ns();
        let mut at = self.server.parking.list.len();
        while at > 0 {
            at -= 1;
            let Some(parked) = self.server.parking.list.get(at).copied() else {
                continue;
            };
            let location = self
                .server
                .mount
                .blob(parked.missing.blob_index)
                .map_or(Location::Invalid, |blob| {
                    blob.locate(parked.missing.chunk_index)
                });
            let ready = location != Location::Absent;
            if ready || now >= parked.deadline_ns {
                self.server.parking.unpark(at);
                let Some(i) = self.position(parked.queue) else {
                    continue;
                };
                let queue = &mut self.queues[i];
                if ready {
                    self.server.shared.failpoint().pass(Point::Unparked);
                    self.server.serve(
                        queue,
                        Head {
                            head: parked.head,
                            taken_ns: parked.taken_ns,
                            waited: true,
                        },
                    );
                } else {
                    let late = &self.server.shared.thread(self.index).deadline_errors;
                    late.store(late.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    self.server.fail(queue, parked.head, Errno(libc::EIO));
                }
                self.step();
            } else if now.saturating_sub(parked.posted_ns) > REPOST_NS {
                self.repost(at, now);
            }
        }
        self.flush_all();
    }

    fn repost(&mut self, at: usize, now: u64) {
        let parking = &mut self.server.parking;
        let Some(parked) = parking.list.get(at).copied() else {
            return;
        };
        parking.forget_post(parked.missing);
        let posts = &self.server.shared.thread(self.index).posts;
        if parking.post(posts, parked.missing, parked.nodeid, parked.offset, now) {
            if let Some(parked) = parking.list.get_mut(at) {
                parked.posted_ns = now;
            }
        }
    }

    fn finish_pool(&mut self) {
        for finished in self.server.pool.take_finished(self.index) {
            let Some(i) = self.position(finished.ticket.queue) else {
                continue;
            };
            let queue = &mut self.queues[i];
            if queue.epoch == finished.ticket.epoch {
                self.server.serve_finished(queue, &finished);
            }
            self.step();
        }
        self.flush_all();
    }

    /// Carries out all commands that are there; false when the keeper is gone.
    fn commands(&mut self) -> io::Result<bool> {
        loop {
            match channel::receive_command(self.channel)? {
                Received::Nothing => return Ok(true),
                Received::Closed => return Ok(false),
                Received::Command(command, fds) => {
                    self.flush_all();
                    let answer = match self.carry_out(&command, fds) {
                        Ok(value) => Answer { status: 0, value },
                        Err(e) => Answer {
                            status: e.raw_os_error().unwrap_or(libc::EINVAL),
                            value: 0,
                        },
                    };
                    self.step();
                    channel::send_answer(self.channel, answer)?;
                }
            }
        }
    }

    fn carry_out(&mut self, command: &Command, fds: Vec<OwnedFd>) -> io::Result<u32> {
        let queue = command.queue as usize;
        let args = command.args;
        let mut fds = fds.into_iter();
        match command.op {
            Op::AddRegion => {
                let fd = fds
                    .next()
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
                let spec = RegionSpec {
                    guest_addr: args[0],
                    size: args[1],
                    user_addr: args[2],
                    mmap_offset: args[3],
                };
                self.server.mem.add(spec, std::os::fd::AsFd::as_fd(&fd))?;
                self.remap();
            }
            Op::RemoveRegion => {
                if !self.server.mem.remove(args[0], args[1], args[2]) {
                    return Err(io::Error::from_raw_os_error(libc::ENOENT));
                }
                self.remap();
            }
            Op::ClearRegions => {
                self.server.mem.clear();
                self.remap();
            }
            Op::SetRing => {
                let words = RingWords::unpack(args[3]);
                let kick = if words.has_kick { fds.next() } else { None };
                let call = if words.has_call { fds.next() } else { None };
                let ring = RingSetup {
                    queue,
                    size: words.size,
                    at: RingAddresses {
                        desc: args[0],
                        avail: args[1],
                        used: args[2],
                    },
                    base: words.base,
                    resume: words.resume,
                    enabled: words.enabled,
                    event_idx: words.event_idx,
                    kick: None,
                    call: None,
                };
                self.stop(queue);
                self.set_ring(&ring, kick, call)?;
            }
            Op::SetCall => {
                if let Some(i) = self.position(queue) {
                    self.queues[i].set_call(fds.next());
                    // A signal to the old fd may have gone nowhere.
                    self.queues[i].signal();
                }
            }
            Op::SetKick => {
                if let Some(i) = self.position(queue) {
                    self.unwatch_kick(i);
                    self.queues[i].kick = fds.next();
                    self.watch_kick(i)?;
                }
            }
            Op::Enable => {
                if let Some(i) = self.position(queue) {
                    self.queues[i].enabled = args[0] != 0;
                    self.server
                        .shared
                        .queue(queue)
                        .enabled
                        .store(args[0] as u32, Ordering::Relaxed);
                }
            }
            Op::Stop => {
                let base = self.stop(queue);
                self.server.shared.failpoint().pass(Point::Stopping);
                return base
                    .map(u32::from)
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT));
            }
            Op::Repost => self.server.parking.forget_posts(),
        }
        Ok(0)
    }

    fn set_ring(
        &mut self,
        ring: &RingSetup,
        kick: Option<OwnedFd>,
        call: Option<OwnedFd>,
    ) -> io::Result<()> {
        let spec = RingSpec {
            size: ring.size,
            at: ring.at,
            event_idx: ring.event_idx,
        };
        let mut queue = Queue::new(ring.queue, self.server.shared, spec, kick, call);
        self.next_epoch += 1;
        queue.epoch = self.next_epoch;
        queue.enabled = ring.enabled;
        self.server
            .shared
            .queue(ring.queue)
            .enabled
            .store(u32::from(ring.enabled), Ordering::Relaxed);
        let mut outstanding = std::mem::take(&mut self.outstanding);
        queue.start(&self.server.mem, ring.base, ring.resume, &mut outstanding);
        for known in &outstanding {
            if known.poisonous {
                eprintln!(
                    "rafs-worker: queue {}: a request that was served at three crashes in a row fails",
                    queue.index
                );
                self.server.fail(&mut queue, known.head, Errno(libc::EIO));
            } else {
                self.server.serve(
                    &mut queue,
                    Head {
                        head: known.head,
                        taken_ns: known.taken_ns,
                        waited: true,
                    },
                );
            }
            // One by one, so that a request which kills its worker takes no other one's answer along.
            queue.publish();
            self.step();
        }
        // Nobody knows what the driver was told before the crash or the stop: tell it once more.
        if ring.resume {
            queue.signal();
        }
        self.outstanding = outstanding;
        let at = self.queues.partition_point(|q| q.index < ring.queue);
        self.queues.insert(at, queue);
        self.watch_kick(at)
    }

    /// Ends a ring; its next avail position. Parked heads stay in the log.
    fn stop(&mut self, queue: usize) -> Option<u16> {
        let at = self.position(queue)?;
        self.unwatch_kick(at);
        self.server.parking.drop_queue(queue);
        let queue = self.queues.remove(at);
        Some(queue.next_avail())
    }

    fn remap(&mut self) {
        for queue in &mut self.queues {
            queue.remap(&self.server.mem);
        }
    }

    fn watch(&self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: `event` is valid for the call.
        let rc =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn watch_kick(&self, i: usize) -> io::Result<()> {
        match &self.queues[i].kick {
            // Edge triggered: a kick that came before is reported at once, and no read is needed to silence it.
            Some(kick) => self.watch(
                kick.as_raw_fd(),
                i as u64,
                (libc::EPOLLIN | libc::EPOLLET) as u32,
            ),
            None => Ok(()),
        }
    }

    fn unwatch_kick(&self, i: usize) {
        if let Some(kick) = &self.queues[i].kick {
            // SAFETY: plain system call; a descriptor that is not registered is no harm.
            unsafe {
                libc::epoll_ctl(
                    self.epoll.as_raw_fd(),
                    libc::EPOLL_CTL_DEL,
                    kick.as_raw_fd(),
                    std::ptr::null_mut(),
                )
            };
        }
    }
}

fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn write_event(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes to an eventfd; it only fails when the counter is full, and then it is readable.
    unsafe { libc::write(fd, one.as_ptr().cast(), 8) };
}
