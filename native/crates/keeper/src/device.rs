//! The vhost-user device: every message of the front-end ends here.
//!
//! The rule for each message: first change the keeper's own state, then tell the worker. When the worker does not
//! answer, it is replaced, and its successor starts from the new state: there is no third case.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use session::{MAX_QUEUE_SIZE, MAX_QUEUES, Shared};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtq::{RegionSpec, RingAddresses};
use worker::RingSetup;
use worker::channel::{Command, Op, RingWords};

use crate::ring::Ring;
use crate::worker_slot::WorkerSlot;

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const FEATURES: u64 = VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | VHOST_USER_F_PROTOCOL_FEATURES
    | VIRTIO_F_VERSION_1;

/// Memory slots offered to the VMM. The number must never shrink between versions or hosts; this one is the limit of
/// the reference implementation (libvhost-user).
const MAX_MEM_SLOTS: u64 = 509;

/// The device as the front-end has set it up.
pub struct Device {
    shared: &'static Shared,
    pub slot: WorkerSlot,
    acked_features: u64,
    acked_protocol: u64,
    regions: Vec<(RegionSpec, File)>,
    rings: Vec<Ring>,
    backend: Option<Backend>,
}

fn unsupported() -> Error {
    Error::InvalidOperation("not offered by this device")
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
            rings: (0..MAX_QUEUES).map(|_| Ring::default()).collect(),
            backend: None,
        }
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

    /// Forks a worker when there is something to serve and somebody to serve it to.
    fn spawn_if_needed(&mut self) {
        if self.slot.is_running() || !self.slot.has_mount() {
            return;
        }
        let rings = self.setups();
        if rings.is_empty() {
            return;
        }
        let queues: Vec<usize> = rings.iter().map(|r| r.queue).collect();
        match self.slot.spawn(&self.regions, rings) {
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

    /// Replaces a worker that did not answer a command in time. A busy host does that too: no request is blamed.
    fn replace_silent(&mut self) {
        self.slot.kill_stuck();
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

    /// A worker must not go on with a ring that is about to mean something else.
    fn stop_if_running(&mut self, index: u32) {
        let running = self
            .rings
            .get(index as usize)
            .is_some_and(|r| r.is_complete() && r.log_valid);
        if running {
            self.stop_ring(index as usize);
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
            // A worker that dies here leaves a log that it has reset, or one that is resumed.
            Some(_) => self.rings[index].log_valid = true,
            None => self.replace_silent(),
        }
    }

    fn stop_ring(&mut self, index: usize) -> u16 {
        let ring = &self.rings[index];
        if !ring.is_complete() || !ring.log_valid {
            // No worker has seen it: nothing was taken.
            let base = ring.base;
            self.rings[index].started = false;
            return base;
        }
        let command = Command::new(Op::Stop, index);
        // A dead worker is replaced first: only a worker reads the guest's rings, and it repairs the log.
        let mut base = None;
        for _ in 0..3 {
            self.spawn_if_needed();
            base = self
                .slot
                .command(&command, &[])
                .filter(|a| a.status == 0)
                .map(|a| a.value as u16);
            if base.is_some() || !self.slot.is_running() {
                break;
            }
            self.slot.kill_stuck();
        }
        let base = base.unwrap_or_else(|| self.shared.log(index).next_avail());
        let ring = &mut self.rings[index];
        ring.started = false;
        ring.kick = None;
        ring.stopped_at = Some(base);
        ring.base = base;
        base
    }

    fn add_region(&mut self, spec: RegionSpec, file: File) -> Result<()> {
        if self.regions.iter().any(|(r, _)| r.overlaps(&spec)) {
            return Err(Error::InvalidParam);
        }
        let len = file.metadata().map_err(Error::ReqHandlerError)?.len();
        if spec
            .mmap_offset
            .checked_add(spec.size)
            .is_none_or(|end| end > len)
        {
            return Err(Error::ReqHandlerError(io::Error::other(
                "memory region is longer than its file",
            )));
        }
        self.regions.push((spec, file));
        Ok(())
    }
}

fn region_spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
    }
}

fn add_command(spec: &RegionSpec) -> Command {
    Command::new(Op::AddRegion, 0).with([
        spec.guest_addr,
        spec.size,
        spec.user_addr,
        spec.mmap_offset,
    ])
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            if self.rings[index].is_complete() {
                self.stop_ring(index);
            }
            self.rings[index].reset();
        }
        self.forget_session();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let old = std::mem::take(&mut self.regions);
        for (region, file) in regions.iter().zip(files) {
            if let Err(e) = self.add_region(region_spec(region), file) {
                self.regions = old;
                return Err(e);
            }
        }
        self.tell_all(Command::new(Op::ClearRegions, 0), &[]);
        let adds: Vec<(Command, RawFd)> = self
            .regions
            .iter()
            .map(|(spec, file)| (add_command(spec), file.as_raw_fd()))
            .collect();
        for (command, fd) in adds {
            self.tell_all(command, &[fd]);
        }
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if num == 0 || !num.is_power_of_two() || num as usize > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        if self.ring(index)?.size != num as u16 {
            self.stop_if_running(index);
            let ring = self.ring(index)?;
            ring.size = num as u16;
            ring.log_valid = false;
        }
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let ring = self.ring(index)?;
        let at = Some(RingAddresses {
            desc: descriptor,
            avail: available,
            used,
        });
        if ring.at == at {
            return Ok(());
        }
        let running = ring.is_complete() && ring.log_valid;
        if running {
            // The ring goes on elsewhere, with the same kick.
            let kick = ring.kick.take();
            self.stop_ring(index as usize);
            let ring = self.ring(index)?;
            ring.kick = kick;
            ring.started = true;
        }
        let ring = self.ring(index)?;
        ring.at = at;
        ring.log_valid = false;
        self.start_ring(index as usize);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let ring = self.ring(index)?;
        // Only a start exactly where the ring was stopped goes on with the heads in the log.
        if ring.stopped_at != Some(base) {
            self.stop_if_running(index);
            self.ring(index)?.log_valid = false;
        }
        self.ring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.ring(index)?;
        let base = self.stop_ring(index as usize);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let plain = self.acked_features & VHOST_USER_F_PROTOCOL_FEATURES == 0;
        let ring = self.ring(u32::from(index))?;
        let was_running = ring.is_complete();
        ring.kick = fd;
        ring.started = true;
        if plain {
            // Without protocol features there is no SET_VRING_ENABLE: a ring is enabled from the start.
            ring.enabled = true;
        }
        if was_running && self.slot.is_running() {
            let fd = self.rings[usize::from(index)]
                .kick
                .as_ref()
                .map(AsRawFd::as_raw_fd);
            self.tell(
                Command::new(Op::SetKick, usize::from(index)),
                &Vec::from_iter(fd),
            );
        } else {
            self.start_ring(usize::from(index));
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.call = fd;
        if self.rings[usize::from(index)].is_complete() {
            let fd = self.rings[usize::from(index)]
                .call
                .as_ref()
                .map(AsRawFd::as_raw_fd);
            self.tell(
                Command::new(Op::SetCall, usize::from(index)),
                &Vec::from_iter(fd),
            );
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.acked_protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(MAX_QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        if self.rings[index as usize].is_complete() {
            let command =
                Command::new(Op::Enable, index as usize).with([u64::from(enable), 0, 0, 0]);
            self.tell(command, &[]);
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        _offset: u32,
        _size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        Err(unsupported())
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        Err(unsupported())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        // Nothing is asked of the VMM; the descriptor is kept so that it does not see a hang-up.
        self.backend = Some(backend);
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(unsupported())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported())
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(unsupported())
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(unsupported())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS)
    }

    fn add_mem_region(&mut self, region: &VhostUserSingleMemoryRegion, fd: File) -> Result<()> {
        if self.regions.len() as u64 >= MAX_MEM_SLOTS {
            return Err(Error::InvalidParam);
        }
        let spec = region_spec(region);
        let raw = fd.as_raw_fd();
        self.add_region(spec, fd)?;
        self.tell_all(add_command(&spec), &[raw]);
        Ok(())
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let spec = region_spec(region);
        let found = self.regions.iter().position(|(r, _)| {
            r.guest_addr == spec.guest_addr && r.size == spec.size && r.user_addr == spec.user_addr
        });
        self.regions.remove(found.ok_or(Error::InvalidParam)?);
        let command =
            Command::new(Op::RemoveRegion, 0).with([spec.guest_addr, spec.size, spec.user_addr, 0]);
        self.tell_all(command, &[]);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(unsupported())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unsupported())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(unsupported())
    }
}
