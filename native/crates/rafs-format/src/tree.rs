//! The directory tree of an image over its bytes: the reader that serves requests.
//!
//! Nothing is kept but the superblock, and nothing is trusted: each offset, count and name is checked where it is
//! used. `inode`, `lookup`, `entries`, `readlink`, `xattr_get` and `chunks` allocate nothing, unless they fail.

use crate::blob::BlobEntry;
use crate::chunk::Chunks;
use crate::dirent::{self, Entries};
use crate::error::{FormatError, Result};
use crate::format::*;
use crate::inode::{Inode, Layout, Nid};
use crate::superblock::SuperBlock;
use crate::xattr::{self, Xattrs};

/// A bootstrap. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'a> {
    image: &'a [u8],
    sb: SuperBlock,
}

impl<'a> Tree<'a> {
    /// Checks superblocks, device slots and blob table of `image`, and that its root is a directory.
    pub fn parse(image: &'a [u8]) -> Result<Tree<'a>> {
        let tree = Tree {
            image,
            sb: SuperBlock::parse(image)?,
        };
        for index in 0..tree.sb.blob_count {
            tree.blob(index)?;
        }
        let root = tree.inode(tree.sb.root_nid)?;
        if !root.is_dir() {
            return Err(FormatError::malformed(
                "superblock.root_nid",
                SUPER_OFFSET,
                "not a directory",
            ));
        }
        Ok(tree)
    }

    /// The tree of an image that [`Tree::parse`] has accepted, with the superblock it found. For owners of the
    /// bytes that cannot keep a borrow of them. Another superblock yields wrong answers, never worse.
    pub fn resume(image: &'a [u8], sb: SuperBlock) -> Tree<'a> {
        Tree { image, sb }
    }

    /// The bytes of the bootstrap.
    pub fn image(&self) -> &'a [u8] {
        self.image
    }

    #[inline]
    pub fn superblock(&self) -> &SuperBlock {
        &self.sb
    }

    /// Node id of the root directory.
    #[inline]
    pub fn root(&self) -> Nid {
        self.sb.root_nid
    }

    /// Entry `index` of the blob table.
    pub fn blob(&self, index: u32) -> Result<BlobEntry> {
        BlobEntry::parse(self.image, &self.sb, index)
    }

    /// The blob table.
    pub fn blobs(&self) -> Result<Vec<BlobEntry>> {
        (0..self.sb.blob_count)
            .map(|index| self.blob(index))
            .collect()
    }

    /// Inode `nid`, which may be any number that a guest made up.
    #[inline]
    pub fn inode(&self, nid: Nid) -> Result<Inode> {
        Inode::parse(self.image, &self.sb, nid)
    }

    /// Node id and `DT_*` type of the entry `name` of `dir`; None when there is none.
    #[inline]
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<(Nid, u8)>> {
        dirent::lookup(self.image, dir, name)
    }

    /// Entries of `dir` from `cookie` on (0: from the start), "." and ".." among them, sorted by name. A cookie
    /// beyond the last entry yields nothing.
    pub fn entries(&self, dir: &Inode, cookie: u64) -> Entries<'a> {
        Entries::new(self.image, dir, cookie)
    }

    /// Target of a symbolic link.
    pub fn readlink(&self, inode: &Inode) -> Result<&'a [u8]> {
        if !inode.is_symlink() {
            return Err(FormatError::malformed(
                "inode.i_mode",
                inode.offset,
                "not a symbolic link",
            ));
        }
        let target = self.flat_data(inode, 0, inode.size)?;
        if target.len() as u64 != inode.size || target.contains(&0) {
            return Err(FormatError::malformed(
                "symlink",
                inode.offset,
                "a NUL in the target",
            ));
        }
        Ok(target)
    }

    /// Value of the extended attribute with this full name, such as `user.x`.
    pub fn xattr_get(&self, inode: &Inode, name: &[u8]) -> Result<Option<&'a [u8]>> {
        xattr::get(self.image, inode, name)
    }

    /// Extended attributes as (prefix, suffix, value).
    pub fn xattrs(&self, inode: &Inode) -> Xattrs<'a> {
        Xattrs::new(self.image, inode)
    }

    /// Parts of chunks that hold `len` bytes of a chunk-based file from `offset` on, clipped to its size. An inode
    /// that has no chunks yields one error.
    #[inline]
    pub fn chunks(&self, inode: &Inode, offset: u64, len: u64) -> Chunks<'a> {
        Chunks::new(self.image, &self.sb, inode, offset, len)
    }

    /// Bytes of a regular file that lies in the bootstrap, from `offset` on. At most `len`, clipped to its size, and
    /// fewer where the piece behind the inode begins: ask again from there. Empty at the end. An error for a file
    /// that is in chunks.
    pub fn inline_data(&self, inode: &Inode, offset: u64, len: u64) -> Result<&'a [u8]> {
        if !inode.is_file() || inode.layout == Layout::ChunkBased {
            return Err(FormatError::malformed(
                "inode.i_format",
                inode.offset,
                "not stored in the bootstrap",
            ));
        }
        self.flat_data(inode, offset, len)
    }

    fn flat_data(&self, inode: &Inode, offset: u64, len: u64) -> Result<&'a [u8]> {
        match inode.flat_extent(offset) {
            Some((at, available)) => need_slice(self.image, at, available.min(len), "inode.data"),
            None => Ok(&[]),
        }
    }

    /// Node ids of the files that the builder wants to be fetched first.
    pub fn prefetch(&self) -> impl Iterator<Item = Nid> + use<'a> {
        let table = slice(
            self.image,
            self.sb.prefetch_table_offset,
            self.sb.prefetch_table_size.into(),
        );
        records_of::<4>(table.unwrap_or_default())
            .map(|raw| Nid::from(u32::from_le_bytes(*raw)))
            .take_while(|&nid| nid != 0)
    }
}
