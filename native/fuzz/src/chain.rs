//! Invariant: a descriptor chain is taken exactly when virtio 1.2 says that it is one, and nothing beside its parts is read or written.
//!
//! The device's walk is compared with one that is written for reading: the same length, the same bytes, the same places.

use std::cell::RefCell;

use virtq::testing::{Driver, Guest};
use virtq::{Chain, ChainError, GuestMemory, Vring};

use crate::guest::{self, BUFFERS, Memory, RINGS};
use crate::input::Input;
use crate::ring::any_descriptor;

/// Segments and indirect entries up to here are certainly not too many.
const CERTAIN: usize = 1000;

struct World {
    guest: Guest,
    memory: Memory,
    device: GuestMemory,
    chain: Chain,
}

impl World {
    fn new() -> World {
        let guest = Guest::new(&guest::REGIONS);
        World {
            memory: Memory::new(&guest),
            device: guest.map(),
            guest,
            chain: Chain::default(),
        }
    }

    fn look(&mut self, ring: &Vring, size: u16, head: u16, offset: usize) {
        let expected = self.memory.walk(RINGS, size, head);
        let found = ring.walk(&self.device, head, &mut self.chain);
        let (walked, chain) = match (expected, found) {
            (None, Err(_)) => return,
            (None, Ok(())) => panic!("a chain that is none"),
            (Some(walked), Err(e)) => {
                assert_eq!(e, ChainError::TooLong, "a chain is refused: {walked:x?}");
                let parts = walked.readable.len() + walked.writable.len();
                assert!(parts > CERTAIN, "{parts} are not too many");
                return;
            }
            (Some(walked), Ok(())) => (walked, &self.chain),
        };
        assert_eq!(chain.readable_len() as u64, walked.readable_len());
        assert_eq!(chain.writable_len() as u64, walked.writable_len());
        let whole = self.memory.gather(&walked.readable);
        let mut read = vec![0xee; 300];
        let n = chain.read_at(offset, &mut read);
        let rest = whole.get(offset..).unwrap_or_default();
        assert_eq!(n, rest.len().min(300));
        assert!(rest.starts_with(&read[..n]) && read[n..].iter().all(|b| *b == 0xee));

        let room = (chain.writable_len()).saturating_sub(offset);
        let mut segments = Vec::new();
        assert_eq!(
            chain.write_segments(offset, 500, &mut segments),
            room >= 500
        );
        let sum: usize = segments.iter().map(|s| s.iov_len).sum();
        assert_eq!(sum, room.min(500));
        self.memory.remember();
        assert_eq!(chain.write_at(offset, &[0x77; 300]), room.min(300));
        let may = guest::merge(walked.writable.clone());
        for span in self.memory.changed() {
            assert!(guest::covers(&may, &span), "{span:x?}");
        }
        self.memory.remember();
        chain.zero_at(offset, 100);
        for span in self.memory.changed() {
            assert!(guest::covers(&may, &span), "{span:x?}");
        }
    }
}

/// A byte for the size of the ring, one for how many descriptors of the ring follow, one for those of tables; these; then
/// heads, and offsets into what they name.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    }
    WORLD.with(|cell| {
        let mut world = cell.borrow_mut();
        let world = world.get_or_insert_with(World::new);
        let mut input = Input::new(data);
        let size = 1u16 << (input.u8() % 8);
        world.memory.clear();
        let driver = Driver::new(&world.guest, RINGS, size, 0);
        let (own, tables) = (input.u8() % 64, input.u8() % 64);
        for i in 0..own {
            let bytes = any_descriptor(&mut input, size);
            let at = RINGS + 16 * u64::from(u16::from(i) % size);
            world.memory.write(at, &bytes);
        }
        for i in 0..tables {
            let bytes = any_descriptor(&mut input, 128);
            let at = BUFFERS + 0x1000 + 16 * u64::from(i);
            world.memory.write(at, &bytes);
        }
        let ring = Vring::new(&world.device, size, driver.addresses(), 0, false);
        let ring = ring.expect("a ring in memory");
        for _ in 0..8 {
            let head = u16::from(input.u8()) % size;
            world.look(&ring, size, head, input.u16().into());
            if input.is_empty() {
                return;
            }
        }
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    // One descriptor as `any_descriptor` reads it: flags, address, next, length.
    let plain = |flags: u8, at: u16, len: u16, next: u8| {
        let (at, len) = (at.to_le_bytes(), len.to_le_bytes());
        vec![flags, 6, at[0], at[1], 1, next, 5, len[0], len[1]]
    };
    let table = |entries: u8| vec![5, 1, 0, 1, 0, 3, entries - 1];
    let chain = [
        plain(0, 10, 40, 1),
        plain(0, 300, 100, 2),
        plain(4, 0, 600, 3),
        plain(3, 900, 50, 0),
    ];
    let mut seeds = vec![
        [
            &[3, 4, 0][..],
            &chain.concat(),
            &[0, 5, 0, 1, 0, 0, 2, 90, 0],
        ]
        .concat(),
        [
            &[3, 1, 4][..],
            &table(4),
            &chain.concat(),
            &[0, 5, 0, 0, 44, 1],
        ]
        .concat(),
        // Loops, of one descriptor and of all.
        [&[1, 2, 0][..], &plain(0, 0, 1, 1), &plain(0, 0, 1, 0), &[0]].concat(),
        [&[3, 1, 1][..], &table(1), &plain(0, 0, 1, 0), &[0]].concat(),
    ];
    // Across the border of two regions, and beyond the end of the last one.
    for (kind, offset) in [(1, 20), (2, 20), (3, 8), (4, 40), (5, 3), (0, 1)] {
        let mut seed = vec![0, 1, 0, 3, kind, offset, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        seed.extend([5, 100, 0, 0, 3, 0]);
        seeds.push(seed);
    }
    seeds
}
