//! The vhost-user device: every message of the front-end ends here.
//!
//! The rule for each message: first change the keeper's own state, then tell the worker. When the worker does not
//! answer, it is replaced, and its successor starts from the new state: there is no third case.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use session::{MAX_QUEUES, Shared};
use vhost::vhost_user::{Backend, Error, Result};
use virtq::{Away, RegionSpec};
use worker::RingSetup;
use worker::channel::{Command, Op, RingWords};

use crate::ring::Ring;
use crate::worker_slot::WorkerSlot;

mod messages;
#[cfg(test)]
mod tests;

const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;

/// The device as the front-end has set it up.
pub struct Device {
    shared: &'static Shared,
    pub slot: WorkerSlot,
    acked_features: u64,
    acked_protocol: u64,
    regions: Vec<(RegionSpec, File)>,
    /// Memory that was there and may come back: requests in it wait, also in the next worker.
    away: Away,
    rings: Vec<Ring>,
    backend: Option<Backend>,
}

impl Device {
    /// A device that no driver uses.
    pub fn new(shared: &'static Shared, slot: WorkerSlot) -> Device {
        Device {
            shared,
            slot,
            acked_features: 0,
            acked_protocol: 0,
            regions: Vec::new(),
            away: Away::default(),
            rings: (0..MAX_QUEUES).map(|_| Ring::default()).collect(),
            backend: None,
        }
    }

    /// Number of memory regions.
    #[cfg(any(test, feature = "testing"))]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    fn event_idx(&self) -> bool {
        self.acked_features & VIRTIO_RING_F_EVENT_IDX != 0
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    fn setups(&self) -> Vec<RingSetup> {
        let event_idx = self.event_idx();
        self.rings
            .iter()
            .enumerate()
            .filter_map(|(i, r)| r.setup(i, event_idx))
            .collect()
    }

    /// Whether there should be a worker and is none: it could not be forked, or its time has not come.
    pub fn lacks_worker(&self) -> bool {
        let wanted = self.slot.has_mount() && self.rings.iter().any(Ring::is_complete);
        wanted && !self.slot.is_running()
    }

    /// Forks a worker when there is something to serve and somebody to serve it to.
    fn spawn_if_needed(&mut self) {
        if self.slot.is_running() || !self.slot.has_mount() {
            return;
        }
        let rings = self.setups();
        if rings.is_empty() {
            return;
        }
        for ring in rings.iter().filter(|r| !r.resume) {
            self.shared.log(ring.queue).disown();
        }
        let queues: Vec<usize> = rings.iter().map(|r| r.queue).collect();
        match self.slot.spawn(&self.regions, self.away.clone(), rings) {
            Ok(true) => {
                for queue in queues {
                    self.rings[queue].log_valid = true;
                }
            }
            Ok(false) => {}
            Err(e) => session::say!("rafs-keeper: no worker can be forked: {e}"),
        }
    }

    /// Replaces a worker that makes no progress: what it was serving may be to blame.
    fn replace_stuck(&mut self) {
        if self.slot.kill_stuck() {
            self.count_crash();
        }
        self.spawn_if_needed();
    }

    /// Replaces a worker that did not answer a command in time. A busy host does that too: no request is blamed, unless
    /// the worker had died by itself.
    fn replace_silent(&mut self) {
        if self.slot.kill_silent() {
            self.count_crash();
        }
        self.spawn_if_needed();
    }

    /// Has the chunks of all parked requests posted again.
    pub fn repost(&mut self) {
        self.tell_all(Command::new(Op::Repost, 0), &[]);
    }

    fn count_crash(&self) {
        for (i, ring) in self.rings.iter().enumerate() {
            if ring.log_valid {
                self.shared.log(i).count_crash();
            }
        }
    }

    /// The worker's pidfd became readable.
    pub fn worker_died(&mut self) {
        if self.slot.reap() {
            self.count_crash();
        }
        self.spawn_if_needed();
    }

    /// Looks after a worker that hangs or waits to be forked.
    pub fn tick(&mut self, heartbeat_ns: u64) {
        if self.slot.is_stuck(heartbeat_ns) {
            self.replace_stuck();
        }
        self.spawn_if_needed();
    }

    /// An image was mounted: the first, or another one in its place.
    pub fn mounted(&mut self) {
        self.slot.kill();
        self.spawn_if_needed();
    }

    /// The front-end is gone with its guest.
    pub fn reset_all(&mut self) {
        self.slot.kill();
        self.acked_features = 0;
        self.acked_protocol = 0;
        self.regions.clear();
        self.away = Away::default();
        self.rings = (0..MAX_QUEUES).map(|_| Ring::default()).collect();
        self.backend = None;
        self.forget_session();
    }

    fn forget_session(&self) {
        self.shared.record().initialised.store(0, Ordering::Relaxed);
        for queue in 0..MAX_QUEUES {
            let record = self.shared.queue(queue);
            if record.size.load(Ordering::Relaxed) != 0 {
                record.size.store(0, Ordering::Relaxed);
                record.enabled.store(0, Ordering::Relaxed);
                record.broken.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Tells the worker, if there is one; replaces it when it does not answer.
    fn tell(&mut self, command: Command, fds: &[RawFd]) {
        if self.slot.is_running() && self.slot.command(&command, fds).is_none() {
            self.replace_silent();
        }
    }

    fn tell_all(&mut self, command: Command, fds: &[RawFd]) {
        if self.slot.is_running() && !self.slot.command_all(&command, fds) {
            self.replace_silent();
        }
    }

    fn start_ring(&mut self, index: usize) {
        let event_idx = self.event_idx();
        let Some(setup) = self.rings[index].setup(index, event_idx) else {
            return;
        };
        if !self.slot.is_running() {
            self.spawn_if_needed();
            return;
        }
        if !setup.resume {
            // Even a worker that dies before it has seen the ring must not leave its predecessor's heads to the next.
            self.shared.log(index).disown();
        }
        let words = RingWords {
            size: setup.size,
            base: setup.base,
            resume: setup.resume,
            enabled: setup.enabled,
            event_idx,
            has_kick: setup.kick.is_some(),
            has_call: setup.call.is_some(),
        };
        let fds: Vec<RawFd> = [setup.kick, setup.call].into_iter().flatten().collect();
        let command = Command::new(Op::SetRing, index).with([
            setup.at.desc,
            setup.at.avail,
            setup.at.used,
            words.pack(),
        ]);
        match self.slot.command(&command, &fds) {
            Some(_) => self.rings[index].log_valid = true,
            None => self.replace_silent(),
        }
    }

    /// Stops a ring; its next avail position.
    fn stop_ring(&mut self, index: usize) -> u16 {
        let ring = &self.rings[index];
        if !ring.is_complete() || !ring.log_valid {
            // No worker has seen it: nothing was taken.
            let base = ring.base;
            self.rings[index].started = false;
            return base;
        }
        // A dead worker is replaced first: only a worker reads the guest's rings, and it repairs the log.
        let mut base = None;
        for _ in 0..3 {
            self.spawn_if_needed();
            base = self.slot.stop(index);
            if base.is_some() || !self.slot.is_running() {
                break;
            }
            if self.slot.kill_silent() {
                self.count_crash();
            }
        }
        let base = base.unwrap_or_else(|| self.shared.log(index).next_avail());
        let ring = &mut self.rings[index];
        ring.started = false;
        ring.kick = None;
        ring.stopped_at = Some(base);
        ring.base = base;
        base
    }

    /// Changes what a ring is made of. One that runs is stopped for it, and started again as it is then: VMMs that
    /// reset a device without GET_VRING_BASE set up a ring that the worker still serves.
    fn reconfigure(&mut self, index: usize, change: impl FnOnce(&mut Ring)) {
        let running = self.rings[index].is_complete() && self.rings[index].log_valid;
        let kick = self.rings[index].kick.take();
        if running {
            self.stop_ring(index);
        }
        let ring = &mut self.rings[index];
        ring.kick = kick;
        ring.started |= running;
        change(ring);
        self.start_ring(index);
    }

    fn add_region(&mut self, spec: RegionSpec, file: File) -> Result<()> {
        if spec.is_absurd() || self.regions.iter().any(|(r, _)| r.overlaps(&spec)) {
            return Err(Error::InvalidParam);
        }
        let metadata = file.metadata().map_err(Error::ReqHandlerError)?;
        // Only of a file does the length say what can be mapped.
        if metadata.is_file() && spec.mmap_offset + spec.size > metadata.len() {
            return Err(Error::ReqHandlerError(io::Error::other(
                "memory region is longer than its file",
            )));
        }
        self.away.give(spec.guest_addr, spec.guest_end());
        self.regions.push((spec, file));
        Ok(())
    }
}

/// Whether two regions are the same memory at the same place.
fn same_region(a: &(RegionSpec, File), b: &(RegionSpec, File)) -> bool {
    let id = |file: &File| file.metadata().ok().map(|m| (m.dev(), m.ino()));
    a.0 == b.0 && id(&a.1).is_some() && id(&a.1) == id(&b.1)
}
