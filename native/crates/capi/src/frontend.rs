//! C ABI of the frontend domain: the test front-end (crate `frontend`) for Python.
//!
//! A handle may be used from several threads; freeing it must be the last use. Buffers are lent for the call.
//! Times are in milliseconds, -1 meaning for ever. Python's facade is `virtiofsd_rafs/native/frontend.py`.

pub mod load;

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use frontend::error::Error;
use frontend::exchange::{Framing, Layout};
use frontend::fault::KINDS;
use frontend::memory::new_file;
use frontend::ring::{Desc, RingOptions};
use frontend::{Connection, Kit, Queue, QueueOptions, Region};

use crate::{Failure, VR_E_INVALID, VR_E_OS, VR_E_PEER, guard};

/// Nothing arrived in time.
pub const VR_FRONTEND_E_TIMEOUT: i64 = -100;
/// The request was in flight when its queue was reset.
pub const VR_FRONTEND_E_RESET: i64 = -101;
/// The ring or the guest's memory is full.
pub const VR_FRONTEND_E_FULL: i64 = -102;

/// Layout word: framing in the two lowest bits.
pub const VR_FRONTEND_FRAMING_LINUX: u64 = 0;
pub const VR_FRONTEND_FRAMING_COMPACT: u64 = 1;
/// Pieces of as many bytes as the upper 32 bits of the word say.
pub const VR_FRONTEND_FRAMING_PIECES: u64 = 2;
/// Layout word: through an indirect table.
pub const VR_FRONTEND_INDIRECT: u64 = 4;
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

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let code = match &e {
            Error::Os(..) => VR_E_OS,
            Error::Invalid(_) => VR_E_INVALID,
            Error::Closed | Error::Broken(_) => VR_E_PEER,
            Error::Timeout => VR_FRONTEND_E_TIMEOUT,
            Error::Reset => VR_FRONTEND_E_RESET,
            Error::RingFull | Error::OutOfMemory(_) => VR_FRONTEND_E_FULL,
        };
        Failure::new(code, e.to_string())
    }
}

fn invalid(text: &str) -> Failure {
    Failure::new(VR_E_INVALID, text)
}

/// # Safety
/// `h` is null or came from [`vr_frontend_new`] and is not freed.
unsafe fn kit<'a>(h: *mut c_void) -> Result<&'a Kit, Failure> {
    // SAFETY: the caller's promise.
    unsafe { h.cast::<Kit>().as_ref() }.ok_or_else(|| invalid("null front-end"))
}

/// # Safety
/// As for [`kit`].
unsafe fn queue(h: *mut c_void, index: u32) -> Result<Arc<Queue>, Failure> {
    let index = u16::try_from(index).map_err(|_| invalid("queue index"))?;
    // SAFETY: the caller's promise.
    Ok(unsafe { kit(h) }?.queue(index)?)
}

/// # Safety
/// `p` is valid for reads of `len` elements, or `len` is 0.
unsafe fn input<'a, T>(p: *const T, len: usize) -> &'a [T] {
    if len == 0 || p.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(p, len) }
}

/// # Safety
/// `p` is valid for writes of `len` elements and nobody else uses them during the call, or `len` is 0.
unsafe fn output<'a, T>(p: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 || p.is_null() {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(p, len) }
}

/// Copies as much of `from` as fits.
fn fill<T: Copy>(to: &mut [T], from: &[T]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

fn time(ms: i64) -> Duration {
    u64::try_from(ms).map_or(Duration::from_secs(365 * 86_400), Duration::from_millis)
}

fn layout(word: u64) -> Result<Layout, Failure> {
    let framing = match word & 3 {
        VR_FRONTEND_FRAMING_LINUX => Framing::Linux,
        VR_FRONTEND_FRAMING_COMPACT => Framing::Compact,
        VR_FRONTEND_FRAMING_PIECES => Framing::Pieces((word >> 32) as u32),
        _ => return Err(invalid("unknown framing")),
    };
    Ok(Layout {
        framing,
        indirect: word & VR_FRONTEND_INDIRECT != 0,
    })
}

fn borrow(fds: &[i32]) -> Result<Vec<BorrowedFd<'_>>, Failure> {
    if fds.iter().any(|&fd| fd < 0) {
        return Err(invalid("a negative file descriptor"));
    }
    // SAFETY: not negative; open during the call by the contract of the functions that take descriptors.
    Ok(fds
        .iter()
        .map(|&fd| unsafe { BorrowedFd::borrow_raw(fd) })
        .collect())
}

/// A new front-end without connection, memory or queues.
#[unsafe(no_mangle)]
pub extern "C" fn vr_frontend_new() -> *mut c_void {
    Box::into_raw(Box::<Kit>::default()).cast()
}

/// Frees a front-end and all that it owns; null is fine.
///
/// # Safety
/// `h` came from [`vr_frontend_new`]; no other call on it runs or follows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_free(h: *mut c_void) {
    if !h.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(h.cast::<Kit>()) });
    }
}

/// Connects to the Unix socket at `path`.
///
/// # Safety
/// `h` is a live handle; `path` has `len` readable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_connect(h: *mut c_void, path: *const u8, len: usize) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, path) = unsafe { (kit(h)?, input(path, len)) };
        let path = std::str::from_utf8(path).map_err(|_| invalid("the path is not UTF-8"))?;
        kit.set_connection(Some(Connection::connect(Path::new(path))?));
        Ok(0)
    })
}

/// Takes over a connected socket, which the front-end then owns; -1 gives up the connection.
///
/// # Safety
/// `h` is a live handle; nobody else uses or closes `fd`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_adopt(h: *mut c_void, fd: i32) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        let kit = unsafe { kit(h) }?;
        // SAFETY: not negative, and the caller hands over its ownership.
        let connection = (fd >= 0).then(|| Connection::adopt(unsafe { OwnedFd::from_raw_fd(fd) }));
        kit.set_connection(connection);
        Ok(0)
    })
}

/// Sends a vhost-user message; `size` ≥ 0 overrides the header's size field.
///
/// # Safety
/// `h` is a live handle; `payload` and `fds` have as many readable elements as told, the descriptors are open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_send(
    h: *mut c_void,
    request: u32,
    flags: u32,
    payload: *const u8,
    len: usize,
    fds: *const i32,
    n_fds: usize,
    size: i64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, payload, fds) = unsafe { (kit(h)?, input(payload, len), input(fds, n_fds)) };
        let size = u32::try_from(size).ok();
        kit.connection()?
            .send(request, flags, payload, &borrow(fds)?, size)?;
        Ok(0)
    })
}

/// Sends bytes over the vhost-user socket as they are.
///
/// # Safety
/// As for [`vr_frontend_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_send_bytes(
    h: *mut c_void,
    bytes: *const u8,
    len: usize,
    fds: *const i32,
    n_fds: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, bytes, fds) = unsafe { (kit(h)?, input(bytes, len), input(fds, n_fds)) };
        kit.connection()?.send_bytes(bytes, &borrow(fds)?)?;
        Ok(0)
    })
}

/// Receives a message: `header` gets request, flags and the number of descriptors, of which at most `max_fds` are
/// stored, owned by the caller. Returns the payload's length; a payload beyond `cap` bytes is cut.
///
/// # Safety
/// `h` is a live handle; `header` has 3, `buf` `cap` and `fds` `max_fds` writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_recv(
    h: *mut c_void,
    timeout_ms: i64,
    header: *mut u32,
    buf: *mut u8,
    cap: usize,
    fds: *mut i32,
    max_fds: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, header, buf, fds) = unsafe {
            (
                kit(h)?,
                output(header, 3),
                output(buf, cap),
                output(fds, max_fds),
            )
        };
        let message = kit.connection()?.recv(time(timeout_ms))?;
        fill(
            header,
            &[message.request, message.flags, message.fds.len() as u32],
        );
        fill(buf, &message.payload);
        fds.iter_mut()
            .zip(message.fds)
            .for_each(|(to, fd)| *to = fd.into_raw_fd());
        Ok(message.payload.len() as i64)
    })
}

/// Adds a region of guest memory at `gpa`, from `file_offset` of the file `fd` (duplicated), or of a new memfd
/// when `fd` is -1, then with huge pages if asked. `out` gets the region's user address and its descriptor, which
/// stays the front-end's.
///
/// # Safety
/// `h` is a live handle; `out` has 2 writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_region_add(
    h: *mut c_void,
    gpa: u64,
    size: u64,
    fd: i32,
    file_offset: u64,
    huge: u32,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, out) = unsafe { (kit(h)?, output(out, 2)) };
        let file = if fd < 0 {
            new_file(file_offset.saturating_add(size), huge != 0)?
        } else {
            borrow(&[fd])?
                .first()
                .ok_or_else(|| invalid("no descriptor"))?
                .try_clone_to_owned()?
        };
        let region = kit.memory.add(Region::new(gpa, size, file, file_offset)?)?;
        fill(
            out,
            &[region.user_address(), region.file().as_raw_fd() as u64],
        );
        Ok(0)
    })
}

/// Removes the region that begins at `gpa`; it stays mapped while buffers in it are in use.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_region_remove(h: *mut c_void, gpa: u64) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { kit(h) }?.memory.remove(gpa)?;
        Ok(0)
    })
}

/// Allocates `len` bytes of guest memory from the region that begins at `region`, or from any when negative;
/// returns the guest-physical address. With `exact` ≥ 0 exactly there.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_alloc(
    h: *mut c_void,
    len: u64,
    align: u64,
    region: i64,
    exact: i64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        let kit = unsafe { kit(h) }?;
        let span = match u64::try_from(exact) {
            Ok(gpa) => kit.memory.alloc_at(gpa, len)?,
            Err(_) => kit
                .memory
                .alloc(len as usize, align as usize, u64::try_from(region).ok())?,
        };
        Ok(kit.keep(span) as i64)
    })
}

/// Gives back what [`vr_frontend_alloc`] returned.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_dealloc(h: *mut c_void, gpa: u64) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { kit(h) }?.release(gpa)?;
        Ok(0)
    })
}

/// Copies `bytes` into guest memory.
///
/// # Safety
/// `h` is a live handle; `bytes` has `len` readable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_write(
    h: *mut c_void,
    gpa: u64,
    bytes: *const u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, bytes) = unsafe { (kit(h)?, input(bytes, len)) };
        kit.memory.write(gpa, bytes)?;
        Ok(0)
    })
}

/// Copies guest memory into `bytes`.
///
/// # Safety
/// `h` is a live handle; `bytes` has `len` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_read(
    h: *mut c_void,
    gpa: u64,
    bytes: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, bytes) = unsafe { (kit(h)?, output(bytes, len)) };
        kit.memory.read(gpa, bytes)?;
        Ok(0)
    })
}

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

/// Submits a chain of `n` descriptors (address, length, 1 if writable); returns its token.
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
                writable: d[2] != 0,
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

/// Stores the faults' counters in the order of their kinds and copies the texts of the first ones, one a line;
/// returns the texts' full length. `clear` forgets them.
///
/// # Safety
/// `h` is a live handle; `counts` has `n` and `text` `cap` writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_faults(
    h: *mut c_void,
    clear: u32,
    counts: *mut u64,
    n: usize,
    text: *mut u8,
    cap: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, counts, text) = unsafe { (kit(h)?, output(counts, n), output(text, cap)) };
        fill(counts, &KINDS.map(|(kind, _)| kit.faults.count(kind)));
        let lines = kit.faults.texts(clear != 0).join("\n");
        fill(text, lines.as_bytes());
        Ok(lines.len() as i64)
    })
}

/// Copies the names of the kinds of faults, one a line, in the order of their counters; returns the full length.
///
/// # Safety
/// `text` has `cap` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_fault_names(text: *mut u8, cap: usize) -> i64 {
    guard(|| {
        let names = KINDS.map(|(_, name)| name).join("\n");
        // SAFETY: the caller's promise.
        fill(unsafe { output(text, cap) }, names.as_bytes());
        Ok(names.len() as i64)
    })
}
