//! Why an image cannot be built.

use std::io;

/// A failed build. The path of a source file is relative to the source, as bytes.
#[derive(Debug)]
pub enum BuildError {
    /// Something in the source tree cannot be stored.
    Source {
        path: Vec<u8>,
        reason: String,
        remedy: &'static str,
    },
    /// A file of the output, or a temporary one beside it, cannot be written.
    Output(io::Error),
    /// The image would break a limit of its format.
    TooLarge(String),
    /// The caller asked for an end.
    Cancelled,
    /// A bug here: a thread panicked.
    Panicked(String),
}

impl BuildError {
    pub(crate) fn source(path: &[u8], reason: impl Into<String>) -> BuildError {
        BuildError::Source {
            path: path.into(),
            reason: reason.into(),
            remedy: "",
        }
    }

    /// What the system said about the file at `path`.
    pub(crate) fn system(path: &[u8], e: &io::Error) -> BuildError {
        BuildError::source(path, text(e))
    }
}

impl From<io::Error> for BuildError {
    /// Only for files that the builder writes itself.
    fn from(e: io::Error) -> BuildError {
        BuildError::Output(e)
    }
}

/// The system's text for `e`, without the number that std appends.
pub(crate) fn text(e: &io::Error) -> String {
    let full = e.to_string();
    match e.raw_os_error() {
        Some(code) => full
            .strip_suffix(&format!(" (os error {code})"))
            .unwrap_or(&full)
            .to_owned(),
        None => full,
    }
}
