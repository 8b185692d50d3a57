//! Children that do one thing and tell how it ended.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It told this.
    Result(i64),
    /// It told nothing, and ended with this code ...
    Exit(i32),
    /// ... or of this signal.
    Signal(i32),
}

/// The result of a system call, or the negative errno.
pub fn c_int_or_errno(result: libc::c_long) -> i64 {
    if result < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return -i64::from(errno.unwrap_or(libc::EIO));
    }
    #[allow(clippy::useless_conversion, reason = "c_long is i32 elsewhere")]
    i64::from(result)
}

fn pipe() -> (std::fs::File, std::fs::File) {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (
            std::fs::File::from_raw_fd(fds[0]),
            std::fs::File::from_raw_fd(fds[1]),
        )
    }
}

/// Runs `body` in a child, whose stdin, stdout and stderr are a pipe's ends and /dev/null.
pub fn as_child(body: impl FnOnce() -> i64) -> End {
    let (mut ours, theirs) = pipe();
    let (input, output) = pipe();
    // SAFETY: the child makes system calls, allocates at most (glibc's malloc survives a fork), and ends by _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: descriptors of this process; `_exit` runs nothing of the test's.
        unsafe {
            libc::dup2(input.as_raw_fd(), 0);
            libc::dup2(output.as_raw_fd(), 1);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            let Ok(result) = result else { libc::_exit(101) };
            libc::write(theirs.as_raw_fd(), (&raw const result).cast(), 8);
            libc::_exit(0);
        }
    }
    drop(theirs);
    let mut told = Vec::new();
    ours.read_to_end(&mut told).expect("a pipe");
    let mut status = 0;
    // SAFETY: writes the status of our child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    match told.try_into() {
        Ok(bytes) => End::Result(i64::from_ne_bytes(bytes)),
        Err(_) if libc::WIFSIGNALED(status) => End::Signal(libc::WTERMSIG(status)),
        Err(_) => End::Exit(libc::WEXITSTATUS(status)),
    }
}

/// `/proc/<pid>/status` of a child that `confine` has confined.
pub fn confined(confine: impl FnOnce() -> std::io::Result<()>) -> String {
    let (mut ready, tell) = pipe();
    let (wait, go_on) = pipe();
    // SAFETY: as in `as_child`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = u8::from(confine().is_err());
        let mut byte = [code];
        // SAFETY: one byte each, of our own.
        unsafe {
            libc::close(go_on.as_raw_fd());
            libc::write(tell.as_raw_fd(), byte.as_ptr().cast(), 1);
            libc::read(wait.as_raw_fd(), byte.as_mut_ptr().cast(), 1);
            libc::_exit(0);
        }
    }
    drop(tell);
    let mut code = [1u8];
    ready.read_exact(&mut code).expect("a child that lives");
    assert_eq!(code, [0]);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a child");
    drop(go_on);
    // SAFETY: waits for our child.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    status
}

/// A field of `/proc/<pid>/status`.
pub fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .expect(name)
        .trim()
}

/// A door: its name, and what is done; the result is that of a system call.
pub type Door = (&'static str, fn() -> i64);

/// The door called `name`.
pub fn door(doors: &[Door], name: &str) -> fn() -> i64 {
    doors.iter().find(|d| d.0 == name).expect(name).1
}
