//! What can go wrong on the front-end's side.

use std::fmt;
use std::io;

/// A failure of the front-end itself or of the connection; misbehaviour on rings is a [`crate::FaultKind`].
#[derive(Debug)]
pub enum Error {
    /// An operating system call failed; the text names it.
    Os(&'static str, io::Error),
    /// A parameter makes no sense.
    Invalid(String),
    /// The back-end closed the connection.
    Closed,
    /// Nothing arrived in time.
    Timeout,
    /// No descriptor is free in the ring.
    RingFull,
    /// Guest memory has no free extent of this size.
    OutOfMemory(u64),
    /// The back-end broke the protocol so that going on makes no sense.
    Broken(String),
    /// The queue was reset while the request was in flight.
    Reset,
}

impl Error {
    /// The failure of the system call `what` just made.
    pub(crate) fn last_os(what: &'static str) -> Self {
        Error::Os(what, io::Error::last_os_error())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Os(what, e) => write!(f, "{what}: {e}"),
            Error::Invalid(text) => f.write_str(text),
            Error::Closed => f.write_str("the back-end closed the connection"),
            Error::Timeout => f.write_str("nothing arrived in time"),
            Error::RingFull => f.write_str("the ring has no free descriptor"),
            Error::OutOfMemory(n) => write!(f, "guest memory has no free extent of {n} bytes"),
            Error::Broken(text) => f.write_str(text),
            Error::Reset => f.write_str("the queue was reset while the request was in flight"),
        }
    }
}

impl std::error::Error for Error {}
