//! C ABI of the store domain: `vr_store_*`.
//!
//! A handle is made by [`vr_store_new`] from a bootstrap. Until every blob is open its calls belong to one thread;
//! afterwards every function may be called from any thread at once, except [`vr_store_free`], which needs that no
//! other call runs. Pointers from [`vr_store_array`] live as long as the handle.

use std::ffi::c_void;
use std::os::fd::{BorrowedFd, IntoRawFd};

use chunk_store::{Options, Promise, Store, TableFds, kernel_boot_id};

use crate::pointers::{free, hand_out};
use crate::{Failure, VR_E_BAD_IMAGE, VR_E_INVALID, VR_E_UNSUPPORTED, guard};

/// Numbers that [`vr_store_blob_info`] writes.
pub const VR_STORE_INFO_LEN: usize = 13;
/// Numbers that [`vr_store_states`] writes.
pub const VR_STORE_STATES_LEN: usize = 5;
/// Numbers that [`vr_store_stats`] writes.
pub const VR_STORE_STATS_LEN: usize = 6;

/// `which` of [`vr_store_array`]: u64 per chunk, byte offset in the blob.
pub const VR_STORE_COMPRESSED_OFFSET: u32 = 0;
/// `which` of [`vr_store_array`]: u32 per chunk, bytes in the blob.
pub const VR_STORE_COMPRESSED_SIZE: u32 = 1;
/// `which` of [`vr_store_array`]: u32 per chunk, uncompressed bytes.
pub const VR_STORE_SIZE: u32 = 2;
/// `which` of [`vr_store_array`]: u32 per chunk, the shared state word.
pub const VR_STORE_STATE_WORDS: u32 = 3;
/// `which` of [`vr_store_array`]: 32 bytes per chunk, the shared extents.
pub const VR_STORE_EXTENTS: u32 = 4;
/// `which` of [`vr_store_array`]: one byte per chunk, not 0 when a read was answered from it.
pub const VR_STORE_TOUCHED: u32 = 5;

pub(crate) struct Handle {
    pub(crate) promise: Promise,
    pub(crate) store: Store,
}

fn invalid(text: &str) -> Failure {
    Failure::new(VR_E_INVALID, text)
}

fn format_failure(e: &rafs_format::FormatError) -> Failure {
    let code = match e.kind {
        rafs_format::ErrorKind::Malformed => VR_E_BAD_IMAGE,
        rafs_format::ErrorKind::Unsupported => VR_E_UNSUPPORTED,
    };
    Failure::new(
        code,
        format!("{}: at byte {}: {}", e.what, e.offset, e.message),
    )
}

/// # Safety
/// `handle` must come from `vr_store_new` and not have been freed.
pub(crate) unsafe fn shared<'a>(handle: *const c_void) -> Result<&'a Handle, Failure> {
    // SAFETY: the caller vouches for the pointer; null is caught.
    unsafe { handle.cast::<Handle>().as_ref() }.ok_or_else(|| invalid("null store"))
}

/// # Safety
/// As `shared`, and no other call on the handle may run.
unsafe fn exclusive<'a>(handle: *mut c_void) -> Result<&'a mut Handle, Failure> {
    // SAFETY: the caller vouches for the pointer and for being alone; null is caught.
    unsafe { handle.cast::<Handle>().as_mut() }.ok_or_else(|| invalid("null store"))
}

/// # Safety
/// `ptr` must be valid for reads of `len` elements (or `len` be 0) for as long as the result is used.
pub(crate) unsafe fn slice<'a, T>(ptr: *const T, len: usize) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        return Err(invalid("null buffer"));
    }
    // SAFETY: the caller promises `len` readable elements.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
}

/// # Safety
/// `ptr` must be valid for reads and writes of `len` elements for as long as the result is used.
pub(crate) unsafe fn slice_mut<'a, T>(ptr: *mut T, len: usize) -> Result<&'a mut [T], Failure> {
    if len == 0 {
        return Ok(&mut []);
    }
    if ptr.is_null() {
        return Err(invalid("null buffer"));
    }
    // SAFETY: the caller promises `len` writable elements.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr, len) })
}

/// # Safety
/// A non-negative `fd` must be open for as long as the result is used.
unsafe fn borrow_fd<'a>(fd: i32) -> Result<BorrowedFd<'a>, Failure> {
    if fd < 0 {
        return Err(invalid("negative file descriptor"));
    }
    // SAFETY: the caller vouches for the descriptor.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Makes a store for the blobs of the bootstrap `image` and writes its handle to `out`. `cache` is the path of the
/// cache directory (UTF-8; length 0: memory only), `boot_id` 16 bytes or null for the running kernel's. With
/// `for_nydusd` 1, a record of what is stored is kept for nydusd.
/// Returns the number of blobs. Blocking: reads the chunk table.
///
/// # Safety
/// Buffers must be valid for their lengths, `out` for one write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_new(
    image: *const u8,
    image_len: usize,
    cache: *const u8,
    cache_len: usize,
    spill_size: u64,
    boot_id: *const u8,
    for_nydusd: u32,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller, for all three buffers.
        let (image, cache) = unsafe { (slice(image, image_len)?, slice(cache, cache_len)?) };
        let boot_id = if boot_id.is_null() {
            kernel_boot_id()?
        } else {
            // SAFETY: promised by the caller.
            unsafe { slice(boot_id, 16)? }
                .try_into()
                .map_err(|_| invalid("boot id"))?
        };
        let cache =
            std::str::from_utf8(cache).map_err(|_| invalid("the cache path is no UTF-8"))?;
        let promise = Promise::parse(image).map_err(|e| format_failure(&e))?;
        let blobs = promise.entries().len();
        let store = Store::new(
            (!cache.is_empty()).then_some(cache),
            blobs,
            spill_size,
            boot_id,
        )?
        .with_options(Options {
            for_nydusd: for_nydusd != 0,
        });
        if out.is_null() {
            return Err(invalid("null out"));
        }
        // SAFETY: promised by the caller.
        unsafe { hand_out(Handle { promise, store }, out) };
        Ok(blobs as i64)
    })
}

/// Frees a store; null is fine.
///
/// # Safety
/// `handle` must come from `vr_store_new`, no other call on it may run, and it must not be used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_free(handle: *mut c_void) {
    // SAFETY: promised by the caller.
    unsafe { free::<Handle>(handle) };
}

/// Writes what the image says about blob `index`: chunk numbers (known ones end there), uncompressed size, known
/// chunks, known chunks without digest, 1 when chunk information is missing, compressor, digester, chunk-info offset,
/// compressed and uncompressed size and compressor, ToC size (0: not authenticated), chunk count of the blob table.
/// Copies the ToC's sha256 to `toc_digest` (32 bytes) and the blob id to `id` (64 bytes). Returns the id's length.
///
/// # Safety
/// `handle` must be a store; the buffers must be valid for [`VR_STORE_INFO_LEN`] numbers, 32 and 64 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_blob_info(
    handle: *const c_void,
    index: u32,
    info: *mut u64,
    toc_digest: *mut u8,
    id: *mut u8,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        // SAFETY: promised by the caller, for all three buffers.
        let (info, toc_out, id_out) = unsafe {
            (
                slice_mut(info, VR_STORE_INFO_LEN)?,
                slice_mut(toc_digest, 32)?,
                slice_mut(id, 64)?,
            )
        };
        let index = index as usize;
        let entry = handle
            .promise
            .entries()
            .get(index)
            .ok_or_else(|| invalid("blob index out of range"))?;
        let (known, without_digest) = handle.promise.known(index);
        let toc = entry.trusted_toc();
        info.copy_from_slice(&[
            handle
                .store
                .blob(index)
                .map_or(0, |b| b.spec.count() as u64),
            entry.uncompressed_size,
            known as u64,
            without_digest as u64,
            u64::from(handle.promise.needs_chunk_info(index)),
            entry.compressor as u64,
            entry.digester as u64,
            entry.ci_offset,
            entry.ci_compressed_size,
            entry.ci_uncompressed_size,
            entry.ci_compressor as u64,
            toc.map_or(0, |(size, _)| u64::from(size)),
            u64::from(entry.chunk_count),
        ]);
        toc_out.copy_from_slice(toc.map_or(&[0; 32], |(_, digest)| digest));
        let name = entry.id().as_bytes();
        id_out
            .get_mut(..name.len())
            .ok_or_else(|| invalid("blob id"))?
            .copy_from_slice(name);
        Ok(name.len() as i64)
    })
}

/// Fills in the chunks of blob `index` that the chunk table lacks, from the uncompressed chunk-info array (or a
/// `blob.meta` file when `meta_file` is 1) and, when `digests_len` is not 0, the authenticated digest section.
///
/// # Safety
/// `handle` must be a store that no other call uses; the buffers must be valid for their lengths.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_set_chunk_info(
    handle: *mut c_void,
    index: u32,
    bytes: *const u8,
    len: usize,
    meta_file: u32,
    digests: *const u8,
    digests_len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { exclusive(handle)? };
        // SAFETY: promised by the caller, for both buffers.
        let (bytes, digests) = unsafe { (slice(bytes, len)?, slice(digests, digests_len)?) };
        handle
            .promise
            .set_chunk_info(
                index as usize,
                bytes,
                meta_file != 0,
                (!digests.is_empty()).then_some(digests),
            )
            .map_err(|e| format_failure(&e))?;
        Ok(0)
    })
}

/// Opens or makes the tables of blob `index`. Returns 1 when its data lives on disk, 0 when memory stands in.
/// Blocking: may wait for another daemon that opens the same blob, and for the disk.
///
/// # Safety
/// `handle` must be a store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_open_blob(handle: *const c_void, index: u32) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        let spec = handle
            .promise
            .spec(index as usize)
            .map_err(|e| Failure::new(VR_E_BAD_IMAGE, format!("blob: {e}")))?;
        Ok(i64::from(handle.store.open_blob(index as usize, spec)?))
    })
}

/// Takes over the tables that a predecessor made for blob `index`; `data` is -1 when there is no data file. The
/// descriptors stay the caller's. Returns 1 when its data lives on disk.
///
/// # Safety
/// `handle` must be a store and the descriptors open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_adopt_blob(
    handle: *const c_void,
    index: u32,
    state: i32,
    extents: i32,
    touched: i32,
    data: i32,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        let spec = handle
            .promise
            .spec(index as usize)
            .map_err(|e| Failure::new(VR_E_BAD_IMAGE, format!("blob: {e}")))?;
        // SAFETY: promised by the caller, for all four descriptors.
        let fds = unsafe {
            TableFds {
                state: borrow_fd(state)?,
                extents: borrow_fd(extents)?,
                touched: borrow_fd(touched)?,
                data: if data < 0 {
                    None
                } else {
                    Some(borrow_fd(data)?)
                },
            }
        };
        Ok(i64::from(handle.store.adopt_blob(
            index as usize,
            spec,
            fds,
        )?))
    })
}

/// Takes over a predecessor's spill memfd, after all blobs were adopted and before anything is ingested.
///
/// # Safety
/// `handle` must be a store and `fd` open; it stays the caller's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_adopt_spill(handle: *const c_void, fd: i32) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, fd) = unsafe { (shared(handle)?, borrow_fd(fd)?) };
        handle.store.adopt_spill(fd)?;
        Ok(0)
    })
}

/// Writes descriptors of state file, extent table, touched table and data file (-1: none) of blob `index` to `out`, for
/// a worker: read-only, except the third. They are the caller's to close.
///
/// # Safety
/// `handle` must be a store, `out` valid for four numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_share(handle: *const c_void, index: u32, out: *mut i32) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, 4)?) };
        let blob = handle
            .store
            .blob(index as usize)
            .ok_or_else(|| invalid("this blob is not open"))?;
        let fds = blob.tables.share()?;
        out.copy_from_slice(&[
            fds.state.into_raw_fd(),
            fds.extents.into_raw_fd(),
            fds.touched.into_raw_fd(),
            fds.data.map_or(-1, IntoRawFd::into_raw_fd),
        ]);
        Ok(0)
    })
}

/// A read-only descriptor of the spill memfd; it is the caller's to close.
///
/// # Safety
/// `handle` must be a store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_share_spill(handle: *const c_void) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        Ok(i64::from(handle.store.share_spill()?.into_raw_fd()))
    })
}

/// Writes the address of one of blob `index`'s arrays to `out` and returns its length in bytes (`which` is a
/// `VR_STORE_*` number). The shared words may change at any time.
///
/// # Safety
/// `handle` must be a store, `out` valid for one write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_array(
    handle: *const c_void,
    index: u32,
    which: u32,
    out: *mut *const c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let handle = unsafe { shared(handle)? };
        let blob = handle
            .store
            .blob(index as usize)
            .ok_or_else(|| invalid("this blob is not open"))?;
        let (spec, tables) = (&blob.spec, &blob.tables);
        let (ptr, len): (*const c_void, usize) = match which {
            VR_STORE_COMPRESSED_OFFSET => {
                (spec.compressed_offset.as_ptr().cast(), spec.count() * 8)
            }
            VR_STORE_COMPRESSED_SIZE => (spec.compressed_size.as_ptr().cast(), spec.count() * 4),
            VR_STORE_SIZE => (spec.size.as_ptr().cast(), spec.count() * 4),
            VR_STORE_STATE_WORDS => {
                let at = chunk_store::layout::STATE_HEADER;
                (
                    tables
                        .states()
                        .as_ptr()
                        .wrapping_add(at)
                        .cast_const()
                        .cast(),
                    tables.count() as usize * 4,
                )
            }
            VR_STORE_EXTENTS => {
                let at = chunk_store::layout::EXTENT_HEADER;
                (
                    tables
                        .extents()
                        .as_ptr()
                        .wrapping_add(at)
                        .cast_const()
                        .cast(),
                    tables.extents().len() - at,
                )
            }
            VR_STORE_TOUCHED => (
                tables.touched().as_ptr().cast_const().cast(),
                tables.count() as usize,
            ),
            _ => return Err(invalid("no such array")),
        };
        if out.is_null() {
            return Err(invalid("null out"));
        }
        // SAFETY: promised by the caller.
        unsafe { out.write(ptr) };
        Ok(len as i64)
    })
}

/// Decodes, verifies and publishes `chunks` of blob `index` out of `bytes`, which start at byte `base` of the blob.
/// Writes an outcome per chunk: 0 ok, 1 digest mismatch, 2 decode error, 3 not (wholly) in the range, 4 no space,
/// 5 no such chunk. Returns how many are ok. Blocking: CPU and disk.
///
/// # Safety
/// `handle` must be a store; the buffers must be valid for their lengths (`outcomes`: `chunk_count` bytes).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_ingest(
    handle: *const c_void,
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
        unsafe {
            ingest(
                handle,
                index,
                base,
                (bytes, len),
                (chunks, chunk_count),
                outcomes,
            )
        }
    })
}

/// [`vr_store_ingest`], for any thread.
///
/// # Safety
/// As there.
pub(crate) unsafe fn ingest(
    handle: *const c_void,
    index: u32,
    base: u64,
    bytes: (*const u8, usize),
    chunks: (*const u32, usize),
    outcomes: *mut u8,
) -> Result<i64, Failure> {
    // SAFETY: promised by the caller, for the handle and all buffers.
    let (handle, bytes, chunks, outcomes) = unsafe {
        (
            shared(handle)?,
            slice(bytes.0, bytes.1)?,
            slice(chunks.0, chunks.1)?,
            slice_mut(outcomes, chunks.1)?,
        )
    };
    handle
        .store
        .ingest(index as usize, base, bytes, chunks, outcomes)?;
    Ok(outcomes.iter().filter(|o| **o == 0).count() as i64)
}

/// Reads a stored chunk back and checks its digest: a present one becomes verified or absent, with `force` 1 a
/// verified one too. Returns 1 when the chunk may be served. Blocking: CPU and disk.
///
/// # Safety
/// `handle` must be a store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_verify(
    handle: *const c_void,
    index: u32,
    chunk: u32,
    force: u32,
) -> i64 {
    // SAFETY: promised by the caller.
    guard(|| unsafe { verify(handle, index, chunk, force) })
}

/// [`vr_store_verify`], for any thread.
///
/// # Safety
/// As there.
pub(crate) unsafe fn verify(
    handle: *const c_void,
    index: u32,
    chunk: u32,
    force: u32,
) -> Result<i64, Failure> {
    // SAFETY: promised by the caller.
    let handle = unsafe { shared(handle)? };
    Ok(i64::from(handle.store.verify_present(
        index as usize,
        chunk,
        force != 0,
    )?))
}

/// Marks (`on` 1) absent chunks as being fetched, or takes the mark away.
///
/// # Safety
/// `handle` must be a store, `chunks` valid for `count` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_hint_fetching(
    handle: *const c_void,
    index: u32,
    chunks: *const u32,
    count: usize,
    on: u32,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, chunks) = unsafe { (shared(handle)?, slice(chunks, count)?) };
        handle
            .store
            .hint_fetching(index as usize, chunks, on != 0)?;
        Ok(0)
    })
}

/// Writes the counts of absent, fetching, present, verified and spilled chunks of blob `index`.
///
/// # Safety
/// `handle` must be a store, `out` valid for [`VR_STORE_STATES_LEN`] numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_states(handle: *const c_void, index: u32, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, VR_STORE_STATES_LEN)?) };
        let c = handle.store.states(index as usize)?;
        out.copy_from_slice(&[c.absent, c.fetching, c.present, c.verified, c.spilled]);
        Ok(0)
    })
}

/// Copies the map digest of blob `index`, which its state file carries (32 bytes), to `out`; it need not be open.
///
/// # Safety
/// `handle` must be a store, `out` valid for 32 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_map_digest(
    handle: *const c_void,
    index: u32,
    out: *mut u8,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, 32)?) };
        let digest = match handle.store.blob(index as usize) {
            Some(blob) => blob.spec.map_digest(),
            None => handle
                .promise
                .spec(index as usize)
                .map_err(|e| Failure::new(VR_E_BAD_IMAGE, format!("blob: {e}")))?
                .map_digest(),
        };
        out.copy_from_slice(&digest);
        Ok(0)
    })
}

/// Writes spill capacity, used bytes, chunks and evictions, how often the cache disk refused, and its last errno.
///
/// # Safety
/// `handle` must be a store, `out` valid for [`VR_STORE_STATS_LEN`] numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_stats(handle: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (handle, out) = unsafe { (shared(handle)?, slice_mut(out, VR_STORE_STATS_LEN)?) };
        let spill = handle.store.spill_stats();
        let (errors, errno) = handle.store.disk_errors();
        out.copy_from_slice(&[
            spill.capacity,
            spill.used,
            spill.chunks,
            spill.evicted,
            errors,
            u64::from(errno.unsigned_abs()),
        ]);
        Ok(0)
    })
}

/// Node ids of a session are node numbers of the image and this; 1 is the root.
const NID_BIAS: u64 = 2;

/// Writes the paths of `count` nodes, named by the ids that a guest uses, to `buf` (at most `len` bytes): one after
/// the other, each ended by a NUL, empty for a node that has no name. Returns the length of the whole. Blocking: walks
/// the tree of the bootstrap `image`.
///
/// # Safety
/// Buffers must be valid for their lengths.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_store_paths(
    image: *const u8,
    image_len: usize,
    nodeids: *const u64,
    count: usize,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller, for all three buffers.
        let (image, nodeids, buf) = unsafe {
            (
                slice(image, image_len)?,
                slice(nodeids, count)?,
                slice_mut(buf, len)?,
            )
        };
        let root = rafs_format::Tree::parse(image)
            .map_err(|e| format_failure(&e))?
            .root();
        let nid = |id: u64| {
            if id == 1 {
                Some(root)
            } else {
                id.checked_sub(NID_BIAS)
            }
        };
        let wanted = nodeids.iter().filter_map(|id| nid(*id)).collect();
        let found = chunk_store::paths(image, &wanted).map_err(|e| format_failure(&e))?;
        let mut out = Vec::new();
        for id in nodeids {
            out.extend(
                nid(*id)
                    .and_then(|nid| found.get(&nid))
                    .into_iter()
                    .flatten(),
            );
            out.push(0);
        }
        let n = out.len().min(buf.len());
        buf[..n].copy_from_slice(&out[..n]);
        Ok(out.len() as i64)
    })
}

/// Gives the calling thread's scratch memory and the allocator's free memory back to the system: for quiet times.
#[unsafe(no_mangle)]
pub extern "C" fn vr_store_trim() -> i64 {
    guard(|| {
        chunk_store::decode::drop_scratch();
        // SAFETY: a plain call into the C allocator, which is thread-safe.
        #[cfg(target_env = "gnu")]
        unsafe {
            libc::malloc_trim(0)
        };
        Ok(0)
    })
}
