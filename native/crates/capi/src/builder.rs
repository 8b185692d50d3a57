//! C ABI of the builder domain: from a source tree to blob and bootstrap, in the order `new`, `prefetch`, `run`, then
//! what is appended to the blob, `layout`, `write`. Calls on one handle wait for each other, except for
//! [`vr_builder_progress`] and [`vr_builder_cancel`], which any thread may call while [`vr_builder_run`] blocks.

use std::ffi::{OsStr, c_void};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use image_builder::{BuildError, Builder, Built, Limits, Options, Plan, Progress};
use rafs_format::{Compressor, Digester};

use crate::pointers::{free, hand_out, input, output};
use crate::{
    Failure, VR_E_CANCELLED, VR_E_INVALID, VR_E_LIMIT, VR_E_OS, VR_E_PANIC, VR_E_SOURCE, guard,
};

/// Values that [`vr_builder_new`] takes.
pub const VR_BUILDER_OPTIONS_LEN: usize = 7;
/// Values of [`vr_builder_totals`].
pub const VR_BUILDER_TOTALS_LEN: usize = 8;
/// Values of [`vr_builder_progress`].
pub const VR_BUILDER_PROGRESS_LEN: usize = 3;

enum Stage {
    Ready(Box<Builder>),
    Built(Box<Built>, Option<Plan>),
    Failed,
}

struct Handle {
    stage: Mutex<Stage>,
    progress: Progress,
    /// What the last `VR_E_SOURCE` is about.
    path: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn order() -> Failure {
    Failure::new(VR_E_INVALID, "calls on a builder out of order")
}

/// The text of an operating system's error, without its number.
fn os_failure(e: &std::io::Error) -> Failure {
    let text = e.to_string();
    let text = text
        .split_once(" (os error")
        .map_or(text.as_str(), |(text, _)| text);
    Failure::new(VR_E_OS, text)
}

impl Handle {
    fn failure(&self, e: BuildError) -> Failure {
        match e {
            BuildError::Source {
                path,
                reason,
                remedy,
            } => {
                *lock(&self.path) = path;
                Failure::new(VR_E_SOURCE, format!("{reason}\0{remedy}"))
            }
            BuildError::Output(e) => os_failure(&e),
            BuildError::TooLarge(text) => Failure::new(VR_E_LIMIT, text),
            BuildError::Cancelled => Failure::new(VR_E_CANCELLED, "cancelled"),
            BuildError::Panicked(text) => {
                Failure::new(VR_E_PANIC, format!("internal error: {text}"))
            }
        }
    }

    fn built<T>(
        &self,
        body: impl FnOnce(&mut Built, &mut Option<Plan>) -> Result<T, BuildError>,
    ) -> Result<T, Failure> {
        match &mut *lock(&self.stage) {
            Stage::Built(built, plan) => body(built, plan).map_err(|e| self.failure(e)),
            _ => Err(order()),
        }
    }
}

/// # Safety
/// `handle` must come from [`vr_builder_new`] and not have been freed.
unsafe fn opened<'a>(handle: *const c_void) -> Result<&'a Handle, Failure> {
    // SAFETY: the caller promises a live handle, which is shared and changes behind locks only.
    unsafe { handle.cast::<Handle>().as_ref() }.ok_or_else(order)
}

/// A file of ours for a descriptor that stays the caller's.
///
/// # Safety
/// `fd` must be open.
unsafe fn file(fd: i32) -> Result<File, Failure> {
    if fd < 0 {
        return Err(Failure::new(VR_E_INVALID, "negative file descriptor"));
    }
    // SAFETY: the caller promises an open descriptor.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(File::from(
        fd.try_clone_to_owned().map_err(|e| os_failure(&e))?,
    ))
}

/// Opens the directory `source` and writes a handle to `out`; temporary files go to `folder`. The options are chunk
/// size, compressor, digester, threads, and at most how many chunks plus one, uncompressed bytes and stored bytes a
/// blob may have.
///
/// # Safety
/// Buffers must be valid for their lengths, `options` for `VR_BUILDER_OPTIONS_LEN` values, `out` for one write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_new(
    source: *const u8,
    source_len: usize,
    folder: *const u8,
    folder_len: usize,
    options: *const u64,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller, for all three buffers.
        let (source, folder, options) = unsafe {
            (
                input(source, source_len),
                input(folder, folder_len),
                input(options, VR_BUILDER_OPTIONS_LEN),
            )
        };
        let invalid = || Failure::new(VR_E_INVALID, "an option is out of range");
        let small = |at: usize| u32::try_from(options[at]).map_err(|_| invalid());
        let chunk_size = small(0)?;
        if !chunk_size.is_power_of_two() || !(4096..=16 << 20).contains(&chunk_size) {
            return Err(invalid());
        }
        let options = Options {
            chunk_size,
            compressor: Compressor::from_u32(small(1)?).ok_or_else(invalid)?,
            digester: Digester::from_u32(small(2)?).ok_or_else(invalid)?,
            jobs: small(3)? as usize,
            limits: Limits {
                chunks: options[4],
                uncompressed: options[5],
                compressed: options[6],
            },
        };
        let stage = match Builder::new(source, OsStr::from_bytes(folder).into(), options) {
            Ok(builder) => Stage::Ready(Box::new(builder)),
            Err(BuildError::Source { reason, .. }) => {
                return Err(Failure::new(VR_E_SOURCE, reason));
            }
            Err(e) => return Err(Failure::new(VR_E_OS, format!("{e:?}"))),
        };
        let handle = Handle {
            stage: Mutex::new(stage),
            progress: Progress::default(),
            path: Mutex::default(),
        };
        // SAFETY: promised by the caller.
        unsafe { hand_out(handle, out) };
        Ok(0)
    })
}

/// Frees a builder and its temporary files; null is fine.
///
/// # Safety
/// `handle` must come from [`vr_builder_new`], and no other call on it may run or follow.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_free(handle: *mut c_void) {
    // SAFETY: promised by the caller.
    unsafe { free::<Handle>(handle) };
}

/// Copies the path that the last `VR_E_SOURCE` is about, relative to the source, to `buf`, as much as fits; returns its
/// whole length.
///
/// # Safety
/// `handle` must be live, `buf` valid for writes of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_error_path(
    handle: *const c_void,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, buf) = unsafe { (opened(handle)?, output(buf, len)) };
        let path = lock(&handle.path);
        let n = path.len().min(buf.len());
        buf[..n].copy_from_slice(&path[..n]);
        Ok(path.len() as i64)
    })
}

/// Lists bytes `[offset, offset + length)` of the file at `path`, or a directory with all files in it, for prefetching.
/// Returns 1, or 0 when the tree has no such file or directory.
///
/// # Safety
/// `handle` must be live, `path` valid for reads of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_prefetch(
    handle: *const c_void,
    path: *const u8,
    len: usize,
    offset: u64,
    length: u64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, path) = unsafe { (opened(handle)?, input(path, len)) };
        match &mut *lock(&handle.stage) {
            Stage::Ready(builder) => builder
                .prefetch(path, offset, length)
                .map(i64::from)
                .map_err(|e| handle.failure(e)),
            _ => Err(order()),
        }
    })
}

/// Reads the tree and writes its chunks to the empty file `blob`. Blocks for long.
///
/// # Safety
/// `handle` must be live, `blob` open for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_run(handle: *const c_void, blob: i32) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, blob) = unsafe { (opened(handle)?, file(blob)?) };
        let mut stage = lock(&handle.stage);
        let builder = match std::mem::replace(&mut *stage, Stage::Failed) {
            Stage::Ready(builder) => builder,
            other => {
                *stage = other;
                return Err(order());
            }
        };
        let built = builder
            .run(blob, &handle.progress)
            .map_err(|e| handle.failure(e))?;
        *stage = Stage::Built(Box::new(built), None);
        Ok(0)
    })
}

/// Writes how many inodes were found, how many bytes of content read, and how many stored. Never waits.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `VR_BUILDER_PROGRESS_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_progress(handle: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (opened(handle)?, output(out, VR_BUILDER_PROGRESS_LEN)) };
        let progress = &handle.progress;
        let counters = [&progress.inodes, &progress.bytes, &progress.stored];
        for (slot, counter) in out.iter_mut().zip(counters) {
            *slot = counter.load(Ordering::Relaxed);
        }
        Ok(0)
    })
}

/// Makes a running [`vr_builder_run`] return `VR_E_CANCELLED` soon. Never waits.
///
/// # Safety
/// `handle` must be live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_cancel(handle: *const c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { opened(handle)? };
        handle.progress.cancelled.store(true, Ordering::Relaxed);
        Ok(0)
    })
}

/// Writes bytes of the blob so far, end of its uncompressed address space, chunks, chunks found again, inodes, bytes of
/// content, whether there are extended attributes, and entries of the prefetch table.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `VR_BUILDER_TOTALS_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_totals(handle: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (opened(handle)?, output(out, VR_BUILDER_TOTALS_LEN)) };
        handle.built(|built, _| {
            out.copy_from_slice(&[
                built.tail.size,
                built.blob.uncompressed_size,
                built.blob.n_chunks.into(),
                built.blob.n_duplicates,
                built.tree.types.len() as u64,
                built.tree.content_size,
                built.tree.has_xattr.into(),
                built.tree.listed.iter().flatten().count() as u64,
            ]);
            Ok(0)
        })
    })
}

/// Appends `len` bytes to the blob.
///
/// # Safety
/// `handle` must be live, `data` valid for reads of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_append(
    handle: *const c_void,
    data: *const u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, data) = unsafe { (opened(handle)?, input(data, len)) };
        handle.built(|built, _| Ok(built.tail.append(data).map(|()| 0)?))
    })
}

/// Writes the SHA-256 of the blob so far.
///
/// # Safety
/// `handle` must be live, `digest` valid for writes of 32 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_sha256(handle: *const c_void, digest: *mut u8) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, digest) = unsafe { (opened(handle)?, output(digest, 32)) };
        handle.built(|built, _| {
            digest.copy_from_slice(&built.tail.sha256());
            Ok(0)
        })
    })
}

/// Appends the chunk information, compressed with `compressor` if that is shorter. Writes its size as stored, its size,
/// and whether it is compressed; its SHA-256 to `digest`.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of 3 values, `digest` of 32 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_append_chunk_info(
    handle: *const c_void,
    compressor: u32,
    out: *mut u64,
    digest: *mut u8,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out, digest) =
            unsafe { (opened(handle)?, output(out, 3), output(digest, 32)) };
        let compressor = Compressor::from_u32(compressor).ok_or_else(order)?;
        handle.built(|built, _| {
            let info = built.tail.append_chunk_info(&built.blob, compressor)?;
            out.copy_from_slice(&[info.stored, info.size, info.packed.into()]);
            digest.copy_from_slice(&info.sha256);
            Ok(0)
        })
    })
}

/// Appends the digests of all chunks; writes their SHA-256.
///
/// # Safety
/// `handle` must be live, `digest` valid for writes of 32 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_append_digests(handle: *const c_void, digest: *mut u8) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, digest) = unsafe { (opened(handle)?, output(digest, 32)) };
        handle.built(|built, _| {
            digest.copy_from_slice(&built.tail.append_digests(&built.blob)?);
            Ok(0)
        })
    })
}

/// Gives every inode its place behind `meta_offset`, a multiple of 4096. Writes the size of the bootstrap, the offset of
/// its chunk table and the nid of the root.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of 3 values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_layout(
    handle: *const c_void,
    meta_offset: u64,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (opened(handle)?, output(out, 3)) };
        if meta_offset % 4096 != 0 {
            return Err(order());
        }
        handle.built(|built, plan| {
            let plan = plan.insert(built.layout(meta_offset)?);
            let root = plan.nids.first().copied().unwrap_or_default();
            out.copy_from_slice(&[plan.size, plan.chunk_table_offset, root.into()]);
            Ok(0)
        })
    })
}

/// Writes the nids of the prefetch table, at most `max`; returns their number. After [`vr_builder_layout`].
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `max` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_prefetch_nids(
    handle: *const c_void,
    out: *mut u32,
    max: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (opened(handle)?, output(out, max)) };
        let nids = handle.built(|built, plan| {
            Ok(plan
                .as_ref()
                .map(|plan| built.prefetch_nids(plan))
                .unwrap_or_default())
        })?;
        for (slot, nid) in out.iter_mut().zip(&nids) {
            *slot = *nid;
        }
        Ok(nids.len() as i64)
    })
}

/// Writes the bootstrap, which begins with `head`, to the empty file `fd`. After [`vr_builder_layout`].
///
/// # Safety
/// `handle` must be live, `head` valid for reads of `len` bytes, `fd` open for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_builder_write(
    handle: *const c_void,
    head: *const u8,
    len: usize,
    fd: i32,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, head, out) = unsafe { (opened(handle)?, input(head, len), file(fd)?) };
        let written = handle.built(|built, plan| {
            let Some(plan) = plan.as_ref() else {
                return Ok(false);
            };
            built.write(plan, head, &out)?;
            Ok(true)
        })?;
        if written { Ok(0) } else { Err(order()) }
    })
}
