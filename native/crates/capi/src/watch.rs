//! C ABI of the thread that looks whether other daemons have fetched something: `vr_watch_*`.
//!
//! A handle's functions may be called from any thread, except [`vr_watch_free`], which needs that no other call runs.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

use chunk_store::{Seen, Watch};

use crate::pointers::{free, hand_out};
use crate::store::{self, Handle, slice};
use crate::{Failure, VR_E_INVALID, guard};

/// A chunk by blob and number.
type Chunk = (u32, u32);

/// The store on its way to the thread.
struct Watched(*const Handle);

// SAFETY: a store may be used by any thread, and is freed after the handle, which waits for its thread.
unsafe impl Send for Watched {}

impl Watched {
    fn seen(&self, (blob, chunk): Chunk) -> Seen {
        // SAFETY: the store is freed after the handle.
        unsafe { &*self.0 }.store.seen(blob as usize, chunk)
    }
}

/// # Safety
/// `handle` must come from [`vr_watch_new`] and not have been freed.
unsafe fn watch<'a>(handle: *const c_void) -> Result<&'a Watch<Chunk>, Failure> {
    // SAFETY: the caller vouches for the pointer; null is caught.
    unsafe { handle.cast::<Watch<Chunk>>().as_ref() }
        .ok_or_else(|| Failure::new(VR_E_INVALID, "no watch"))
}

/// Makes a thread that watches chunks of the store `store`, none yet; writes the handle to `out`. When one has come, 1 is
/// added to each of the `n_wakes` eventfds `wakes`. Returns an eventfd that becomes readable when one will not come; it stays
/// the handle's.
///
/// # Safety
/// `store` must be a store that is freed after this handle, `wakes` valid for reads of `n_wakes` numbers, `out` for one
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_watch_new(
    store: *const c_void,
    wakes: *const i32,
    n_wakes: usize,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (store, wakes) = unsafe { (Watched(store::shared(store)?), slice(wakes, n_wakes)?) };
        let wakes = wakes.iter().map(|&fd| {
            if fd < 0 {
                return Err(io::Error::from_raw_os_error(libc::EBADF));
            }
            // SAFETY: a descriptor that the caller has open, or an error.
            unsafe { BorrowedFd::borrow_raw(fd) }
                .try_clone_to_owned()
                .map(File::from)
        });
        let wakes = wakes.collect::<io::Result<Vec<File>>>()?;
        let watch = Watch::new(
            move |chunk: &Chunk| store.seen(*chunk),
            move || {
                for mut wake in &wakes {
                    // A full counter is a wake-up that is still pending.
                    let _ = wake.write(&1u64.to_ne_bytes());
                }
            },
        )?;
        let fd = watch.event().as_raw_fd();
        // SAFETY: promised by the caller.
        unsafe { hand_out(watch, out) };
        Ok(i64::from(fd))
    })
}

/// Watches `count` chunks, of blobs `blobs` with numbers `chunks`, and nothing else: each of them until it has come, or is
/// not being fetched any more.
///
/// # Safety
/// `handle` as for all functions here; `blobs` and `chunks` must be valid for reads of `count` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_watch_set(
    handle: *const c_void,
    blobs: *const u32,
    chunks: *const u32,
    count: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (watch, blobs, chunks) =
            unsafe { (watch(handle)?, slice(blobs, count)?, slice(chunks, count)?) };
        let watched = blobs.iter().copied().zip(chunks.iter().copied());
        watch.set(watched.collect());
        Ok(0)
    })
}

/// Makes the eventfd unreadable.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_watch_seen(handle: *const c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        unsafe { watch(handle)? }.seen();
        Ok(0)
    })
}

/// Ends the thread. Null is allowed.
///
/// # Safety
/// `handle` as for all functions here, and no other call on it may run or follow.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_watch_free(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        unsafe { free::<Watch<Chunk>>(handle) };
        Ok(0)
    })
}
