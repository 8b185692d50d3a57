//! Invariant: any FUSE message, in any framing, gets an answer that its sender could take apart, or an empty buffer; nothing is written beside it.
//!
//! An answer's length is that of the used entry, its `unique` that of the request, its error an errno; directory entries lie
//! inside it; data is what the image and its chunks say.

use fuse_abi::opcode;
use fuse_abi::request::{InHeader, ReadIn};
use rafs_format::Tree;
use virtq::testing::{NEXT, WRITE};

use crate::guest::BUFFERS;
use crate::image;
use crate::input::Input;
use crate::ring;
use crate::world::{World, with_world};

/// Where the answer goes; the message lies at the start of the buffers.
const ROOM: u64 = BUFFERS + 0x4000;
/// What is left from there.
const ROOM_LEN: u64 = 0x1_0000;
/// Requests of one run.
const REQUESTS: usize = 40;
const FILL: u8 = 0x33;

fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    let part = &bytes[at..at + len];
    part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn directory(answer: &[u8], plus: bool) {
    let mut at = 0;
    while at < answer.len() {
        let head = at + if plus { 128 } else { 0 };
        assert!(head + 24 <= answer.len(), "half an entry");
        let len = le(answer, head + 16, 4) as usize;
        assert!((1..=255).contains(&len));
        let end = (head + 24 + len).next_multiple_of(8);
        assert!(end <= answer.len(), "a name beyond the answer");
        assert!(le(answer, head + 8, 8) != 0, "a cookie that starts anew");
        at = end;
    }
}

fn data(tree: &Tree<'_>, nodeid: u64, args: &[u8], answer: &[u8]) {
    let asked = ReadIn::parse(args).expect("arguments, as there is data");
    assert!(answer.len() <= asked.size as usize);
    let nid = if nodeid == 1 { tree.root() } else { nodeid - 2 };
    let inode = tree.inode(nid).expect("a file, as there is data");
    let mut at = 0;
    if inode.layout == rafs_format::Layout::ChunkBased {
        assert!(answer.iter().all(|byte| *byte == FILL), "other data");
        let left = inode.size.saturating_sub(asked.offset);
        assert!(answer.len() as u64 <= left, "more than the file has");
    } else {
        while at < answer.len() {
            let offset = asked.offset + at as u64;
            let piece = tree.inline_data(&inode, offset, (answer.len() - at) as u64);
            let piece = piece.expect("data of the bootstrap");
            assert!(!piece.is_empty() && answer[at..].starts_with(piece));
            at += piece.len();
        }
    }
}

fn check(message: &[u8], answer: &[u8], room: u64) {
    let header = InHeader::parse(message);
    if answer.is_empty() {
        return;
    }
    let header = header.expect("a header, as there is an answer");
    assert!(answer.len() >= 16 && answer.len() as u64 <= room);
    assert_eq!(le(answer, 0, 4), answer.len() as u64, "another length");
    assert_eq!(le(answer, 8, 8), header.unique, "somebody else's answer");
    let error = le(answer, 4, 4) as u32 as i32;
    assert!((-4095..=0).contains(&error), "{error} is no errno");
    let payload = &answer[16..];
    if error != 0 {
        assert!(payload.is_empty(), "an error with data");
        return;
    }
    let tree = Tree::parse(&image::built().bootstrap).expect("the image");
    let end = message.len().min(header.len as usize).max(40);
    match header.opcode {
        opcode::LOOKUP => {
            assert_eq!(payload.len(), 128);
            let node = le(payload, 0, 8);
            assert!(node == 0 || node == 1 || tree.inode(node - 2).is_ok());
        }
        opcode::GETATTR => assert_eq!(payload.len(), 104),
        opcode::READLINK => assert!(!payload.contains(&0)),
        opcode::READDIR => directory(payload, false),
        opcode::READDIRPLUS => directory(payload, true),
        opcode::READ if !payload.is_empty() => {
            data(&tree, header.nodeid, &message[40..end.min(552)], payload);
        }
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => {
            panic!("an answer that nobody waits for")
        }
        _ => {}
    }
}

fn one(world: &mut World, input: &mut Input<'_>) {
    let kind = input.u8();
    let message = if kind & 1 == 0 {
        ring::message(input, &world.nodes)
    } else {
        let len = usize::from(input.u16()) % 0x3000;
        input.bytes(len).to_vec()
    };
    let room = match kind >> 1 & 3 {
        0 => u64::from(input.u8()),
        1 => ROOM_LEN,
        _ => u64::from(input.u16()).min(ROOM_LEN),
    };
    world.memory.write(BUFFERS, &message);
    let (driver, guest) = (&world.queues[1].driver, &world.bench.guest);
    // Parts of any sizes, empty ones among them.
    let mut index = 0;
    let part = |index: &mut u16, addr, len, flags| {
        driver.describe(guest, *index, addr, len, flags, *index + 1);
        *index += 1;
    };
    let mut at = 0;
    for _ in 0..kind >> 3 & 3 {
        let n = u64::from(input.u8()).min(message.len() as u64 - at);
        part(&mut index, BUFFERS + at, n as u32, NEXT);
        at += n;
    }
    let rest = message.len() as u64 - at;
    part(&mut index, BUFFERS + at, rest as u32, NEXT);
    at = 0;
    for _ in 0..kind >> 5 & 3 {
        let n = u64::from(input.u8()).min(room - at);
        part(&mut index, ROOM + at, n as u32, WRITE | NEXT);
        at += n;
    }
    part(&mut index, ROOM + at, (room - at) as u32, WRITE);
    if kind & 0x80 != 0 {
        // Nothing to write into at all.
        driver.describe(guest, 0, BUFFERS, message.len() as u32, 0, 0);
    }
    world.queues[1].driver.offer(guest, 0);
    world.memory.remember();
    world.worker.turn();
    let answers = world.queues[1].driver.answers(&world.bench.guest);
    assert_eq!(answers.len(), 1, "all chunks are there, so nobody waits");
    let (head, len) = answers[0];
    assert_eq!(head, 0);
    let room = if kind & 0x80 != 0 { 0 } else { room };
    assert!(u64::from(len) <= room);
    let used = world.queues[1].driver.used_gpa();
    for span in world.memory.changed() {
        let inside = span.start >= ROOM && span.end <= ROOM + room;
        assert!(inside || span.start >= used && span.end <= used + 6 + 8 * 64);
    }
    let answer = world.memory.read(ROOM, len as usize).expect("memory");
    check(&message, &answer, room);
}

/// Requests one after the other: a byte that says how they are framed (bit 0: any bytes; 1 and 2: how much room; 3 and 4,
/// 5 and 6: how many parts more; 7: no room at all), then what that needs.
pub fn run(data: &[u8]) {
    with_world(|world| {
        for chunk in 0..world.chunks {
            world.bench.blobs[0].store(chunk, FILL);
        }
        let mut input = Input::new(data);
        for _ in 0..REQUESTS {
            if input.is_empty() {
                break;
            }
            one(world, &mut input);
        }
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let tree = Tree::parse(&image::built().bootstrap).expect("the image");
    let root = tree.inode(tree.root()).expect("the root");
    let mut nodes = vec![1, 0];
    nodes.extend(tree.entries(&root, 0).flatten().map(|entry| entry.nid + 2));
    for opcode in 0..=60u32 {
        let mut seed = Vec::new();
        for &node in &nodes {
            let bodies = [
                worker::testing::read_args(0, 4096),
                worker::testing::read_args(4000, 1 << 17),
                b"big\0".to_vec(),
                [&[255, 0, 0, 0, 0, 0, 0, 0][..], b"user.x\0"].concat(),
                [7u32, 38, 1 << 17, u32::MAX, u32::MAX]
                    .iter()
                    .flat_map(|word| word.to_le_bytes())
                    .collect(),
            ];
            for (i, body) in bodies.iter().enumerate() {
                let message = worker::testing::message(opcode, node, body);
                seed.push(1 | 2 | (i as u8 % 4) << 3);
                seed.extend((message.len() as u16).to_le_bytes());
                seed.extend(&message);
                seed.extend(vec![44; i % 4]);
            }
        }
        seeds.push(seed);
    }
    seeds
}
