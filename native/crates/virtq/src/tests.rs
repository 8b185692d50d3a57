//! Rings and chains, right and wrong, as a driver may write them.

use crate::testing::*;
use crate::{Chain, ChainError, GuestMemory, RingAddresses, RingError, Vring};

const RING: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
/// Two regions that touch in the guest and not in the host, and one far away.
const REGIONS: [(u64, u64); 3] = [
    (0x10_0000, 0x20_0000),
    (0x30_0000, 0x10_0000),
    (1 << 36, 0x10_0000),
];
const EDGE: u64 = 0x30_0000;

struct Fixture {
    guest: Guest,
    mem: GuestMemory,
    driver: Driver,
    ring: Vring,
}

fn fixture(size: u16, start: u16, event_idx: bool) -> Fixture {
    let guest = Guest::new(&REGIONS);
    let mem = guest.map();
    let driver = Driver::new(&guest, RING, size, start);
    let ring = Vring::new(&mem, size, driver.addresses(), start, event_idx).unwrap();
    Fixture {
        guest,
        mem,
        driver,
        ring,
    }
}

impl Fixture {
    fn walk(&self, head: u16) -> (Result<(), ChainError>, Chain) {
        let mut chain = Chain::default();
        let result = self.ring.walk(&self.mem, head, &mut chain);
        (result, chain)
    }
}

#[test]
fn all_indexes_wrap() {
    for (size, event_idx) in [(1, true), (2, false), (8, true), (1024, true)] {
        let mut f = fixture(size, 65_530, event_idx);
        for n in 0..140_000u32 / 64 {
            let batch = (n % u32::from(size)) as u16 + 1;
            for head in 0..batch {
                f.driver.offer(&f.guest, head);
            }
            for head in 0..batch {
                assert_eq!(f.ring.take(), Ok(Some(head)));
                f.ring.push_used(head, n);
            }
            assert_eq!(f.ring.take(), Ok(None));
            assert_eq!(f.driver.answers(&f.guest), []);
            f.ring.publish();
            let want: Vec<_> = (0..u32::from(batch)).map(|head| (head, n)).collect();
            assert_eq!(f.driver.answers(&f.guest), want);
            assert_eq!(f.ring.next_avail(), f.driver.offered);
            assert_eq!(f.ring.published_used(), f.driver.seen);
        }
    }
}

/// Every place of the event index around a batch, at the wrap and elsewhere, against the rule in words: a signal is
/// due when one of the entries just published is the one that the driver waits for.
#[test]
fn a_signal_is_sent_exactly_when_the_event_index_is_passed() {
    let f = fixture(16, 0, true);
    for start in [0u16, 7, 32_767, 65_531, 65_535] {
        for batch in 1..=8u16 {
            // All far offsets behave alike.
            for offset in (0..40).chain(65_496..=u16::MAX) {
                f.driver.set_used_index(&f.guest, start);
                let mut ring = Vring::new(&f.mem, 16, f.driver.addresses(), start, true).unwrap();
                let event = start.wrapping_add(offset);
                f.driver.set_used_event(&f.guest, event);
                for head in 0..batch {
                    ring.push_used(head, 0);
                }
                ring.publish();
                let passed = (0..batch).any(|n| start.wrapping_add(n) == event);
                assert_eq!(ring.needs_signal(), passed, "{start} {batch} {event}");
                assert!(!ring.needs_signal(), "said once");
            }
        }
    }
}

#[test]
fn without_event_index_the_flag_decides() {
    let mut f = fixture(8, 0, false);
    f.driver.set_no_interrupt(&f.guest, true);
    f.ring.push_used(0, 0);
    f.ring.publish();
    assert!(!f.ring.needs_signal());
    f.driver.set_no_interrupt(&f.guest, false);
    assert!(!f.ring.needs_signal(), "nothing new");
    f.ring.push_used(1, 0);
    assert!(!f.ring.needs_signal(), "nothing the driver could see");
    f.ring.publish();
    assert!(f.ring.needs_signal());
}

#[test]
fn arming_asks_for_the_next_head_and_sees_one_that_is_there() {
    for event_idx in [false, true] {
        let mut f = fixture(8, 65_535, event_idx);
        f.ring.disarm();
        assert_eq!(f.driver.no_notify(&f.guest), !event_idx);
        assert!(!f.ring.arm());
        assert!(!f.ring.has_more());
        assert!(!f.driver.no_notify(&f.guest));
        if event_idx {
            assert_eq!(f.driver.avail_event(&f.guest), 65_535);
        }
        f.driver.offer(&f.guest, 3);
        assert!(f.ring.has_more());
        assert!(
            f.ring.arm(),
            "a head that came between the last look and arming"
        );
        assert_eq!(f.ring.take(), Ok(Some(3)));
        assert!(!f.ring.arm());
        if event_idx {
            assert_eq!(f.driver.avail_event(&f.guest), 0);
        }
    }
}

#[test]
fn an_avail_index_that_runs_ahead_is_refused() {
    let mut f = fixture(8, 100, true);
    f.driver.set_avail(&f.guest, 109);
    assert_eq!(f.ring.take(), Err(RingError::BadAvail));
    f.driver.set_avail(&f.guest, 99);
    assert_eq!(f.ring.take(), Err(RingError::BadAvail));
    f.driver.set_avail(&f.guest, 108);
    assert!(f.ring.take().is_ok(), "a full ring is none");
}

#[test]
fn a_head_outside_the_table_is_refused() {
    for head in [8, 9, 0x8000, u16::MAX] {
        let mut f = fixture(8, 0, true);
        f.driver.offer(&f.guest, head);
        assert_eq!(f.ring.take(), Err(RingError::BadAvail));
    }
}

#[test]
fn rings_that_do_not_fit_memory_are_refused() {
    let guest = Guest::new(&REGIONS);
    let mem = guest.map();
    let at = |desc, avail, used| RingAddresses { desc, avail, used };
    let new = |size, at| Vring::new(&mem, size, at, 0, true).err();
    let good = USER_BASE + RING;
    for size in [0, 3, 1023] {
        assert_eq!(new(size, at(good, good, good)), Some(RingError::BadSize));
    }
    let last = USER_BASE + EDGE;
    for bad in [
        at(good + 8, good, good),
        at(good, good + 1, good),
        at(good, good, good + 2),
        // Parts that begin inside a region and end behind it.
        at(last - 64, good, good),
        at(good, last - 10, good),
        at(good, good, last - 64),
        at(0, good, good),
        at(good, RING, good),
        at(u64::MAX - 15, good, good),
        at(good, u64::MAX - 1, good),
        at(good, good, u64::MAX - 3),
    ] {
        assert_eq!(new(8, bad), Some(RingError::BadAddress), "{bad:?}");
    }
    assert_eq!(new(8, at(last - 128, last - 22, last - 72)), None);
}

/// The VMM chooses both addresses of a region: what is aligned in its own may be odd in the mapping.
#[test]
fn a_region_at_an_odd_address_does_not_hold_a_ring() {
    use std::os::fd::AsFd;
    let file = memfd(1 << 16);
    let mut mem = GuestMemory::default();
    let spec = crate::RegionSpec {
        guest_addr: 0,
        size: 0x8000,
        user_addr: USER_BASE + 1,
        mmap_offset: 0,
    };
    mem.add(spec, file.as_fd()).unwrap();
    let at = RingAddresses {
        desc: USER_BASE + 0x10,
        avail: USER_BASE + 0x1000,
        used: USER_BASE + 0x2000,
    };
    assert_eq!(
        Vring::new(&mem, 8, at, 0, true).err(),
        Some(RingError::BadAddress)
    );
}

#[test]
fn chains_are_followed() {
    let f = fixture(8, 0, true);
    f.driver.describe(&f.guest, 2, DATA, 10, NEXT, 5);
    f.driver.describe(&f.guest, 5, DATA + 100, 20, NEXT, 1);
    f.driver.describe(&f.guest, 1, DATA + 200, 0, NEXT, 7);
    f.driver
        .describe(&f.guest, 7, DATA + 300, 30, NEXT | WRITE, 0);
    f.driver.describe(&f.guest, 0, DATA + 400, 40, WRITE, 0);
    f.guest.write(DATA, b"0123456789");
    f.guest.write(DATA + 100, b"abcdefghijklmnopqrst");
    let (result, chain) = f.walk(2);
    assert_eq!(result, Ok(()));
    assert_eq!((chain.readable_len(), chain.writable_len()), (30, 70));
    let mut out = [0; 64];
    assert_eq!(chain.read_at(8, &mut out), 22);
    assert_eq!(&out[..22], b"89abcdefghijklmnopqrst");
    assert_eq!(chain.read_at(30, &mut out), 0);
    assert_eq!(chain.read_at(usize::MAX, &mut out), 0);
    assert_eq!(chain.write_at(25, &[7; 100]), 45);
    assert_eq!(f.guest.read(DATA + 300, 31), {
        let mut want = vec![0; 25];
        want.extend([7; 5]);
        want.push(0);
        want
    });
    assert_eq!(f.guest.read(DATA + 399, 42), {
        let mut want = vec![0];
        want.extend([7; 40]);
        want.push(0);
        want
    });
    let mut segments = Vec::new();
    assert!(!chain.write_segments(60, 11, &mut segments));
    segments.clear();
    assert!(chain.write_segments(20, 50, &mut segments));
    assert_eq!(segments.iter().map(|s| s.iov_len).sum::<usize>(), 50);
}

#[test]
fn a_buffer_across_regions_is_one_run_of_bytes() {
    let f = fixture(8, 0, true);
    f.driver.describe(&f.guest, 0, EDGE - 6, 12, NEXT, 1);
    f.driver.describe(&f.guest, 1, EDGE - 3, 6, WRITE, 0);
    f.guest.write(EDGE - 6, b"before");
    f.guest.write(EDGE, b"after!");
    let (result, chain) = f.walk(0);
    assert_eq!(result, Ok(()));
    let mut out = [0; 12];
    assert_eq!(chain.read_at(0, &mut out), 12);
    assert_eq!(&out, b"beforeafter!");
    assert_eq!(chain.write_at(0, b"xxxyyy"), 6);
    assert_eq!(f.guest.read(EDGE - 6, 6), b"befxxx");
    assert_eq!(f.guest.read(EDGE, 6), b"yyyer!");
}

#[test]
fn addresses_outside_memory_are_refused() {
    let f = fixture(8, 0, true);
    for (addr, len) in [
        (0, 1),
        (RING - 1, 2),
        (EDGE + 0x10_0000 - 1, 2),
        ((1 << 36) - 1, 1),
        ((1 << 36) + 0x10_0000, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
        (DATA, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            f.driver.describe(&f.guest, 0, addr, len, flags, 0);
            assert_eq!(f.walk(0).0, Err(ChainError::BadAddress), "{addr:#x} {len}");
        }
    }
}

#[test]
fn memory_that_was_taken_away_is_no_fault() {
    let f = fixture(8, 0, true);
    let mut mem = f.guest.map();
    let walk = |mem: &GuestMemory| f.ring.walk(mem, 0, &mut Chain::default());
    f.driver.describe(&f.guest, 0, DATA, 16, 0, 0);
    let (spec, file) = f
        .guest
        .regions()
        .find(|(r, _)| r.guest_addr <= DATA && DATA < r.guest_end())
        .unwrap();
    assert!(mem.remove(spec.guest_addr, spec.size, spec.user_addr));
    for flags in [0, INDIRECT] {
        f.driver.describe(&f.guest, 0, DATA, 16, flags, 0);
        assert_eq!(walk(&mem), Err(ChainError::MemoryAway));
    }
    // What never was memory is a fault, also now.
    f.driver.describe(&f.guest, 0, 1 << 40, 16, 0, 0);
    assert_eq!(walk(&mem), Err(ChainError::BadAddress));
    f.driver.describe(&f.guest, 0, DATA, 16, 0, 0);
    mem.add(spec, std::os::fd::AsFd::as_fd(file)).unwrap();
    assert_eq!(walk(&mem), Ok(()));
}

#[test]
fn loops_end() {
    let f = fixture(8, 0, true);
    for head in 0..8u16 {
        f.driver
            .describe(&f.guest, head, DATA, 1, NEXT, (head + 1) % 8);
    }
    assert_eq!(f.walk(3).0, Err(ChainError::BadIndex));
    f.driver.describe(&f.guest, 0, DATA, 1, NEXT, 0);
    assert_eq!(f.walk(0).0, Err(ChainError::BadIndex));
    for next in [8, u16::MAX] {
        f.driver.describe(&f.guest, 0, DATA, 1, NEXT, next);
        assert_eq!(f.walk(0).0, Err(ChainError::BadIndex));
    }
}

#[test]
fn readable_behind_writable_is_refused() {
    let f = fixture(8, 0, true);
    f.driver.describe(&f.guest, 0, DATA, 8, WRITE | NEXT, 1);
    f.driver.describe(&f.guest, 1, DATA, 8, 0, 0);
    assert_eq!(f.walk(0).0, Err(ChainError::BadOrder));
}

fn table(f: &Fixture, gpa: u64, entries: &[[u8; 16]]) {
    f.guest.write(gpa, &entries.concat());
}

#[test]
fn indirect_tables_are_followed() {
    let f = fixture(8, 0, true);
    // Not aligned, out of order, and behind a direct descriptor.
    let at = DATA + 3;
    table(
        &f,
        at,
        &[
            descriptor(DATA + 0x1000, 4, NEXT, 2),
            descriptor(DATA + 0x3000, 6, WRITE, 0),
            descriptor(DATA + 0x2000, 5, NEXT | WRITE, 1),
        ],
    );
    f.driver.describe(&f.guest, 0, DATA + 0x4000, 3, NEXT, 1);
    f.driver.describe(&f.guest, 1, at, 48, INDIRECT, 0);
    let (result, chain) = f.walk(0);
    assert_eq!(result, Ok(()));
    assert_eq!((chain.readable_len(), chain.writable_len()), (7, 11));
}

#[test]
fn malformed_indirect_tables_are_refused() {
    let f = fixture(8, 0, true);
    let one = |addr, len, flags| {
        f.driver.describe(&f.guest, 0, addr, len, flags, 1);
        f.walk(0).0
    };
    table(&f, DATA, &[descriptor(DATA, 1, 0, 0)]);
    assert_eq!(one(DATA, 16, INDIRECT), Ok(()));
    for len in [0, 1, 15, 17, u32::MAX, 65537 * 16] {
        assert_eq!(one(DATA, len, INDIRECT), Err(ChainError::BadIndirect));
    }
    assert_eq!(one(DATA, 16, INDIRECT | NEXT), Err(ChainError::BadIndirect));
    for addr in [0, EDGE - 8, u64::MAX - 15, u64::MAX] {
        assert_eq!(one(addr, 16, INDIRECT), Err(ChainError::BadAddress));
    }
    table(&f, DATA, &[descriptor(DATA, 16, INDIRECT, 0)]);
    assert_eq!(one(DATA, 16, INDIRECT), Err(ChainError::BadIndirect));
    table(&f, DATA, &[descriptor(DATA, 1, NEXT, 0)]);
    assert_eq!(one(DATA, 16, INDIRECT), Err(ChainError::BadIndex));
    table(&f, DATA, &[descriptor(DATA, 1, NEXT, 1)]);
    assert_eq!(one(DATA, 16, INDIRECT), Err(ChainError::BadIndex));
}

#[test]
fn endless_chains_end_early() {
    let f = fixture(8, 0, true);
    // 65536 empty descriptors: no segment, and a millisecond of work for one head.
    let empty: Vec<_> = (0..65536u32)
        .map(|i| descriptor(DATA, 0, NEXT, (i + 1) as u16))
        .collect();
    table(&f, DATA, &empty[..32768]);
    f.driver
        .describe(&f.guest, 0, DATA, 32768 * 16, INDIRECT, 0);
    assert_eq!(f.walk(0).0, Err(ChainError::TooLong));
    // 5000 descriptors whose bytes are not neighbours.
    let scattered: Vec<_> = (0..5000u16)
        .map(|i| descriptor(DATA + 0x8_0000 + 2 * u64::from(i), 1, NEXT, i + 1))
        .collect();
    table(&f, DATA, &scattered);
    f.driver.describe(&f.guest, 0, DATA, 5000 * 16, INDIRECT, 0);
    assert_eq!(f.walk(0).0, Err(ChainError::TooLong));
}

#[test]
fn absurd_regions_are_refused() {
    use crate::RegionSpec;
    use std::os::fd::AsFd;
    let file = memfd(1 << 16);
    let mut mem = GuestMemory::default();
    let spec = |guest_addr, size, user_addr, mmap_offset| RegionSpec {
        guest_addr,
        size,
        user_addr,
        mmap_offset,
    };
    mem.add(spec(0x1000, 0x1000, 0x1000, 0), file.as_fd())
        .unwrap();
    for bad in [
        spec(0, 0, 0, 0),
        spec(u64::MAX, 2, 0, 0),
        spec(0x10_0000, 2, u64::MAX, 0),
        spec(0x10_0000, 0x1000, 0, u64::MAX),
        spec(0x10_0000, 0x1_0001, 0, 0),
        spec(0x10_0000, 0x1_0000, 0, 1),
        spec(0x1fff, 1, 0, 0),
        spec(0x0, 0x1001, 0, 0),
        spec(u64::MAX, u64::MAX, u64::MAX, u64::MAX),
    ] {
        assert!(mem.add(bad, file.as_fd()).is_err(), "{bad:?}");
        // Asked by callers that have not checked it.
        let _ = (bad.overlaps(&bad), bad.overlaps(&spec(0, 1, 0, 0)));
    }
    assert!(mem.translate(0x1fff, 9).is_some_and(|(_, run)| run == 1));
    assert!(!mem.remove(0x1000, 0x1000, 0));
    assert!(mem.remove(0x1000, 0x1000, 0x1000));
    assert!(mem.translate(0x1000, 1).is_none());
}
