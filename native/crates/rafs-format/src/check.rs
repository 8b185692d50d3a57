//! A walk over the whole tree that finds out whether the chunk maps describe all that its files need.

use std::collections::HashSet;

use crate::chunk_map::ChunkMap;
use crate::error::{FormatError, Result};
use crate::inode::{Inode, Layout, Nid};
use crate::tree::Tree;

/// What a walk has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub directories: u64,
    pub files: u64,
    /// Symbolic links and special files.
    pub others: u64,
    /// Bytes of the files, hard links counted once.
    pub bytes: u64,
    /// Parts of files whose chunk has no digest.
    pub without_digest: u64,
}

/// Counts what was looked at. Names, attributes and chunk indexes of a sound image are bytes of their own, so that there
/// are never as many as it has bytes; inodes of a hostile one share them, and the work would be their product.
struct Steps(usize);

impl Steps {
    fn step(&mut self, inode: &Inode) -> Result<()> {
        match self.0.checked_sub(1) {
            Some(left) => self.0 = left,
            None => {
                return Err(FormatError::malformed(
                    "inode",
                    inode.offset,
                    "inodes share directories, attributes or chunk indexes",
                ));
            }
        }
        Ok(())
    }
}

/// Visits every inode once and resolves all its chunks in `maps` (one per blob, in the order of the blob table).
///
/// Fails at the first name, inode or chunk that breaks the format, at a chunk that no map describes, at a directory with
/// two parents, and where inodes share so much that there is no end.
pub fn check_references(tree: &Tree<'_>, maps: &[ChunkMap]) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut steps = Steps(tree.image().len());
    let mut seen: HashSet<Nid> = HashSet::from([tree.root()]);
    let mut directories = vec![tree.root()];
    while let Some(nid) = directories.pop() {
        usage.directories += 1;
        let dir = tree.inode(nid)?;
        for entry in tree.entries(&dir, 0) {
            let entry = entry?;
            steps.step(&dir)?;
            if matches!(entry.name, b"." | b"..") {
                continue;
            }
            let inode = tree.inode(entry.nid)?;
            if entry.d_type != 0 && entry.d_type != inode.d_type() {
                return Err(FormatError::malformed(
                    "dirent.file_type",
                    inode.offset,
                    "not that of the inode",
                ));
            }
            if !seen.insert(entry.nid) {
                if inode.is_dir() {
                    return Err(FormatError::malformed(
                        "dirent.nid",
                        inode.offset,
                        "a directory with two names",
                    ));
                }
                continue;
            }
            for attribute in tree.xattrs(&inode) {
                attribute?;
                steps.step(&inode)?;
            }
            if inode.is_dir() {
                directories.push(entry.nid);
            } else if inode.is_file() {
                usage.files += 1;
                usage.bytes = usage.bytes.saturating_add(inode.size);
                if inode.layout == Layout::ChunkBased {
                    for part in tree.chunks(&inode, 0, inode.size) {
                        let part = part?;
                        steps.step(&inode)?;
                        let Some(map) = maps.get(usize::from(part.blob_index)) else {
                            return Err(FormatError::malformed(
                                "chunk_index",
                                inode.offset,
                                "a blob without a map",
                            ));
                        };
                        if map.resolve(&part)?.digest.is_none() {
                            usage.without_digest += 1;
                        }
                    }
                }
            } else {
                usage.others += 1;
                if inode.is_symlink() {
                    tree.readlink(&inode)?;
                }
            }
        }
    }
    Ok(usage)
}
