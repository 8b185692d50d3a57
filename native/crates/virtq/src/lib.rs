//! Guest memory and split virtqueues, device side.
//!
//! Nothing here trusts the guest: addresses are translated through the region table each time, every index is
//! reduced by the ring size, chains are bounded, and what is read once is kept in locals, because the guest may
//! change its memory at any moment.

mod away;
mod chain;
mod error;
mod memory;
mod ring;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use away::Away;
pub use chain::{Chain, Segment};
pub use error::{ChainError, RingError};
pub use memory::{GuestMemory, RegionSpec};
pub use ring::{RingAddresses, Vring};
