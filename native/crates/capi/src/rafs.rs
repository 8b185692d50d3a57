//! C ABI of the rafs domain: the bootstrap reader for tools and for tests against the Python one.
//!
//! A handle owns a copy of the bootstrap and never changes, so that any number of threads may use it at once; only
//! [`vr_rafs_close`] must be the last call. Nothing blocks. Results are arrays of u64 of the lengths given here, or
//! packed records; strings have a length and no NUL.

pub mod blobs;
pub mod runs;

use std::ffi::c_void;
use std::sync::OnceLock;

use rafs_format::{ChunkTable, Dirent, ErrorKind, FormatError, SuperBlock, Tree};

use crate::pointers::{free, hand_out, input, output};
use crate::{Failure, VR_E_BAD_IMAGE, VR_E_INVALID, VR_E_UNSUPPORTED, guard};

/// Values of [`vr_rafs_superblock`].
pub const VR_RAFS_SUPERBLOCK_LEN: usize = 16;
/// Values of [`vr_rafs_inode`].
pub const VR_RAFS_INODE_LEN: usize = 16;

/// A bootstrap that was accepted once, with the superblock that was found.
struct Image {
    bytes: Box<[u8]>,
    superblock: SuperBlock,
    chunks: OnceLock<Result<ChunkTable, FormatError>>,
}

impl Image {
    fn tree(&self) -> Tree<'_> {
        Tree::resume(&self.bytes, self.superblock)
    }

    fn chunk_table(&self) -> Result<&ChunkTable, Failure> {
        let table = self.chunks.get_or_init(|| ChunkTable::parse(&self.tree()));
        table.as_ref().map_err(|e| e.clone().into())
    }
}

impl From<FormatError> for Failure {
    fn from(e: FormatError) -> Self {
        let code = match e.kind {
            ErrorKind::Malformed => VR_E_BAD_IMAGE,
            ErrorKind::Unsupported => VR_E_UNSUPPORTED,
        };
        Failure::new(code, e.to_string())
    }
}

/// The image behind a handle.
///
/// # Safety
/// `handle` must come from [`vr_rafs_open`] and not have been closed.
unsafe fn image<'a>(handle: *const c_void) -> Result<&'a Image, Failure> {
    // SAFETY: the caller promises a live handle, which is never written to.
    unsafe { handle.cast::<Image>().as_ref() }.ok_or_else(|| Failure::new(VR_E_INVALID, "no image"))
}

/// Copies as much of `value` as fits; returns its whole length.
fn give(value: &[u8], out: &mut [u8]) -> i64 {
    let n = value.len().min(out.len());
    out[..n].copy_from_slice(&value[..n]);
    value.len() as i64
}

/// Opens the bootstrap in `data`, of which a copy is made, and writes its handle.
///
/// # Safety
/// `data` must be valid for reads of `len` bytes, `handle` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_open(
    data: *const u8,
    len: usize,
    handle: *mut *mut c_void,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let bytes = unsafe { input(data, len) };
        let superblock = *Tree::parse(bytes)?.superblock();
        let image = Image {
            bytes: bytes.into(),
            superblock,
            chunks: OnceLock::new(),
        };
        // SAFETY: promised by the caller.
        unsafe { hand_out(image, handle) };
        Ok(0)
    })
}

/// Frees a handle. Null is allowed.
///
/// # Safety
/// `handle` must come from [`vr_rafs_open`], and no other call on it may run or follow.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_close(handle: *mut c_void) {
    // SAFETY: promised by the caller.
    unsafe { free::<Image>(handle) };
}

/// Writes flags, chunk size, root node id, inodes, build time, its nanoseconds, metadata offset, data blocks, number
/// of blobs, compressor, digester, offset and size of the chunk table and of the prefetch table; the rest is 0.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `VR_RAFS_SUPERBLOCK_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_superblock(handle: *const c_void, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out) = unsafe { (image(handle)?, output(out, VR_RAFS_SUPERBLOCK_LEN)) };
        let sb = &image.superblock;
        out.copy_from_slice(&[
            sb.flags,
            sb.chunk_size.into(),
            sb.root_nid,
            sb.inos,
            sb.build_time as u64,
            sb.build_time_nsec.into(),
            sb.meta_offset,
            sb.blocks.into(),
            sb.blob_count.into(),
            u64::from(sb.compressor() as u32),
            u64::from(sb.digester() as u32),
            sb.chunk_table_offset,
            sb.chunk_table_size,
            sb.prefetch_table_offset,
            sb.prefetch_table_size.into(),
            0,
        ]);
        Ok(0)
    })
}

/// Writes node id, on-disk number, mode, uid, gid, links, size, modification time, its nanoseconds, device number,
/// layout, and whether there are extended attributes; the rest is 0.
///
/// # Safety
/// `handle` must be live, `out` valid for writes of `VR_RAFS_INODE_LEN` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_inode(handle: *const c_void, nid: u64, out: *mut u64) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, out) = unsafe { (image(handle)?, output(out, VR_RAFS_INODE_LEN)) };
        let inode = image.tree().inode(nid)?;
        out.copy_from_slice(&[
            inode.ino,
            inode.disk_ino.into(),
            inode.mode.into(),
            inode.uid.into(),
            inode.gid.into(),
            inode.nlink.into(),
            inode.size,
            inode.mtime as u64,
            inode.mtime_nsec.into(),
            inode.rdev.into(),
            inode.layout as u64,
            inode.has_xattr().into(),
            0,
            0,
            0,
            0,
        ]);
        Ok(0)
    })
}

/// Looks `name` up in the directory `nid`. Returns 1 and writes node id and `DT_*` type, or returns 0.
///
/// # Safety
/// `handle` must be live, `name` valid for reads of `name_len` bytes, `out` for writes of 2 values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_lookup(
    handle: *const c_void,
    nid: u64,
    name: *const u8,
    name_len: usize,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, name, out) = unsafe { (image(handle)?, input(name, name_len), output(out, 2)) };
        let tree = image.tree();
        match tree.lookup(&tree.inode(nid)?, name)? {
            Some((nid, d_type)) => {
                out.copy_from_slice(&[nid, d_type.into()]);
                Ok(1)
            }
            None => Ok(0),
        }
    })
}

/// Packs entries of the directory `nid` from `cookie` on into `buf`: node id u64, cookie of the next one u64, `DT_*`
/// type u32, length of the name u32, the name. Returns the bytes used; 0 at the end. An error behind the first entry
/// is reported by the call that starts there.
///
/// # Safety
/// `handle` must be live, `buf` valid for writes of `len` bytes; 279 hold any entry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_entries(
    handle: *const c_void,
    nid: u64,
    cookie: u64,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, mut buf) = unsafe { (image(handle)?, output(buf, len)) };
        let tree = image.tree();
        let dir = tree.inode(nid)?;
        let mut used = 0;
        for entry in tree.entries(&dir, cookie) {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if used > 0 => break,
                Err(e) => return Err(e.into()),
            };
            let record = pack(&entry);
            let Some((head, rest)) = buf.split_at_mut_checked(record.len()) else {
                if used == 0 {
                    return Err(Failure::new(
                        VR_E_INVALID,
                        "the buffer is too small for an entry",
                    ));
                }
                break;
            };
            head.copy_from_slice(&record);
            buf = rest;
            used += record.len() as i64;
        }
        Ok(used)
    })
}

fn pack(entry: &Dirent<'_>) -> Vec<u8> {
    let mut record = Vec::with_capacity(24 + entry.name.len());
    record.extend(entry.nid.to_le_bytes());
    record.extend(entry.next_cookie.to_le_bytes());
    record.extend(u32::from(entry.d_type).to_le_bytes());
    record.extend((entry.name.len() as u32).to_le_bytes());
    record.extend(entry.name);
    record
}

/// Copies the target of the symbolic link `nid`; returns its length, which is at most 4096.
///
/// # Safety
/// `handle` must be live, `buf` valid for writes of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_readlink(
    handle: *const c_void,
    nid: u64,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, buf) = unsafe { (image(handle)?, output(buf, len)) };
        let tree = image.tree();
        Ok(give(tree.readlink(&tree.inode(nid)?)?, buf))
    })
}

/// Packs the extended attributes of `nid`: length of the name u32, length of the value u32, full name, value.
/// Returns the length of all; call again with a larger buffer when it is above `len`.
///
/// # Safety
/// `handle` must be live, `buf` valid for writes of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_xattrs(
    handle: *const c_void,
    nid: u64,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, buf) = unsafe { (image(handle)?, output(buf, len)) };
        let tree = image.tree();
        let mut packed = Vec::new();
        for attribute in tree.xattrs(&tree.inode(nid)?) {
            let (prefix, suffix, value) = attribute?;
            packed.extend(((prefix.len() + suffix.len()) as u32).to_le_bytes());
            packed.extend((value.len() as u32).to_le_bytes());
            packed.extend(prefix);
            packed.extend(suffix);
            packed.extend(value);
        }
        Ok(give(&packed, buf))
    })
}

/// Copies the value of the extended attribute `name` of `nid`. Writes 1 to `found` and returns its length, which is
/// at most 65535, or writes 0 and returns 0.
///
/// # Safety
/// `handle` must be live, `name` valid for reads of `name_len` bytes, `buf` for writes of `len`, `found` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_xattr_get(
    handle: *const c_void,
    nid: u64,
    name: *const u8,
    name_len: usize,
    buf: *mut u8,
    len: usize,
    found: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, name, buf, found) = unsafe {
            (
                image(handle)?,
                input(name, name_len),
                output(buf, len),
                output(found, 1),
            )
        };
        let tree = image.tree();
        let value = tree.xattr_get(&tree.inode(nid)?, name)?;
        found[0] = value.is_some().into();
        Ok(give(value.unwrap_or_default(), buf))
    })
}

/// Copies bytes of a file that lies in the bootstrap; returns how many, 0 at its end. It may be fewer than `len`
/// before the end: ask again from there.
///
/// # Safety
/// `handle` must be live, `buf` valid for writes of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_rafs_inline_data(
    handle: *const c_void,
    nid: u64,
    offset: u64,
    buf: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: promised by the caller.
        let (image, buf) = unsafe { (image(handle)?, output(buf, len)) };
        let tree = image.tree();
        Ok(give(
            tree.inline_data(&tree.inode(nid)?, offset, len as u64)?,
            buf,
        ))
    })
}
