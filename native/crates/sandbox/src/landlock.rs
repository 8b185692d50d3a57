//! Landlock: which files, ports and processes are out of reach (linux/landlock.h, Documentation/userspace-api/landlock.rst).
//!
//! A ruleset names what it handles; what is handled and not allowed is denied. What a kernel does not know cannot be
//! handled, so a ruleset is made for the ABI that was found.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The newest ABI whose rights are used here.
pub const NEWEST: u32 = 6;

const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;

const FS_EXECUTE: u64 = 1 << 0;
const FS_WRITE_FILE: u64 = 1 << 1;
const FS_READ_FILE: u64 = 1 << 2;
const FS_READ_DIR: u64 = 1 << 3;
const FS_REMOVE_DIR: u64 = 1 << 4;
const FS_REMOVE_FILE: u64 = 1 << 5;
const FS_MAKE_DIR: u64 = 1 << 7;
const FS_MAKE_REG: u64 = 1 << 8;
const FS_MAKE_SOCK: u64 = 1 << 9;
const FS_MAKE_FIFO: u64 = 1 << 10;
const FS_MAKE_SYM: u64 = 1 << 12;
const FS_REFER: u64 = 1 << 13;
const FS_TRUNCATE: u64 = 1 << 14;
/// What can be said of a file that is no directory.
const FS_OF_FILES: u64 = FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE;

const NET_BIND_TCP: u64 = 1 << 0;
const NET_CONNECT_TCP: u64 = 1 << 1;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1 << 0;
const SCOPE_SIGNAL: u64 = 1 << 1;

/// All rights to files that `abi` knows.
fn fs_rights(abi: u32) -> u64 {
    let n = match abi {
        0 => 0,
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    (1 << n) - 1
}

/// What may be done with a file, or with everything below a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read files, list directories.
    Read,
    /// ... and run programs.
    Run,
    /// Read, write, make and remove files and directories. Not: devices, and programs to run.
    Write,
    /// Remove files.
    Remove,
}

impl Access {
    fn rights(self) -> u64 {
        let read = FS_READ_FILE | FS_READ_DIR;
        match self {
            Access::Read => read,
            Access::Run => read | FS_EXECUTE,
            Access::Write => {
                read | FS_WRITE_FILE
                    | FS_TRUNCATE
                    | FS_REMOVE_DIR
                    | FS_REMOVE_FILE
                    | FS_MAKE_DIR
                    | FS_MAKE_REG
                    | FS_MAKE_SOCK
                    | FS_MAKE_FIFO
                    | FS_MAKE_SYM
                    | FS_REFER
            }
            Access::Remove => FS_REMOVE_FILE,
        }
    }
}

/// A path and what may be done there. One that does not exist is passed over.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a> {
    pub path: &'a Path,
    pub access: Access,
}

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: RawFd,
}

/// What is to be handled.
pub struct Ruleset {
    abi: u32,
    net: u64,
    scoped: u64,
}

/// The ABI that this kernel offers, at most [`NEWEST`].
pub fn abi() -> io::Result<u32> {
    // SAFETY: with this flag the call reads nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version)
        .map(|version| version.min(NEWEST))
        .map_err(|_| io::Error::last_os_error())
}

impl Ruleset {
    /// Files by rules; no TCP port to listen on; signals only to each other.
    pub fn daemon(abi: u32) -> Ruleset {
        Ruleset {
            abi,
            net: NET_BIND_TCP,
            scoped: SCOPE_SIGNAL,
        }
    }

    /// Files by rules; no TCP at all; neither signals nor abstract sockets of anybody else.
    pub fn worker(abi: u32) -> Ruleset {
        Ruleset {
            abi,
            net: NET_BIND_TCP | NET_CONNECT_TCP,
            scoped: SCOPE_SIGNAL | SCOPE_ABSTRACT_UNIX_SOCKET,
        }
    }

    /// Enforces it for this thread and those that it starts, with files as `allowed`. Needs no_new_privs.
    pub fn enforce(&self, allowed: &[Allowed<'_>]) -> io::Result<()> {
        let attr = RulesetAttr {
            handled_access_fs: fs_rights(self.abi),
            handled_access_net: if self.abi >= 4 { self.net } else { 0 },
            scoped: if self.abi >= 6 { self.scoped } else { 0 },
        };
        // SAFETY: reads `attr`; fields that an older kernel does not know are zero, which it accepts.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                &raw const attr,
                size_of::<RulesetAttr>(),
                0u32,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let ruleset = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        for one in allowed {
            self.add(&ruleset, one)?;
        }
        // SAFETY: plain system call.
        if unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) }
            != 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn add(&self, ruleset: &OwnedFd, allowed: &Allowed<'_>) -> io::Result<()> {
        let Ok(path) = CString::new(allowed.path.as_os_str().as_bytes()) else {
            return Ok(());
        };
        // SAFETY: a NUL-terminated path; the result is checked.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
        if fd < 0 {
            return Ok(());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let parent = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: fstat writes into a zeroed stat that we own.
        let mode = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(parent.as_raw_fd(), &mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat.st_mode
        };
        let mut rights = allowed.access.rights() & fs_rights(self.abi);
        if mode & libc::S_IFMT != libc::S_IFDIR {
            rights &= FS_OF_FILES;
        }
        if rights == 0 {
            return Ok(());
        }
        let attr = PathBeneathAttr {
            allowed_access: rights,
            parent_fd: parent.as_raw_fd(),
        };
        // SAFETY: reads `attr`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset.as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const attr,
                0u32,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
