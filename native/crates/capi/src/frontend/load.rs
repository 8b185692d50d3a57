//! C ABI of the front-end's native loops: loads and digests.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use frontend::digest::{self, File, Status};
use frontend::load::{Expected, Kind, Op, OpOutcome, Outcome, Spec, Target, run};
use frontend::port::Wait;
use frontend::sys::Mapping;

use super::{borrow, fill, input, invalid, kit, layout, output, queue, time};
use crate::{Failure, guard};

/// Numbers of 64 bits per operation and per target in [`vr_frontend_load`], and per operation in its result.
pub const VR_FRONTEND_LOAD_PARAMS: usize = 10;
pub const VR_FRONTEND_LOAD_OP: usize = 6;
pub const VR_FRONTEND_LOAD_TARGET: usize = 8;
pub const VR_FRONTEND_LOAD_HEAD: usize = 7;
pub const VR_FRONTEND_LOAD_RESULT: usize = 11;
/// Kinds of operations.
pub const VR_FRONTEND_OP_GETATTR: u64 = 0;
pub const VR_FRONTEND_OP_LOOKUP: u64 = 1;
pub const VR_FRONTEND_OP_READ: u64 = 2;
pub const VR_FRONTEND_OP_ABSENT: u64 = 3;
pub const VR_FRONTEND_OP_OPEN: u64 = 4;
pub const VR_FRONTEND_OP_FORGET: u64 = 5;
/// Kinds of expected content.
pub const VR_FRONTEND_EXPECT_ANYTHING: u64 = 0;
pub const VR_FRONTEND_EXPECT_FILE: u64 = 1;
pub const VR_FRONTEND_EXPECT_BLOCKS: u64 = 2;

/// Byte strings and files that targets refer to.
struct Pool<'a> {
    bytes: &'a [u8],
    files: Vec<Arc<Mapping>>,
}

impl Pool<'_> {
    fn slice(&self, at: u64, len: u64) -> Result<&[u8], Failure> {
        let end = at
            .checked_add(len)
            .ok_or_else(|| invalid("a range of the pool wraps"))?;
        self.bytes
            .get(at as usize..end as usize)
            .ok_or_else(|| invalid("a range is outside of the pool"))
    }

    /// Words: nodeid, handle, size, name's offset and length in the pool, kind of expected content, and for a file
    /// its number and the offset in it, for blocks the offset of the digests in the pool.
    fn target(&self, words: &[u64], op_len: u64) -> Result<Target, Failure> {
        let &[nodeid, fh, size, name_at, name_len, kind, a, b] = words else {
            return Err(invalid("a target has 8 words"));
        };
        let expected = match kind {
            VR_FRONTEND_EXPECT_ANYTHING => Expected::Anything,
            VR_FRONTEND_EXPECT_FILE => Expected::File(
                self.files
                    .get(a as usize)
                    .ok_or_else(|| invalid("no such file"))?
                    .clone(),
                b,
            ),
            VR_FRONTEND_EXPECT_BLOCKS => {
                let n = size.div_ceil(op_len.max(1));
                let bytes = self.slice(a, n.saturating_mul(32))?;
                let digests = bytes.chunks_exact(32).filter_map(|d| d.try_into().ok());
                Expected::Blocks(digests.collect())
            }
            _ => return Err(invalid("unknown kind of expected content")),
        };
        Ok(Target {
            nodeid,
            fh,
            size,
            name: self.slice(name_at, name_len)?.to_vec(),
            expected,
        })
    }
}

/// Words: kind, weight, bytes of a read, 1 if random, first target, number of targets.
fn op(words: &[u64], targets: &[u64], pool: &Pool<'_>) -> Result<Op, Failure> {
    let &[kind, weight, len, random, first, n] = words else {
        return Err(invalid("an operation has 6 words"));
    };
    let kind = match kind {
        VR_FRONTEND_OP_GETATTR => Kind::Getattr,
        VR_FRONTEND_OP_LOOKUP => Kind::Lookup,
        VR_FRONTEND_OP_READ => Kind::Read,
        VR_FRONTEND_OP_ABSENT => Kind::Absent,
        VR_FRONTEND_OP_OPEN => Kind::Open,
        VR_FRONTEND_OP_FORGET => Kind::Forget,
        _ => return Err(invalid("unknown operation")),
    };
    let mine = targets
        .chunks_exact(VR_FRONTEND_LOAD_TARGET)
        .skip(first as usize)
        .take(n as usize);
    Ok(Op {
        kind,
        weight: weight as u32,
        len: len as u32,
        random: random != 0,
        targets: mine
            .map(|words| pool.target(words, len))
            .collect::<Result<_, _>>()?,
    })
}

/// Runs a load on the given queues, a thread and `depth` requests for each, and stores what came of it.
///
/// `params`: depth, requests per queue (0 = no limit), duration in ms, 1 to spin, layout word, 1 for canaries, resting
/// buffers, seed, stall time in ms, unused. `ops` and `targets` as in [`op`] and [`Pool::target`]; `pool` holds names
/// and digests, `files` descriptors of files with expected content. `out`: elapsed ns, lost, wrong, kicks, kicks
/// suppressed, interrupts, number of steps; then for each operation and for all together: requests, errors, first
/// errno, wrong, bytes, latencies in ns: mean, p50, p90, p99, p99.9, maximum. `steps`: of all latencies together, pairs
/// of a latency in ns and how many were above the one before it and not above this one.
///
/// # Safety
/// `h` is a live handle; the arrays have as many elements as told: `queues` `n_queues`, `params`
/// VR_FRONTEND_LOAD_PARAMS, `ops` and `targets` as many words as their counts times their sizes, `pool` `pool_len`
/// bytes, `files` `n_files` open descriptors; `out` and `steps` have `n_out` and `n_steps` writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_load(
    h: *mut c_void,
    queues: *const u32,
    n_queues: usize,
    params: *const u64,
    ops: *const u64,
    n_ops: usize,
    targets: *const u64,
    n_targets: usize,
    pool: *const u8,
    pool_len: usize,
    files: *const i32,
    n_files: usize,
    out: *mut u64,
    n_out: usize,
    steps: *mut u64,
    n_steps: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, queues, params) = unsafe {
            (
                kit(h)?,
                input(queues, n_queues),
                input(params, VR_FRONTEND_LOAD_PARAMS),
            )
        };
        // SAFETY: the caller's promises.
        let (ops, targets) = unsafe {
            (
                input(ops, n_ops * VR_FRONTEND_LOAD_OP),
                input(targets, n_targets * VR_FRONTEND_LOAD_TARGET),
            )
        };
        // SAFETY: the caller's promises.
        let (pool, files, out, steps) = unsafe {
            (
                input(pool, pool_len),
                input(files, n_files),
                output(out, n_out),
                output(steps, n_steps),
            )
        };
        let &[
            depth,
            count,
            duration,
            spin,
            word,
            canaries,
            resting,
            seed,
            stall,
            _,
        ] = params
        else {
            return Err(invalid("a load has 10 parameters"));
        };
        let files = borrow(files)?
            .into_iter()
            .map(|fd| Mapping::whole(fd).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let pool = Pool { bytes: pool, files };
        let spec = Spec {
            ops: ops
                .chunks_exact(VR_FRONTEND_LOAD_OP)
                .map(|o| op(o, targets, &pool))
                .collect::<Result<_, _>>()?,
            depth: depth as usize,
            count,
            duration: Duration::from_millis(duration),
            wait: if spin != 0 { Wait::Spin } else { Wait::Sleep },
            layout: layout(word)?,
            canaries: canaries != 0,
            resting: resting as usize,
            seed,
            stall: Duration::from_millis(stall),
        };
        let queues = queues
            .iter()
            .map(|&q| kit.queue(u16::try_from(q).unwrap_or(u16::MAX)))
            .collect::<Result<Vec<_>, _>>()?;
        let outcome = run(&queues, &spec, &kit.stop)?;
        let words = tell(&outcome, steps);
        fill(out, &words);
        Ok(words.len() as i64)
    })
}

/// What `vr_frontend_load` stores, the steps apart.
pub(super) fn tell(outcome: &Outcome, steps: &mut [u64]) -> Vec<u64> {
    let total = outcome.total();
    let pairs: Vec<u64> = total.latency.steps().flat_map(|(ns, n)| [ns, n]).collect();
    fill(steps, &pairs);
    let n_steps = pairs.len().min(steps.len()) / 2;
    let mut words = vec![
        outcome.elapsed.as_nanos() as u64,
        outcome.lost,
        total.wrong,
        outcome.kicks,
        outcome.kicks_suppressed,
        outcome.interrupts,
        n_steps as u64,
    ];
    let each = outcome.ops.iter().chain([&total]);
    each.for_each(|op| words.extend(numbers(op)));
    words
}

fn numbers(op: &OpOutcome) -> [u64; VR_FRONTEND_LOAD_RESULT] {
    let l = &op.latency;
    let percentiles = [500_000, 900_000, 990_000, 999_000].map(|p| l.percentile(p));
    let [p50, p90, p99, p999] = percentiles;
    [
        l.count(),
        op.errors,
        op.first_errno as u64,
        op.wrong,
        op.bytes,
        l.mean(),
        p50,
        p90,
        p99,
        p999,
        l.max(),
    ]
}

/// Makes running loads stop submitting; they end when what is in flight is answered.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_load_stop(h: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { kit(h) }?.stop.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    })
}

/// Reads `n` files (nodeid, handle, size each) whole, with `depth` reads of `read_size` in flight. For each file
/// `digests` gets its SHA-256 and `statuses` 0, an errno, or -1 when a read had the wrong length.
///
/// # Safety
/// `h` is a live handle; `files` has `3 * n` readable, `digests` `32 * n` and `statuses` `n` writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_digest(
    h: *mut c_void,
    index: u32,
    files: *const u64,
    n: usize,
    read_size: u32,
    depth: u32,
    layout_word: u64,
    stall_ms: i64,
    digests: *mut u8,
    statuses: *mut i32,
) -> i64 {
    guard(|| {
        let words = n.checked_mul(32).ok_or_else(|| invalid("too many files"))?;
        // SAFETY: the caller's promises.
        let (queue, files) = unsafe { (queue(h, index)?, input(files, n * 3)) };
        // SAFETY: the caller's promises.
        let (digests, statuses) = unsafe { (output(digests, words), output(statuses, n)) };
        let files: Vec<File> = files
            .chunks_exact(3)
            .map(|f| File {
                nodeid: f[0],
                fh: f[1],
                size: f[2],
            })
            .collect();
        let options = digest::Options {
            read_size,
            depth: depth as usize,
            layout: layout(layout_word)?,
            stall: time(stall_ms),
        };
        let results = digest::digest_files(&queue, &files, &options)?;
        for ((result, digest), status) in results
            .iter()
            .zip(digests.chunks_exact_mut(32))
            .zip(statuses)
        {
            *status = match result {
                Status::Digest(d) => {
                    fill(digest, d);
                    0
                }
                Status::Errno(e) => *e,
                Status::BadLength => -1,
            };
        }
        Ok(0)
    })
}
