//! Sizes of the format that reading the tree and writing the bootstrap share (docs/formats/rafs-v6.md), in bytes.

pub const BLOCK: u64 = 4096;
/// An entry of a directory, without its name.
pub const DIRENT: usize = 12;
