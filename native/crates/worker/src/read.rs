//! READ: from a range of a file to verified bytes in guest memory.

use std::os::fd::RawFd;

use chunk_store::{Location, Source};
use fuse_abi::request::ReadIn;
use rafs_format::{Layout, Tree};
use virtq::{Chain, Segment};

use crate::mount::Mount;
use crate::ops::{Errno, inode};
use crate::parked::ChunkId;
use crate::pool::Piece;
use crate::residency::Residency;

/// How a READ went.
pub enum ReadOutcome {
    /// So many bytes are in guest memory, after room for the out header.
    Copied(usize),
    /// Chunks are missing: see [`Reader::missing`].
    Missing,
    /// The page cache has not got all of it: [`Reader::pieces`] are to be read by the pool.
    WouldBlock,
}

/// Buffers that are reused from request to request.
#[derive(Default)]
pub struct Reader {
    /// Where the bytes are, in file order.
    pub pieces: Vec<Piece>,
    /// What is not there, and the file offset at which it is needed.
    pub missing: Vec<(ChunkId, u64)>,
    segments: Vec<Segment>,
    /// preadv2(RWF_NOWAIT) is refused by these descriptors' file systems; the pool reads them, or memory does.
    blocking: Vec<RawFd>,
    residency: Residency,
    /// The file that was read last is executable by somebody.
    pub executable: bool,
}

/// Bytes that one READ may ask for: 1024 pages, which is what INIT grants at most, of the largest page size (64 KiB).
/// A driver that ignores INIT could otherwise have gigabytes copied, or bought by the pool, with one head.
pub const MAX_READ: u32 = 64 << 20;
/// iovecs per system call (UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// A chunk that was replaced during the copy is looked up again this often before the request waits for control.
const MAX_TRIES: usize = 3;

impl Reader {
    /// Finds the bytes of a READ and copies them to `chain` after `skip` bytes. `room` is what fits there.
    pub fn read(
        &mut self,
        mount: &Mount,
        tree: &Tree<'_>,
        nodeid: u64,
        args: &[u8],
        chain: &Chain,
        skip: usize,
    ) -> Result<ReadOutcome, Errno> {
        let asked = ReadIn::parse(args).ok_or(Errno(libc::EINVAL))?;
        if asked.size > MAX_READ {
            return Err(Errno(libc::EINVAL));
        }
        let node = inode(tree, nodeid)?;
        match node.mode & libc::S_IFMT {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno(libc::EISDIR)),
            _ => return Err(Errno(libc::EINVAL)),
        }
        self.executable = node.mode & 0o111 != 0;
        let room = chain.writable_len().saturating_sub(skip);
        let left = node.size.saturating_sub(asked.offset);
        let len = u64::from(asked.size).min(left).min(room as u64);
        if len == 0 {
            return Ok(ReadOutcome::Copied(0));
        }
        if node.layout != Layout::ChunkBased {
            // Two pieces when the range reaches into the block behind the inode: less would mean the end of the file.
            let mut copied = 0;
            while (copied as u64) < len {
                let (at, left) = (asked.offset + copied as u64, len - copied as u64);
                let data = tree.inline_data(&node, at, left)?;
                match chain.write_at(skip + copied, data) {
                    0 => break,
                    n => copied += n,
                }
            }
            return Ok(ReadOutcome::Copied(copied));
        }
        for _ in 0..MAX_TRIES {
            self.locate(mount, tree, &node, asked.offset, len)?;
            if !self.missing.is_empty() {
                return Ok(ReadOutcome::Missing);
            }
            if !self.copy(chain, skip)? {
                return Ok(ReadOutcome::WouldBlock);
            }
            if settled(mount, &self.pieces) {
                return Ok(ReadOutcome::Copied(len as usize));
            }
        }
        // Replaced again and again while it was copied: let control put it somewhere stable.
        let first = self.pieces.first().ok_or(Errno(libc::EIO))?;
        let chunk = ChunkId {
            blob_index: first.blob_index,
            chunk_index: first.chunk_index,
        };
        self.missing.push((chunk, asked.offset));
        Ok(ReadOutcome::Missing)
    }

    fn locate(
        &mut self,
        mount: &Mount,
        tree: &Tree<'_>,
        node: &rafs_format::Inode,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        self.pieces.clear();
        self.missing.clear();
        let mut at = offset;
        for chunk in tree.chunks(node, offset, len) {
            let chunk = chunk?;
            let blob = mount.blob(chunk.blob_index).ok_or(Errno(libc::EIO))?;
            let id = ChunkId {
                blob_index: chunk.blob_index,
                chunk_index: chunk.chunk_index,
            };
            match blob.locate(chunk.chunk_index) {
                Location::Invalid => return Err(Errno(libc::EIO)),
                Location::Absent => self.missing.push((id, at)),
                Location::Ready(extent) => {
                    let end = u64::from(chunk.chunk_offset) + u64::from(chunk.len);
                    if end > u64::from(extent.size) || extent.offset > i64::MAX as u64 - end {
                        return Err(Errno(libc::EIO));
                    }
                    self.pieces.push(Piece {
                        fd: mount
                            .file(chunk.blob_index, extent.file)
                            .ok_or(Errno(libc::EIO))?,
                        offset: extent.offset + u64::from(chunk.chunk_offset),
                        len: chunk.len,
                        blob_index: chunk.blob_index,
                        chunk_index: chunk.chunk_index,
                        stamp: extent.stamp,
                        in_memory: extent.file == Source::Spill,
                    });
                }
            }
            at += u64::from(chunk.len);
        }
        if at != offset + len {
            return Err(Errno(libc::EIO));
        }
        Ok(())
    }

    /// Copies all pieces without blocking; false when the page cache lacks a part.
    fn copy(&mut self, chain: &Chain, skip: usize) -> Result<bool, Errno> {
        let (mut next, mut at) = (0, skip);
        while let Some(first) = self.pieces.get(next).copied() {
            // Chunks that are neighbours in their file are read with one call.
            let mut len = u64::from(first.len);
            next += 1;
            while let Some(piece) = self.pieces.get(next) {
                if piece.fd != first.fd || piece.offset != first.offset + len {
                    break;
                }
                len += u64::from(piece.len);
                next += 1;
            }
            if self.blocking.contains(&first.fd) && !first.in_memory {
                return Ok(false);
            }
            if !first.in_memory && self.residency.is_absent(&first, len) {
                return Ok(false);
            }
            let mut done = 0;
            while done < len {
                self.segments.clear();
                if !chain.write_segments(at, (len - done) as usize, &mut self.segments) {
                    return Err(Errno(libc::EIO));
                }
                match read_segments(&first, done, &self.segments) {
                    Ok(0) => return Err(Errno(libc::EIO)),
                    Ok(n) => {
                        done += n as u64;
                        at += n;
                    }
                    Err(libc::EINTR) => {}
                    Err(libc::EAGAIN) => {
                        self.residency.missed(&first);
                        return Ok(false);
                    }
                    Err(libc::EOPNOTSUPP) => {
                        self.blocking.push(first.fd);
                        return Ok(false);
                    }
                    Err(_) => return Err(Errno(libc::EIO)),
                }
            }
        }
        Ok(true)
    }
}

fn read_segments(piece: &Piece, done: u64, segments: &[Segment]) -> Result<usize, i32> {
    let count = segments.len().min(IOV_MAX) as i32;
    let offset = (piece.offset + done) as libc::off_t;
    // A memfd has no disk behind it, and knows no RWF_NOWAIT.
    let flags = if piece.in_memory { 0 } else { libc::RWF_NOWAIT };
    // SAFETY: the segments lie in mapped guest memory that the device may write.
    let n = unsafe { libc::preadv2(piece.fd, segments.as_ptr(), count, offset, flags) };
    usize::try_from(n).map_err(|_| {
        std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    })
}

/// Whether all pieces are still what they were when they were located: zeros of a hole or another chunk's bytes
/// must not reach the guest. Chunks that served are marked as touched.
pub fn settled(mount: &Mount, pieces: &[Piece]) -> bool {
    pieces.iter().all(|p| {
        mount.blob(p.blob_index).is_some_and(|blob| {
            let unchanged = blob.unchanged(p.chunk_index, p.stamp);
            if unchanged {
                blob.touch(p.chunk_index);
            }
            unchanged
        })
    })
}
