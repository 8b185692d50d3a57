//! RAFS v6 bootstraps and blob metadata: parsers that do no I/O.
//!
//! [`Tree`] reads a bootstrap, [`ChunkTable`] and [`ChunkMap`] say where the chunks of its blobs lie and which digests
//! they have, [`Toc`] finds the sections of a blob. Input is untrusted: a malformed one yields a [`FormatError`],
//! never a panic, an endless loop, or an allocation that it sized.
#![forbid(unsafe_code)]

mod algorithm;
mod blob;
mod check;
mod chunk;
mod chunk_entry;
pub mod chunk_info;
mod chunk_map;
mod dirent;
mod error;
pub mod format;
mod inode;
mod runs;
mod superblock;
pub mod toc;
mod tree;
mod xattr;

pub use algorithm::{Compressor, Digester};
pub use blob::{BlobEntry, feature};
pub use check::{Usage, check_references};
pub use chunk::{ChunkRef, Chunks, chunk_flag};
pub use chunk_entry::ChunkInfo;
pub use chunk_map::{ChunkMap, ChunkTable};
pub use dirent::{Dirent, Entries};
pub use error::{ErrorKind, FormatError, Result};
pub use inode::{Inode, Layout, Nid};
pub use inode::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
pub use runs::Run;
pub use superblock::{SuperBlock, flag};
pub use toc::Toc;
pub use tree::Tree;
pub use xattr::{Xattr, Xattrs};
