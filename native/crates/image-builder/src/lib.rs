//! Makes RAFS v6 images from source trees: reads the tree once, cuts files into chunks, digests and compresses them on
//! all cores, and writes blob and bootstrap. The same tree gives the same bytes whatever the number of cores. Memory
//! grows by a few bytes per file and chunk, never with the size of files: what is known about them lies in spools.
//!
//! Fixed-size records at the head of the bootstrap and the table of contents are the caller's: this crate moves what is
//! large.

mod blob;
mod bootstrap;
mod codec;
mod dedup;
mod error;
mod feeder;
mod job;
mod layout;
mod pipeline;
mod prefetch;
mod scan;
mod source;
mod spool;
#[cfg(test)]
mod testing;
mod worker;
mod xattr;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rafs_format::{Compressor, Digester};

pub use blob::{Blob, BlobTail};
pub use bootstrap::Plan;
pub use error::BuildError;
pub use job::Progress;
pub use scan::Tree;

/// What an image may have at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Chunks of a blob, plus one.
    pub chunks: u64,
    /// Bytes of a blob's uncompressed address space.
    pub uncompressed: u64,
    /// Bytes of a blob.
    pub compressed: u64,
}

/// How to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// A power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    pub compressor: Compressor,
    pub digester: Digester,
    /// Threads that read and compress.
    pub jobs: usize,
    pub limits: Limits,
}

/// A tree about to be built.
pub struct Builder {
    top: OwnedFd,
    top_path: Vec<u8>,
    folder: PathBuf,
    options: Options,
    listed: prefetch::Listed,
}

/// A tree whose content is in the blob, and whose bootstrap is not written yet.
pub struct Built {
    pub tree: Tree,
    pub blob: Blob,
    pub tail: BlobTail,
    pub options: Options,
}

impl Builder {
    /// Opens the directory `top`. Temporary files go to `folder`.
    pub fn new(top: &[u8], folder: PathBuf, options: Options) -> Result<Builder, BuildError> {
        let fd = source::open_top(top).map_err(|e| BuildError::system(b"", &e))?;
        Ok(Builder {
            top: fd,
            top_path: top.into(),
            folder,
            options,
            listed: prefetch::Listed::default(),
        })
    }

    /// Lists bytes `[offset, offset + length)` of a file, or all files below a directory, for prefetching: their chunks
    /// come first in the blob, in the order of the list. Returns false when the tree has no such file or directory.
    pub fn prefetch(&mut self, path: &[u8], offset: u64, length: u64) -> Result<bool, BuildError> {
        self.listed.add(self.top.as_fd(), path, offset, length)
    }

    /// Reads the tree and writes its content to `blob`, from its start.
    pub fn run(mut self, blob: File, progress: &Progress) -> Result<Built, BuildError> {
        let mut sink = blob::BlobWriter::new(blob, &self.folder, &self.options, progress)?;
        let mut tree = None;
        let top = self.top.as_fd();
        let (listed, options) = (&mut self.listed, &self.options);
        pipeline::run(top, options, progress, &mut sink, |feeder| {
            listed.feed(top, options.chunk_size, feeder)?;
            let place = (top, self.top_path.as_slice());
            tree = Some(scan::Scanner::new(place, &self.folder, feeder, progress, listed).run()?);
            Ok(())
        })?;
        let (blob, tail) = sink.into_tail()?;
        let tree = tree.ok_or(BuildError::Cancelled)?;
        Ok(Built {
            tree,
            blob,
            tail,
            options: self.options,
        })
    }
}

impl Built {
    /// Gives every inode its place; what comes before `meta_offset`, a multiple of 4096, is the caller's.
    pub fn layout(&self, meta_offset: u64) -> Result<Plan, BuildError> {
        bootstrap::layout(&self.tree, self.blob.n_chunks, &self.options, meta_offset)
    }

    /// The prefetch table.
    pub fn prefetch_nids(&self, plan: &Plan) -> Vec<u32> {
        let listed = self.tree.listed.iter().flatten();
        listed.map(|ino| plan.nids[*ino as usize - 1]).collect()
    }

    /// Writes the bootstrap to `out`; `head` is its beginning.
    pub fn write(&self, plan: &Plan, head: &[u8], out: &File) -> io::Result<()> {
        bootstrap::write(plan, &self.tree, &self.blob, &self.options, head, out)
    }
}

#[cfg(test)]
#[path = "builder_tests.rs"]
mod tests;
