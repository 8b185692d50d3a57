//! Messages of a front-end that asks for anything in any order. No image is mounted, so that no worker is forked.

use std::fs::File;
use std::os::fd::OwnedFd;

use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{
    VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
};
use virtq::testing::{Random, memfd};

use super::*;

fn eventfd() -> File {
    // SAFETY: plain system call; the result is checked and owned by nobody else.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        File::from(<OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd))
    }
}

fn device() -> Device {
    let shared: &'static Shared = Box::leak(Box::new(Shared::create().unwrap()));
    let fd = || std::os::fd::IntoRawFd::into_raw_fd(eventfd());
    Device::new(
        shared,
        WorkerSlot::new(shared, vec![fd(), fd()], fd(), fd()),
    )
}

const NO_FLAGS: VhostUserVringAddrFlags = VhostUserVringAddrFlags::empty();

fn region(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
    VhostUserMemoryRegion::new(guest, size, user, offset)
}

fn single(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserSingleMemoryRegion {
    VhostUserSingleMemoryRegion::new(guest, size, user, offset)
}

fn set_up(device: &mut Device, index: u32) {
    device.set_vring_num(index, 256).unwrap();
    device.set_vring_base(index, 5).unwrap();
    device
        .set_vring_addr(index, NO_FLAGS, 0x1000, 0x3000, 0x2000, 0)
        .unwrap();
    device.set_vring_kick(index as u8, Some(eventfd())).unwrap();
    device.set_vring_enable(index, true).unwrap();
}

#[test]
fn queues_that_do_not_exist_are_refused() {
    let mut d = device();
    for index in [MAX_QUEUES as u32, 255, 256, u32::MAX] {
        assert!(d.set_vring_num(index, 256).is_err());
        assert!(d.set_vring_base(index, 0).is_err());
        assert!(d.get_vring_base(index).is_err());
        assert!(d.set_vring_enable(index, true).is_err());
        assert!(d.set_vring_addr(index, NO_FLAGS, 0, 0, 0, 0).is_err());
    }
    for index in [MAX_QUEUES as u8, u8::MAX] {
        assert!(d.set_vring_kick(index, Some(eventfd())).is_err());
        assert!(d.set_vring_call(index, Some(eventfd())).is_err());
        assert!(d.set_vring_err(index, None).is_err());
    }
    assert!(d.rings.iter().all(|r| !r.is_complete() && r.kick.is_none()));
}

#[test]
fn sizes_and_bases_that_no_ring_has_are_refused() {
    let mut d = device();
    for size in [0, 3, 1000, 2048, 65_536, u32::MAX] {
        assert!(d.set_vring_num(1, size).is_err(), "{size}");
    }
    for bits in 0..=10 {
        d.set_vring_num(1, 1 << bits).unwrap();
    }
    // The form with wrap counters of packed rings is one of them.
    for base in [65_536, 0x8000_8000, u32::MAX] {
        assert!(d.set_vring_base(1, base).is_err());
    }
    d.set_vring_base(1, 65_535).unwrap();
    assert!(d.set_features(1 << 34).is_err());
    assert!(d.set_features(FEATURES_OFFERED).is_ok());
    assert_eq!(d.get_queue_num().unwrap(), MAX_QUEUES as u64);
}

const FEATURES_OFFERED: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

#[test]
fn a_ring_that_no_worker_has_seen_keeps_its_base() {
    let mut d = device();
    set_up(&mut d, 1);
    let base = d.get_vring_base(1).unwrap();
    assert_eq!({ base.num }, 5);
    assert!(!d.rings[1].is_complete());
}

/// As if a worker had served it, and had died.
fn running(d: &mut Device, index: usize) {
    set_up(d, index as u32);
    d.rings[index].log_valid = true;
    d.shared.log(index).reset(256, 40, 40);
    assert!(d.shared.log(index).log(3, 1));
}

#[test]
fn a_stopped_ring_goes_on_only_from_where_it_was_stopped() {
    for (base, goes_on) in [(41, true), (40, false), (0, false), (42, false)] {
        let mut d = device();
        running(&mut d, 1);
        let stopped = d.get_vring_base(1).unwrap();
        assert_eq!({ stopped.num }, 41, "the head in flight was taken");
        assert!(d.rings[1].kick.is_none());
        d.set_vring_num(1, 256).unwrap();
        d.set_vring_base(1, base).unwrap();
        d.set_vring_addr(1, NO_FLAGS, 0x1000, 0x3000, 0x2000, 0)
            .unwrap();
        d.set_vring_kick(1, Some(eventfd())).unwrap();
        assert_eq!(d.rings[1].log_valid, goes_on, "base {base}");
    }
}

/// A VMM that resets its device without GET_VRING_BASE sets up rings that still run.
#[test]
fn a_running_ring_that_is_set_up_anew_starts_anew() {
    let setups: [fn(&mut Device); 3] = [
        |d| d.set_vring_num(1, 128).unwrap(),
        |d| d.set_vring_base(1, 0).unwrap(),
        |d| {
            d.set_vring_addr(1, NO_FLAGS, 0x8000, 0x3000, 0x2000, 0)
                .unwrap()
        },
    ];
    for set_up in setups {
        let mut d = device();
        running(&mut d, 1);
        set_up(&mut d);
        let ring = &d.rings[1];
        assert!(!ring.log_valid, "its heads are not the new driver's");
        assert_eq!(ring.stopped_at, Some(41), "the worker was not told");
        assert!(ring.is_complete() && ring.kick.is_some(), "it runs on");
    }
}

#[test]
fn what_changes_nothing_stops_nothing() {
    let mut d = device();
    running(&mut d, 1);
    d.set_vring_num(1, 256).unwrap();
    d.set_vring_addr(1, NO_FLAGS, 0x1000, 0x3000, 0x2000, 0)
        .unwrap();
    assert!(d.rings[1].log_valid && d.rings[1].stopped_at.is_none());
}

#[test]
fn reset_forgets_rings_and_keeps_memory_and_call_fds() {
    let mut d = device();
    let file = memfd(1 << 20);
    d.add_mem_region(&single(0, 4096, 0, 0), file).unwrap();
    d.set_vring_call(1, Some(eventfd())).unwrap();
    running(&mut d, 1);
    d.reset_device().unwrap();
    let ring = &d.rings[1];
    assert!(!ring.is_complete() && !ring.enabled && !ring.log_valid && ring.kick.is_none());
    assert!(ring.call.is_some() && ring.base == 0 && ring.stopped_at.is_none());
    assert_eq!(d.regions.len(), 1);
    d.reset_all();
    assert!(d.rings[1].call.is_none() && d.regions.is_empty());
}

#[test]
fn absurd_regions_are_refused() {
    let mut d = device();
    d.add_mem_region(&single(0x1000, 0x1000, 0x1000, 0), memfd(0x2000))
        .unwrap();
    for (guest, size, user, offset) in [
        (0, 0, 0, 0),
        (0x1fff, 1, 0, 0),
        (0, 0x1001, 0, 0),
        (u64::MAX, 2, 0, 0),
        (1 << 40, 2, u64::MAX, 0),
        (1 << 40, 0x1000, 0, u64::MAX),
        (1 << 40, 0x2001, 0, 0),
        (1 << 40, 0x2000, 0, 1),
        (u64::MAX, u64::MAX, u64::MAX, u64::MAX),
    ] {
        let added = d.add_mem_region(&single(guest, size, user, offset), memfd(0x2000));
        assert!(added.is_err(), "{guest:#x} {size:#x}");
        assert!(
            d.remove_mem_region(&single(guest, size, user, offset))
                .is_err()
        );
    }
    assert_eq!(d.regions.len(), 1);
    d.remove_mem_region(&single(0x1000, 0x1000, 0x1000, 0))
        .unwrap();
    assert!(d.regions.is_empty());
}

#[test]
fn there_are_as_many_slots_as_were_promised() {
    let mut d = device();
    let slots = d.get_max_mem_slots().unwrap();
    let file = memfd(4096);
    for n in 0..slots {
        let region = single(n << 20, 4096, n << 20, 0);
        d.add_mem_region(&region, file.try_clone().unwrap())
            .unwrap();
    }
    let region = single(slots << 20, 4096, slots << 20, 0);
    assert!(d.add_mem_region(&region, file).is_err());
}

#[test]
fn a_table_with_a_wrong_region_changes_nothing() {
    let mut d = device();
    let good = [region(0, 4096, 0, 0), region(1 << 20, 4096, 1 << 20, 0)];
    d.set_mem_table(&good, vec![memfd(4096), memfd(4096)])
        .unwrap();
    let before: Vec<RegionSpec> = d.regions.iter().map(|r| r.0).collect();
    for bad in [
        [region(0, 4096, 0, 0), region(0xfff, 1, 0, 0)],
        [region(0, 4096, 0, 0), region(1 << 30, 4097, 0, 0)],
        [region(u64::MAX, 4096, 0, 0), region(0, 4096, 0, 0)],
    ] {
        assert!(
            d.set_mem_table(&bad, vec![memfd(4096), memfd(4096)])
                .is_err()
        );
        assert!(d.regions.iter().map(|r| r.0).eq(before.iter().copied()));
    }
    assert!(d.set_mem_table(&good, vec![memfd(4096)]).is_err());
    d.set_mem_table(&good[..1], vec![memfd(4096)]).unwrap();
    assert_eq!(d.regions.len(), 1);
}

#[test]
fn the_same_memory_is_recognised() {
    let file = memfd(4096);
    let spec = |guest_addr| RegionSpec {
        guest_addr,
        size: 4096,
        user_addr: 0,
        mmap_offset: 0,
    };
    let a = (spec(0), file.try_clone().unwrap());
    assert!(same_region(&a, &(spec(0), file.try_clone().unwrap())));
    assert!(!same_region(&a, &(spec(4096), file)));
    assert!(!same_region(&a, &(spec(0), memfd(4096))));
}

#[test]
fn messages_in_any_order() {
    let mut random = Random::new(5);
    for _ in 0..40 {
        let mut d = device();
        for _ in 0..500 {
            let index = [0, 1, 2, 64, 65, u32::MAX][random.below(6) as usize];
            let bits = random.below(64);
            let number = random.draw() >> bits;
            let fd = (random.below(2) == 0).then(eventfd);
            let _ = match random.below(14) {
                0 => d.set_vring_num(index, number as u32),
                1 => d.set_vring_num(index, 1 << random.below(12)),
                2 => d.set_vring_base(index, number as u32),
                3 => d.set_vring_base(index, random.below(4) as u32),
                4 => d.set_vring_addr(index, NO_FLAGS, number, number ^ 64, number ^ 128, 0),
                5 => d.get_vring_base(index).map(|_| ()),
                6 => d.set_vring_kick(index as u8, fd),
                7 => d.set_vring_call(index as u8, fd),
                8 => d.set_vring_enable(index, random.below(2) == 0),
                9 => d.reset_device(),
                10 => d.set_features(number),
                11 => d.add_mem_region(&single(number, number, number, 0), memfd(4096)),
                12 => d.remove_mem_region(&single(number, number, number, 0)),
                _ => {
                    if let Some(ring) = d.rings.get_mut(index as usize) {
                        ring.log_valid |= ring.is_complete();
                    }
                    Ok(())
                }
            };
            d.tick(1);
        }
        assert!(!d.slot.is_running());
        d.reset_all();
    }
}
