//! C ABI of walks: a whole tree listed as a guest lists it.

use std::ffi::c_void;

use frontend::port::Wait;
use frontend::walk::{Options, run};

use super::load::tell;
use super::{fill, input, invalid, kit, layout, output, queue, time};
use crate::guard;

/// Numbers of 64 bits that [`vr_frontend_walk`] takes, and those that stand before a load's result.
pub const VR_FRONTEND_WALK_PARAMS: usize = 8;
pub const VR_FRONTEND_WALK_HEAD: usize = 3;

/// Lists the tree again and again on one queue and stores what came of it.
///
/// `params`: root node, requests in flight, bytes of a READDIRPLUS, duration in ms, walks at most (0 = no limit), 1 to
/// spin, layout word, stall time in ms. `out`: walks, names, directories, then as `vr_frontend_load` stores it, with the
/// requests as its only operation; `steps` as there.
///
/// # Safety
/// `h` is a live handle; `params` has VR_FRONTEND_WALK_PARAMS readable, `out` and `steps` have `n_out` and `n_steps`
/// writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_walk(
    h: *mut c_void,
    index: u32,
    params: *const u64,
    out: *mut u64,
    n_out: usize,
    steps: *mut u64,
    n_steps: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, params) = unsafe { (queue(h, index)?, input(params, VR_FRONTEND_WALK_PARAMS)) };
        // SAFETY: the caller's promises.
        let (kit, out, steps) = unsafe { (kit(h)?, output(out, n_out), output(steps, n_steps)) };
        let &[root, depth, size, duration, count, spin, word, stall] = params else {
            return Err(invalid("a walk has 8 parameters"));
        };
        let options = Options {
            root,
            depth: depth as usize,
            size: u32::try_from(size).map_err(|_| invalid("a READDIRPLUS beyond 4 GiB"))?,
            duration: time(duration as i64),
            count,
            wait: if spin != 0 { Wait::Spin } else { Wait::Sleep },
            layout: layout(word)?,
            stall: time(stall as i64),
        };
        let walked = run(&queue, &options, &kit.stop)?;
        let mut words = vec![walked.walks, walked.entries, walked.directories];
        words.extend(tell(&walked.outcome, steps));
        fill(out, &words);
        Ok(words.len() as i64)
    })
}
