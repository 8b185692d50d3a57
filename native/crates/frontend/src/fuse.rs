//! The little of the FUSE protocol that the front-end itself needs (Linux include/uapi/linux/fuse.h). Everything
//! else arrives as bytes.

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const RELEASE: u32 = 18;
pub const OPENDIR: u32 = 27;
pub const RELEASEDIR: u32 = 29;
pub const READDIRPLUS: u32 = 44;
pub const BATCH_FORGET: u32 = 42;

/// Size of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Size of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// Sizes of the answers' bodies.
pub const ATTR_OUT: usize = 104;
pub const ENTRY_OUT: usize = 128;
pub const OPEN_OUT: usize = 16;

/// `struct fuse_in_header` for a request of `len` bytes in all, sent by root (uid 0, gid 0, pid 1).
pub fn in_header(len: u32, opcode: u32, unique: u64, nodeid: u64) -> [u8; IN_HEADER] {
    let mut h = [0u8; IN_HEADER];
    h[0..4].copy_from_slice(&len.to_le_bytes());
    h[4..8].copy_from_slice(&opcode.to_le_bytes());
    h[8..16].copy_from_slice(&unique.to_le_bytes());
    h[16..24].copy_from_slice(&nodeid.to_le_bytes());
    h[32..36].copy_from_slice(&1u32.to_le_bytes());
    h
}

/// `struct fuse_read_in`: handle, offset and size; flags as for a plain O_RDONLY file.
pub fn read_in(fh: u64, offset: u64, size: u32) -> [u8; 40] {
    let mut b = [0u8; 40];
    b[0..8].copy_from_slice(&fh.to_le_bytes());
    b[8..16].copy_from_slice(&offset.to_le_bytes());
    b[16..20].copy_from_slice(&size.to_le_bytes());
    b
}

/// `struct fuse_open_in` of a plain O_RDONLY open.
pub const OPEN_IN: [u8; 8] = [0; 8];

/// `struct fuse_release_in` of a handle.
pub fn release_in(fh: u64) -> [u8; 24] {
    let mut b = [0u8; 24];
    b[0..8].copy_from_slice(&fh.to_le_bytes());
    b
}

/// `struct fuse_forget_in`: one lookup less.
pub const FORGET_ONE: [u8; 8] = 1u64.to_le_bytes();

/// A parsed `struct fuse_out_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutHeader {
    pub len: u32,
    pub error: i32,
    pub unique: u64,
}

impl OutHeader {
    pub fn parse(b: &[u8; OUT_HEADER]) -> Self {
        let [l0, l1, l2, l3, e0, e1, e2, e3, u @ ..] = *b;
        OutHeader {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            error: i32::from_le_bytes([e0, e1, e2, e3]),
            unique: u64::from_le_bytes(u),
        }
    }
}
