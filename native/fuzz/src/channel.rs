//! Invariant: packets between our own processes that make no sense are errors: no panic, no mapping beyond a file, no descriptor kept.
//!
//! A worker is told by the keeper; the keeper hears answers of a worker and messages of control. Each of them may be another
//! version, or out of its mind.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use keeper::testing::MountMessages;
use virtq::testing::memfd;
use worker::channel;

use crate::guest::{BUFFERS, RINGS};
use crate::input::Input;
use crate::world::with_world;

struct Pair {
    ours: OwnedFd,
    theirs: OwnedFd,
    /// Descriptors to be sent along: files of 64 KiB and of none, a device, a socket.
    fds: Vec<OwnedFd>,
}

impl Pair {
    fn new() -> Pair {
        let (ours, theirs) = channel::pair().expect("sockets");
        let zero = std::fs::File::open("/dev/zero").expect("a device");
        // A worker writes into descriptors that it is given: this one is nobody else's.
        let socket = channel::pair().expect("sockets").0;
        Pair {
            fds: vec![memfd(1 << 16).into(), memfd(0).into(), zero.into(), socket],
            ours,
            theirs,
        }
    }

    fn fds(&self, input: &mut Input<'_>) -> Vec<RawFd> {
        let choice = input.u8();
        (0..choice & 3)
            .map(|i| self.fds[usize::from(choice >> (2 + 2 * i) & 3)].as_raw_fd())
            .collect()
    }
}

/// Numbers that mean something to a ring thread, or any.
fn number(input: &mut Input<'_>) -> u64 {
    const USER: u64 = virtq::testing::USER_BASE;
    match input.u8() % 8 {
        0 => input.u64(),
        1 => u64::MAX - u64::from(input.u8()),
        2 => RINGS + u64::from(input.u16()),
        3 => BUFFERS + u64::from(input.u16()),
        4 => USER + RINGS + u64::from(input.u16()) * 16,
        5 => USER + RINGS,
        6 => 1 << (input.u8() % 64),
        _ => input.u16().into(),
    }
}

fn command(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.u8();
    if kind & 0x80 != 0 {
        let n = input.u8() % 64;
        return input.bytes(n.into()).to_vec();
    }
    let mut bytes = u32::from(kind % 12).to_le_bytes().to_vec();
    let queue = if kind & 0x40 != 0 {
        input.u32()
    } else {
        u32::from(input.u8() % 4)
    };
    bytes.extend(queue.to_le_bytes());
    for _ in 0..4 {
        bytes.extend(number(input).to_le_bytes());
    }
    bytes
}

fn worker_commands(pair: &Pair, input: &mut Input<'_>) {
    with_world(|world| {
        for _ in 0..20 {
            if input.is_empty() {
                break;
            }
            let bytes = command(input);
            let fds = pair.fds(input);
            if bytes.is_empty() {
                continue;
            }
            let keeper = world.bench.keeper.as_raw_fd();
            channel::send_packet(keeper, &bytes, &fds).expect("a socket");
            // An error ends a real worker; the next one knows nothing of it.
            if world.worker.commands().is_err() {
                world.worker.restart(&world.bench, Vec::new());
            }
            while channel::receive_answer(keeper, 0).is_some() {}
            // A ring whose used part is its avail part never gets empty. Commands have their turn all the same.
            world.worker.turn_for(1_000);
        }
        world.worker.restart(&world.bench, Vec::new());
    });
}

/// First byte: 0 = commands to a worker, 1 = answers to the keeper, else messages of control. Then packets, each with the
/// descriptors that go with it.
pub fn run(data: &[u8]) {
    thread_local! {
        static PAIR: RefCell<Option<Pair>> = const { RefCell::new(None) };
    }
    PAIR.with(|cell| {
        let mut pair = cell.borrow_mut();
        let pair = &*pair.get_or_insert_with(Pair::new);
        let mut input = Input::new(data);
        let (ours, theirs) = (pair.ours.as_raw_fd(), pair.theirs.as_raw_fd());
        let mut messages = MountMessages::default();
        match input.u8() % 3 {
            0 => worker_commands(pair, &mut input),
            1 => {
                for _ in 0..8 {
                    let n = usize::from(input.u8() % 16);
                    let bytes = input.bytes(n);
                    if !bytes.is_empty() {
                        let fds = pair.fds(&mut input);
                        channel::send_packet(ours, bytes, &fds).expect("a socket");
                        let answer = channel::receive_answer(theirs, 0);
                        assert_eq!(answer.is_some(), bytes.len() == 8, "{bytes:?} {answer:?}");
                    }
                }
            }
            _ => {
                while !input.is_empty() {
                    let kind = input.u8();
                    let mut bytes = u32::from(kind % 6).to_le_bytes().to_vec();
                    bytes.extend(input.bytes(4));
                    bytes.extend(if kind & 0x80 == 0 {
                        u32::from(kind >> 4).to_le_bytes()
                    } else {
                        input.u32().to_le_bytes()
                    });
                    bytes.resize(16 + usize::from(kind == 0x66), 0);
                    let fds: Vec<RawFd> = pair.fds.iter().map(AsRawFd::as_raw_fd).collect();
                    let n = usize::from(input.u8() % 5);
                    channel::send_packet(ours, &bytes, &fds[..n]).expect("a socket");
                    messages.receive(theirs);
                }
            }
        }
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![
        // A mount with two blobs, and one that lacks some.
        vec![
            2, 0x21, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 3, 0x12, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0,
        ],
        vec![2, 0x21, 0, 0, 0, 0, 2, 3, 0, 0, 0, 0, 0],
        vec![1, 8, 0, 0, 0, 0, 5, 0, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 5],
    ];
    for op in 0..12u8 {
        for kind in 0..8u8 {
            let mut seed = vec![0, op, 1];
            for _ in 0..4 {
                seed.push(kind);
                seed.extend(vec![1; [8, 1, 2, 2, 2, 0, 1, 2][usize::from(kind)]]);
            }
            seed.push(1);
            seeds.push(seed);
        }
    }
    seeds
}
