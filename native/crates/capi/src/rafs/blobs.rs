//! The part of the rafs domain about blobs and their chunks; the conventions are those of the module above.

use std::ffi::c_void;

use super::{give, image, output};
use crate::{Failure, VR_E_INVALID, guard};

/// Values of [`vr_rafs_blob`].
pub const VR_RAFS_BLOB_LEN: usize = 16;
/// Values per part of [`vr_rafs_chunks`].
pub const VR_RAFS_PART_LEN: usize = 5;
/// Values per chunk of [`vr_rafs_chunk_map`].
pub const VR_RAFS_CHUNK_LEN: usize = 12;
/// Bytes of the id that [`vr_rafs_blob`] fills in, padded with NUL.
pub const VR_RAFS_BLOB_ID_LEN: usize = 64;

/// Writes the parts of chunks that hold `len` bytes of the file `nid` from `offset` on, at most `max`: blob, chunk,
/// offset inside the chunk, length, and where the chunk starts in the blob's uncompressed address space. Returns
/// their number; 0 at the end of the range. An error behind the first part is reported by the call that starts there.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `max` times `VR_RAFS_PART_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_chunks(
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
                output(out, max.saturating_mul(VR_RAFS_PART_LEN)),
            )
        };
        let tree = image.tree();
        let inode = tree.inode(nid)?;
        let mut count = 0;
        for (slot, part) in out
            .chunks_exact_mut(VR_RAFS_PART_LEN)
            .zip(tree.chunks(&inode, offset, len))
        {
            let part = match part {
                Ok(part) => part,
                Err(_) if count > 0 => break,
                Err(e) => return Err(e.into()),
            };
            slot.copy_from_slice(&[
                part.blob_index.into(),
                part.chunk_index.into(),
                part.chunk_offset.into(),
                part.len.into(),
                part.data_offset,
            ]);
            count += 1;
        }
        Ok(count)
    })
}

/// Writes about blob `index`: chunk size, chunk count, compressor, digester, features, compressed and uncompressed
/// size, size of its data, size of its table of contents (0 when it cannot be trusted), compressor, offset,
/// compressed and uncompressed size of the chunk-info array, size of one of its elements; the rest is 0. Then the id
/// and the digest of the table of contents.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `VR_RAFS_BLOB_LEN` values, `id` for writes of
/// `VR_RAFS_BLOB_ID_LEN` bytes, `toc_digest` for writes of 32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_blob(
    handle: *const c_void,
    index: u32,
    out: *mut u64,
    id: *mut u8,
    toc_digest: *mut u8,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out, id, toc_digest) = unsafe {
            (
                image(handle)?,
                output(out, VR_RAFS_BLOB_LEN),
                output(id, VR_RAFS_BLOB_ID_LEN),
                output(toc_digest, 32),
            )
        };
        let blob = image.tree().blob(index)?;
        out.copy_from_slice(&[
            blob.chunk_size.into(),
            blob.chunk_count.into(),
            u64::from(blob.compressor as u32),
            u64::from(blob.digester as u32),
            blob.features.into(),
            blob.compressed_size,
            blob.uncompressed_size,
            blob.data_size(),
            blob.trusted_toc().map_or(0, |(size, _)| size.into()),
            u64::from(blob.ci_compressor as u32),
            blob.ci_offset,
            blob.ci_compressed_size,
            blob.ci_uncompressed_size,
            blob.chunk_info_size(),
            0,
            0,
        ]);
        id.fill(0);
        give(blob.id().as_bytes(), id);
        toc_digest.copy_from_slice(&blob.toc_digest);
        Ok(0)
    })
}

/// Writes the chunks of blob `index` that the chunk table describes, ascending by number, from the `first`-th on, at
/// most `max`: number, flags, compressed offset, uncompressed offset, compressed size, uncompressed size, CRC-32C,
/// whether there is a digest, and the digest's 32 bytes as they are. Returns their number; 0 at the end.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `max` times `VR_RAFS_CHUNK_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_chunk_map(
    handle: *const c_void,
    index: u16,
    first: usize,
    out: *mut u64,
    max: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out) = unsafe {
            (
                image(handle)?,
                output(out, max.saturating_mul(VR_RAFS_CHUNK_LEN)),
            )
        };
        let Some(map) = image.chunk_table()?.map(index) else {
            return Err(Failure::new(
                VR_E_INVALID,
                format!("there is no blob {index}"),
            ));
        };
        let mut count = 0;
        for (slot, chunk) in out
            .chunks_exact_mut(VR_RAFS_CHUNK_LEN)
            .zip(map.iter().skip(first))
        {
            slot[..8].copy_from_slice(&[
                chunk.index.into(),
                chunk.flags.into(),
                chunk.compressed_offset,
                chunk.uncompressed_offset,
                chunk.compressed_size.into(),
                chunk.uncompressed_size.into(),
                chunk.crc32.into(),
                chunk.digest.is_some().into(),
            ]);
            let digest = chunk.digest.unwrap_or_default();
            for (value, bytes) in slot[8..].iter_mut().zip(digest.chunks_exact(8)) {
                *value = bytes
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
            }
            count += 1;
        }
        Ok(count)
    })
}

/// Writes node ids of the prefetch table, at most `max`; returns their number in the table.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `max` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_prefetch(handle: *const c_void, out: *mut u64, max: usize) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out) = unsafe { (image(handle)?, output(out, max)) };
        for (slot, nid) in out.iter_mut().zip(image.tree().prefetch()) {
            *slot = nid;
        }
        Ok(image.tree().prefetch().count() as i64)
    })
}
