//! Layout constants of RAFS v6 (EROFS plus private tables) and little-endian readers.
//!
//! Field offsets stand beside the code that reads them; this file holds what several modules share.

use crate::error::{FormatError, Result};

/// Block size: addresses of directories, inline files and chunks count these.
pub const BLOCK_SIZE: u64 = 4096;
/// Offset of the EROFS superblock.
pub const SUPER_OFFSET: u64 = 1024;
/// Size of the EROFS superblock.
pub const SUPER_SIZE: u64 = 128;
/// Offset of the RAFS extended superblock.
pub const EXT_SUPER_OFFSET: u64 = SUPER_OFFSET + SUPER_SIZE;
/// Size of the RAFS extended superblock.
pub const EXT_SUPER_SIZE: u64 = 256;
/// Offset of the device slots.
pub const DEVICE_TABLE_OFFSET: u64 = EXT_SUPER_OFFSET + EXT_SUPER_SIZE;
/// Size of a device slot; the superblock's `devt_slotoff` counts these.
pub const DEVICE_SLOT_SIZE: u64 = 128;
/// Size of an entry of the blob table.
pub const BLOB_ENTRY_SIZE: u64 = 256;
/// Length of the blob id field in device slots and in the blob table.
pub const BLOB_ID_SIZE: usize = 64;
/// Size of an entry of the chunk table.
pub const CHUNK_ENTRY_SIZE: u64 = 80;
/// Size of a chunk index behind an inode.
pub const CHUNK_INDEX_SIZE: u64 = 8;
/// Inodes lie on multiples of this; a node id counts them.
pub const INODE_SLOT_SIZE: u64 = 32;
/// Size of a directory entry without its name.
pub const DIRENT_SIZE: usize = 12;
/// A tar header: in a blob with HAS_TAR_HEADER one follows each section.
pub const TAR_HEADER_SIZE: u64 = 512;

/// Longest file name, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symbolic link, in bytes.
pub const SYMLINK_MAX: u64 = 4096;
/// Largest bootstrap that is read.
pub const BOOTSTRAP_MAX: u64 = 2 << 30;
/// Smallest and largest chunk size.
pub const CHUNK_SIZE_MIN: u32 = 4096;
pub const CHUNK_SIZE_MAX: u32 = 16 << 20;
/// Most chunks in a blob: the chunk number has 24 bits.
pub const CHUNK_COUNT_MAX: u32 = 1 << 24;
/// Most blobs in an image: the EROFS device id has 8 bits, and 0 is the bootstrap itself.
pub const BLOB_COUNT_MAX: u64 = 255;
/// Largest blob, as stored and as uncompressed address space.
pub const BLOB_STORED_MAX: u64 = 1 << 40;
pub const BLOB_SPACE_MAX: u64 = 1 << 44;

/// `N` bytes at `offset`, or None when they are not all there.
#[inline]
pub fn array<const N: usize>(bytes: &[u8], offset: u64) -> Option<&[u8; N]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..)?.first_chunk::<N>()
}

/// `len` bytes at `offset`, or None when they are not all there.
#[inline]
pub fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(len)?).ok()?;
    bytes.get(start..end)
}

/// Consecutive records of `N` bytes; an incomplete one at the end is left out.
pub fn records_of<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = &[u8; N]> {
    bytes
        .chunks_exact(N)
        .filter_map(|record| record.first_chunk::<N>())
}

/// As [`array`], with an error that names the structure.
#[inline]
pub fn need<'a, const N: usize>(
    bytes: &'a [u8],
    offset: u64,
    what: &'static str,
) -> Result<&'a [u8; N]> {
    array(bytes, offset).ok_or_else(|| beyond_end(what, offset, N as u64, bytes.len()))
}

/// As [`slice`], with an error that names the structure.
#[inline]
pub fn need_slice<'a>(
    bytes: &'a [u8],
    offset: u64,
    len: u64,
    what: &'static str,
) -> Result<&'a [u8]> {
    slice(bytes, offset, len).ok_or_else(|| beyond_end(what, offset, len, bytes.len()))
}

#[cold]
fn beyond_end(what: &'static str, offset: u64, len: u64, size: usize) -> FormatError {
    FormatError::malformed(
        what,
        offset,
        format!("{len} bytes reach beyond the end at {size}"),
    )
}

/// Little-endian integer at a constant place of a fixed-size record. `at` is a constant of the caller that lies
/// inside the record, so that the bounds checks vanish when compiled.
#[inline(always)]
pub fn le16<const N: usize>(record: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([record[at], record[at + 1]])
}

/// See [`le16`].
#[inline(always)]
pub fn le32<const N: usize>(record: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
}

/// See [`le16`].
#[inline(always)]
pub fn le64<const N: usize>(record: &[u8; N], at: usize) -> u64 {
    u64::from(le32(record, at)) | u64::from(le32(record, at + 4)) << 32
}

/// `M` bytes at a constant place of a fixed-size record; see [`le16`].
#[inline(always)]
pub fn bytes_at<const N: usize, const M: usize>(record: &[u8; N], at: usize) -> [u8; M] {
    std::array::from_fn(|i| record[at + i])
}
