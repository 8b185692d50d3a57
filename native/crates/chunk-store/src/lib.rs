//! Chunk states, extents, decoding and verification: what the agent writes and the worker reads.
//!
//! Per blob there are four objects, all shared between processes by file descriptor:
//!
//! * the **state file**: one atomic word per chunk, [`layout`] names the bits; only [`layout::VERIFIED`] may be served;
//! * the **data file**: the blob's uncompressed address space, sparse;
//! * the **extent table**: where a chunk's bytes lie, and whether the daemon's spill memfd stands in for the data file;
//! * the **touched table**: from which chunks reads were answered.
//!
//! Publishing order: bytes first, then (release) the state or spill word. A reader takes a word (acquire), copies
//! the bytes, and looks at the same word again: [`BlobView::locate`] and [`BlobView::unchanged`]. The writer is
//! [`Store`].

pub mod decode;
mod disk;
mod evict;
mod fds;
mod image;
pub mod layout;
mod mapping;
mod nydusd;
mod paths;
mod pool;
pub mod protocol;
pub mod spec;
mod spill;
mod store;
mod sys;
mod tables;
mod view;
mod watch;

pub use disk::{BootId, Options, kernel_boot_id};
pub use evict::{Goal, Sweep, reclaim, sweep};
pub use fds::{SharedFds, TableFds};
pub use image::Promise;
pub use mapping::Mapping;
pub use paths::paths;
pub use pool::Pool;
pub use spill::SpillStats;
pub use store::{Blob, Outcome, StateCounts, Store};
pub use tables::Tables;
pub use view::{BlobView, Extent, Location, Source};
pub use watch::{Seen, Watch};
