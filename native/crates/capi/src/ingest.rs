//! C ABI of the threads that decode and verify for a store: `vr_ingest_*`.
//!
//! A job is handed over with a ticket. Its buffers stay the caller's, who keeps them until the ticket has been taken or
//! the handle has been freed. A handle's functions may be called from any thread, except [`vr_ingest_free`], which
//! needs that no other call runs.

use std::ffi::c_void;
use std::os::fd::AsRawFd;

use chunk_store::Pool;

use crate::pointers::{free, hand_out};
use crate::store::{self, Handle};
use crate::{Failure, VR_E_INVALID, caught, guard, told};

type Done = Result<i64, Failure>;

struct Ingest {
    pool: Pool<Done>,
    store: *const Handle,
}

/// Pointers of a job on their way to another thread.
struct Lent<T>(T);

// SAFETY: the caller of vr_ingest_* promises that what the pointers mean stays, and that nobody else writes there.
unsafe impl<T> Send for Lent<T> {}

impl<T> Lent<T> {
    /// All of it: a closure that named its parts would catch bare pointers.
    fn into_inner(self) -> T {
        self.0
    }
}

/// # Safety
/// `handle` must come from [`vr_ingest_new`] and not have been freed.
unsafe fn ingest<'a>(handle: *const c_void) -> Result<&'a Ingest, Failure> {
    // SAFETY: the caller vouches for the pointer; null is caught.
    unsafe { handle.cast::<Ingest>().as_ref() }
        .ok_or_else(|| Failure::new(VR_E_INVALID, "no ingest threads"))
}

/// Makes at most `threads` threads, started when needed, for the store `store`; writes the handle to `out`. Returns an
/// eventfd that is readable while there are results to take; it stays the handle's.
///
/// # Safety
/// `store` must be a store that is freed after this handle, `out` valid for one write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_ingest_new(
    store: *const c_void,
    threads: u32,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let store: *const Handle = unsafe { store::shared(store)? };
        let pool = Pool::new(threads as usize)?;
        let fd = pool.event().as_raw_fd();
        // SAFETY: promised by the caller.
        unsafe { hand_out(Ingest { pool, store }, out) };
        Ok(i64::from(fd))
    })
}

/// Hands over the job `ticket`: what `vr_store_ingest` does, whose result comes back.
///
/// # Safety
/// `handle` as for all functions here; the buffers must be valid as for `vr_store_ingest` until the ticket is taken, and
/// nobody else may write to them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_ingest_submit(
    handle: *const c_void,
    ticket: u64,
    index: u32,
    base: u64,
    bytes: *const u8,
    len: usize,
    chunks: *const u32,
    chunk_count: usize,
    outcomes: *mut u8,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let ingest = unsafe { ingest(handle)? };
        let lent = Lent((ingest.store, bytes, chunks, outcomes));
        ingest.pool.submit(ticket, move || {
            let (store, bytes, chunks, outcomes) = lent.into_inner();
            // SAFETY: the caller keeps all of it until the ticket is taken.
            caught(|| unsafe {
                store::ingest(
                    store.cast(),
                    index,
                    base,
                    (bytes, len),
                    (chunks, chunk_count),
                    outcomes,
                )
            })
        })?;
        Ok(0)
    })
}

/// Hands over the job `ticket`: what `vr_store_verify` does, whose result comes back.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_ingest_submit_verify(
    handle: *const c_void,
    ticket: u64,
    index: u32,
    chunk: u32,
    force: u32,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let ingest = unsafe { ingest(handle)? };
        let lent = Lent(ingest.store);
        ingest.pool.submit(ticket, move || {
            let store = lent.into_inner();
            // SAFETY: the store is freed after the handle, which waits for this thread.
            caught(|| unsafe { store::verify(store.cast(), index, chunk, force) })
        })?;
        Ok(0)
    })
}

/// Takes the next job that is done: 1 with its `ticket` and `result`, 0 when there is none. The text of a negative
/// result is read with `vr_last_error`.
///
/// # Safety
/// `handle` as for all functions here; `ticket` and `result` must be valid for one write each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_ingest_take(
    handle: *const c_void,
    ticket: *mut u64,
    result: *mut i64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let Some((number, done)) = unsafe { ingest(handle)? }.pool.take() else {
            return Ok(0);
        };
        let value = done.unwrap_or_else(told);
        // SAFETY: promised by the caller.
        unsafe {
            ticket.write(number);
            result.write(value);
        }
        Ok(1)
    })
}

/// Ends the threads: waits for jobs that run, forgets the others. Null is allowed.
///
/// # Safety
/// `handle` as for all functions here, and no other call on it may run or follow.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_ingest_free(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        unsafe { free::<Ingest>(handle) };
        Ok(0)
    })
}
