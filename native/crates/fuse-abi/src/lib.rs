//! FUSE wire structures as the Linux kernel sends them (include/uapi/linux/fuse.h, 7.45). Little endian hosts only,
//! as virtio-fs devices follow the guest and x86-64 / arm64 guests are little endian.

#![forbid(unsafe_code)]

pub mod opcode;
pub mod reply;
pub mod request;

/// Protocol version: major.
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor that this server speaks; the smaller of both sides counts.
pub const KERNEL_MINOR_VERSION: u32 = 41;
/// Node id of the mount's root.
pub const ROOT_ID: u64 = 1;

/// INIT flags (low 32 bits from `flags`, high 32 bits from `flags2`).
pub mod init_flags {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}
