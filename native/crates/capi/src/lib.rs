//! The C ABI that Python sees through cffi. One file per domain; every signature uses primitive types and
//! opaque pointers only, so that cbindgen needs no other crate.
//!
//! Conventions: functions return 0 or a count on success and a negative `VR_E_*` code on failure; the text of
//! the last failure of the calling thread is read with [`vr_last_error`]. No panic crosses: see [`guard`].

pub mod builder;
pub mod cache;
pub mod frontend;
pub mod ingest;
mod pointers;
pub mod rafs;
pub mod sandbox;
pub mod session;
pub mod store;
pub mod watch;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Changes whenever a signature or a shared layout changes; checked when Python loads the library.
pub const VR_ABI_VERSION: u32 = 4;

/// A parameter is out of range or inconsistent.
pub const VR_E_INVALID: i64 = -1;
/// An operating system call failed; the text names it and its errno.
pub const VR_E_OS: i64 = -2;
/// An image or blob is malformed; the text says where.
pub const VR_E_BAD_IMAGE: i64 = -3;
/// Bytes do not have the digest that the image promises.
pub const VR_E_DIGEST: i64 = -4;
/// The image uses a feature that is not supported.
pub const VR_E_UNSUPPORTED: i64 = -5;
/// No space is left in the cache.
pub const VR_E_NOSPACE: i64 = -6;
/// The peer broke the protocol or went away.
pub const VR_E_PEER: i64 = -7;
/// A file of a source tree cannot be stored in an image; the text says why.
pub const VR_E_SOURCE: i64 = -8;
/// An image would break a limit of its format.
pub const VR_E_LIMIT: i64 = -9;
/// The caller ended it.
pub const VR_E_CANCELLED: i64 = -10;
/// A bug of ours: a panic was caught at the boundary.
pub const VR_E_PANIC: i64 = -70;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A failure on its way to Python: code and text.
#[derive(Debug)]
pub struct Failure {
    pub code: i64,
    pub text: String,
}

impl Failure {
    pub fn new(code: i64, text: impl Into<String>) -> Self {
        Failure {
            code,
            text: text.into(),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        let code = if e.raw_os_error() == Some(libc::ENOSPC) {
            VR_E_NOSPACE
        } else {
            VR_E_OS
        };
        Failure::new(code, e.to_string())
    }
}

/// Runs `body`, keeps the text of its failure for [`vr_last_error`], and turns a panic into `VR_E_PANIC`.
pub fn guard(body: impl FnOnce() -> Result<i64, Failure>) -> i64 {
    caught(body).unwrap_or_else(told)
}

/// Runs `body`; a panic is a failure.
fn caught(body: impl FnOnce() -> Result<i64, Failure>) -> Result<i64, Failure> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
            .unwrap_or_default();
        Err(Failure::new(VR_E_PANIC, format!("internal error: {text}")))
    })
}

/// The code of a failure, whose text is kept for [`vr_last_error`].
fn told(failure: Failure) -> i64 {
    note(failure.text);
    failure.code
}

/// Keeps `text` for [`vr_last_error`].
fn note(text: String) {
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
}

/// The ABI version of this library.
#[unsafe(no_mangle)]
pub extern "C" fn vr_abi_version() -> u32 {
    VR_ABI_VERSION
}

/// Copies the text of the calling thread's last failure into `buf` (at most `len` bytes, no NUL); returns its
/// full length.
///
/// # Safety
/// `buf` must be valid for writes of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_last_error(buf: *mut u8, len: usize) -> i64 {
    LAST_ERROR.with(|last| {
        let last = last.borrow();
        let n = last.len().min(len);
        if n > 0 {
            // SAFETY: the caller promises `len` writable bytes, and `n` is at most that.
            unsafe { std::ptr::copy_nonoverlapping(last.as_ptr(), buf, n) };
        }
        last.len() as i64
    })
}
