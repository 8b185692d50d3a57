//! Requests that are answered from metadata alone: pure functions from arguments to reply bytes.

use std::sync::OnceLock;

use fuse_abi::reply::{self, Attr};
use fuse_abi::request::{self, InitIn, LseekIn, ReadIn};
use fuse_abi::{init_flags, opcode};
use rafs_format::{FormatError, Inode, Tree};

use crate::mount::{nid_of, nodeid_of};

/// An errno for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<FormatError> for Errno {
    fn from(_: FormatError) -> Errno {
        Errno(libc::EIO)
    }
}

/// Longest symlink target that Linux accepts, in bytes.
const PATH_MAX: usize = 4096;
/// Longest attribute name, NUL not counted.
const XATTR_NAME_MAX: usize = 255;
/// The kernel's limit for one value or one list.
const XATTR_SIZE_MAX: usize = 65536;
/// Bytes of one answer to READDIR, whatever buffer the driver offers: it asks again for the rest.
const READDIR_MAX: usize = 1 << 20;

/// What INIT agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    pub minor: u32,
    pub flags: u64,
}

/// The inode behind a node id.
pub fn inode(tree: &Tree<'_>, nodeid: u64) -> Result<Inode, Errno> {
    let nid = nid_of(nodeid, tree.root()).ok_or(Errno(libc::ESTALE))?;
    Ok(tree.inode(nid)?)
}

/// User and group of this process, which never change.
static OWNER: OnceLock<(u32, u32)> = OnceLock::new();

#[inline]
fn attr(tree: &Tree<'_>, inode: &Inode) -> Attr {
    // Without EXPLICIT_UID_GID an image names no owners: the daemon's stand in, as with nydusd.
    let (uid, gid) = if tree.superblock().explicit_uid_gid() {
        (inode.uid, inode.gid)
    } else {
        *OWNER.get_or_init(|| {
            // SAFETY: plain system calls that cannot fail.
            unsafe { (libc::geteuid(), libc::getegid()) }
        })
    };
    Attr {
        ino: inode.nid,
        size: inode.size,
        mtime: inode.mtime,
        mtime_nsec: inode.mtime_nsec,
        mode: inode.mode,
        nlink: inode.nlink,
        uid,
        gid,
        rdev: inode.rdev,
    }
}

fn file_type(inode: &Inode) -> u32 {
    inode.mode & libc::S_IFMT
}

/// Answers `opcode` into `out`, which has room for `room` bytes beyond the out header.
pub fn answer(
    tree: &Tree<'_>,
    code: u32,
    nodeid: u64,
    args: &[u8],
    room: usize,
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    match code {
        opcode::LOOKUP => lookup(tree, nodeid, args, out),
        opcode::GETATTR => {
            out.extend_from_slice(&reply::attr_out(&attr(tree, &inode(tree, nodeid)?)));
            Ok(())
        }
        opcode::READLINK => readlink(tree, nodeid, out),
        opcode::STATFS => {
            let sb = tree.superblock();
            out.extend_from_slice(&reply::statfs_out(u64::from(sb.blocks), sb.inos));
            Ok(())
        }
        opcode::GETXATTR => getxattr(tree, nodeid, args, out),
        opcode::LISTXATTR => listxattr(tree, nodeid, args, out),
        opcode::READDIR | opcode::READDIRPLUS => {
            readdir(tree, nodeid, args, code == opcode::READDIRPLUS, room, out)
        }
        opcode::LSEEK => lseek(tree, nodeid, args, out),
        opcode::ACCESS
        | opcode::RELEASE
        | opcode::RELEASEDIR
        | opcode::DESTROY
        | opcode::SYNCFS => Ok(()),
        // ENOSYS is sticky for the whole connection: the kernel stops asking, and opens without a message.
        opcode::OPEN
        | opcode::OPENDIR
        | opcode::FLUSH
        | opcode::FSYNC
        | opcode::FSYNCDIR
        | opcode::STATX => Err(Errno(libc::ENOSYS)),
        code if opcode::is_write(code) => Err(Errno(libc::EROFS)),
        _ => Err(Errno(libc::ENOSYS)),
    }
}

/// Answers INIT. `queue_size` bounds how many pages one request can carry.
pub fn init(
    args: &[u8],
    queue_size: u16,
    has_xattr: bool,
    out: &mut Vec<u8>,
) -> Result<Option<Negotiated>, Errno> {
    let asked = InitIn::parse(args).ok_or(Errno(libc::EINVAL))?;
    if asked.major < fuse_abi::KERNEL_VERSION {
        return Err(Errno(libc::EPROTO));
    }
    if asked.major > fuse_abi::KERNEL_VERSION {
        // The kernel has to ask again with our major (include/uapi/linux/fuse.h, "Protocol changelog").
        let only_version = reply::InitOut {
            minor: fuse_abi::KERNEL_MINOR_VERSION,
            ..Default::default()
        };
        out.extend_from_slice(&reply::init_out(&only_version));
        return Ok(None);
    }
    let mut wanted = init_flags::ASYNC_READ
        | init_flags::BIG_WRITES
        | init_flags::DO_READDIRPLUS
        | init_flags::READDIRPLUS_AUTO
        | init_flags::ASYNC_DIO
        | init_flags::NO_OPEN_SUPPORT
        | init_flags::NO_OPENDIR_SUPPORT
        | init_flags::PARALLEL_DIROPS
        | init_flags::MAX_PAGES
        | init_flags::CACHE_SYMLINKS
        | init_flags::EXPLICIT_INVAL_DATA
        | init_flags::INIT_EXT
        | init_flags::ALLOW_IDMAP;
    if has_xattr {
        wanted |= init_flags::POSIX_ACL;
    }
    let flags = asked.flags & wanted;
    let minor = asked.minor.min(fuse_abi::KERNEL_MINOR_VERSION);
    // In header, out header, and room for their neighbours in the descriptor table.
    let max_pages = queue_size.saturating_sub(4).clamp(1, 1024);
    out.extend_from_slice(&reply::init_out(&reply::InitOut {
        minor,
        max_readahead: asked.max_readahead,
        flags,
        // The default of 12 throttles read-ahead; a read-only tree has no reason to.
        max_background: u16::MAX,
        congestion_threshold: (u16::MAX / 4) * 3,
        max_write: 128 * 1024,
        max_pages,
    }));
    if asked.minor < 23 {
        out.truncate(reply::INIT_OUT_LEN_COMPAT_22);
    }
    Ok(Some(Negotiated { minor, flags }))
}

fn lookup(tree: &Tree<'_>, nodeid: u64, args: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    let dir = inode(tree, nodeid)?;
    if file_type(&dir) != libc::S_IFDIR {
        return Err(Errno(libc::ENOTDIR));
    }
    let name = request::name(args).ok_or(Errno(libc::EINVAL))?;
    if name.len() > 255 {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    match tree.lookup(&dir, name)? {
        Some((nid, _)) => {
            let child = tree.inode(nid)?;
            out.extend_from_slice(&reply::entry_out(
                nodeid_of(nid, tree.root()),
                &attr(tree, &child),
            ));
        }
        // Node id 0 with a validity: a negative entry that the kernel keeps. ENOENT would be asked again each time.
        None => out.extend_from_slice(&reply::entry_out(0, &Attr::default())),
    }
    Ok(())
}

fn readlink(tree: &Tree<'_>, nodeid: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
    let link = inode(tree, nodeid)?;
    if file_type(&link) != libc::S_IFLNK {
        return Err(Errno(libc::EINVAL));
    }
    let target = tree.readlink(&link)?;
    if target.len() > PATH_MAX {
        return Err(Errno(libc::EIO));
    }
    out.extend_from_slice(target);
    Ok(())
}

/// A reply that depends on the caller's buffer: its length for size 0, ERANGE when it does not fit.
fn sized(value: &[u8], size: u32, out: &mut Vec<u8>) -> Result<(), Errno> {
    if size == 0 {
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    } else if value.len() > size as usize {
        return Err(Errno(libc::ERANGE));
    } else {
        out.extend_from_slice(value);
    }
    Ok(())
}

fn getxattr(tree: &Tree<'_>, nodeid: u64, args: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    if !tree.superblock().has_xattr() {
        return Err(Errno(libc::ENOSYS));
    }
    let size = request::xattr_size(args).ok_or(Errno(libc::EINVAL))?;
    let name = args
        .get(request::GETXATTR_IN_LEN..)
        .and_then(request::name)
        .ok_or(Errno(libc::EINVAL))?;
    if name.len() > XATTR_NAME_MAX {
        return Err(Errno(libc::ERANGE));
    }
    let node = inode(tree, nodeid)?;
    let value = tree.xattr_get(&node, name)?.ok_or(Errno(libc::ENODATA))?;
    sized(value, size, out)
}

fn listxattr(tree: &Tree<'_>, nodeid: u64, args: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    if !tree.superblock().has_xattr() {
        return Err(Errno(libc::ENOSYS));
    }
    let size = request::xattr_size(args).ok_or(Errno(libc::EINVAL))?;
    let node = inode(tree, nodeid)?;
    let start = out.len();
    for item in tree.xattrs(&node) {
        let (prefix, suffix, _) = item?;
        out.extend_from_slice(prefix);
        out.extend_from_slice(suffix);
        out.push(0);
        if out.len() - start > XATTR_SIZE_MAX {
            return Err(Errno(libc::E2BIG));
        }
    }
    let len = out.len() - start;
    if size == 0 {
        out.truncate(start);
        out.extend_from_slice(&(len as u64).to_le_bytes());
    } else if len > size as usize {
        return Err(Errno(libc::ERANGE));
    }
    Ok(())
}

fn readdir(
    tree: &Tree<'_>,
    nodeid: u64,
    args: &[u8],
    plus: bool,
    room: usize,
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    let dir = inode(tree, nodeid)?;
    if file_type(&dir) != libc::S_IFDIR {
        return Err(Errno(libc::ENOTDIR));
    }
    let asked = ReadIn::parse(args).ok_or(Errno(libc::EINVAL))?;
    let limit = out.len() + room.min(asked.size as usize).min(READDIR_MAX);
    for item in tree.entries(&dir, asked.offset) {
        let entry = item?;
        let len = reply::dirent_len(entry.name.len()) + if plus { reply::ENTRY_OUT_LEN } else { 0 };
        if out.len() + len > limit {
            break;
        }
        if plus {
            // "." and ".." carry no entry: the kernel would count references for them.
            let dots = entry.name == b"." || entry.name == b"..";
            let head = if dots {
                reply::entry_out(0, &Attr::default())
            } else {
                let child = tree.inode(entry.nid)?;
                reply::entry_out(nodeid_of(entry.nid, tree.root()), &attr(tree, &child))
            };
            out.extend_from_slice(&head);
        }
        reply::push_dirent(out, entry.nid, entry.next_cookie, entry.d_type, entry.name);
    }
    Ok(())
}

fn lseek(tree: &Tree<'_>, nodeid: u64, args: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    let asked = LseekIn::parse(args).ok_or(Errno(libc::EINVAL))?;
    let node = inode(tree, nodeid)?;
    if asked.offset >= node.size {
        return Err(Errno(libc::ENXIO));
    }
    // RAFS v6 stores holes as chunks of zeros: all is data, and the only hole is the end.
    let found = match i32::try_from(asked.whence) {
        Ok(libc::SEEK_DATA) => asked.offset,
        Ok(libc::SEEK_HOLE) => node.size,
        _ => return Err(Errno(libc::EINVAL)),
    };
    out.extend_from_slice(&found.to_le_bytes());
    Ok(())
}

#[cfg(test)]
#[path = "ops_tests.rs"]
mod tests;
