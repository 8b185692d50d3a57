//! A whole tree listed as a guest lists it: OPENDIR, READDIRPLUS until nothing more comes, RELEASEDIR.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exchange::{Exchange, Layout};
use crate::fuse::{self, IN_HEADER, OUT_HEADER};
use crate::port::{Port, Wait};
use crate::queue::Queue;
use crate::spec::{OpOutcome, Outcome};

/// Type of a file in its mode, and that of a directory (inode(7)).
const FILE_TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
/// Where the mode is in `struct fuse_entry_out`.
const MODE: usize = 100;
/// Size of `struct fuse_dirent` without the name.
const DIRENT: usize = 24;

/// How a tree is listed.
pub struct Options {
    /// Node where the walks begin.
    pub root: u64,
    /// Requests in flight: directories that are listed at the same time.
    pub depth: usize,
    /// Bytes of a READDIRPLUS.
    pub size: u32,
    /// Time after which no further walk begins.
    pub duration: Duration,
    /// Walks at most; 0 for no limit.
    pub count: u64,
    pub wait: Wait,
    pub layout: Layout,
    /// Time without any completion after which a walk is given up.
    pub stall: Duration,
}

/// What came of the walks. `outcome` has the requests as its only operation.
#[derive(Default)]
pub struct Walked {
    pub outcome: Outcome,
    pub walks: u64,
    /// Names, without `.` and `..`, of all walks.
    pub entries: u64,
    pub directories: u64,
}

/// A request of a walk.
#[derive(Clone, Copy)]
enum Step {
    Open { node: u64 },
    List { node: u64, fh: u64, offset: u64 },
    Release { node: u64, fh: u64 },
}

/// A request in flight.
struct Flying {
    step: Step,
    unique: u64,
    submitted: Instant,
}

/// Two buffers, as a guest takes no room for names where no names come.
struct Slot {
    small: Exchange,
    large: Exchange,
    flying: Option<Flying>,
}

impl Slot {
    fn exchange(&mut self, step: Step) -> &mut Exchange {
        match step {
            Step::List { .. } => &mut self.large,
            _ => &mut self.small,
        }
    }
}

struct Walk<'a> {
    queue: &'a Queue,
    options: &'a Options,
    slots: Vec<Slot>,
    todo: VecDeque<Step>,
    /// OPENDIR was answered with ENOSYS: a guest asks no more.
    handleless: bool,
    unique: u64,
    buf: Vec<u8>,
    all: Walked,
    requests: OpOutcome,
}

/// Walks the tree again and again until the time is over or `stop` changes; the walk under way is finished.
pub fn run(queue: &Queue, options: &Options, stop: &AtomicU64) -> Result<Walked, Error> {
    if options.depth == 0 || options.size == 0 {
        return Err(Error::Invalid("a walk needs a depth and a size".into()));
    }
    let stop_at = stop.load(Ordering::Relaxed);
    let mut walk = Walk::new(queue, options)?;
    let port = Port::open(queue, options.wait);
    let before = counters(queue);
    let started = Instant::now();
    while walk.all.walks == 0
        || (walk.all.walks != options.count
            && started.elapsed() < options.duration
            && stop.load(Ordering::Relaxed) == stop_at)
    {
        walk.todo.push_back(Step::Open { node: options.root });
        match walk.once(&port) {
            Ok(()) => walk.all.walks += 1,
            Err(Error::Timeout | Error::Reset | Error::Closed) => break,
            Err(e) => return Err(walk.abandon(port, e)),
        }
    }
    walk.all.outcome.elapsed = started.elapsed();
    let after = counters(queue);
    let in_flight = walk.slots.iter().filter(|slot| slot.flying.is_some());
    walk.all.outcome.lost = in_flight.count() as u64;
    let mut all = std::mem::take(&mut walk.all);
    let [kicks, suppressed, interrupts] = [0, 1, 2].map(|i| after[i] - before[i]);
    (all.outcome.kicks, all.outcome.kicks_suppressed) = (kicks, suppressed);
    all.outcome.interrupts = interrupts;
    all.outcome.ops.push(std::mem::take(&mut walk.requests));
    walk.hand_over(port);
    Ok(all)
}

fn counters(queue: &Queue) -> [u64; 3] {
    let s = &queue.stats;
    [&s.kicks, &s.kicks_suppressed, &s.interrupts].map(|n| n.load(Ordering::Relaxed))
}

impl<'a> Walk<'a> {
    fn new(queue: &'a Queue, options: &'a Options) -> Result<Self, Error> {
        let exchange = |request: usize, reply: usize| {
            let (request, reply) = (IN_HEADER + request, OUT_HEADER + reply);
            queue.exchange(request, reply, options.layout, None)
        };
        let slot = |_| {
            Ok(Slot {
                small: exchange(24, fuse::OPEN_OUT)?,
                large: exchange(40, options.size as usize)?,
                flying: None,
            })
        };
        Ok(Walk {
            queue,
            options,
            slots: (0..options.depth).map(slot).collect::<Result<_, Error>>()?,
            todo: VecDeque::new(),
            handleless: false,
            unique: 3 << 60,
            buf: vec![0; options.size as usize],
            all: Walked::default(),
            requests: OpOutcome::default(),
        })
    }

    /// The buffers of what is still in flight belong to the queue from now on.
    fn hand_over(self, port: Port<'_>) {
        let flying = self.slots.into_iter().filter(|s| s.flying.is_some());
        port.abandon(flying.flat_map(|s| [s.small, s.large]));
    }

    fn abandon(self, port: Port<'_>, error: Error) -> Error {
        self.hand_over(port);
        error
    }

    fn once(&mut self, port: &Port<'_>) -> Result<(), Error> {
        let mut done = Vec::with_capacity(self.options.depth);
        let mut waiting: VecDeque<u32> = VecDeque::new();
        loop {
            for i in 0..self.slots.len() {
                if self.slots[i].flying.is_some() {
                    continue;
                }
                let Some(step) = self.todo.pop_front() else {
                    break;
                };
                self.prepare(i, step)?;
                waiting.push_back(i as u32);
            }
            if self.slots.iter().all(|slot| slot.flying.is_none()) {
                return Ok(());
            }
            self.submit(port, &mut waiting)?;
            let result = port.completions(self.options.stall, &mut done);
            let now = Instant::now();
            for (slot, used) in done.drain(..) {
                self.finish(slot as usize, used, now);
            }
            result?;
        }
    }

    fn submit(&mut self, port: &Port<'_>, waiting: &mut VecDeque<u32>) -> Result<(), Error> {
        if waiting.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        for &i in waiting.iter() {
            if let Some(flying) = &mut self.slots[i as usize].flying {
                flying.submitted = now;
            }
        }
        let slots = &self.slots;
        let batch = waiting.iter().filter_map(|&i| {
            let slot = &slots[i as usize];
            let large = matches!(slot.flying.as_ref()?.step, Step::List { .. });
            Some((i, if large { &slot.large } else { &slot.small }))
        });
        let n = port.submit(batch)?;
        waiting.drain(..n);
        Ok(())
    }

    fn prepare(&mut self, i: usize, step: Step) -> Result<(), Error> {
        self.unique += 2;
        // Without handles the listing begins at once.
        let step = match step {
            Step::Open { node } if self.handleless => Step::List {
                node,
                fh: 0,
                offset: 0,
            },
            other => other,
        };
        let read = |fh, offset| fuse::read_in(fh, offset, self.options.size);
        let (opcode, node, body): (u32, u64, Vec<u8>) = match step {
            Step::Open { node } => (fuse::OPENDIR, node, fuse::OPEN_IN.to_vec()),
            Step::List { node, fh, offset } => (fuse::READDIRPLUS, node, read(fh, offset).to_vec()),
            Step::Release { node, fh } => (fuse::RELEASEDIR, node, fuse::release_in(fh).to_vec()),
        };
        let len = IN_HEADER + body.len();
        let (memory, layout) = (&self.queue.memory, self.options.layout);
        let exchange = self.slots[i].exchange(step);
        exchange.set_request_len(memory, len, layout)?;
        exchange.write_request(IN_HEADER, &body);
        exchange.write_request(0, &fuse::in_header(len as u32, opcode, self.unique, node));
        self.slots[i].flying = Some(Flying {
            step,
            unique: self.unique,
            submitted: Instant::now(),
        });
        Ok(())
    }

    fn finish(&mut self, i: usize, used: u32, now: Instant) {
        let Some(flying) = self.slots.get_mut(i).and_then(|slot| slot.flying.take()) else {
            return;
        };
        let latency = now.duration_since(flying.submitted).as_nanos() as u64;
        self.requests.latency.record(latency);
        let (faults, q) = (&self.queue.faults, self.queue.index);
        let exchange = self.slots[i].exchange(flying.step);
        let header = exchange.verify(flying.unique, used, faults, q);
        let error = header.map_or(libc::EPROTO, |h| -h.error);
        let capacity = exchange.reply_capacity();
        let len = (exchange.reply_len(used, header).min(capacity)).saturating_sub(OUT_HEADER);
        let mut body = std::mem::take(&mut self.buf);
        body.resize(self.options.size as usize, 0);
        body.truncate(len);
        exchange.read_reply(OUT_HEADER, &mut body);
        self.requests.bytes += len as u64;
        match (flying.step, error) {
            (Step::Open { node }, libc::ENOSYS) => {
                self.handleless = true;
                self.todo.push_front(Step::Open { node });
            }
            (Step::Release { .. }, 0) => {}
            (Step::Open { node }, 0) => {
                let fh = body.get(..8).and_then(|b| b.try_into().ok());
                let fh = fh.map_or(0, u64::from_le_bytes);
                let offset = 0;
                self.todo.push_front(Step::List { node, fh, offset });
            }
            (Step::List { node, fh, .. }, 0) => match self.list(&body) {
                Some(offset) => self.todo.push_front(Step::List { node, fh, offset }),
                None => self.close(node, fh),
            },
            (step, error) => {
                self.requests.errors += 1;
                if self.requests.first_errno == 0 {
                    self.requests.first_errno = error;
                }
                if let Step::List { node, fh, .. } = step {
                    self.close(node, fh);
                }
            }
        }
        self.buf = body;
    }

    /// Directories of an answer are listed later; returns where the listing goes on, if it does.
    fn list(&mut self, body: &[u8]) -> Option<u64> {
        let mut last = None;
        let mut rest = body;
        while let Some((entry, next)) = split_entry(rest) {
            last = Some(entry.offset);
            rest = next;
            if matches!(entry.name, b"." | b"..") {
                continue;
            }
            self.all.entries += 1;
            if entry.node == 0 {
                // Names without a node would cost a guest a LOOKUP each: no walk by READDIRPLUS.
                self.requests.wrong += 1;
            } else if entry.mode & FILE_TYPE == DIRECTORY {
                self.todo.push_back(Step::Open { node: entry.node });
            }
        }
        if !rest.is_empty() {
            self.requests.wrong += 1;
            return None;
        }
        last
    }

    fn close(&mut self, node: u64, fh: u64) {
        self.all.directories += 1;
        if !self.handleless {
            self.todo.push_front(Step::Release { node, fh });
        }
    }
}

/// A parsed `struct fuse_direntplus`.
struct Entry<'a> {
    node: u64,
    offset: u64,
    mode: u32,
    name: &'a [u8],
}

/// The first entry of a listing and what follows it; nothing at the end, or where no whole entry is.
fn split_entry(b: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let word = |at: usize| {
        let bytes = b.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let at = fuse::ENTRY_OUT;
    let (node, offset, lens) = (word(0)?, word(at + 8)?, word(at + 16)?);
    let (name_len, mode) = ((lens & 0xffff_ffff) as usize, word(MODE)? as u32);
    let name = b.get(at + DIRENT..)?.get(..name_len)?;
    if name_len == 0 {
        return None;
    }
    let entry = Entry {
        node,
        offset,
        mode,
        name,
    };
    let whole = (at + DIRENT + name_len).next_multiple_of(8);
    Some((entry, b.get(whole..)?))
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
