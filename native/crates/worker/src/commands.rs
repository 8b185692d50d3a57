//! What the keeper tells a ring thread: memory, rings, descriptors. Carried out between two rounds.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use session::clock::now_ns;
use session::failpoint::Point;
use virtq::{RegionSpec, RingAddresses};

use crate::RingSetup;
use crate::channel::{self, Answer, Command, Op, Received, RingWords};
use crate::queue::{Queue, RingSpec};
use crate::thread::RingThread;

impl RingThread {
    /// Carries out all commands that are there; false when the keeper is gone.
    pub(crate) fn commands(&mut self) -> io::Result<bool> {
        loop {
            match channel::receive_command(self.channel)? {
                Received::Nothing => return Ok(true),
                Received::Closed => return Ok(false),
                Received::Command(command, fds) => {
                    self.flush_all();
                    let answer = match self.carry_out(&command, fds) {
                        Ok(value) => Answer { status: 0, value },
                        Err(e) => {
                            session::say!("rafs-worker: {:?} {}: {e}", command.op, command.queue);
                            Answer {
                                status: e.raw_os_error().unwrap_or(libc::EINVAL),
                                value: 0,
                            }
                        }
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
                    self.enable(i, args[0] != 0);
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

    /// Takes a ring over. Its backlog is served by the rounds that follow: commands are answered at once.
    pub(crate) fn set_ring(
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
        queue.start(&self.server.mem, ring.base, ring.resume);
        let at = self.queues.partition_point(|q| q.index < ring.queue);
        self.queues.insert(at, queue);
        self.watch_kick(at)
    }

    /// Ends a ring; its next avail position. Parked heads stay in the log.
    fn stop(&mut self, queue: usize) -> Option<u16> {
        let at = self.position(queue)?;
        self.unwatch_kick(at);
        self.server.parking.drop_queue(queue);
        Some(self.queues.remove(at).stop())
    }

    /// Enables or disables the ring of queue `i`. A machine that stands still is not behind time when it goes on.
    fn enable(&mut self, i: usize, enabled: bool) {
        let (now, deadline_ns) = (now_ns(), self.server.io_deadline_ns);
        let queue = &mut self.queues[i];
        if queue.enabled == enabled {
            return;
        }
        queue.enable(enabled, now);
        for parked in &mut self.server.parking.list {
            if parked.queue == queue.index {
                parked.taken_ns = now;
                parked.deadline_ns = now.saturating_add(deadline_ns);
            }
        }
    }

    fn remap(&mut self) {
        for queue in &mut self.queues {
            queue.remap(&self.server.mem);
        }
    }
}
