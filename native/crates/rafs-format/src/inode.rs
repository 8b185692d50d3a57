//! Inodes: EROFS compact (32 bytes) and extended (64 bytes) form.

use crate::error::{FormatError, Result};
use crate::format::*;
use crate::superblock::SuperBlock;

const COMPACT_SIZE: u32 = 32;
const EXTENDED_SIZE: u32 = 64;
const XATTR_HEADER_SIZE: u32 = 12;
const NSEC_PER_SEC: u32 = 1_000_000_000;

/// File type bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
pub const S_IFSOCK: u32 = 0o140_000;
pub const S_IFLNK: u32 = 0o120_000;
pub const S_IFREG: u32 = 0o100_000;
pub const S_IFBLK: u32 = 0o060_000;
pub const S_IFDIR: u32 = 0o040_000;
pub const S_IFCHR: u32 = 0o020_000;
pub const S_IFIFO: u32 = 0o010_000;

/// Number of an inode: its offset from the metadata area in 32-byte slots.
pub type Nid = u64;

/// Where the content of a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Layout {
    /// In consecutive blocks of the bootstrap.
    FlatPlain = 0,
    /// All but the last block as in [`Layout::FlatPlain`], the last one behind the inode.
    FlatInline = 2,
    /// In chunks of blobs, with an array of chunk indexes behind the inode.
    ChunkBased = 4,
}

/// An inode, checked: what it names lies inside the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    pub nid: Nid,
    /// Number for `stat`: the node id, as in the kernel and in nydusd, because hard links share it and the
    /// on-disk field may be 0.
    pub ino: u64,
    /// File type and permissions.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    /// Bytes; of a directory, of its entries and names.
    pub size: u64,
    /// Seconds since the epoch. A compact inode has none: the superblock's build time stands in.
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// Device number of a character or block device, in the kernel's 32-bit form (the one of FUSE); else 0.
    pub rdev: u32,
    pub layout: Layout,
    /// The on-disk inode number.
    pub disk_ino: u32,
    pub(crate) offset: u64,
    pub(crate) inode_size: u32,
    /// Bytes of the extended attributes behind the inode.
    pub(crate) xattr_size: u32,
    pub(crate) union: u32,
}

impl Inode {
    /// Reads and checks inode `nid`.
    #[inline]
    pub fn parse(image: &[u8], sb: &SuperBlock, nid: Nid) -> Result<Inode> {
        let Some(offset) = nid
            .checked_mul(INODE_SLOT_SIZE)
            .and_then(|at| at.checked_add(sb.meta_offset))
        else {
            return Err(FormatError::malformed("inode.nid", nid, "beyond any image"));
        };
        let head: &[u8; COMPACT_SIZE as usize] = need(image, offset, "inode")?;
        let format = le16(head, 0);
        let layout = match format >> 1 {
            0 => Layout::FlatPlain,
            2 => Layout::FlatInline,
            4 => Layout::ChunkBased,
            _ => {
                return Err(malformed(
                    "inode.i_format",
                    offset,
                    format!("unknown layout {format:#x}"),
                ));
            }
        };
        let mode = u32::from(le16(head, 4));
        let union = le32(head, 16);
        let icount = u32::from(le16(head, 2));
        let mut inode = Inode {
            nid,
            ino: nid,
            mode,
            uid: u32::from(le16(head, 24)),
            gid: u32::from(le16(head, 26)),
            nlink: u32::from(le16(head, 6)),
            size: u64::from(le32(head, 8)),
            mtime: sb.build_time,
            mtime_nsec: sb.build_time_nsec,
            rdev: if matches!(mode & S_IFMT, S_IFCHR | S_IFBLK) {
                union
            } else {
                0
            },
            layout,
            disk_ino: le32(head, 20),
            offset,
            inode_size: COMPACT_SIZE,
            xattr_size: if icount == 0 {
                0
            } else {
                XATTR_HEADER_SIZE + (icount - 1) * 4
            },
            union,
        };
        if format & 1 == 1 {
            let ext: &[u8; EXTENDED_SIZE as usize] = need(image, offset, "inode")?;
            inode.size = le64(ext, 8);
            inode.uid = le32(ext, 24);
            inode.gid = le32(ext, 28);
            inode.mtime = le64(ext, 32) as i64;
            inode.mtime_nsec = le32(ext, 40);
            inode.nlink = le32(ext, 44);
            inode.inode_size = EXTENDED_SIZE;
            if inode.mtime_nsec >= NSEC_PER_SEC {
                return Err(malformed("inode.i_mtime_nsec", offset, "a second or more"));
            }
        }
        inode.check(image.len() as u64, sb)?;
        Ok(inode)
    }

    /// The rules that tie the fields to each other and to the size of the image.
    #[inline]
    fn check(&self, image_size: u64, sb: &SuperBlock) -> Result<()> {
        let body = self.body();
        if body > image_size {
            return Err(malformed(
                "inode.i_xattr_icount",
                self.offset,
                "reaches beyond the end",
            ));
        }
        match self.mode & S_IFMT {
            S_IFREG => {}
            S_IFDIR | S_IFLNK if self.layout == Layout::ChunkBased => {
                return Err(malformed(
                    "inode.i_format",
                    self.offset,
                    "only regular files have chunks",
                ));
            }
            S_IFDIR => {}
            S_IFLNK if self.size == 0 || self.size > SYMLINK_MAX => {
                return Err(malformed(
                    "inode.i_size",
                    self.offset,
                    "not that of a symbolic link",
                ));
            }
            S_IFLNK => {}
            S_IFCHR | S_IFBLK | S_IFIFO | S_IFSOCK => return Ok(()),
            _ => {
                return Err(malformed(
                    "inode.i_mode",
                    self.offset,
                    format!("{:#o} has no file type", self.mode),
                ));
            }
        }
        let inside = match self.layout {
            Layout::ChunkBased => {
                // A power of two: a shift instead of a division.
                let bits = sb.chunk_size.trailing_zeros();
                let count = (self.size >> bits)
                    + u64::from(self.size & (u64::from(sb.chunk_size) - 1) != 0);
                count <= image_size
                    && self.chunk_index_offset() + count * CHUNK_INDEX_SIZE <= image_size
            }
            Layout::FlatPlain => {
                self.size <= image_size && self.blocks_offset() + self.size <= image_size
            }
            Layout::FlatInline => {
                self.size <= image_size
                    && (self.tail_start() == 0
                        || self.blocks_offset() + self.tail_start() <= image_size)
                    && body + (self.size - self.tail_start()) <= image_size
            }
        };
        if inside {
            Ok(())
        } else {
            Err(malformed(
                "inode.i_size",
                self.offset,
                "the content reaches beyond the end of the bootstrap",
            ))
        }
    }

    /// Offset of what follows inode and extended attributes.
    #[inline]
    pub(crate) fn body(&self) -> u64 {
        self.offset + u64::from(self.inode_size) + u64::from(self.xattr_size)
    }

    /// Offset of the chunk indexes of a chunk-based file.
    #[inline]
    pub(crate) fn chunk_index_offset(&self) -> u64 {
        self.body().next_multiple_of(CHUNK_INDEX_SIZE)
    }

    /// Offset of the blocks of a flat file.
    #[inline]
    fn blocks_offset(&self) -> u64 {
        u64::from(self.union) * BLOCK_SIZE
    }

    /// Position in the file at which the part behind the inode starts, for [`Layout::FlatInline`].
    #[inline]
    fn tail_start(&self) -> u64 {
        self.size.saturating_sub(1) / BLOCK_SIZE * BLOCK_SIZE
    }

    /// Place in the image of the content of a flat file from `position` on, and how many bytes lie there in one
    /// piece. None beyond the end and for chunk-based files.
    #[inline]
    pub(crate) fn flat_extent(&self, position: u64) -> Option<(u64, u64)> {
        if position >= self.size {
            return None;
        }
        match self.layout {
            Layout::FlatPlain => Some((self.blocks_offset() + position, self.size - position)),
            Layout::FlatInline if position >= self.tail_start() => Some((
                self.body() + (position - self.tail_start()),
                self.size - position,
            )),
            Layout::FlatInline => Some((
                self.blocks_offset() + position,
                self.tail_start() - position,
            )),
            Layout::ChunkBased => None,
        }
    }

    #[inline]
    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    #[inline]
    pub fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    #[inline]
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// Whether extended attributes follow the inode.
    #[inline]
    pub fn has_xattr(&self) -> bool {
        self.xattr_size > 0
    }

    /// The `DT_*` value of the file type.
    #[inline]
    pub fn d_type(&self) -> u8 {
        ((self.mode & S_IFMT) >> 12) as u8
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> (u32, u32) {
        (
            self.rdev >> 8 & 0xfff,
            self.rdev & 0xff | self.rdev >> 12 & 0xf_ff00,
        )
    }
}

#[cold]
fn malformed(
    what: &'static str,
    offset: u64,
    message: impl Into<std::borrow::Cow<'static, str>>,
) -> FormatError {
    FormatError::malformed(what, offset, message)
}
