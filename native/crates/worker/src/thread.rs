//! The loop of a ring thread: commands, wake-ups, kicks; serve, publish, signal; sleep.
//!
//! A ring thread never blocks on data: what is missing is parked, what a disk must read goes to the pool. Nor does it
//! do anything for long: a round is bounded, so that commands are answered at once whatever a driver does.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use chunk_store::Location;
use session::clock::now_ns;
use session::failpoint::Point;
use session::inflight::Outstanding;

use crate::budget::{Budget, ROUND_HEADS, SHOW_BYTES, SHOW_HEADS, is_signal_due};
use crate::fds::{duplicate, write_event};
use crate::mount::Mount;
use crate::ops::Errno;
use crate::parked::{Parked, REPOST_NS, TICK_MS};
use crate::pool::{Finished, Pool};
use crate::queue::Queue;
use crate::serve::{Head, Server};
use crate::spin::Spin;
use crate::{Setup, thread_of};

/// While rings never run empty, descriptors are looked at this often, in ns: a system call in each round costs as much
/// as some requests.
const WAIT_NS: u64 = 200_000;
/// After so long without a request, in ms, what only a busy thread needs is given back.
const REST_MS: i32 = 3000;
/// How often a ring without a kick fd is looked at.
const POLL_MS: i32 = 1;

const TOKEN_CHANNEL: u64 = 1 << 32;
const TOKEN_WAKE: u64 = 2 << 32;
const TOKEN_POOL: u64 = 3 << 32;

/// One ring thread with its queues.
pub struct RingThread {
    index: usize,
    pub(crate) server: Server,
    pub(crate) queues: Vec<Queue<'static>>,
    epoll: OwnedFd,
    pub(crate) channel: RawFd,
    wake: RawFd,
    post: RawFd,
    awake: RawFd,
    pub(crate) next_epoch: u64,
    spin: Spin,
    /// Bytes of answers since a driver was told last.
    unsignalled_bytes: usize,
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
        server.mem.set_away(setup.away.clone());
        let mut this = RingThread {
            index,
            server,
            queues: Vec::new(),
            epoll,
            channel: setup.channels[index],
            wake: setup.wakes[index],
            post: setup.post,
            awake: setup.awake,
            next_epoch: 0,
            unsignalled_bytes: 0,
            spin: Spin::new(setup.shared.record().poll_ns.load(Ordering::Relaxed)),
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
        // Whether waiting requests have to be looked at, when that was done last, and whether the pool has ended reads.
        let (mut look, mut looked_ns, mut read) = (true, 0, true);
        let mut waited_ns = 0;
        loop {
            let busy = self.round();
            let more = busy | look | read;
            if self.server.parking.tell_control {
                self.server.parking.tell_control = false;
                write_event(self.post);
            }
            if busy && now_ns().saturating_sub(waited_ns) < WAIT_NS {
                continue;
            }
            let timeout = match (more, self.nobody_waits()) {
                (true, _) => 0,
                // A VMM that gives no kick fd wants its ring to be looked at.
                _ if self.queues.iter().any(Queue::is_polled) => POLL_MS,
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
                // The next round may find a request, and hang with it: nobody would look whether a resting thread does.
                self.set_busy();
                thread.resting.store(1, Ordering::Relaxed);
                continue;
            }
            let now = self.set_busy();
            waited_ns = now;
            if std::mem::take(&mut rested) {
                // Nobody has looked whether it hangs since.
                thread.resting.store(0, Ordering::Relaxed);
                write_event(self.awake);
            }
            session::add(&thread.wakeups, 1);
            for event in &events[..n as usize] {
                // Copied: the structure is packed, and rustc 1.85 borrows what it matches on.
                let token = event.u64;
                match token {
                    TOKEN_POOL => read = true,
                    TOKEN_WAKE => look = true,
                    TOKEN_CHANNEL if !self.commands()? => return Ok(()),
                    TOKEN_CHANNEL => look = true,
                    // A kick: all rings are looked at by the next round.
                    _ => {}
                }
            }
            if read {
                look |= self.server.parking.pool_was_full;
                read = self.finish_pool();
            }
            // Not with every kick: warm requests do not pay for those that wait, however many these are.
            if look || now.saturating_sub(looked_ns) >= TICK_MS as u64 * 1_000_000 {
                looked_ns = now;
                look = self.unpark();
            }
        }
    }

    /// Whether no request waits for anything that comes without a signal.
    fn nobody_waits(&self) -> bool {
        self.server.parking.list.is_empty() && self.queues.iter().all(|q| q.waiting.is_empty())
    }

    /// Notes since when the thread is busy: now, which is returned.
    fn set_busy(&self) -> u64 {
        let now = now_ns();
        let thread = self.server.shared.thread(self.index);
        thread.busy_since_ns.store(now, Ordering::Relaxed);
        now
    }

    pub(crate) fn step(&self) {
        let progress = &self.server.shared.thread(self.index).progress;
        session::add(progress, 1);
    }

    /// Serves what the rings offer. False when they are empty and the driver will kick: the thread may sleep. A driver
    /// that keeps the rings filled does not keep the thread from its commands: the budget is that of all queues.
    pub(crate) fn round(&mut self) -> bool {
        let mut heads = 0;
        loop {
            let (mut more, now) = (false, now_ns());
            // Index order: hiprio is queue 0, and comes first in every round; each of the others has its turn.
            for i in 0..self.queues.len() {
                let budget = self.drain(i, now);
                heads += budget.heads;
                more |= budget.is_spent();
            }
            if more || heads >= ROUND_HEADS {
                return true;
            }
            let queues = &self.queues;
            if heads > 0 && self.spin.wait(|| queues.iter().any(Queue::has_more)) {
                continue;
            }
            for queue in &mut self.queues {
                more |= queue.arm();
            }
            if !more {
                return false;
            }
        }
    }

    /// Serves what queue `i` offers, up to the budget of a round.
    fn drain(&mut self, i: usize, now: u64) -> Budget {
        self.queues[i].disarm();
        let mut budget = Budget::default();
        self.drain_backlog(i, now, &mut budget);
        let mut shown = budget.bytes;
        while !budget.is_spent() {
            let queue = &mut self.queues[i];
            let Some(head) = queue.take(now) else {
                // The driver has nothing else to do than to take its answers.
                self.flush(i);
                return budget;
            };
            let at = Head {
                head,
                taken_ns: now,
                waited: false,
            };
            let bytes = self.server.serve(queue, at);
            budget.spend(bytes);
            self.unsignalled_bytes += bytes;
            if budget.heads % SHOW_HEADS == 0 || budget.bytes - shown >= SHOW_BYTES {
                shown = budget.bytes;
                self.show(i);
            }
        }
        self.show(i);
        budget
    }

    /// Shows the driver its answers; it is signalled only when that is worth it.
    fn show(&mut self, i: usize) {
        self.queues[i].publish();
        let (untold, waiting) = self.queues[i].untold_and_waiting();
        if is_signal_due(self.unsignalled_bytes, untold, waiting) {
            self.flush(i);
        } else {
            self.step();
        }
    }

    fn drain_backlog(&mut self, i: usize, now: u64, budget: &mut Budget) {
        let queue = &mut self.queues[i];
        while !budget.is_spent() {
            let Some(known) = queue.next_in_backlog(now) else {
                return;
            };
            let bytes = if known.poisonous {
                session::say!(
                    "rafs-worker: queue {}: a request that was served at three crashes in a row fails",
                    queue.index
                );
                if !self.server.fail(queue, known.head, Errno(libc::EIO)) {
                    queue.wait_for_memory(known);
                }
                0
            } else {
                let at = Head {
                    head: known.head,
                    taken_ns: known.taken_ns,
                    waited: true,
                };
                self.server.serve(queue, at)
            };
            budget.spend(bytes);
            // One by one, so that a request which kills its worker takes no other one's answer along.
            queue.publish();
        }
    }

    fn flush(&mut self, i: usize) {
        self.unsignalled_bytes = 0;
        if self.queues[i].flush() {
            let signals = &self.server.shared.thread(self.index).signals;
            session::add(signals, 1);
        }
        self.step();
    }

    pub(crate) fn flush_all(&mut self) {
        for i in 0..self.queues.len() {
            self.flush(i);
        }
    }

    pub(crate) fn position(&self, queue: usize) -> Option<usize> {
        self.queues.iter().position(|q| q.index == queue)
    }

    /// Looks at every parked request: its chunk may have come, its time may be over, its post may be lost. True when
    /// the budget of a round ended the look: one chunk may free more requests than a command can wait for.
    pub(crate) fn unpark(&mut self) -> bool {
        if self.nobody_waits() {
            return false;
        }
        let now = now_ns();
        self.expire_waiting(now);
        let mut budget = Budget::default();
        let mount = self.server.mount;
        let has_come = |chunk| mount.locate(chunk) != Location::Absent;
        self.server.parking.forget_arrived(has_come);
        let list = self.server.parking.take_all();
        for parked in &list {
            let at = self.position(parked.queue);
            let Some(i) = at.filter(|&i| self.queues[i].can_answer() && !budget.is_spent()) else {
                self.server.parking.list.push(*parked);
                continue;
            };
            if has_come(parked.missing) {
                self.server.shared.failpoint().pass(Point::Unparked);
                let at = Head {
                    head: parked.head,
                    taken_ns: parked.taken_ns,
                    waited: true,
                };
                budget.spend(self.server.serve(&mut self.queues[i], at));
                self.step();
            } else if now >= parked.deadline_ns {
                self.server.parking.forget_all_posts();
                let late = &self.server.shared.thread(self.index).deadline_errors;
                session::add(late, 1);
                let queue = &mut self.queues[i];
                if !self.server.fail(queue, parked.head, Errno(libc::EIO)) {
                    queue.complete(parked.head, 0);
                }
                budget.spend(0);
                self.step();
            } else {
                let mut parked = *parked;
                if now.saturating_sub(parked.posted_ns) > REPOST_NS && self.repost(&parked) {
                    parked.posted_ns = now;
                }
                self.server.parking.list.push(parked);
            }
        }
        self.server.parking.looked_at(list);
        self.flush_all();
        budget.is_spent()
    }

    /// Gives heads back whose memory has not come within the deadline: what they asked for can be told to nobody.
    fn expire_waiting(&mut self, now: u64) {
        let until = now.saturating_sub(self.server.io_deadline_ns);
        let late: usize = self
            .queues
            .iter_mut()
            .map(|q| q.expire_waiting(until))
            .sum();
        let errors = &self.server.shared.thread(self.index).deadline_errors;
        session::add(errors, late as u64);
    }

    fn repost(&mut self, parked: &Parked) -> bool {
        let parking = &mut self.server.parking;
        parking.forget_post(parked.missing);
        let posts = &self.server.shared.thread(self.index).posts;
        parking.post(
            posts,
            parked.missing,
            parked.nodeid,
            parked.offset,
            parked.taken_ns,
        )
    }

    /// Answers with what the pool has read, up to the budget of a round; true when there is more.
    pub(crate) fn finish_pool(&mut self) -> bool {
        let mut budget = Budget::default();
        while !budget.is_spent() {
            let Some(finished) = self.server.pool.take_finished(self.index) else {
                break;
            };
            budget.spend(finished.data.as_ref().map_or(0, Vec::len));
            self.finish(&finished);
        }
        self.flush_all();
        budget.is_spent()
    }

    fn finish(&mut self, finished: &Finished) {
        let Some(i) = self.position(finished.ticket.queue) else {
            return;
        };
        let queue = &mut self.queues[i];
        if queue.epoch != finished.ticket.epoch {
            return;
        }
        if queue.can_answer() {
            self.server.serve_finished(queue, finished);
        } else {
            // Its memory is away for the moment, or the machine stands still: the request is served once more when
            // it goes on.
            queue.backlog.push_back(Outstanding {
                head: finished.ticket.head,
                counter: 0,
                taken_ns: finished.taken_ns,
                poisonous: false,
            });
        }
        self.step();
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

    pub(crate) fn watch_kick(&self, i: usize) -> io::Result<()> {
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

    pub(crate) fn unwatch_kick(&self, i: usize) {
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

#[cfg(test)]
#[path = "thread_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod waiting_tests;
