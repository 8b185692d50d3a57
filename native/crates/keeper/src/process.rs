//! Processes: names, signals, pidfds, and what a child does before anything else.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Sets the process's `comm` (at most 15 bytes).
pub fn set_name(name: &CStr) {
    // SAFETY: a NUL-terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Blocks `signals` and returns a descriptor that becomes readable when one is pending.
pub fn signalfd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before use; the descriptor is checked.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Raises the soft limit of open files to the hard one: an image of 255 blobs has 1020 descriptors, and a worker
/// holds them twice.
pub fn raise_descriptor_limit() {
    // SAFETY: reads and writes a limit that we own. When it cannot be raised, opening says so later.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// A pidfd of a child.
pub fn pidfd(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Waits for a child that has ended or is about to; its wait status.
pub fn reap(pid: libc::pid_t) -> libc::c_int {
    let mut status = 0;
    loop {
        // SAFETY: writes into `status`.
        let n = unsafe { libc::waitpid(pid, &mut status, 0) };
        if n == pid || io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return status;
        }
    }
}

/// SIGKILL to a child that has not been reaped.
pub fn kill(pid: libc::pid_t) {
    // SAFETY: plain system call.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Whether the process behind `pidfd` has ended (it may still have to be reaped).
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that we own.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}

/// SIGKILL, then wait: after this the child writes nothing anywhere.
pub fn kill_and_reap(pid: libc::pid_t) -> libc::c_int {
    kill(pid);
    reap(pid)
}

/// SIGKILL, then waits at most `timeout_ms`: for a caller that ends itself and leaves the rest to init.
pub fn kill_and_wait(pid: libc::pid_t, pidfd: &OwnedFd, timeout_ms: libc::c_int) {
    kill(pid);
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that we own.
    if unsafe { libc::poll(&mut poll, 1, timeout_ms) } > 0 {
        reap(pid);
    }
}

/// A wait status in words.
pub fn describe_status(status: libc::c_int) -> String {
    if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS {
        format!(
            "signal {}: it made a system call that its sandbox forbids; the kernel's log says which (type=1326)",
            libc::SIGSYS
        )
    } else if libc::WIFSIGNALED(status) {
        format!("signal {}", libc::WTERMSIG(status))
    } else {
        format!("exit code {}", libc::WEXITSTATUS(status))
    }
}

/// What a freshly forked child does first: dies with `parent`, answers signals again, keeps only `keep` of the
/// descriptors (and stderr), has nothing to do with the parent's stdin and stdout.
pub fn become_child(name: &CStr, parent: u32, keep: &[RawFd]) {
    set_name(name);
    // SAFETY: plain system calls; the set is initialised before use.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The parent may have died before PDEATHSIG was set.
        if libc::getppid() != parent as libc::pid_t {
            libc::_exit(0);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::signal(signal, libc::SIG_DFL);
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            libc::dup2(null, 0);
            libc::dup2(null, 1);
            if null > 2 {
                libc::close(null);
            }
        }
    }
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|&fd| fd > 2).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3u32;
    for fd in keep.into_iter().map(|fd| fd as u32) {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: plain system call; what is closed belongs to the parent's copies of its objects, which a child never
    // drops (it leaves by _exit).
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// When this process was started (exec), CLOCK_MONOTONIC in ns, with the kernel's resolution of 10 ms.
pub fn start_time_ns() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Field 22, counted behind the parenthesised comm, in clock ticks since boot.
    let ticks: u64 = stat
        .rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()?;
    // SAFETY: plain library call.
    let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64;
    let since_boot = ticks.checked_mul(1_000_000_000)? / hz.max(1);
    let mut boot = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes into `boot`.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut boot) };
    let boot_now = boot.tv_sec as u64 * 1_000_000_000 + boot.tv_nsec as u64;
    // The two clocks differ by the time spent in suspend.
    session::clock::now_ns().checked_sub(boot_now.checked_sub(since_boot)?)
}
