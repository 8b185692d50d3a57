//! Why chains and rings are refused.

/// Why a chain cannot be served. All but one are the driver's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is not below the table's size, or the chain loops.
    BadIndex,
    /// An address is not in shared memory.
    BadAddress,
    /// An address lies in a region that the VMM has removed: it may come back.
    MemoryAway,
    /// A readable descriptor follows a writable one.
    BadOrder,
    /// An indirect table is malformed (size, nesting, NEXT beside INDIRECT).
    BadIndirect,
    /// More parts than any real request has.
    TooLong,
}

/// Why a ring cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The size is zero, no power of two, or larger than supported.
    BadSize,
    /// A part of the ring is not in shared memory, or is misaligned.
    BadAddress,
    /// The avail index runs ahead of what the ring can hold, or names a head that does not exist.
    BadAvail,
}
