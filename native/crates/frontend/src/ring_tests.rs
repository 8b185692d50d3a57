use super::*;
use crate::testing::{FakeRing, memory};

fn ring(size: u16, event_idx: bool, base: u16) -> (Memory, Ring, FakeRing) {
    let memory = memory();
    let ring = Ring::new(
        &memory,
        RingOptions {
            size,
            event_idx,
            reuse_newest: true,
        },
        base,
    )
    .unwrap();
    let device = FakeRing::new(ring.gpas(), size, event_idx, base);
    (memory, ring, device)
}

fn descs(n: usize) -> Vec<Desc> {
    (0..n)
        .map(|i| Desc {
            gpa: 0x1000 * i as u64,
            len: 16 + i as u32,
            writable: i % 2 == 1,
            indirect: false,
        })
        .collect()
}

#[test]
fn chains_wrap_in_every_size() {
    for size in [2u16, 4, 256, 1024, 32768] {
        let (memory, mut ring, mut device) = ring(size, true, 65_530);
        for round in 0..40u64 {
            let n = 1 + round as usize % usize::from(size).min(5);
            let head = ring.add(&descs(n), None, round, None).unwrap();
            assert_eq!(device.take(&memory), Some((head, descs(n))));
            assert!(ring.pop().is_none());
            device.complete(&memory, u32::from(head), 7);
            assert_eq!(
                ring.pop().unwrap().unwrap(),
                Used {
                    tag: round,
                    head,
                    len: 7
                }
            );
            assert_eq!((ring.n_in_flight(), ring.n_free()), (0, usize::from(size)));
        }
    }
}

#[test]
fn indirect_tables_take_one_descriptor() {
    let (memory, mut ring, mut device) = ring(2, true, 0);
    let table = memory.alloc(table_size(300), 16, None).unwrap();
    write_table(&table, &descs(300));
    let entry = Some((table.gpa(), table_size(300) as u32));
    let head = ring.add(&descs(300), entry, 1, None).unwrap();
    assert_eq!(device.take(&memory), Some((head, descs(300))));
    ring.add(&descs(1), None, 2, None).unwrap();
    assert!(matches!(
        ring.add(&descs(1), None, 3, None),
        Err(Error::RingFull)
    ));
}

#[test]
fn completions_out_of_order_keep_their_tags() {
    let (memory, mut ring, mut device) = ring(8, true, 3);
    let heads: Vec<u16> = (0..4)
        .map(|i| ring.add(&descs(2), None, i, None).unwrap())
        .collect();
    for i in [2usize, 0, 3, 1] {
        device.complete(&memory, u32::from(heads[i]), i as u32);
        let used = ring.pop().unwrap().unwrap();
        assert_eq!((used.tag, used.len), (i as u64, i as u32));
    }
}

#[test]
fn a_bad_device_is_noticed() {
    let (memory, mut ring, mut device) = ring(8, true, 0);
    let head = ring.add(&descs(1), None, 9, None).unwrap();
    device.complete(&memory, 8, 0);
    device.complete(&memory, u32::from(head), 0);
    device.complete(&memory, u32::from(head), 0);
    device.complete(&memory, u32::MAX, 0);
    let mut kinds = Vec::new();
    while let Some(used) = ring.pop() {
        kinds.push(used.map_err(|bad| bad.kind));
    }
    let good = Used {
        tag: 9,
        head,
        len: 0,
    };
    use FaultKind::{NotInFlight, UsedIdRange};
    assert_eq!(
        kinds,
        [
            Err(UsedIdRange),
            Ok(good),
            Err(NotInFlight),
            Err(UsedIdRange)
        ]
    );
    for _ in 0..9 {
        device.complete(&memory, 0, 0);
    }
    assert_eq!(
        ring.pop().unwrap().unwrap_err().kind,
        FaultKind::UsedIndexJump
    );
    assert!(ring.pop().is_none());
}

#[test]
fn event_indices_suppress_kicks_and_interrupts() {
    for base in [0u16, 65_535] {
        let (memory, mut ring, mut device) = ring(8, true, base);
        device.want_kick_at(&memory, base);
        let old = ring.avail_idx();
        ring.add(&descs(1), None, 0, None).unwrap();
        assert!(ring.needs_kick(old));
        let old = ring.avail_idx();
        let head = ring.add(&descs(1), None, 1, None).unwrap();
        assert!(!ring.needs_kick(old));
        ring.disable_interrupts();
        assert!(!device.complete(&memory, u32::from(head), 0));
        assert!(ring.enable_interrupts());
        ring.pop().unwrap().unwrap();
        assert!(!ring.enable_interrupts());
        let head = ring.add(&descs(1), None, 2, None).unwrap();
        assert!(device.complete(&memory, u32::from(head), 0));
    }
}

#[test]
fn flags_suppress_kicks_and_interrupts_without_event_indices() {
    let (memory, mut ring, mut device) = ring(8, false, 0);
    let head = ring.add(&descs(1), None, 0, None).unwrap();
    assert!(ring.needs_kick(0) && !ring.needs_kick(1));
    device.suppress_kicks(&memory);
    assert!(!ring.needs_kick(0));
    ring.disable_interrupts();
    assert!(!device.complete(&memory, u32::from(head), 0));
    ring.enable_interrupts();
    let head = ring.add(&descs(1), None, 0, None).unwrap();
    assert!(device.complete(&memory, u32::from(head), 0));
}
