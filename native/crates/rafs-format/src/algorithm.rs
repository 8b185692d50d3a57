//! Numbers of compressors and digesters, the same in superblock, blob table and chunk-info header.

/// How chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Compressor {
    None = 0,
    /// A raw LZ4 block without a size header.
    Lz4Block = 1,
    Gzip = 2,
    Zstd = 3,
}

impl Compressor {
    /// The algorithm with this number.
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Compressor::None),
            1 => Some(Compressor::Lz4Block),
            2 => Some(Compressor::Gzip),
            3 => Some(Compressor::Zstd),
            _ => None,
        }
    }
}

/// How chunk digests are made; both have 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Digester {
    Blake3 = 0,
    Sha256 = 1,
}

impl Digester {
    /// The algorithm with this number.
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Digester::Blake3),
            1 => Some(Digester::Sha256),
            _ => None,
        }
    }
}
