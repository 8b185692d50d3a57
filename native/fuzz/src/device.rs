//! Invariant: whatever a front-end says, with whatever descriptors, the keeper neither panics nor blocks, answers are well-formed, and the next front-end is served.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use keeper::testing::Bench;
use virtq::testing::memfd;

use crate::input::Input;

/// Messages of one run.
const MESSAGES: usize = 100;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
const GET_FEATURES: u32 = 1;

struct World {
    bench: Bench,
    fds: Vec<OwnedFd>,
}

impl World {
    fn new() -> World {
        let zero = std::fs::File::open("/dev/zero").expect("a device");
        let socket = worker::channel::pair().expect("sockets").0;
        World {
            bench: Bench::new(),
            fds: vec![memfd(1 << 20).into(), memfd(0).into(), zero.into(), socket],
        }
    }
}

pub fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn number(input: &mut Input<'_>) -> u64 {
    match input.u8() % 6 {
        0 => input.u64(),
        1 => u64::MAX - u64::from(input.u8()),
        2 => u64::from(input.u8()) << 12,
        3 => 1 << (input.u8() % 64),
        4 => u64::from(input.u8() % 5),
        _ => 0x7f00_0000_0000 + (u64::from(input.u8()) << 4),
    }
}

/// Bytes and descriptors of one message: of the right form but for its numbers, or anything. `region` is what was added
/// last.
fn message(input: &mut Input<'_>, region: &mut [u64; 4]) -> (Vec<u8>, Vec<usize>) {
    let kind = input.u8();
    let request = match kind & 0x3f {
        0x3f => input.u32(),
        small => small.into(),
    };
    let flags = match input.u8() {
        0xff => input.u32(),
        flags => VERSION | (u32::from(flags) & NEED_REPLY),
    };
    let mut body = Vec::new();
    let count = usize::from(input.u8());
    let mut n_fds = usize::from(kind >> 6);
    match request {
        // Memory tables: a count, then regions of four numbers.
        5 => {
            let regions = count % 10;
            body.extend((regions as u64).to_le_bytes());
            for _ in 0..regions.min(8) {
                for _ in 0..4 {
                    body.extend(number(input).to_le_bytes());
                }
            }
            if kind & 0x40 != 0 {
                n_fds = regions.min(4);
            }
        }
        // One region, behind a field of padding.
        37 | 38 => {
            body.extend([0; 8]);
            if request == 37 || count & 1 != 0 {
                *region = std::array::from_fn(|_| number(input));
            }
            body.extend(region.iter().flat_map(|word| word.to_le_bytes()));
        }
        // Queue and number.
        8 | 10 | 11 | 18 => {
            body.extend(u32::from(input.u8()).to_le_bytes());
            body.extend((number(input) as u32).to_le_bytes());
        }
        9 => {
            body.extend(u32::from(input.u8() % 70).to_le_bytes());
            body.extend([0; 4]);
            for _ in 0..4 {
                body.extend(number(input).to_le_bytes());
            }
        }
        // Queue and whether a descriptor follows.
        12..=14 => body.extend(number(input).to_le_bytes()),
        2 | 16 | 19 => body.extend(number(input).to_le_bytes()),
        _ => body.extend(input.bytes(count)),
    }
    if count & 0x80 != 0 {
        body.truncate(count & 0x7f);
    }
    let size = if kind == 0x55 {
        input.u32()
    } else {
        body.len() as u32
    };
    let fds = (0..n_fds).map(|_| usize::from(input.u8() % 4)).collect();
    ([header(request, flags, size), body].concat(), fds)
}

/// Every answer has a header that says how long it is, and that it is one.
fn check(mut answers: &[u8]) {
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    while !answers.is_empty() {
        assert!(answers.len() >= 12, "half a header");
        assert_eq!(word(answers, 4) & 7, 5, "not a reply of version 1");
        let end = 12 + word(answers, 8) as usize;
        assert!(end <= answers.len(), "half an answer");
        answers = &answers[end..];
    }
}

/// Messages, one behind the other: kind, flags, length, and the numbers that belong to it.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    }
    WORLD.with(|cell| {
        let mut world = cell.borrow_mut();
        let World { bench, fds } = world.get_or_insert_with(World::new);
        let mut input = Input::new(data);
        let mut region = [0; 4];
        for _ in 0..MESSAGES {
            if input.is_empty() {
                break;
            }
            let (bytes, which) = message(&mut input, &mut region);
            let raw: Vec<RawFd> = which.iter().map(|i| fds[*i].as_raw_fd()).collect();
            bench.send(&bytes, &raw);
            check(&bench.serve());
            assert!(bench.regions() <= 509);
            if !bench.is_connected() {
                bench.connect();
            }
        }
        bench.connect();
        assert_eq!(
            bench.regions(),
            0,
            "the guest is gone, and its memory with it"
        );
        bench.send(&header(GET_FEATURES, VERSION, 0), &[]);
        assert_eq!(bench.serve().len(), 20, "the next front-end is served");
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    let queue = |request: u8, queue: u8, number: u8| vec![request, 8, 0, queue, 4, number];
    // A device that is set up as QEMU does it: features, owner, memory, a ring, and its end.
    let ring = [
        vec![1, 0, 0],
        vec![3, 0, 0],
        vec![15, 0, 0],
        vec![16, 8, 0, 0],
        [1u64.to_le_bytes().as_slice()].concat(),
        vec![2, 8, 0, 0],
        (1u64 << 32 | 1 << 30).to_le_bytes().to_vec(),
        // One region: guest 0, 1 MiB, user address, offset 0; its file.
        vec![0x40 | 5, 8, 1, 2, 0, 3, 20, 5, 0, 4, 0, 0],
        vec![8, 8, 0, 1, 3, 8],
        queue(10, 1, 0),
        vec![9, 8, 0, 1, 5, 1, 5, 3, 5, 2, 4, 0],
        vec![0x40 | 12, 8, 0, 4, 1, 3],
        vec![0x40 | 13, 8, 0, 4, 1, 3],
        queue(18, 1, 1),
        queue(11, 1, 0),
        vec![34, 8, 0],
        // A region comes and goes: guest 2 MiB, 4 KiB, user address, offset 4 KiB.
        vec![0x40 | 37, 8, 0, 3, 21, 3, 12, 5, 0, 3, 12, 0],
        vec![38, 8, 0],
    ];
    let mut seeds = vec![ring.concat()];
    for i in 0..ring.len() {
        let mut other = ring.to_vec();
        other.remove(i);
        seeds.push(other.concat());
    }
    for request in 0..64u8 {
        for fds in 0..4u8 {
            seeds.push(vec![
                request | fds << 6,
                8,
                8,
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                0,
                0,
                0,
                0,
            ]);
        }
    }
    seeds
}
