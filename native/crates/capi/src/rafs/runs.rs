//! Files as runs of chunks.

use std::ffi::c_void;

use super::{image, output};
use crate::guard;

/// Values of one run of [`vr_rafs_runs`].
pub const VR_RAFS_RUN_LEN: usize = 5;

/// Writes the chunks of the file `nid` that hold `len` bytes from `offset` on, or those of all files below the
/// directory `nid`, as runs: node id, where the first chunk starts in the file, blob, first chunk, number of chunks. At
/// most `max` runs; returns how many there are.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `max` times `VR_RAFS_RUN_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_runs(
    handle: *const c_void,
    nid: u64,
    offset: u64,
    len: u64,
    out: *mut u64,
    max: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out) = unsafe {
            (
                image(handle)?,
                output(out, max.saturating_mul(VR_RAFS_RUN_LEN)),
            )
        };
        let mut slots = out.chunks_exact_mut(VR_RAFS_RUN_LEN);
        let mut count = 0;
        image.tree().runs(nid, offset, len, |run| {
            count += 1;
            if let Some(slot) = slots.next() {
                slot.copy_from_slice(&[
                    run.nid,
                    run.offset,
                    run.blob_index.into(),
                    run.first.into(),
                    run.count.into(),
                ]);
            }
        })?;
        Ok(count)
    })
}
