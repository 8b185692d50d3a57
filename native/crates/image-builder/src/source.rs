//! The source tree as the system shows it: directories, attributes, links, extended attributes, and where files have
//! data. Paths are bytes relative to the top; none is too long, and symbolic links are never followed.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use crate::error::BuildError;

/// Longer paths are opened in pieces (PATH_MAX is 4096, with the NUL).
const PATH_PIECE: usize = 4000;
const SYMLINK_MAX: usize = 4096;

/// What `stat` says, as far as an image has room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    /// In the encoding that Linux shows to user space, of which the low half is EROFS's.
    pub rdev: u32,
    pub size: u64,
    /// Of 512 bytes.
    pub blocks: u64,
    pub mtime: i64,
    pub mtime_nsec: u32,
}

impl Stat {
    fn new(st: &libc::stat) -> Stat {
        Stat {
            dev: st.st_dev,
            ino: st.st_ino,
            mode: st.st_mode,
            nlink: st.st_nlink as _,
            uid: st.st_uid,
            gid: st.st_gid,
            rdev: st.st_rdev as u32,
            size: st.st_size as u64,
            blocks: st.st_blocks as u64,
            mtime: st.st_mtime,
            mtime_nsec: st.st_mtime_nsec as u32,
        }
    }

    pub fn is(&self, kind: u32) -> bool {
        self.mode & libc::S_IFMT == kind
    }

    pub fn is_dir(&self) -> bool {
        self.is(libc::S_IFDIR)
    }

    pub fn is_reg(&self) -> bool {
        self.is(libc::S_IFREG)
    }

    /// Identifies the file while it exists.
    pub fn key(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }

    /// Whether the content of `other` is that of this file, as far as the system tells.
    pub fn same_content(&self, other: &Stat) -> bool {
        let of = |s: &Stat| {
            (
                s.key(),
                s.mode & libc::S_IFMT,
                s.size,
                s.mtime,
                s.mtime_nsec,
            )
        };
        of(self) == of(other)
    }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn open_at(dir: Option<BorrowedFd<'_>>, name: &[u8], flags: i32) -> io::Result<OwnedFd> {
    let name = c_string(name)?;
    let dir = dir.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: `name` ends with NUL; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = check(libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC).into())?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Opens the top of the tree; a symbolic link to it is followed.
pub fn open_top(path: &[u8]) -> io::Result<OwnedFd> {
    open_at(None, path, libc::O_RDONLY | libc::O_DIRECTORY)
}

/// Opens `path` below `top` (empty: the top itself), however long it is.
fn open_below(top: BorrowedFd<'_>, path: &[u8], flags: i32) -> io::Result<OwnedFd> {
    if path.is_empty() {
        return open_at(Some(top), b".", flags);
    }
    let mut rest = path;
    let mut dir: Option<OwnedFd> = None;
    while rest.len() > PATH_PIECE {
        // Names have at most 255 bytes, so a piece always has a slash.
        let cut = rest[..PATH_PIECE]
            .iter()
            .rposition(|b| *b == b'/')
            .unwrap_or(0);
        let at = dir.as_ref().map_or(top, |fd| std::os::fd::AsFd::as_fd(fd));
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        dir = Some(open_at(Some(at), &rest[..cut], flags)?);
        rest = &rest[cut + 1..];
    }
    let at = dir.as_ref().map_or(top, |fd| std::os::fd::AsFd::as_fd(fd));
    open_at(Some(at), rest, flags | libc::O_NOFOLLOW)
}

/// Opens the directory `path` below `top` for [`list`] and [`stat_at`].
pub fn open_dir(top: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    open_below(top, path, libc::O_RDONLY | libc::O_DIRECTORY)
}

/// Opens the regular file `path` below `top`. Without O_NONBLOCK a FIFO in its place would stop the build.
pub fn open_file(top: BorrowedFd<'_>, path: &[u8]) -> io::Result<File> {
    open_below(top, path, libc::O_RDONLY | libc::O_NONBLOCK).map(File::from)
}

/// Opens what `path` leads to in the tree `top`, as for a process whose root that is: symbolic links, the last one too,
/// lead to files of the tree only.
pub fn open_in_root(top: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: all zero is a valid open_how.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the path ends with NUL, the size is that of `how`; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_openat2,
            top.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// The path of an open file, as the kernel knows it.
pub fn path_of(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt as _;
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(std::fs::read_link(link)?.into_os_string().into_vec())
}

pub fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    let mut st = MaybeUninit::uninit();
    // SAFETY: fstat fills the buffer when it succeeds.
    unsafe {
        check(libc::fstat(fd.as_raw_fd(), st.as_mut_ptr()).into())?;
        Ok(Stat::new(st.assume_init_ref()))
    }
}

/// The attributes of `name` in the directory `dir`.
pub fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Stat> {
    let name = c_string(name)?;
    let mut st = MaybeUninit::uninit();
    // SAFETY: `name` ends with NUL; fstatat fills the buffer when it succeeds.
    unsafe {
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        check(libc::fstatat(dir.as_raw_fd(), name.as_ptr(), st.as_mut_ptr(), flags).into())?;
        Ok(Stat::new(st.assume_init_ref()))
    }
}

/// What the symbolic link `name` in `dir` holds.
pub fn read_link_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    let name = c_string(name)?;
    let mut target = vec![0_u8; SYMLINK_MAX];
    // SAFETY: `name` ends with NUL, `target` has the length that is passed.
    let n = unsafe {
        let to = target.as_mut_ptr().cast();
        check(libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), to, target.len()) as i64)?
    };
    target.truncate(n as usize);
    Ok(target)
}

/// Names of a directory, in one piece of memory.
#[derive(Default)]
pub struct Names {
    bytes: Vec<u8>,
    /// Where each begins and how long it is, in byte order of the names.
    order: Vec<(u32, u8)>,
}

impl Names {
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.order.iter().map(|place| self.name(place))
    }

    fn name(&self, (at, len): &(u32, u8)) -> &[u8] {
        &self.bytes[*at as usize..*at as usize + usize::from(*len)]
    }
}

/// The names in `dir`, without "." and "..", sorted by their bytes.
pub fn list(dir: OwnedFd) -> io::Result<Names> {
    struct Stream(*mut libc::DIR);
    impl Drop for Stream {
        fn drop(&mut self) {
            // SAFETY: the stream came from fdopendir, and this is its last use.
            unsafe { libc::closedir(self.0) };
        }
    }
    // SAFETY: the descriptor is ours and goes over to the stream when that is made.
    let stream = Stream(unsafe { libc::fdopendir(dir.as_raw_fd()) });
    if stream.0.is_null() {
        std::mem::forget(stream);
        return Err(io::Error::last_os_error());
    }
    std::mem::forget(dir);
    let mut names = Names::default();
    loop {
        // SAFETY: errno is this thread's; the entry is valid until the next call on the stream, its name has a NUL.
        let name = unsafe {
            *libc::__errno_location() = 0;
            let entry = libc::readdir64(stream.0);
            if entry.is_null() {
                match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(0) => break,
                    e => return Err(e),
                }
            }
            CStr::from_ptr((*entry).d_name.as_ptr()).to_bytes()
        };
        if name == b"." || name == b".." {
            continue;
        }
        let too_long = |_| io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        let at = u32::try_from(names.bytes.len()).map_err(too_long)?;
        names
            .order
            .push((at, u8::try_from(name.len()).map_err(too_long)?));
        names.bytes.extend_from_slice(name);
    }
    let mut order = std::mem::take(&mut names.order);
    order.sort_unstable_by(|a, b| names.name(a).cmp(names.name(b)));
    names.order = order;
    Ok(names)
}

/// Where the next data of `file` at or behind `position` begins; `size` when there is none.
pub fn next_data(file: BorrowedFd<'_>, position: u64, size: u64) -> u64 {
    // SAFETY: no memory is passed.
    match check(unsafe { libc::lseek64(file.as_raw_fd(), position as i64, libc::SEEK_DATA) }) {
        Ok(at) => (at as u64).min(size),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => size,
        Err(_) => position, // the file system cannot tell
    }
}

/// Where the next hole at or behind `position`, which is in data, begins.
pub fn next_hole(file: BorrowedFd<'_>, position: u64, size: u64) -> u64 {
    // SAFETY: no memory is passed.
    match check(unsafe { libc::lseek64(file.as_raw_fd(), position as i64, libc::SEEK_HOLE) }) {
        Ok(at) => (at as u64).clamp(position, size),
        Err(_) => size,
    }
}

/// Fills `out` from `offset` on; returns how much there was before the end of the file.
pub fn read_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut n = 0;
    while n < out.len() {
        match file.read_at(&mut out[n..], offset + n as u64) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

/// Extended attributes, full names and values, of the file at `path` (that is not followed): the path of the top, a
/// slash and the path below it.
pub struct XattrReader {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Default for XattrReader {
    fn default() -> Self {
        XattrReader {
            names: vec![0; 1 << 16],
            value: vec![0; 1 << 16],
        }
    }
}

impl XattrReader {
    /// Calls `each` with name and value; none when the file system has no such attributes.
    pub fn read(&mut self, path: &CStr, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        // SAFETY: the path ends with NUL, the buffer has the length that is passed.
        let listed = check(unsafe {
            libc::llistxattr(
                path.as_ptr(),
                self.names.as_mut_ptr().cast(),
                self.names.len(),
            ) as i64
        });
        let n = match listed {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
            other => other? as usize,
        };
        let mut rest = &self.names[..n];
        while let Ok(name) = CStr::from_bytes_until_nul(rest) {
            rest = &rest[name.to_bytes_with_nul().len()..];
            // SAFETY: both strings end with NUL, the buffer has the length that is passed.
            let len = check(unsafe {
                let to = self.value.as_mut_ptr().cast();
                libc::lgetxattr(path.as_ptr(), name.as_ptr(), to, self.value.len()) as i64
            })?;
            each(name.to_bytes(), &self.value[..len as usize]);
        }
        Ok(())
    }
}

/// The names of a listing that are not `.` or `..`; for those who walk the tree on their own.
pub fn list_dir(top: BorrowedFd<'_>, path: &[u8]) -> Result<(OwnedFd, Names), BuildError> {
    let failed = |e: io::Error| BuildError::system(path, &e);
    let fd = open_dir(top, path).map_err(failed)?;
    let names = list(fd.try_clone().map_err(failed)?).map_err(failed)?;
    Ok((fd, names))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn paths_of_any_length_are_opened() {
        let folder = crate::testing::Folder::new();
        let top = open_top(folder.path().as_os_str().as_encoded_bytes()).unwrap();
        let mut path = Vec::new();
        let mut dir = top.try_clone().unwrap();
        for i in 0..60 {
            let name = [b'a' + i % 26; 200];
            let c = c_string(&name).unwrap();
            // SAFETY: the name ends with NUL.
            unsafe { assert_eq!(libc::mkdirat(dir.as_raw_fd(), c.as_ptr(), 0o755), 0) };
            dir = open_at(Some(dir.as_fd()), &name, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            let found = open_dir(top.as_fd(), &path).unwrap();
            assert_eq!(
                stat_fd(found.as_fd()).unwrap().key(),
                stat_fd(dir.as_fd()).unwrap().key()
            );
        }
    }

    #[test]
    fn links_are_not_followed_and_never_lead_out() {
        let folder = crate::testing::Folder::new();
        let top = open_top(folder.path().as_os_str().as_encoded_bytes()).unwrap();
        std::fs::create_dir(folder.path().join("etc")).unwrap();
        std::fs::write(folder.path().join("etc/passwd"), b"inside").unwrap();
        std::os::unix::fs::symlink("/etc", folder.path().join("link")).unwrap();
        assert!(open_dir(top.as_fd(), b"link").is_err());
        let found = open_in_root(top.as_fd(), b"link/passwd").unwrap();
        assert_eq!(stat_fd(found.as_fd()).unwrap().size, 6);
        assert!(open_in_root(top.as_fd(), b"../../etc/hostname").is_err());
    }

    #[test]
    fn names_are_sorted_by_their_bytes() {
        let folder = crate::testing::Folder::new();
        for name in ["b", "a", "ab", "B", "\u{e4}"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let names = list(open_top(folder.path().as_os_str().as_encoded_bytes()).unwrap()).unwrap();
        let found: Vec<&[u8]> = names.iter().collect();
        assert_eq!(found, [&b"B"[..], b"a", b"ab", b"b", "\u{e4}".as_bytes()]);
    }
}
