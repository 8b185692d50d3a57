//! C ABI of the front-end's queues and requests.

use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use frontend::QueueOptions;
use frontend::ring::{Desc, RingOptions};

use super::{fill, input, invalid, kit, layout, output, queue, time};
use crate::guard;

/// Queue flags.
pub const VR_FRONTEND_EVENT_IDX: u64 = 1;
pub const VR_FRONTEND_REUSE_NEWEST: u64 = 2;

/// What [`vr_frontend_queue_control`] does.
pub const VR_FRONTEND_PAUSE: u32 = 0;
pub const VR_FRONTEND_FREEZE: u32 = 1;
pub const VR_FRONTEND_THAW: u32 = 2;
pub const VR_FRONTEND_RESUME: u32 = 3;
pub const VR_FRONTEND_CHECK: u32 = 4;
pub const VR_FRONTEND_KICK: u32 = 5;
pub const VR_FRONTEND_RESET: u32 = 6;

/// Makes queue `index` (in place of an earlier one) with all indices at `base`. `flags`: VR_FRONTEND_EVENT_IDX,
/// VR_FRONTEND_REUSE_NEWEST; `layout_word`: how requests are cut into descriptors. `out` gets the guest-physical,
/// then the user addresses of descriptor table, available and used ring, and the kick and call descriptors.
///
/// # Safety
/// `h` is a live handle; `out` has 8 writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_queue_new(
    h: *mut c_void,
    index: u32,
    size: u32,
    flags: u64,
    layout_word: u64,
    base: u32,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, out) = unsafe { (kit(h)?, output(out, 8)) };
        let ring = RingOptions {
            size: u16::try_from(size).map_err(|_| invalid("queue size"))?,
            event_idx: flags & VR_FRONTEND_EVENT_IDX != 0,
            reuse_newest: flags & VR_FRONTEND_REUSE_NEWEST != 0,
        };
        let options = QueueOptions {
            ring,
            layout: layout(layout_word)?,
        };
        let index = u16::try_from(index).map_err(|_| invalid("queue index"))?;
        let queue = kit.add_queue(index, options, base as u16)?;
        let (gpas, users) = queue.addresses();
        fill(out, &gpas);
        fill(out.get_mut(3..).unwrap_or_default(), &users);
        let fds = [
            queue.kick_fd().as_raw_fd() as u64,
            queue.call_fd().as_raw_fd() as u64,
        ];
        fill(out.get_mut(6..).unwrap_or_default(), &fds);
        Ok(0)
    })
}

/// Makes a new call eventfd for the queue and returns it; it stays the front-end's.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_queue_swap_call(h: *mut c_void, index: u32) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        Ok(unsafe { queue(h, index) }?.swap_call()?.as_raw_fd().into())
    })
}

/// Facts about a queue: the 6 addresses, available index, used index, requests in flight; then since it was made:
/// kicks, kicks suppressed, interrupts, completions.
///
/// # Safety
/// `h` is a live handle; `out` has 13 writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_queue_info(h: *mut c_void, index: u32, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, out) = unsafe { (queue(h, index)?, output(out, 13)) };
        let (gpas, users) = queue.addresses();
        let (avail, used, in_flight) = queue.indices();
        fill(out, &gpas);
        fill(out.get_mut(3..).unwrap_or_default(), &users);
        fill(
            out.get_mut(6..).unwrap_or_default(),
            &[avail.into(), used.into(), in_flight as u64],
        );
        let s = &queue.stats;
        let stats = [&s.kicks, &s.kicks_suppressed, &s.interrupts, &s.completions];
        fill(
            out.get_mut(9..).unwrap_or_default(),
            &stats.map(|s| s.load(Ordering::Relaxed)),
        );
        Ok(0)
    })
}

/// Does `what` (VR_FRONTEND_PAUSE …) with a queue; `value` is the new base of a reset.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_queue_control(
    h: *mut c_void,
    index: u32,
    what: u32,
    value: u32,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { queue(h, index) }?;
        match what {
            VR_FRONTEND_PAUSE => queue.pause(),
            VR_FRONTEND_FREEZE => queue.freeze(),
            VR_FRONTEND_THAW => queue.thaw(),
            VR_FRONTEND_RESUME => queue.resume(),
            VR_FRONTEND_CHECK => queue.check(),
            VR_FRONTEND_KICK => queue.kick()?,
            VR_FRONTEND_RESET => queue.reset(value as u16)?,
            _ => return Err(invalid("unknown control")),
        }
        Ok(0)
    })
}

/// Submits a request of `len` readable bytes, beginning with a FUSE in header, and `reply_len` writable bytes;
/// returns its token. `region` ≥ 0: buffers from the region that begins there. Waits for free descriptors.
///
/// # Safety
/// `h` is a live handle; `request` has `len` readable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_submit(
    h: *mut c_void,
    index: u32,
    request: *const u8,
    len: usize,
    reply_len: usize,
    layout_word: u64,
    region: i64,
    timeout_ms: i64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, request) = unsafe { (queue(h, index)?, input(request, len)) };
        let layout = layout(layout_word)?;
        let region = u64::try_from(region).ok();
        Ok(queue.submit(
            request.to_vec(),
            reply_len,
            layout,
            region,
            time(timeout_ms),
        )? as i64)
    })
}

/// Submits a chain of `n` descriptors (address, length, 1 if writable plus 2 if it is an indirect table); returns its
/// token.
///
/// # Safety
/// `h` is a live handle; `descs` has `3 * n` readable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_submit_raw(
    h: *mut c_void,
    index: u32,
    descs: *const u64,
    n: usize,
    indirect: u32,
) -> i64 {
    guard(|| {
        let words = n
            .checked_mul(3)
            .ok_or_else(|| invalid("too many descriptors"))?;
        // SAFETY: the caller's promises.
        let (queue, words) = unsafe { (queue(h, index)?, input(descs, words)) };
        let descs: Vec<Desc> = words
            .chunks_exact(3)
            .map(|d| Desc {
                gpa: d[0],
                len: d[1] as u32,
                writable: d[2] & 1 != 0,
                indirect: d[2] & 2 != 0,
            })
            .collect();
        Ok(queue.submit_raw(&descs, indirect != 0)? as i64)
    })
}

/// Waits for a request. `out` gets the used length, 1 if the reply has an out header, its error, its unique, its
/// length, and the latency in nanoseconds.
///
/// # Safety
/// `h` is a live handle; `out` has 6 writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_wait(
    h: *mut c_void,
    index: u32,
    token: u64,
    timeout_ms: i64,
    out: *mut i64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, out) = unsafe { (queue(h, index)?, output(out, 6)) };
        let (used, header, latency) = queue.wait(token, time(timeout_ms))?;
        let (has, error, unique, len) = header.map_or((0, 0, 0, 0), |h| {
            (1, h.error.into(), h.unique as i64, h.len.into())
        });
        fill(
            out,
            &[
                used.into(),
                has,
                error,
                unique,
                len,
                latency.as_nanos() as i64,
            ],
        );
        Ok(0)
    })
}

/// Stores up to `max` tokens of completed requests, waiting for the first; returns their number.
///
/// # Safety
/// `h` is a live handle; `tokens` has `max` writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_completed(
    h: *mut c_void,
    index: u32,
    timeout_ms: i64,
    tokens: *mut u64,
    max: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, tokens) = unsafe { (queue(h, index)?, output(tokens, max)) };
        let found = queue.completed(time(timeout_ms))?;
        fill(tokens, &found);
        Ok(found.len().min(max) as i64)
    })
}

/// Copies up to `cap` bytes of a completed request's reply behind the out header, and forgets the request.
///
/// # Safety
/// `h` is a live handle; `data` has `cap` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_take(
    h: *mut c_void,
    index: u32,
    token: u64,
    data: *mut u8,
    cap: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (queue, data) = unsafe { (queue(h, index)?, output(data, cap)) };
        queue.take(token, data)?;
        Ok(0)
    })
}
