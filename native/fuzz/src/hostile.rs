//! Invariant: a guest that asks anything of any image gets an answer that fits, from bytes of the image and its chunks alone.
//!
//! Images are signed by nobody: whoever pushes one decides what a worker walks through, and a guest decides where.

use std::cell::RefCell;

use fuse_abi::opcode;
use rafs_format::Tree;
use virtq::testing::{Driver, Guest, WRITE};
use virtq::{Chain, GuestMemory, Vring};
use worker::testing::{Bench, answer, read};

use crate::guest::{self, BUFFERS, Memory, RINGS};
use crate::image;
use crate::input::{Input, damage, write_at};

/// Requests of one run.
const REQUESTS: usize = 30;
/// The longest that is ever answered from metadata, whatever room there is: a directory's megabyte.
const MOST: usize = (1 << 20) + 4096;
const FILL: u8 = 0x33;
const ROOM: u64 = 0x1_0000;

struct World {
    bench: Bench,
    memory: Memory,
    device: GuestMemory,
    chain: Chain,
    ring: Vring,
}

impl World {
    fn new() -> World {
        let image = &image::built().bootstrap;
        let blob = Tree::parse(image).and_then(|tree| tree.blob(0));
        let chunks = blob.expect("a blob").chunk_count;
        let bench = Bench::new(image, u64::from(image::CHUNK_SIZE), &[chunks, 3]);
        for chunk in 0..chunks {
            bench.blobs[0].store(chunk.into(), FILL);
        }
        bench.blobs[1].store(0, FILL);
        let guest = Guest::new(&guest::REGIONS);
        let device = guest.map();
        let driver = Driver::new(&guest, RINGS, 4, 0);
        driver.describe(&guest, 0, BUFFERS, ROOM as u32, WRITE, 0);
        let ring = Vring::new(&device, 4, driver.addresses(), 0, false);
        World {
            memory: Memory::new(&guest),
            chain: Chain::default(),
            ring: ring.expect("a ring"),
            device,
            bench,
        }
    }

    fn read(&mut self, tree: &Tree<'_>, node: u64, args: &[u8]) {
        self.ring
            .walk(&self.device, 0, &mut self.chain)
            .expect("one descriptor");
        self.memory.remember();
        let copied = read(self.bench.mount, tree, node, args, &self.chain);
        let n = copied.ok().flatten().unwrap_or(0);
        assert!(n as u64 <= ROOM - 16);
        for span in self.memory.changed() {
            assert!(span.start >= BUFFERS + 16 && span.end <= BUFFERS + ROOM);
        }
    }
}

fn name_of<'a>(tree: &Tree<'a>, input: &mut Input<'_>) -> &'a [u8] {
    let Ok(root) = tree.inode(tree.root()) else {
        return b"x";
    };
    let skip = usize::from(input.u8());
    let entry = tree.entries(&root, 0).flatten().nth(skip % 16);
    entry.map_or(b"x", |entry| entry.name)
}

/// One byte for the image, two for how many bytes of damage follow, the damage; then requests: opcode, node, and what
/// belongs to it.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    }
    WORLD.with(|cell| {
        let mut world = cell.borrow_mut();
        let world = world.get_or_insert_with(World::new);
        let mut input = Input::new(data);
        let mut bytes = match input.u8() % 2 {
            0 => image::built().bootstrap.clone(),
            _ => image::sample().to_vec(),
        };
        let n = usize::from(input.u16());
        damage(&mut Input::new(input.bytes(n)), &mut bytes);
        let Ok(tree) = Tree::parse(&bytes) else {
            return;
        };
        let slots = (bytes.len() as u64 - tree.superblock().meta_offset) / 32;
        for _ in 0..REQUESTS {
            if input.is_empty() {
                break;
            }
            let code = u32::from(input.u8() % 64);
            let node = match input.u8() % 8 {
                0 => 1,
                1 => input.u64(),
                // Every number between those of two inodes is one, too.
                _ => 2 + u64::from(input.u16()) % (slots + 2),
            };
            let (offset, size) = match input.u8() % 4 {
                0 => (0, 1 << 17),
                1 => (input.u64(), input.u32()),
                2 => (u64::from(input.u16()), u32::from(input.u16())),
                _ => (u64::from(input.u8()) << 10 | u64::from(input.u8()), 8192),
            };
            let mut args = worker::testing::read_args(offset, size);
            if code == opcode::READ {
                world.read(&tree, node, &args);
                continue;
            }
            if code == opcode::LOOKUP {
                args = [name_of(&tree, &mut input), b"\0"].concat();
            } else if code == opcode::GETXATTR {
                args = [&[255, 255, 0, 0, 0, 0, 0, 0][..], b"user.comment\0"].concat();
            }
            let room = usize::from(input.u16());
            let mut out = vec![0; 16];
            let done = answer(&tree, code, node, &args, room, &mut out);
            assert!(out.len() <= MOST, "{} bytes for opcode {code}", out.len());
            if let Err(errno) = done {
                assert!((1..4096).contains(&errno));
            } else if matches!(code, opcode::READDIR | opcode::READDIRPLUS) {
                assert!(out.len() <= 16 + room.min(size as usize));
            }
        }
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (kind, image) in [(0, &image::built().bootstrap[..]), (1, image::sample())] {
        let tree = Tree::parse(image).expect("an image");
        let root = tree.inode(tree.root()).expect("the root");
        let meta = tree.superblock().meta_offset;
        let nids: Vec<u64> = tree.entries(&root, 0).flatten().map(|e| e.nid).collect();
        let mut requests = Vec::new();
        for code in [1, 3, 5, 15, 22, 23, 28, 44, 46] {
            for nid in &nids {
                requests.extend([code, 2]);
                requests.extend((*nid as u16).to_le_bytes());
                requests.push(0);
                if code == 1 {
                    requests.push(3);
                }
                requests.extend([0xff, 0x7f]);
            }
        }
        let mut all = vec![vec![]];
        for nid in nids {
            let at = (meta + 32 * nid) as usize;
            all.push(write_at(at, &[9, 0]));
            all.push(write_at(at + 2, &[0xff, 0x0f]));
            all.push(write_at(at + 8, &[0xff; 4]));
            all.push(write_at(at + 16, &[0xff; 4]));
        }
        for damage in all {
            for part in requests.chunks(150) {
                let mut seed = vec![kind];
                seed.extend((damage.len() as u16).to_le_bytes());
                seed.extend(&damage);
                seed.extend(part);
                seeds.push(seed);
            }
        }
    }
    seeds
}
