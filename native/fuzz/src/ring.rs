//! Invariant: whatever a driver writes into its rings and whenever, nothing is written outside writable descriptors, no thread spins, and a new driver is served.
//!
//! A driver that keeps the rules gets each answer once, with a length that its descriptors have room for, and its ring is
//! never called broken; a worker that dies, a ring that is stopped and memory that goes and comes change nothing of that.

use std::os::fd::AsRawFd as _;

use virtq::testing::{INDIRECT, NEXT, WRITE, descriptor};

use worker::channel::Op;

use crate::guest::{BUFFERS, BUFFERS_LEN, RINGS, RINGS_LEN};
use crate::input::Input;
use crate::world::{MOST, QUEUES, World, with_world};

/// Actions of one run.
const ACTIONS: usize = 150;
/// A page of buffers for messages, one for indirect tables; writable descriptors usually name what follows.
const TABLES: u64 = BUFFERS + 0x1000;
const ROOM: u64 = BUFFERS + 0x2000;
/// The second region of buffers.
const LAST: u64 = BUFFERS + 0x1_0000;
const OPCODES: [u32; 20] = [
    1, 2, 3, 4, 5, 14, 15, 15, 17, 18, 22, 23, 26, 28, 34, 36, 38, 42, 44, 46,
];

/// A request, right but for what the input says.
pub fn message(input: &mut Input<'_>, nodes: &[u64]) -> Vec<u8> {
    let kind = input.u8();
    let opcode = if kind & 0x80 != 0 {
        input.u32()
    } else {
        OPCODES[usize::from(kind) % OPCODES.len()]
    };
    let node = if input.u8() & 0x80 != 0 {
        input.u64()
    } else {
        let at = input.below(nodes.len());
        nodes[at]
    };
    let args = match input.u8() % 5 {
        0 => {
            let (offset, size) = (input.u32(), input.u24());
            worker::testing::read_args(u64::from(offset), size)
        }
        1 => input
            .pick(&[&b"big\0"[..], b"dir\0", b"again\0", b"many\0", b"x\0y\0"])
            .to_vec(),
        2 => [
            7u32,
            27 + input.u8() as u32 % 20,
            1 << 17,
            input.u32(),
            input.u32(),
        ]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect(),
        3 => [&[255, 0, 0, 0, 0, 0, 0, 0][..], b"user.x\0"].concat(),
        _ => {
            let n = input.u8();
            input.bytes(n.into()).to_vec()
        }
    };
    let mut bytes = worker::testing::message(opcode, node, &args);
    if kind & 0x40 != 0 {
        let at = input.below(bytes.len());
        bytes[at] = input.u8();
    }
    bytes
}

/// An address: of a kind of place, or any at all.
fn place(input: &mut Input<'_>, write: bool) -> u64 {
    let kind = input.u8();
    let offset = u64::from(input.u16());
    match kind % 16 {
        0 => input.u64(),
        // Where regions begin and end.
        1 => (BUFFERS + 0x1_0000).wrapping_sub(offset % 64),
        2 => (BUFFERS + BUFFERS_LEN).wrapping_sub(offset % 64),
        3 => BUFFERS.wrapping_sub(offset % 64),
        4 => RINGS + offset % RINGS_LEN,
        5 => u64::MAX - offset,
        _ if write => ROOM + offset % (BUFFERS_LEN - 0x2000),
        _ => BUFFERS + offset % 0x2000,
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    let kind = input.u8();
    match kind % 8 {
        0 => input.u32(),
        1 => 0,
        2 => 16,
        3 => 16 * (1 + u32::from(input.u8())),
        4 => 0x4000 + u32::from(input.u16()),
        _ => 1 + u32::from(input.u16()) % 0x1100,
    }
}

/// A descriptor of any kind, for a table of `size` entries.
pub fn any_descriptor(input: &mut Input<'_>, size: u16) -> [u8; 16] {
    let flags = match input.u8() % 8 {
        0 | 1 => NEXT,
        2 => 0,
        3 => WRITE,
        4 => WRITE | NEXT,
        5 | 6 => INDIRECT,
        _ => input.u16(),
    };
    let addr = if flags == INDIRECT && input.u8() % 4 != 0 {
        TABLES + 16 * u64::from(input.u8() % 128)
    } else {
        place(input, flags & WRITE != 0)
    };
    let next = if input.u8() % 8 == 0 {
        input.u16()
    } else {
        u16::from(input.u8()) % size
    };
    descriptor(addr, length(input), flags, next)
}

/// A request as Linux would lay it out, in descriptors of the ring or in an indirect table.
fn proper(world: &mut World, input: &mut Input<'_>, queue: usize) {
    let bytes = message(input, &world.nodes);
    let size = world.queues[queue].driver.size;
    // A place per head, so that a request stays as it is while it is in flight.
    let head = input.u8() as u16 % size.min(16) / 2 * 2;
    let own = (queue as u64 * 16 + u64::from(head)) * 80;
    let (at, room) = (BUFFERS + own, ROOM + own * 10);
    if world.queues[queue].offered.contains(&head) || size < 2 {
        return;
    }
    let bytes = &bytes[..bytes.len().min(160)];
    world.memory.write(at, bytes);
    let kind = input.u8();
    let len = if kind & 0x20 == 0 {
        u32::from(input.u16()) % 1600
    } else {
        120
    };
    let split = u32::from(input.u8()) % (bytes.len() as u32);
    let guest = &world.bench.guest;
    let driver = &world.queues[queue].driver;
    if kind & 1 != 0 {
        let table = TABLES + 64 * (8 * queue as u64 + u64::from(head / 2));
        let parts = [
            descriptor(at, split, NEXT, 1),
            descriptor(at + u64::from(split), bytes.len() as u32 - split, NEXT, 2),
            descriptor(room, len / 2, NEXT | WRITE, 3),
            descriptor(room + u64::from(len / 2), len - len / 2, WRITE, 0),
        ];
        world.memory.write(table, &parts.concat());
        driver.describe(guest, head, table, 64, INDIRECT, 0);
    } else {
        driver.describe(guest, head, at, bytes.len() as u32, NEXT, head + 1);
        driver.describe(guest, head + 1, room, len, WRITE, 0);
    }
    world.offer(queue, head);
}

fn act(world: &mut World, input: &mut Input<'_>) {
    let action = input.u8();
    let queue = usize::from(action >> 6) % QUEUES;
    match action & 0x3f {
        0..14 => proper(world, input, queue),
        14..26 => {
            let size = world.queues[queue].driver.size;
            let index = u64::from(input.u8()) % u64::from(size);
            let bytes = any_descriptor(input, size);
            world
                .memory
                .write(RINGS + 0x2000 * queue as u64 + 16 * index, &bytes);
            // It may be part of a chain that is in flight.
            world.queues[queue].lawful &= world.queues[queue].offered.is_empty();
        }
        26..30 => {
            let at = TABLES + 16 * u64::from(input.u8());
            let bytes = any_descriptor(input, 128);
            world.memory.write(at, &bytes);
            let busy = world.queues.iter().any(|q| !q.offered.is_empty());
            world.queues.iter_mut().for_each(|q| q.lawful &= !busy);
        }
        30..33 => {
            let bytes = message(input, &world.nodes);
            let at = BUFFERS + u64::from(input.u16()) % 0x1000;
            world.memory.write(at, &bytes);
        }
        33..38 => {
            let size = world.queues[queue].driver.size;
            let head = u16::from(input.u8()) % size;
            world.offer(queue, head);
        }
        38 => {
            let head = input.u16();
            world.offer(queue, head);
        }
        39..44 => world.turn(),
        44 => {
            let index = input.u16();
            let state = &mut world.queues[queue];
            state.driver.set_avail(&world.bench.guest, index);
            state.lawful = false;
        }
        45 => {
            let index = input.u16();
            let state = &mut world.queues[queue];
            state.driver.set_used_index(&world.bench.guest, index);
            state.lawful = false;
        }
        46 => {
            let state = &world.queues[queue];
            if state.event_idx {
                state.driver.set_used_event(&world.bench.guest, input.u16());
            } else {
                state
                    .driver
                    .set_no_interrupt(&world.bench.guest, input.u8() & 1 != 0);
            }
        }
        47..49 => world.bench.blobs[0].store(u64::from(input.u8()) % world.chunks, 0x33),
        49 => world.bench.blobs[0].store_in_file(u64::from(input.u8()) % world.chunks, 0x44),
        50 => world.bench.blobs[0].discard(u64::from(input.u8()) % world.chunks),
        51 => world.crash(),
        52 => world.set_patience(input.u8() & 1 == 0),
        53 => world.stop_and_start(queue, input.u8() & 3 != 0),
        54 => {
            let size = 1 << (input.u8() % 8);
            let start = input.u16();
            world.set_up(queue, size.min(MOST), start, action & 0x80 != 0);
        }
        55 => world.enable(queue, input.u8() & 1 != 0),
        // All of it, the buffers, a part of them, or the rings.
        56 => {
            let away = input.pick(&[
                &[][..],
                &[RINGS, BUFFERS, LAST],
                &[BUFFERS],
                &[LAST],
                &[RINGS],
            ]);
            world.set_away(away);
        }
        57 => {
            let bytes = input.bytes(64);
            let at = BUFFERS + u64::from(input.u16()) % BUFFERS_LEN;
            world.memory.write(at, bytes);
        }
        58 => {
            let fds = [world.call.as_raw_fd()];
            let given = usize::from(input.u8() & 1);
            world.tell(queue, Op::SetCall, &fds[..given]);
        }
        59 => world.tell(queue, Op::Repost, &[]),
        60 => {
            let head = u16::from(input.u8()) % world.queues[queue].driver.size;
            world.crash_of(queue, head);
        }
        _ => world.turn(),
    }
}

/// A list of actions, each one byte (queue in the upper two bits) and what it needs.
pub fn run(data: &[u8]) {
    with_world(|world| {
        let mut input = Input::new(data);
        for _ in 0..ACTIONS {
            if input.is_empty() {
                break;
            }
            act(world, &mut input);
        }
        world.turn();
        world.is_alive();
        world.set_patience(true);
    });
}

/// The input of a READ in `queue`: of file `node` of the world's list, with room for `room` bytes; bit 0 of `kind` asks for an
/// indirect table.
fn read(queue: u8, node: u8, offset: u32, size: u32, head: u8, kind: u8, room: u16) -> Vec<u8> {
    let mut out = vec![queue << 6, 6, 0, node, 0];
    out.extend(offset.to_le_bytes());
    out.extend(&size.to_le_bytes()[..3]);
    out.extend([head, kind]);
    out.extend(room.to_le_bytes());
    out.push(20);
    out
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![Vec::new()];
    // Each opcode at each kind of arguments, with all chunks there, some there, and none.
    for opcode in 0..OPCODES.len() as u8 {
        let mut seed = vec![47, 0, 47, 1, 49, 2];
        for args in 0..5u8 {
            for node in 0..12u8 {
                seed.extend([node % 3 << 6, opcode, 0, node, args]);
                seed.extend([0, 0, 0, 0, 0, 16, 0, 0]);
                seed.extend([0x20 | node & 1, 7, 0]);
                seed.push(39);
            }
        }
        seeds.push(seed);
    }
    // Reads of the first two files behind the five numbers that are none: parked, in memory, by the pool, in parts.
    const BIG: u8 = 5;
    let reads = [
        read(0, BIG, 0, 4096, 0, 0, 1500),
        read(1, BIG, 4000, 200, 2, 1, 700),
        read(1, BIG, 9000, 1 << 17, 4, 0, 1599),
        read(2, BIG + 6, 0, 4096, 0, 1, 16),
    ];
    let all = reads.concat();
    let stored = |action: u8| {
        (0..8)
            .flat_map(move |chunk| [action, chunk])
            .collect::<Vec<u8>>()
    };
    seeds.push([&stored(47), &all[..], &[39]].concat());
    seeds.push([&stored(49), &all[..], &[39]].concat());
    seeds.push([&all[..], &[39], &stored(47), &[39]].concat());
    seeds.push(
        [
            &all[..],
            &[39],
            &stored(49),
            &[39],
            &stored(50),
            &all[..],
            &[39],
        ]
        .concat(),
    );
    // The same with everything that can happen meanwhile.
    let happens = [
        &[51, 39][..],
        &[44, 3, 0, 39, 39],
        &[45, 3, 0, 39, 39],
        &[38, 3, 0, 39, 39],
        &[53, 1, 39],
        &[53, 0, 39],
        &[54, 3, 0, 0, 39],
        &[52, 1, 51, 39],
        &[60, 0, 39, 60, 0, 60, 0, 60, 0, 39],
        &[58, 1, 39, 58, 0],
        &[59, 39],
        &[56, 1, 39, 56, 0],
        &[56, 2, 39, 52, 1, 51, 39, 56, 0, 39],
        &[56, 2, 39, 56, 0, 39],
        &[56, 3, 39, 51, 39],
        &[56, 4, 39, 56, 0, 39],
        &[55, 0, 39, 55, 1, 39],
        &[57, 0, 1, 2, 3, 39],
    ];
    for more in happens {
        for first in &reads {
            seeds.push([first, &[39][..], more, &stored(47), &[39]].concat());
        }
        seeds.push([&all[..], &[39], more, &stored(47), &[39]].concat());
        seeds.push([&all[..], &[39], more, &stored(49), &[39]].concat());
        seeds.push(
            [
                &[56, 2],
                &all[..],
                &[39],
                more,
                &[56, 0, 39],
                &stored(47),
                &[39],
            ]
            .concat(),
        );
    }
    // Descriptors of any kind, offered.
    let mut any = Vec::new();
    for i in 0..40u8 {
        any.extend([14, i, i, 6, i, 0, 5, i, 0, 1, i + 1, 33, i, 39]);
    }
    seeds.push(any);
    seeds
}
