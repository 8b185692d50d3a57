//! The few system calls that the standard library does not wrap.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_name(name: &str) -> io::Result<CString> {
    CString::new(name)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "NUL in a file name"))
}

/// A memfd of `len` bytes whose size can never change again, so that no mapping of it can raise SIGBUS.
pub fn sealed_memfd(name: &CStr, len: u64) -> io::Result<File> {
    // SAFETY: `name` is a C string; the result is checked.
    let fd = check(unsafe {
        libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain fcntl on an open descriptor.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// An eventfd that starts with nothing to read, and never blocks.
pub fn eventfd() -> io::Result<File> {
    // SAFETY: a plain call, whose result is checked.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Another open file description of the same file, with the access mode of `flags`.
pub fn reopen(fd: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path = c_name(&format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    // SAFETY: `path` is a C string; the result is checked.
    let fd = check(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which signal tells that a lease is to be given back (asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Whether another process has `file` open, which this one has opened once.
///
/// A lease for writing is given to nobody else's file alone. It is asked for first, because a confined process sees
/// no other one; where the file is somebody else's, or its file system has no leases, processes are looked at.
pub fn in_use_elsewhere(file: &File) -> io::Result<bool> {
    let fd = file.as_raw_fd();
    // Who opens the file at this moment makes the kernel send a signal, by default one that kills.
    // SAFETY: plain fcntl on an open descriptor.
    check(unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) })?;
    // SAFETY: as above.
    match check(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) }) {
        Ok(_) => {
            // SAFETY: as above. Whoever opens the file meanwhile waits until the lease is gone.
            check(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) })?;
            Ok(false)
        }
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(_) => Ok(open_elsewhere(file_id(file)?)),
    }
}

/// Opens `name` in `dir` for reading and writing, making it (mode 0600) when it is not there. Symbolic links are
/// refused.
pub fn open_file_at(dir: BorrowedFd<'_>, name: &str) -> io::Result<File> {
    let name = c_name(name)?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `name` is a C string; the result is checked.
    let fd = check(unsafe {
        libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, 0o600 as libc::c_uint)
    })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Opens a directory.
pub fn open_dir(path: &str) -> io::Result<OwnedFd> {
    let path = c_name(path)?;
    // SAFETY: `path` is a C string; the result is checked.
    let fd = check(unsafe {
        libc::open(
            path.as_ptr(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes `name` from `dir`; that it is not there is fine.
pub fn unlink_at(dir: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let name = c_name(name)?;
    // SAFETY: `name` is a C string.
    match check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) }) {
        Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
        _ => Ok(()),
    }
}

/// Inode number and size of an open file.
pub fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    // SAFETY: `stat` is plain old data, for which all zeros is a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `fd` is open and `stat` is valid for writes.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) })?;
    Ok((stat.st_ino, u64::try_from(stat.st_size).unwrap_or(0)))
}

/// Inode number of `name` in `dir`; `None` when it is not there.
pub fn inode_at(dir: BorrowedFd<'_>, name: &str) -> io::Result<Option<u64>> {
    let name = c_name(name)?;
    // SAFETY: `stat` is plain old data, for which all zeros is a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `name` is a C string and `stat` is valid for writes.
    let r = unsafe {
        libc::fstatat(
            dir.as_raw_fd(),
            name.as_ptr(),
            &mut stat,
            libc::AT_SYMLINK_NOFOLLOW,
        )
    };
    match check(r) {
        Ok(_) => Ok(Some(stat.st_ino)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Takes the exclusive lock of the file, waiting for its holder (who keeps it for microseconds). It ends with the
/// file description, at a crash as well.
pub fn lock_exclusive(fd: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        // SAFETY: plain flock on an open descriptor.
        match check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => return other.map(drop),
        }
    }
}

fn try_flock(fd: BorrowedFd<'_>, operation: libc::c_int) -> io::Result<bool> {
    loop {
        // SAFETY: plain flock on an open descriptor.
        return match check(unsafe { libc::flock(fd.as_raw_fd(), operation | libc::LOCK_NB) }) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        };
    }
}

/// Takes the exclusive lock of the file if nobody holds it, or shares it.
pub fn try_lock_exclusive(fd: BorrowedFd<'_>) -> io::Result<bool> {
    try_flock(fd, libc::LOCK_EX)
}

/// Shares the lock of the file, unless somebody holds it alone.
pub fn try_lock_shared(fd: BorrowedFd<'_>) -> io::Result<bool> {
    try_flock(fd, libc::LOCK_SH)
}

/// Gives bytes of a file back to the file system; they read as zeros from then on.
pub fn punch(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let to_off =
        |n| libc::off_t::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
    let (offset, len) = (to_off(offset)?, to_off(len)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: plain fallocate on an open descriptor.
        match check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => return other.map(drop),
        }
    }
}

/// Whether any of the bytes take up space. File systems without the call say yes.
pub fn has_data(fd: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    let Ok(start) = libc::off_t::try_from(offset) else {
        return false;
    };
    // SAFETY: plain lseek on an open descriptor, whose position nobody uses.
    match check_off(unsafe { libc::lseek(fd.as_raw_fd(), start, libc::SEEK_DATA) }) {
        Ok(found) => found < offset.saturating_add(len),
        Err(e) => e.raw_os_error() != Some(libc::ENXIO),
    }
}

fn check_off(result: libc::off_t) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Bytes of the file system that unprivileged users may still fill, and its size.
pub fn free_bytes(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    // SAFETY: `statvfs` is plain old data, for which all zeros is a value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `fd` is open and `stat` is valid for writes.
    check(unsafe { libc::fstatvfs(fd.as_raw_fd(), &mut stat) })?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok((bytes(stat.f_bavail), bytes(stat.f_blocks)))
}

/// What tells a file from all others as long as it exists: device and inode number.
pub fn file_id(file: &File) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    file.metadata().map(|m| (m.dev(), m.ino()))
}

/// Whether another process has the file open (as far as this user may see). Slow: looks at every descriptor.
pub fn open_elsewhere(id: (u64, u64)) -> bool {
    use std::os::unix::fs::MetadataExt;
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|p| {
            let name = p.file_name();
            let name = name.as_encoded_bytes();
            name.iter().all(u8::is_ascii_digit) && name != own.as_bytes()
        })
        .filter_map(|p| std::fs::read_dir(p.path().join("fd")).ok())
        .flatten()
        .flatten()
        .filter_map(|fd| std::fs::metadata(fd.path()).ok())
        .any(|m| (m.dev(), m.ino()) == id)
}

/// Opens `name` in `dir` for reading and writing if it is there. Symbolic links are refused.
pub fn open_existing_at(dir: BorrowedFd<'_>, name: &str) -> io::Result<Option<File>> {
    let name = c_name(name)?;
    let flags = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `name` is a C string; the result is checked.
    match check(unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags) }) {
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(fd) => Ok(Some(unsafe { File::from_raw_fd(fd) })),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Releases the lock of [`lock_exclusive`].
pub fn unlock(fd: BorrowedFd<'_>) {
    // SAFETY: plain flock on an open descriptor.
    unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_UN) };
}

/// Reserves disk space for the first `len` bytes: writing to a hole through a mapping raises SIGBUS on a full disk.
/// File systems without the call are left as they are.
pub fn reserve(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: plain fallocate on an open descriptor.
    match check(unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, len) }) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_open_once_is_in_use_by_nobody_else() {
        let path = std::env::temp_dir().join(format!("vr-lease-{}", std::process::id()));
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        assert!(!in_use_elsewhere(&file).unwrap());
        let other = File::open(&path).unwrap();
        assert!(in_use_elsewhere(&file).unwrap());
        drop(other);
        assert!(!in_use_elsewhere(&file).unwrap());
        std::fs::remove_file(path).unwrap();
    }
}
