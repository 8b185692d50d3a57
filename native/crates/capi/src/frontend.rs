//! C ABI of the frontend domain: the test front-end (crate `frontend`) for Python.
//!
//! A handle may be used from several threads; freeing it must be the last use. Buffers are lent for the call.
//! Times are in milliseconds, -1 meaning for ever. Python's facade is `virtiofsd_rafs/native/frontend.py`.

pub mod load;
pub mod memory;
pub mod queues;
pub mod walk;

use std::ffi::c_void;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use frontend::error::Error;
use frontend::exchange::{Framing, Layout};
use frontend::fault::KINDS;
use frontend::{Connection, Kit, Queue};

use crate::pointers::{input, output};
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
    let one = |&fd: &i32| unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fds.iter().map(one).collect())
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
