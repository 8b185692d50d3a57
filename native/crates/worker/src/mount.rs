//! The image that a worker serves: metadata tree, chunk tables, and the node ids by which the guest names files.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use chunk_store::{BlobView, Location, SharedFds, Source};
use rafs_format::{Nid, Tree};

use crate::fds::duplicate;
use crate::memory_map::MemoryMap;
use crate::parked::ChunkId;

/// Descriptors of one blob's tables, as control handed them over.
#[derive(Clone, Copy, Debug)]
pub struct BlobFds {
    pub state: RawFd,
    pub extents: RawFd,
    pub touched: RawFd,
    pub data: Option<RawFd>,
}

/// Descriptors of one mounted image.
#[derive(Clone, Debug, Default)]
pub struct MountFds {
    pub bootstrap: RawFd,
    pub spill: RawFd,
    pub blobs: Vec<BlobFds>,
}

/// A mapped image.
pub struct Mount {
    map: MemoryMap,
    blobs: Vec<BlobView>,
    spill: RawFd,
}

/// Node ids are stateless: mount index and node number. 1 is the root of the session; the others are `nid + 2`,
/// so that no nid (0 included) meets it.
const NID_BIAS: u64 = 2;
const NID_MASK: u64 = (1 << 48) - 1;

impl Mount {
    /// Maps the image behind `fds`. The bootstrap is parsed once here, so that later borrows cannot fail.
    pub fn open(fds: &MountFds) -> io::Result<Mount> {
        // SAFETY: the caller keeps the descriptor open during this call.
        let map = MemoryMap::sealed(unsafe { BorrowedFd::borrow_raw(fds.bootstrap) })?;
        Tree::parse(map.bytes())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        let blobs = fds
            .blobs
            .iter()
            .map(|b| {
                BlobView::open(SharedFds {
                    state: duplicate(b.state)?,
                    extents: duplicate(b.extents)?,
                    touched: duplicate(b.touched)?,
                    data: b.data.map(duplicate).transpose()?,
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Mount {
            map,
            blobs,
            spill: fds.spill,
        })
    }

    /// The metadata. Cheap enough per thread, not per request.
    pub fn tree(&self) -> io::Result<Tree<'_>> {
        Tree::parse(self.map.bytes())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))
    }

    /// The chunk tables of blob `index`.
    #[inline]
    pub fn blob(&self, index: u16) -> Option<&BlobView> {
        self.blobs.get(usize::from(index))
    }

    /// Where a chunk is.
    pub fn locate(&self, chunk: ChunkId) -> Location {
        let blob = self.blob(chunk.blob_index);
        blob.map_or(Location::Invalid, |blob| blob.locate(chunk.chunk_index))
    }

    /// The descriptor behind `source` for blob `index`.
    pub fn file(&self, index: u16, source: Source) -> Option<RawFd> {
        match source {
            Source::Spill => Some(self.spill),
            Source::Data => self.blob(index)?.data_fd().map(|fd| fd.as_raw_fd()),
        }
    }
}

/// The node number behind a node id; `None` when the id belongs to no mount.
#[inline]
pub fn nid_of(nodeid: u64, root: Nid) -> Option<Nid> {
    if nodeid == fuse_abi::ROOT_ID {
        return Some(root);
    }
    if nodeid >> 48 != 0 {
        return None;
    }
    nodeid.checked_sub(NID_BIAS)
}

/// The node id of a node number.
#[inline]
pub fn nodeid_of(nid: Nid, root: Nid) -> u64 {
    if nid == root {
        fuse_abi::ROOT_ID
    } else {
        (nid + NID_BIAS) & NID_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ids_are_reversible() {
        for nid in [0, 1, 2, 128, 1 << 27] {
            assert_eq!(nid_of(nodeid_of(nid, 128), 128), Some(nid));
        }
        assert_eq!(nodeid_of(128, 128), 1);
        assert_eq!(nid_of(0, 128), None);
        assert_eq!(nid_of(1 << 48 | 5, 128), None);
    }
}
