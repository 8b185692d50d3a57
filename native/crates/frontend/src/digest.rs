//! SHA-256 of many files, with many reads in flight that may be answered in any order.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::exchange::{Exchange, Layout};
use crate::fuse::{self, IN_HEADER, OUT_HEADER};
use crate::port::{Port, Wait};
use crate::queue::Queue;

/// A file to read from beginning to end.
#[derive(Clone, Copy, Debug)]
pub struct File {
    pub nodeid: u64,
    pub fh: u64,
    pub size: u64,
}

/// How the files are read.
pub struct Options {
    pub read_size: u32,
    /// Reads in flight.
    pub depth: usize,
    pub layout: Layout,
    /// Time without any completion after which the walk fails.
    pub stall: Duration,
}

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Digest([u8; 32]),
    /// A read was answered with this errno.
    Errno(i32),
    /// A read returned fewer or more bytes than the file has there, or no valid reply.
    BadLength,
}

struct Progress {
    hasher: Sha256,
    hashed: u64,
    /// Pieces that came before their turn, by offset.
    early: BTreeMap<u64, Vec<u8>>,
    failed: Option<Status>,
}

struct Slot {
    exchange: Exchange,
    file: usize,
    offset: u64,
    len: u64,
    unique: u64,
}

/// Pieces per read in flight that may wait for an earlier one, which bounds the memory.
const EARLY_PER_DEPTH: usize = 4;

/// Reads all `files`, several at once; the statuses are in their order.
pub fn digest_files(
    queue: &Queue,
    files: &[File],
    options: &Options,
) -> Result<Vec<Status>, Error> {
    if options.depth == 0 || options.read_size == 0 {
        return Err(Error::Invalid(
            "digests need a depth and a read size".into(),
        ));
    }
    let mut progress: Vec<Progress> = files
        .iter()
        .map(|_| Progress {
            hasher: Sha256::new(),
            hashed: 0,
            early: BTreeMap::new(),
            failed: None,
        })
        .collect();
    let request_len = IN_HEADER + 40;
    let idle: Result<Vec<Exchange>, Error> = (0..options.depth)
        .map(|_| {
            queue.exchange(
                request_len,
                OUT_HEADER + options.read_size as usize,
                options.layout,
                None,
            )
        })
        .collect();
    let mut idle = idle?;
    let mut slots: Vec<Option<Slot>> = (0..options.depth).map(|_| None).collect();
    let mut free: Vec<u32> = (0..options.depth as u32).rev().collect();
    let mut waiting = VecDeque::new();
    let mut done = Vec::new();
    let (mut file, mut offset, mut n_early) = (0, 0, 0usize);
    let mut unique = 3u64 << 61;
    let port = Port::open(queue, Wait::Sleep);
    loop {
        while file < files.len() && n_early < options.depth * EARLY_PER_DEPTH {
            if offset >= files[file].size || progress[file].failed.is_some() {
                (file, offset) = (file + 1, 0);
                continue;
            }
            let Some(slot) = free.pop() else { break };
            let Some(exchange) = idle.pop() else { break };
            let f = files[file];
            let len = u64::from(options.read_size).min(f.size - offset);
            unique += 2;
            exchange.poison();
            exchange.write_request(
                0,
                &fuse::in_header(request_len as u32, fuse::READ, unique, f.nodeid),
            );
            exchange.write_request(IN_HEADER, &fuse::read_in(f.fh, offset, options.read_size));
            slots[slot as usize] = Some(Slot {
                exchange,
                file,
                offset,
                len,
                unique,
            });
            waiting.push_back(slot);
            offset += len;
        }
        if free.len() == slots.len() {
            break;
        }
        let batch = waiting
            .iter()
            .filter_map(|&i: &u32| Some((i, &slots[i as usize].as_ref()?.exchange)));
        let result = port.submit(batch).and_then(|n| {
            waiting.drain(..n);
            port.completions(options.stall, &mut done)
        });
        for (index, used) in done.drain(..) {
            let Some(slot) = slots.get_mut(index as usize).and_then(Option::take) else {
                continue;
            };
            free.push(index);
            let p = &mut progress[slot.file];
            let before = p.early.len();
            accept(p, &slot, used, queue);
            n_early = n_early + p.early.len() - before;
            idle.push(slot.exchange);
        }
        if let Err(e) = result {
            port.abandon(slots.into_iter().flatten().map(|slot| slot.exchange));
            return Err(e);
        }
    }
    let finish = |p: Progress| {
        p.failed
            .unwrap_or_else(|| Status::Digest(p.hasher.finalize().into()))
    };
    Ok(progress.into_iter().map(finish).collect())
}

/// Checks a completed read and hashes what it makes contiguous.
fn accept(p: &mut Progress, slot: &Slot, used: u32, queue: &Queue) {
    let x = &slot.exchange;
    let header = x.verify(slot.unique, used, &queue.faults, queue.index);
    x.verify_poison(
        x.reply_len(used, header),
        slot.unique,
        &queue.faults,
        queue.index,
    );
    let failure = match header {
        Some(h) if h.error != 0 => Some(Status::Errno(-h.error)),
        Some(h) if u64::from(h.len) == OUT_HEADER as u64 + slot.len => None,
        _ => Some(Status::BadLength),
    };
    if let Some(status) = failure.filter(|_| p.failed.is_none()) {
        p.failed = Some(status);
    }
    if p.failed.is_some() {
        p.early.clear();
        return;
    }
    let mut bytes = vec![0u8; slot.len as usize];
    x.read_reply(OUT_HEADER, &mut bytes);
    p.early.insert(slot.offset, bytes);
    while let Some(bytes) = p.early.remove(&p.hashed) {
        p.hasher.update(&bytes);
        p.hashed += bytes.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::Framing;
    use crate::testing::{FakeDevice, queue};

    /// Content of a node: a function of node and offset.
    fn byte(node: u64, offset: u64) -> u8 {
        (node.wrapping_mul(31) ^ offset ^ (offset >> 8)) as u8
    }

    #[test]
    fn digests_survive_answers_in_any_order() {
        let queue = queue(64);
        let mut device = FakeDevice::new(&queue);
        let sizes = [0u64, 1, 4096, 100_000, 4097, 0, 65_536, 12_345];
        let files: Vec<File> = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| File {
                nodeid: i as u64,
                fh: 0,
                size,
            })
            .collect();
        let total: usize = sizes.iter().map(|s| s.div_ceil(4096) as usize).sum();
        let layout = Layout {
            framing: Framing::Linux,
            indirect: true,
        };
        let options = Options {
            read_size: 4096,
            depth: 8,
            layout,
            stall: Duration::from_secs(10),
        };
        let statuses = std::thread::scope(|scope| {
            let walk = scope.spawn(|| digest_files(&queue, &files, &options).unwrap());
            let mut held = Vec::new();
            for i in 0..total {
                held.push(device.expect());
                // Later requests first, as long as a few are held.
                if held.len() == 5 || i + 8 > total {
                    while let Some((head, descs, request)) = held.pop() {
                        let field =
                            |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
                        let (node, offset) = (field(16), field(48));
                        let end = sizes[node as usize].min(offset + 4096);
                        let body: Vec<u8> = (offset..end).map(|o| byte(node, o)).collect();
                        device.reply(head, &descs, &request, &body);
                    }
                }
            }
            walk.join().unwrap()
        });
        for (file, status) in files.iter().zip(statuses) {
            let content: Vec<u8> = (0..file.size).map(|o| byte(file.nodeid, o)).collect();
            assert_eq!(status, Status::Digest(Sha256::digest(&content).into()));
        }
        assert_eq!(queue.faults.texts(false), Vec::<String>::new());
    }

    #[test]
    fn errors_and_short_reads_are_told() {
        let queue = queue(64);
        let mut device = FakeDevice::new(&queue);
        let files = [1, 2].map(|nodeid| File {
            nodeid,
            fh: 0,
            size: 10,
        });
        let layout = Layout {
            framing: Framing::Compact,
            indirect: false,
        };
        let options = Options {
            read_size: 4096,
            depth: 8,
            layout,
            stall: Duration::from_secs(10),
        };
        let statuses = std::thread::scope(|scope| {
            let walk = scope.spawn(|| digest_files(&queue, &files, &options).unwrap());
            let (head, descs, request) = device.expect();
            let unique = u64::from_le_bytes(request[8..16].try_into().unwrap());
            device.answer(head, &descs, &crate::testing::reply(unique, -5, &[]), 16);
            let (head, descs, request) = device.expect();
            device.reply(head, &descs, &request, &[0; 9]);
            walk.join().unwrap()
        });
        assert_eq!(statuses, [Status::Errno(5), Status::BadLength]);
    }
}
