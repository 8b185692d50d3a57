//! Which chunks the files below a node consist of, as runs: what a prefetch list means.

use std::collections::HashSet;

use crate::error::Result;
use crate::inode::{Inode, Layout, Nid};
use crate::tree::Tree;

/// So many index entries and directory entries are looked at: inodes of a hostile image may share one array of
/// indexes, and the work would be their product.
const MAX_STEPS: u64 = 1 << 25;

/// Chunks with consecutive numbers that follow each other in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub nid: Nid,
    /// Where the first chunk starts in the file.
    pub offset: u64,
    pub blob_index: u16,
    pub first: u32,
    pub count: u32,
}

struct Walk<'t, 'a, F> {
    tree: &'t Tree<'a>,
    steps: u64,
    seen: HashSet<Nid>,
    give: F,
}

impl<F: FnMut(Run)> Walk<'_, '_, F> {
    fn step(&mut self) -> bool {
        self.steps += 1;
        self.steps <= MAX_STEPS
    }

    fn file(&mut self, inode: &Inode, offset: u64, len: u64) -> Result<()> {
        if !inode.is_file() || inode.layout != Layout::ChunkBased {
            return Ok(());
        }
        let stride = u64::from(self.tree.superblock().chunk_size);
        let end = offset.saturating_add(len);
        let mut at = offset - offset % stride;
        let mut run: Option<Run> = None;
        for part in self.tree.chunks(inode, at, end - at) {
            let part = part?;
            if !self.step() {
                break;
            }
            match &mut run {
                Some(run)
                    if run.blob_index == part.blob_index
                        && run.first.checked_add(run.count) == Some(part.chunk_index) =>
                {
                    run.count += 1;
                }
                _ => {
                    let next = Run {
                        nid: inode.nid,
                        offset: at,
                        blob_index: part.blob_index,
                        first: part.chunk_index,
                        count: 1,
                    };
                    if let Some(done) = run.replace(next) {
                        (self.give)(done);
                    }
                }
            }
            at = at.saturating_add(stride);
        }
        if let Some(done) = run {
            (self.give)(done);
        }
        Ok(())
    }

    /// Everything below a directory, names in order, files before the directories beside them.
    fn below(&mut self, directory: Inode) -> Result<()> {
        let mut waiting = vec![directory];
        while let Some(directory) = waiting.pop() {
            let first = waiting.len();
            for entry in self.tree.entries(&directory, 0) {
                let entry = entry?;
                if !self.step() {
                    return Ok(());
                }
                if matches!(entry.name, b"." | b"..") || !self.seen.insert(entry.nid) {
                    continue;
                }
                let inode = self.tree.inode(entry.nid)?;
                if inode.is_dir() {
                    waiting.push(inode);
                } else {
                    self.file(&inode, 0, inode.size)?;
                }
            }
            // The stack gives back the last one first.
            if let Some(added) = waiting.get_mut(first..) {
                added.reverse();
            }
        }
        Ok(())
    }
}

impl Tree<'_> {
    /// The chunks behind `len` bytes from `offset` on of the file `nid`, or behind all files below the directory
    /// `nid`, each file once. Whole chunks; what lies in the bootstrap has none. Memory grows with the number of names
    /// below the directory.
    pub fn runs(&self, nid: Nid, offset: u64, len: u64, give: impl FnMut(Run)) -> Result<()> {
        let inode = self.inode(nid)?;
        let mut walk = Walk {
            tree: self,
            steps: 0,
            seen: HashSet::from([nid]),
            give,
        };
        if inode.is_dir() {
            walk.below(inode)
        } else {
            walk.file(&inode, offset.min(inode.size), len)
        }
    }
}
