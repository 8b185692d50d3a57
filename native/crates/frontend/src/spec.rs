//! What a load does, and what came of it.

use std::sync::Arc;
use std::time::Duration;

use crate::exchange::Layout;
use crate::fuse::{self, IN_HEADER, OUT_HEADER};
use crate::histogram::Histogram;
use crate::port::Wait;
use crate::sys::Mapping;

/// What a read must return.
#[derive(Clone)]
pub enum Expected {
    /// Whatever comes, as long as the length is right.
    Anything,
    /// The bytes of a mapped file, the target's content beginning at this offset.
    File(Arc<Mapping>, u64),
    /// SHA-256 of each block of the operation's length; the last may be shorter.
    Blocks(Vec<[u8; 32]>),
}

/// An object of an operation.
#[derive(Clone)]
pub struct Target {
    pub nodeid: u64,
    pub fh: u64,
    /// Bytes of the file that is read.
    pub size: u64,
    /// What is looked up, without NUL.
    pub name: Vec<u8>,
    pub expected: Expected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Getattr,
    Lookup,
    /// A lookup that must find nothing: ENOENT, or an entry without a node.
    Absent,
    Read,
    /// OPEN, and when it is answered RELEASE; both count as one operation.
    Open,
    /// FORGET of one lookup, which has no answer: for the hiprio queue.
    Forget,
}

/// One kind of operation in a mix.
pub struct Op {
    pub kind: Kind,
    /// Share in the mix.
    pub weight: u32,
    /// Bytes of a read; offsets are multiples of it.
    pub len: u32,
    /// Targets and offsets at random, else one after the other.
    pub random: bool,
    pub targets: Vec<Target>,
}

impl Op {
    pub(crate) fn request_len(&self) -> usize {
        IN_HEADER
            + match self.kind {
                Kind::Getattr => 16,
                Kind::Lookup | Kind::Absent => self.targets.first().map_or(1, |t| t.name.len() + 1),
                Kind::Read => 40,
                Kind::Open => 24,
                Kind::Forget => 8,
            }
    }

    pub(crate) fn reply_len(&self) -> usize {
        OUT_HEADER
            + match self.kind {
                Kind::Getattr => fuse::ATTR_OUT,
                Kind::Lookup | Kind::Absent => fuse::ENTRY_OUT,
                Kind::Read => self.len as usize,
                Kind::Open => fuse::OPEN_OUT,
                Kind::Forget => return 0,
            }
    }

    pub(crate) fn blocks(&self, target: &Target) -> u64 {
        target.size.div_ceil(u64::from(self.len.max(1))).max(1)
    }
}

/// What a load does.
pub struct Spec {
    pub ops: Vec<Op>,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Requests per queue, 0 for no limit.
    pub count: u64,
    /// Time after which nothing new is submitted.
    pub duration: Duration,
    pub wait: Wait,
    pub layout: Layout,
    /// Poison buffers, look at them after completion, and once more before they are used again.
    pub canaries: bool,
    /// Buffers beyond the depth that rest, poisoned, between two uses.
    pub resting: usize,
    pub seed: u64,
    /// Time without any completion after which what is in flight is given up as lost.
    pub stall: Duration,
}

/// What came of one operation of the mix.
#[derive(Clone, Default)]
pub struct OpOutcome {
    pub errors: u64,
    pub first_errno: i32,
    /// Reads whose length or content is not the expected one.
    pub wrong: u64,
    pub bytes: u64,
    pub latency: Histogram,
}

impl OpOutcome {
    pub(crate) fn merge(&mut self, other: &OpOutcome) {
        self.errors += other.errors;
        self.first_errno = if self.first_errno == 0 {
            other.first_errno
        } else {
            self.first_errno
        };
        self.wrong += other.wrong;
        self.bytes += other.bytes;
        self.latency.merge(&other.latency);
    }
}

/// What came of a load.
#[derive(Default)]
pub struct Outcome {
    pub elapsed: Duration,
    /// Requests that were given up.
    pub lost: u64,
    pub kicks: u64,
    pub kicks_suppressed: u64,
    pub interrupts: u64,
    /// By operation, in the order of the specification.
    pub ops: Vec<OpOutcome>,
}

impl Outcome {
    /// All operations together.
    pub fn total(&self) -> OpOutcome {
        let mut total = OpOutcome::default();
        self.ops.iter().for_each(|op| total.merge(op));
        total
    }
}
