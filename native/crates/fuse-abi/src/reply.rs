//! What is answered: structures as fixed byte arrays, built without padding surprises.

/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER_LEN: usize = 16;
/// Bytes of `struct fuse_attr`.
pub const ATTR_LEN: usize = 88;
/// Bytes of `struct fuse_attr_out`.
pub const ATTR_OUT_LEN: usize = 16 + ATTR_LEN;
/// Bytes of `struct fuse_entry_out`.
pub const ENTRY_OUT_LEN: usize = 40 + ATTR_LEN;
/// Bytes of `struct fuse_init_out`.
pub const INIT_OUT_LEN: usize = 64;
/// Bytes of `struct fuse_init_out` before protocol 7.23.
pub const INIT_OUT_LEN_COMPAT_22: usize = 24;
/// Bytes of `struct fuse_statfs_out`.
pub const STATFS_OUT_LEN: usize = 80;
/// Bytes of `struct fuse_dirent` before the name.
pub const DIRENT_LEN: usize = 24;

/// Seconds for which the kernel may keep an entry or its attributes of an immutable tree: about 136 years.
pub const FOREVER_S: u64 = u32::MAX as u64;

/// Fills a structure from its start. All is inlined, so that each position is a constant and nothing is checked.
struct Cursor<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline(always)]
    fn u16(&mut self, v: u16) {
        self.bytes(&v.to_le_bytes());
    }
    #[inline(always)]
    fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }
    #[inline(always)]
    fn u64(&mut self, v: u64) {
        self.bytes(&v.to_le_bytes());
    }
    #[inline(always)]
    fn bytes(&mut self, v: &[u8]) {
        self.out[self.at..self.at + v.len()].copy_from_slice(v);
        self.at += v.len();
    }
}

/// `struct fuse_out_header`; `error` is a positive errno or 0, `len` counts the header.
#[inline]
pub fn out_header(len: u32, error: i32, unique: u64) -> [u8; OUT_HEADER_LEN] {
    let mut out = [0; OUT_HEADER_LEN];
    let mut c = Cursor {
        out: &mut out,
        at: 0,
    };
    c.u32(len);
    c.bytes(&(-error).to_le_bytes());
    c.u64(unique);
    out
}

/// The values of `struct fuse_attr`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
}

impl Attr {
    #[inline(always)]
    fn put(&self, c: &mut Cursor<'_>) {
        c.u64(self.ino);
        c.u64(self.size);
        c.u64(self.size.div_ceil(512));
        // An immutable tree knows one time: it stands for atime and ctime too.
        for _ in 0..3 {
            c.bytes(&self.mtime.to_le_bytes());
        }
        for _ in 0..3 {
            c.u32(self.mtime_nsec);
        }
        c.u32(self.mode);
        c.u32(self.nlink);
        c.u32(self.uid);
        c.u32(self.gid);
        c.u32(self.rdev);
        c.u32(4096);
        c.u32(0);
    }
}

/// `struct fuse_attr_out`, valid for ever.
#[inline]
pub fn attr_out(attr: &Attr) -> [u8; ATTR_OUT_LEN] {
    let mut out = [0; ATTR_OUT_LEN];
    let mut c = Cursor {
        out: &mut out,
        at: 0,
    };
    c.u64(FOREVER_S);
    c.u64(0);
    attr.put(&mut c);
    out
}

/// `struct fuse_entry_out`, valid for ever. `nodeid` 0 is a negative entry that the kernel may keep.
#[inline]
pub fn entry_out(nodeid: u64, attr: &Attr) -> [u8; ENTRY_OUT_LEN] {
    let mut out = [0; ENTRY_OUT_LEN];
    let mut c = Cursor {
        out: &mut out,
        at: 0,
    };
    c.u64(nodeid);
    c.u64(0);
    c.u64(FOREVER_S);
    c.u64(FOREVER_S);
    c.u32(0);
    c.u32(0);
    attr.put(&mut c);
    out
}

/// The values of `struct fuse_init_out` that this server decides.
#[derive(Clone, Copy, Debug, Default)]
pub struct InitOut {
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u64,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub max_pages: u16,
}

/// `struct fuse_init_out`.
pub fn init_out(init: &InitOut) -> [u8; INIT_OUT_LEN] {
    let mut out = [0; INIT_OUT_LEN];
    let mut c = Cursor {
        out: &mut out,
        at: 0,
    };
    c.u32(crate::KERNEL_VERSION);
    c.u32(init.minor);
    c.u32(init.max_readahead);
    c.u32(init.flags as u32);
    c.u16(init.max_background);
    c.u16(init.congestion_threshold);
    c.u32(init.max_write);
    c.u32(1); // time_gran: nanoseconds
    c.u16(init.max_pages);
    c.u16(0);
    c.u32((init.flags >> 32) as u32);
    out
}

/// `struct fuse_statfs_out` of a full, read-only file system of `blocks` × 4096 bytes and `files` inodes.
pub fn statfs_out(blocks: u64, files: u64) -> [u8; STATFS_OUT_LEN] {
    let mut out = [0; STATFS_OUT_LEN];
    let mut c = Cursor {
        out: &mut out,
        at: 0,
    };
    c.u64(blocks);
    c.u64(0);
    c.u64(0);
    c.u64(files);
    c.u64(0);
    c.u32(4096);
    c.u32(255);
    c.u32(4096);
    out
}

/// Length in a reply of a `struct fuse_dirent` with a name of `name_len` bytes: padded to 8.
#[inline]
pub fn dirent_len(name_len: usize) -> usize {
    (DIRENT_LEN + name_len).next_multiple_of(8)
}

/// Appends a `struct fuse_dirent`; `next` is the offset at which a later READDIR goes on.
#[inline]
pub fn push_dirent(out: &mut Vec<u8>, ino: u64, next: u64, d_type: u8, name: &[u8]) {
    let end = out.len() + dirent_len(name.len());
    out.extend_from_slice(&ino.to_le_bytes());
    out.extend_from_slice(&next.to_le_bytes());
    out.extend_from_slice(&(name.len() as u32).to_le_bytes());
    out.extend_from_slice(&u32::from(d_type).to_le_bytes());
    out.extend_from_slice(name);
    out.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirents_are_padded() {
        let mut out = Vec::new();
        push_dirent(&mut out, 1, 2, 4, b"abc");
        assert_eq!(out.len(), 32);
        assert_eq!(dirent_len(8), 32);
        assert_eq!(dirent_len(9), 40);
    }

    #[test]
    fn errors_are_negative_on_the_wire() {
        let h = out_header(16, 2, 9);
        assert_eq!(i32::from_le_bytes([h[4], h[5], h[6], h[7]]), -2);
    }
}
