//! C ABI of the cache directory: `vr_cache_*`. Handles are those of `vr_store_new`; every function may be called from any
//! thread.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsFd;

use chunk_store::{Goal, kernel_boot_id, reclaim};

use crate::store::{shared, slice, slice_mut};
use crate::{Failure, VR_E_INVALID, guard};

/// Numbers that [`vr_cache_sweep`] writes.
pub const VR_CACHE_SWEEP_LEN: usize = 6;

/// Protects chunks of blob `index` from eviction for `seconds`, or until a read was answered from them.
///
/// # Safety
/// `handle` must be a store, `chunks` valid for `count` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_hold(
    handle: *const c_void,
    index: u32,
    chunks: *const u32,
    count: usize,
    seconds: u32,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, chunks) = unsafe { (shared(handle)?, slice(chunks, count)?) };
        handle.store.hold(index as usize, chunks, seconds)?;
        Ok(0)
    })
}

/// Notes which chunks reads were answered from since the last call; returns their number.
///
/// # Safety
/// `handle` must be a store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_harvest(handle: *const c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        Ok(handle.store.harvest() as i64)
    })
}

/// Writes the bytes that were stored in the directory since the start, and whether a chunk could not be because it was
/// being evicted (1), to `out`.
///
/// # Safety
/// `handle` must be a store, `out` valid for two numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_growth(handle: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, 2)?) };
        let (bytes, met) = handle.store.growth();
        out.copy_from_slice(&[bytes, u64::from(met)]);
        Ok(0)
    })
}

/// Brings the store's directory below `limit` bytes (0: no limit), with `recover` 1 also gives back what an interrupted
/// eviction left. Writes bytes before, bytes after, evicted chunks, held bytes, errno of a file system that gives nothing
/// back, and whether another process was at it. Returns 1, or 0 without a directory. Blocking: disk.
///
/// # Safety
/// `handle` must be a store, `out` valid for [`VR_CACHE_SWEEP_LEN`] numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_sweep(
    handle: *const c_void,
    limit: u64,
    recover: u32,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, VR_CACHE_SWEEP_LEN)?) };
        let goal = Goal {
            limit,
            recover: recover != 0,
        };
        let Some(sweep) = handle.store.sweep(&goal)? else {
            return Ok(0);
        };
        out.copy_from_slice(&[
            sweep.before,
            sweep.after,
            sweep.chunks,
            sweep.held,
            u64::from(sweep.errno.unsigned_abs()),
            u64::from(sweep.busy),
        ]);
        Ok(1)
    })
}

/// Ends a sweep that runs in another thread, and those to come.
///
/// # Safety
/// `handle` must be a store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_stop_sweep(handle: *const c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        handle.store.stop_sweep();
        Ok(0)
    })
}

/// Gives back what absent chunks of the blob with the file names `stem` still use in the directory `dir`; their number
/// and one more, or 0 when another process sweeps or the files are not to be changed. Blocking: disk.
///
/// # Safety
/// The buffers must be valid for their lengths.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_cache_reclaim(
    dir: *const u8,
    dir_len: usize,
    stem: *const u8,
    stem_len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller, for both buffers.
        let (dir, stem) = unsafe { (slice(dir, dir_len)?, slice(stem, stem_len)?) };
        let text = |bytes| {
            std::str::from_utf8(bytes).map_err(|_| Failure::new(VR_E_INVALID, "name is no UTF-8"))
        };
        let dir = File::open(text(dir)?)?;
        let done = reclaim(dir.as_fd(), text(stem)?, &kernel_boot_id()?)?;
        Ok(done.map_or(0, |n| n as i64 + 1))
    })
}
