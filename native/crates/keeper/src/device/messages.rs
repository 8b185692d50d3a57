//! The front-end's messages, one method each. What the device does not offer is refused.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use session::{MAX_QUEUE_SIZE, MAX_QUEUES};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtq::{RegionSpec, RingAddresses};
use worker::channel::{Command, Op};

use super::{Device, VIRTIO_RING_F_EVENT_IDX, same_region};

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const FEATURES: u64 = VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | VHOST_USER_F_PROTOCOL_FEATURES
    | VIRTIO_F_VERSION_1;

/// Memory slots offered to the VMM. The number must never shrink between versions or hosts; this one is the limit of
/// the reference implementation (libvhost-user).
const MAX_MEM_SLOTS: u64 = 509;

fn unsupported() -> Error {
    Error::InvalidOperation("not offered by this device")
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

fn remove_command(spec: &RegionSpec) -> Command {
    Command::new(Op::RemoveRegion, 0).with([spec.guest_addr, spec.size, spec.user_addr, 0])
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
        if regions.len() != files.len() {
            return Err(Error::InvalidParam);
        }
        let old = std::mem::take(&mut self.regions);
        let away = self.away.clone();
        for (spec, _) in &old {
            self.away.take(spec.guest_addr, spec.guest_end());
        }
        for (region, file) in regions.iter().zip(files) {
            if let Err(e) = self.add_region(region_spec(region), file) {
                self.regions = old;
                self.away = away;
                return Err(e);
            }
        }
        // What stays is left alone: rings that run on it notice nothing.
        let missing_in = |list: &[(RegionSpec, File)], region: &(RegionSpec, File)| {
            !list.iter().any(|other| same_region(other, region))
        };
        let gone = old.iter().filter(|r| missing_in(&self.regions, r));
        let new = self.regions.iter().filter(|r| missing_in(&old, r));
        let commands: Vec<(Command, Option<RawFd>)> = gone
            .map(|(spec, _)| (remove_command(spec), None))
            .chain(new.map(|(spec, file)| (add_command(spec), Some(file.as_raw_fd()))))
            .collect();
        for (command, fd) in commands {
            self.tell_all(command, fd.as_slice());
        }
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if num == 0 || !num.is_power_of_two() || num as usize > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        if self.ring(index)?.size != num as u16 {
            self.reconfigure(index as usize, |ring| {
                ring.size = num as u16;
                ring.log_valid = false;
            });
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
        let at = Some(RingAddresses {
            desc: descriptor,
            avail: available,
            used,
        });
        if self.ring(index)?.at != at {
            self.reconfigure(index as usize, |ring| {
                ring.at = at;
                ring.log_valid = false;
            });
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?;
        self.reconfigure(index as usize, |ring| {
            // Only a start exactly where the ring was stopped goes on with the heads in the log.
            if ring.stopped_at != Some(base) {
                ring.log_valid = false;
            }
            ring.base = base;
        });
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
        self.away.take(spec.guest_addr, spec.guest_end());
        self.tell_all(remove_command(&spec), &[]);
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
