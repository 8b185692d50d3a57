//! Load loops: a mix of operations at a constant depth, with latencies, and with a look at every byte if asked.
//!
//! Latency runs from just before the request is made available to when its completion was taken from the ring;
//! what the loop then does with it (checks of content and poison) counts for the next request at most.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::exchange::Exchange;
use crate::fault::FaultKind;
use crate::fuse::OUT_HEADER;
use crate::operation::{Step, Verdict, ask, judge};
use crate::port::Port;
use crate::queue::Queue;
pub use crate::spec::{Expected, Kind, Op, OpOutcome, Outcome, Spec, Target};

/// Runs a load on each of `queues` at the same time, until it is done or `stop` changes.
pub fn run(queues: &[Arc<Queue>], spec: &Spec, stop: &AtomicU64) -> Result<Outcome, Error> {
    if spec.depth == 0
        || spec.ops.iter().all(|op| op.weight == 0)
        || spec.ops.iter().any(|op| op.targets.is_empty())
    {
        return Err(Error::Invalid(
            "a load needs a depth, a weight and targets for every operation".into(),
        ));
    }
    let stop_at = stop.load(Ordering::Relaxed);
    let started = Instant::now();
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter()
            .enumerate()
            .map(|(i, queue)| {
                scope.spawn(move || {
                    Loop::new(queue, spec, i as u64)?
                        .run(|| stop.load(Ordering::Relaxed) != stop_at)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| {
                t.join()
                    .unwrap_or_else(|_| Err(Error::Broken("a load thread panicked".into())))
            })
            .collect::<Vec<_>>()
    });
    let mut all = Outcome {
        ops: vec![OpOutcome::default(); spec.ops.len()],
        ..Outcome::default()
    };
    for result in results {
        let one = result?;
        all.lost += one.lost;
        all.kicks += one.kicks;
        all.kicks_suppressed += one.kicks_suppressed;
        all.interrupts += one.interrupts;
        all.ops
            .iter_mut()
            .zip(&one.ops)
            .for_each(|(all, one)| all.merge(one));
    }
    all.elapsed = started.elapsed();
    Ok(all)
}

/// A request in flight.
struct Slot {
    exchange: Exchange,
    op: usize,
    target: usize,
    offset: u64,
    unique: u64,
    step: Step,
    submitted: Instant,
}

/// The state of a load on one queue.
struct Loop<'a> {
    queue: &'a Queue,
    spec: &'a Spec,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// Idle exchanges by operation.
    idle: Vec<VecDeque<Exchange>>,
    /// For sequential operations: target and block to read next.
    cursors: Vec<(usize, u64)>,
    total_weight: u64,
    random: u64,
    unique: u64,
    buf: Vec<u8>,
    outcome: Outcome,
}

impl<'a> Loop<'a> {
    fn new(queue: &'a Queue, spec: &'a Spec, index: u64) -> Result<Self, Error> {
        let resting = if spec.canaries { spec.resting } else { 0 };
        let mut idle = Vec::new();
        for op in &spec.ops {
            let exchanges: Result<VecDeque<Exchange>, Error> = (0..spec.depth + resting)
                .map(|_| queue.exchange(op.request_len(), op.reply_len(), spec.layout, None))
                .collect();
            idle.push(exchanges?);
        }
        Ok(Loop {
            queue,
            spec,
            slots: (0..spec.depth).map(|_| None).collect(),
            free: (0..spec.depth as u32).rev().collect(),
            idle,
            cursors: vec![(0, 0); spec.ops.len()],
            total_weight: spec.ops.iter().map(|op| u64::from(op.weight)).sum(),
            random: spec.seed ^ (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            unique: (1 << 62) + (index << 48),
            buf: Vec::new(),
            outcome: Outcome {
                ops: vec![OpOutcome::default(); spec.ops.len()],
                ..Outcome::default()
            },
        })
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A random number below `n`.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_random()) * u128::from(n.max(1))) >> 64) as u64
    }

    fn pick_op(&mut self) -> usize {
        if self.spec.ops.len() == 1 {
            return 0;
        }
        let mut at = self.below(self.total_weight);
        for (i, op) in self.spec.ops.iter().enumerate() {
            match at.checked_sub(u64::from(op.weight)) {
                None => return i,
                Some(rest) => at = rest,
            }
        }
        0
    }

    /// Target and block of the next request of an operation.
    fn pick(&mut self, i: usize) -> (usize, u64) {
        let op = &self.spec.ops[i];
        if op.random {
            let target = self.below(op.targets.len() as u64) as usize;
            return (target, self.below(op.blocks(&op.targets[target])));
        }
        let (target, block) = self.cursors[i];
        let next = block + 1;
        let wrapped = op.kind != Kind::Read || next >= op.blocks(&op.targets[target]);
        self.cursors[i] = if wrapped {
            ((target + 1) % op.targets.len(), 0)
        } else {
            (target, next)
        };
        (target, block)
    }

    /// The next request; `now` stands in for the time of its submission.
    fn prepare(&mut self, now: Instant) -> Result<Slot, Error> {
        let i = self.pick_op();
        let (target, block) = self.pick(i);
        let op = &self.spec.ops[i];
        // With canaries the buffer that rested longest, else the one still warm.
        let idle = &mut self.idle[i];
        let taken = if self.spec.canaries {
            idle.pop_front()
        } else {
            idle.pop_back()
        };
        let mut exchange = taken.ok_or_else(|| Error::Broken("no idle exchange".into()))?;
        if self.spec.canaries {
            exchange.verify_untouched("a request of a load", &self.queue.faults, self.queue.index);
        }
        let offset = block * u64::from(op.len);
        self.unique += 2;
        let asked = (op, &op.targets[target]);
        let place = (self.queue, self.spec);
        ask(
            &mut exchange,
            place,
            asked,
            Step::First,
            self.unique,
            offset,
        )?;
        Ok(Slot {
            exchange,
            op: i,
            target,
            offset,
            unique: self.unique,
            step: Step::First,
            submitted: now,
        })
    }

    fn run(mut self, stopped: impl Fn() -> bool) -> Result<Outcome, Error> {
        let stats = &self.queue.stats;
        let before = [&stats.kicks, &stats.kicks_suppressed, &stats.interrupts]
            .map(|s| s.load(Ordering::Relaxed));
        let end = self.work(stopped);
        let after = [&stats.kicks, &stats.kicks_suppressed, &stats.interrupts]
            .map(|s| s.load(Ordering::Relaxed));
        self.outcome.kicks = after[0] - before[0];
        self.outcome.kicks_suppressed = after[1] - before[1];
        self.outcome.interrupts = after[2] - before[2];
        if self.spec.canaries {
            for exchange in self.idle.iter().flatten() {
                exchange.verify_untouched(
                    "a request of a load",
                    &self.queue.faults,
                    self.queue.index,
                );
            }
        }
        end?;
        Ok(self.outcome)
    }

    fn work(&mut self, stopped: impl Fn() -> bool) -> Result<(), Error> {
        let queue = self.queue;
        let port = Port::open(queue, self.spec.wait);
        let started = Instant::now();
        let mut left = if self.spec.count == 0 {
            u64::MAX
        } else {
            self.spec.count
        };
        // Prepared slots that the ring had no room for yet, oldest first.
        let mut waiting: VecDeque<u32> = VecDeque::new();
        let mut done = Vec::with_capacity(self.spec.depth);
        let mut now = started;
        loop {
            if left > 0 && (now.duration_since(started) >= self.spec.duration || stopped()) {
                left = 0;
            }
            while left > 0 {
                let Some(slot) = self.free.pop() else { break };
                let prepared = self.prepare(now)?;
                self.slots[slot as usize] = Some(prepared);
                waiting.push_back(slot);
                left -= 1;
            }
            if self.free.len() == self.slots.len() {
                return Ok(());
            }
            let result = self.turn(&port, &mut waiting, &mut done);
            now = Instant::now();
            for (slot, used) in done.drain(..) {
                if self.finish(slot, used, now)? {
                    waiting.push_back(slot);
                }
            }
            match result {
                Ok(()) => {}
                Err(e) => {
                    let open: Vec<Slot> = self.slots.iter_mut().filter_map(Option::take).collect();
                    self.outcome.lost = open.len() as u64;
                    port.abandon(open.into_iter().map(|slot| slot.exchange));
                    // Who stalled, went or was reset left an outcome all the same.
                    return if matches!(e, Error::Timeout | Error::Reset | Error::Closed) {
                        Ok(())
                    } else {
                        Err(e)
                    };
                }
            }
        }
    }

    fn turn(
        &mut self,
        port: &Port<'_>,
        waiting: &mut VecDeque<u32>,
        done: &mut Vec<(u32, u32)>,
    ) -> Result<(), Error> {
        let now = Instant::now();
        for &i in waiting.iter() {
            self.slots[i as usize]
                .iter_mut()
                .filter(|slot| slot.step == Step::First)
                .for_each(|slot| slot.submitted = now);
        }
        let slots = &self.slots;
        let batch = waiting
            .iter()
            .filter_map(|&i| Some((i, &slots[i as usize].as_ref()?.exchange)));
        let n = if waiting.is_empty() {
            0
        } else {
            port.submit(batch)?
        };
        waiting.drain(..n);
        port.completions(self.spec.stall, done)
    }

    /// Judges an answer. Returns whether the operation has another request, which is in the slot then.
    fn finish(&mut self, index: u32, used: u32, now: Instant) -> Result<bool, Error> {
        let Some(mut slot) = self.slots.get_mut(index as usize).and_then(Option::take) else {
            return Ok(false);
        };
        let (faults, q) = (&self.queue.faults, self.queue.index);
        let op = &self.spec.ops[slot.op];
        let header = slot.exchange.verify(slot.unique, used, faults, q);
        if self.spec.canaries {
            slot.exchange.verify_poison(
                slot.exchange.reply_len(used, header),
                slot.unique,
                faults,
                q,
            );
        }
        let verdict = judge(op.kind, slot.step, header, &slot.exchange);
        let capacity = slot.exchange.reply_capacity();
        let len = (slot.exchange.reply_len(used, header).min(capacity)).saturating_sub(OUT_HEADER);
        let right = match (verdict, op.kind) {
            (Verdict::Good, Kind::Read) => content_is_right(op, &slot, len, &mut self.buf),
            (verdict, _) => verdict != Verdict::Wrong,
        };
        if self.spec.canaries {
            slot.exchange.poison();
        }
        let outcome = &mut self.outcome.ops[slot.op];
        if !right {
            outcome.wrong += 1;
            faults.record(FaultKind::WrongData, || {
                let t = &op.targets[slot.target];
                format!(
                    "queue {q}: node {}, {len} bytes at {} of {}",
                    t.nodeid, slot.offset, t.size
                )
            });
        }
        match verdict {
            Verdict::Next(step) => {
                self.unique += 2;
                (slot.step, slot.unique) = (step, self.unique);
                let asked = (op, &op.targets[slot.target]);
                let place = (self.queue, self.spec);
                ask(&mut slot.exchange, place, asked, step, slot.unique, 0)?;
                self.slots[index as usize] = Some(slot);
                return Ok(true);
            }
            Verdict::Refused(error) => {
                outcome.errors += 1;
                if outcome.first_errno == 0 {
                    outcome.first_errno = error;
                }
            }
            Verdict::Good | Verdict::Wrong => outcome.bytes += len as u64,
        }
        let latency = now.duration_since(slot.submitted).as_nanos() as u64;
        outcome.latency.record(latency);
        self.free.push(index);
        self.idle[slot.op].push_back(slot.exchange);
        Ok(false)
    }
}

fn content_is_right(op: &Op, slot: &Slot, len: usize, buf: &mut Vec<u8>) -> bool {
    let target = &op.targets[slot.target];
    let want = u64::from(op.len).min(target.size.saturating_sub(slot.offset)) as usize;
    if len != want {
        return false;
    }
    match &target.expected {
        Expected::Anything => true,
        Expected::File(file, start) => {
            let at = usize::try_from(start + slot.offset).unwrap_or(usize::MAX);
            file.bytes()
                .get(at..)
                .and_then(|b| b.get(..want))
                .is_some_and(|b| slot.exchange.reply_equals(OUT_HEADER, b))
        }
        Expected::Blocks(digests) => {
            buf.resize(want, 0);
            slot.exchange.read_reply(OUT_HEADER, buf);
            let block = (slot.offset / u64::from(op.len.max(1))) as usize;
            digests
                .get(block)
                .is_some_and(|d| Sha256::digest(&buf).as_slice() == d)
        }
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
