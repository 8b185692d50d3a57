use super::*;

fn memory(regions: &[(u64, u64)]) -> Memory {
    let memory = Memory::default();
    for &(gpa, size) in regions {
        memory
            .add(Region::new(gpa, size, new_file(size, false).unwrap(), 0).unwrap())
            .unwrap();
    }
    memory
}

#[test]
fn allocation_aligns_carves_and_coalesces() {
    let memory = memory(&[(0x10_0000, 0x4000)]);
    let a = memory.alloc(10, 1, None).unwrap();
    let b = memory.alloc(0x1000, 0x1000, None).unwrap();
    assert_eq!((a.gpa(), b.gpa()), (0x10_0000, 0x10_1000));
    assert!(matches!(
        memory.alloc(0x3000, 1, None),
        Err(Error::OutOfMemory(_))
    ));
    drop((a, b));
    let all = memory.alloc(0x4000, 1, None).unwrap();
    assert_eq!(all.gpa(), 0x10_0000);
    drop(all);
    let exact = memory.alloc_at(0x10_2345, 7).unwrap();
    assert!(memory.alloc_at(0x10_2347, 1).is_err());
    drop(exact);
    assert!(memory.alloc_at(0x10_3fff, 2).is_err());
}

#[test]
fn allocation_moves_through_memory() {
    let memory = memory(&[(0, 0x3000)]);
    let addresses: Vec<u64> = (0..4)
        .map(|_| memory.alloc(0x1000, 0x1000, None).unwrap().gpa())
        .collect();
    assert_eq!(addresses, [0, 0x1000, 0x2000, 0]);
}

#[test]
fn regions_must_not_overlap_and_may_touch() {
    let memory = memory(&[(0, 0x1000), (0x1000, 0x1000), (0x1_0000_0000, 0x1000)]);
    assert!(
        memory
            .add(Region::new(0xfff, 0x1000, new_file(0x1000, false).unwrap(), 0).unwrap())
            .is_err()
    );
    memory.write(0xffe, &[1, 2, 3, 4]).unwrap();
    let mut got = [0u8; 4];
    memory.read(0xffe, &mut got).unwrap();
    assert_eq!(got, [1, 2, 3, 4]);
    assert!(memory.write(0x1fff, &[1, 2]).is_err());
    let removed = memory.remove(0x1000).unwrap();
    assert_eq!(removed.gpa, 0x1000);
    assert!(memory.read(0x1000, &mut got).is_err());
}

#[test]
fn one_file_can_back_two_regions() {
    let file = new_file(0x3000, false).unwrap();
    let memory = Memory::default();
    memory
        .add(Region::new(0, 0x1000, file.try_clone().unwrap(), 0).unwrap())
        .unwrap();
    memory
        .add(Region::new(0x10_0000, 0x1000, file.try_clone().unwrap(), 0x2000).unwrap())
        .unwrap();
    memory.write(0x10_0010, b"x").unwrap();
    let whole = Mapping::new(file.as_fd(), 0, 0x3000, true).unwrap();
    // SAFETY: inside the mapping of 0x3000 bytes.
    assert_eq!(unsafe { whole.as_ptr().add(0x2010).read() }, b'x');
}

#[test]
fn poison_notices_any_byte() {
    let memory = memory(&[(0x1000, 0x10000)]);
    let span = memory.alloc(5000, 1, None).unwrap();
    for (at, len) in [(0, 5000), (3, 4099), (1, 2), (5, 0), (7, 1)] {
        span.poison(at, len);
        assert_eq!(span.first_unpoisoned(at, len), None);
        for i in (at..at + len)
            .step_by(61)
            .chain(len.checked_sub(1).map(|l| at + l))
        {
            let mut byte = [0u8];
            span.read(i, &mut byte);
            span.write(i, &[byte[0] ^ 0x10]);
            assert_eq!(span.first_unpoisoned(at, len), Some(span.gpa() + i as u64));
            span.write(i, &byte);
        }
    }
}
