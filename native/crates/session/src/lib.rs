//! The memory shared by keeper, worker and control: one memfd with a fixed layout.
//!
//! | part | written by | read by | survives |
//! |---|---|---|---|
//! | session record | worker (FUSE), keeper (processes) | all | worker and control |
//! | in-flight logs | worker | next worker | worker |
//! | post rings | worker | control | worker and control |
//! | trace rings | worker | control | worker and control |
//! | counters, heartbeats | worker | keeper, control | worker |
//! | failpoints | tests | worker | - |
//!
//! Everything is atomics: any of the processes may be killed between two instructions. No part holds a pointer, and
//! readers check every number, because a worker that a guest has taken over may write anything here.

pub mod clock;
pub mod failpoint;
pub mod inflight;
pub mod rings;
pub mod say;
mod shared;

pub use shared::{
    MAX_QUEUE_SIZE, MAX_QUEUES, MAX_THREADS, QueueRecord, SessionRecord, Shared, ThreadRecord, add,
};
