//! The one error of this crate: which field of which structure, at which byte, breaks which rule.

use std::borrow::Cow;
use std::fmt;

/// Whether the input breaks the format or only uses a part of it that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The bytes break a rule of the format.
    Malformed,
    /// The bytes are well-formed and ask for a feature that this reader does not have.
    Unsupported,
}

/// A rule that the input breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    pub kind: ErrorKind,
    /// `structure.field`, a stable name.
    pub what: &'static str,
    /// Offset of the structure in the parsed bytes.
    pub offset: u64,
    /// What is wrong with the field.
    pub message: Cow<'static, str>,
}

/// Result of a parser.
pub type Result<T> = std::result::Result<T, FormatError>;

impl FormatError {
    /// The bytes at `offset` break the format.
    #[cold]
    pub fn malformed(
        what: &'static str,
        offset: u64,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        FormatError {
            kind: ErrorKind::Malformed,
            what,
            offset,
            message: message.into(),
        }
    }

    /// The bytes at `offset` ask for a feature that is not served.
    #[cold]
    pub fn unsupported(
        what: &'static str,
        offset: u64,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        FormatError {
            kind: ErrorKind::Unsupported,
            what,
            offset,
            message: message.into(),
        }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}: {}", self.what, self.offset, self.message)
    }
}

impl std::error::Error for FormatError {}
