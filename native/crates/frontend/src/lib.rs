//! A vhost-user front-end without a VM: it owns guest memory, plays the driver's side of split virtqueues, and
//! watches the back-end's every write.
//!
//! The kit is a judge, so it shares no definitions with the daemon: message layouts, ring layouts and FUSE
//! headers are written down here a second time, from the specifications.
//!
//! | module | holds |
//! |---|---|
//! | [`connection`] | vhost-user framing over a Unix socket, with file descriptors |
//! | [`memory`] | guest memory from memfds, regions at any guest-physical address, an allocator |
//! | [`ring`] | the driver's side of one split ring, and what a device may not do to it |
//! | [`exchange`] | the buffers of one request: framing, poison, checks after completion |
//! | [`state`] | a ring with its eventfds, shared by threads; completions, quarantine |
//! | [`queue`] | its requests: submitting, taking replies; waiting and pausing in modules of their own |
//! | [`port`] | the way by which native loops use a queue: batches, no allocation |
//! | [`spec`], [`load`], [`histogram`] | what a load does, its loops with content checks, its latencies |
//! | [`walk`] | a whole tree listed as a guest lists it |
//! | [`digest`] | SHA-256 of many files with many reads in flight |
//! | [`kit`] | all of them together, as one front-end |

pub mod connection;
pub mod digest;
pub mod error;
pub mod exchange;
pub mod fault;
pub mod fuse;
pub mod histogram;
pub mod kit;
pub mod load;
pub mod memory;
mod operation;
mod pause;
pub mod port;
pub mod queue;
pub mod ring;
pub mod spec;
pub mod state;
pub mod sys;
#[cfg(test)]
mod testing;
mod waiting;
pub mod walk;

pub use connection::Connection;
pub use error::Error;
pub use fault::{FaultKind, Faults};
pub use kit::Kit;
pub use memory::{Memory, Region, Span};
pub use queue::{Queue, QueueOptions};
