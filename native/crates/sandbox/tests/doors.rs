//! Every door that a sandbox closes is tried from inside, in a child of its own: what a taken-over worker or control
//! would do. Each is first tried outside, so that a door that is closed anyway proves nothing.

mod common;

use std::ptr::{null, null_mut};

use common::{Door, End, as_child, c_int_or_errno, confined, door};
use sandbox::{Parts, confine_worker};

const FILE: &std::ffi::CStr = c"/etc/passwd";

macro_rules! call {
    ($nr:ident $(, $arg:expr)*) => {
        // SAFETY: arguments are valid for the call, or the call is refused before it looks at them.
        c_int_or_errno(unsafe { libc::syscall(libc::$nr $(, $arg)*) })
    };
}

/// Doors that anybody may pass outside: what they do there is harmless.
fn open_outside() -> Vec<Door> {
    vec![
        ("open for reading", || {
            call!(SYS_openat, libc::AT_FDCWD, FILE.as_ptr(), libc::O_RDONLY)
        }),
        ("open for writing", || {
            call!(
                SYS_openat,
                libc::AT_FDCWD,
                c"/dev/null".as_ptr(),
                libc::O_WRONLY
            )
        }),
        ("make a file", || {
            call!(
                SYS_openat,
                libc::AT_FDCWD,
                c"/tmp".as_ptr(),
                libc::O_TMPFILE | libc::O_RDWR,
                0o600
            )
        }),
        ("reopen a descriptor", || {
            call!(
                SYS_openat,
                libc::AT_FDCWD,
                c"/proc/self/fd/0".as_ptr(),
                libc::O_RDONLY
            )
        }),
        ("look at a file", || {
            // SAFETY: an all-zero stat is valid.
            let mut stat: libc::stat = unsafe { std::mem::zeroed() };
            call!(
                SYS_newfstatat,
                libc::AT_FDCWD,
                FILE.as_ptr(),
                &raw mut stat,
                0
            )
        }),
        ("read a link", || {
            let mut buf = [0u8; 256];
            call!(
                SYS_readlinkat,
                libc::AT_FDCWD,
                c"/proc/self/exe".as_ptr(),
                buf.as_mut_ptr(),
                256
            )
        }),
        ("TCP socket", || {
            call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0)
        }),
        ("UDP socket", || {
            call!(SYS_socket, libc::AF_INET6, libc::SOCK_DGRAM, 0)
        }),
        ("unix socket", || {
            call!(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)
        }),
        ("socket pair", || {
            let mut fds = [0i32; 2];
            call!(
                SYS_socketpair,
                libc::AF_UNIX,
                libc::SOCK_STREAM,
                0,
                fds.as_mut_ptr()
            )
        }),
        ("fork", || {
            let pid = call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
            if pid == 0 {
                // SAFETY: the grandchild ends.
                unsafe { libc::_exit(0) };
            }
            pid
        }),
        ("exec", || {
            let argv = [c"true".as_ptr(), null()];
            call!(
                SYS_execve,
                c"/bin/true".as_ptr(),
                argv.as_ptr(),
                null::<*const i8>()
            )
        }),
        ("be traced", || {
            call!(SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0)
        }),
        ("signal to the parent", || {
            // SAFETY: plain system call.
            let parent = unsafe { libc::getppid() };
            call!(SYS_kill, parent, 0)
        }),
        ("signal to a thread of the parent", || {
            // SAFETY: plain system call.
            let parent = unsafe { libc::getppid() };
            call!(SYS_tgkill, parent, parent, 0)
        }),
        ("pidfd", || {
            // SAFETY: plain system call.
            let parent = unsafe { libc::getppid() };
            call!(SYS_pidfd_open, parent, 0)
        }),
        ("become dumpable", || {
            call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
        }),
        ("outlive the parent", || {
            call!(SYS_prctl, libc::PR_SET_PDEATHSIG, 0, 0, 0, 0)
        }),
        ("limits", || {
            let mut old = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            call!(
                SYS_prlimit64,
                0,
                libc::RLIMIT_NOFILE,
                null::<libc::rlimit>(),
                &raw mut old
            )
        }),
        ("code in new memory", || {
            let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let at = call!(
                SYS_mmap,
                0,
                4096,
                prot,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0
            );
            if at > 0 { 0 } else { at }
        }),
        ("code in old memory", || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = call!(
                SYS_mmap,
                0,
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0
            );
            call!(SYS_mprotect, at, 4096, libc::PROT_READ | libc::PROT_EXEC)
        }),
        ("memfd", || call!(SYS_memfd_create, c"x".as_ptr(), 0)),
        ("duplicate over another", || call!(SYS_dup3, 0, 99, 0)),
        ("change flags", || call!(SYS_fcntl, 0, libc::F_SETFD, 0)),
        ("inotify", || call!(SYS_inotify_init1, 0)),
        ("timer", || {
            call!(SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0)
        }),
        ("write at an offset", || {
            match call!(SYS_pwrite64, 1, c"".as_ptr(), 0, 0) {
                // A pipe refuses it, after the kernel has looked.
                n if n == -i64::from(libc::ESPIPE) => 0,
                n => n,
            }
        }),
        ("read the memory of the parent", || {
            let (mut to, at) = ([0u8; 8], c"x".as_ptr());
            let local = libc::iovec {
                iov_base: to.as_mut_ptr().cast(),
                iov_len: 8,
            };
            let remote = libc::iovec {
                iov_base: at.cast_mut().cast(),
                iov_len: 1,
            };
            // SAFETY: plain system call.
            let parent = unsafe { libc::getppid() };
            call!(
                SYS_process_vm_readv,
                parent,
                &raw const local,
                1,
                &raw const remote,
                1,
                0
            )
        }),
    ]
}

/// Doors that need privileges or more preparation outside: inside the kernel must not get so far.
fn closed_outside() -> Vec<Door> {
    vec![
        ("remove a file", || {
            call!(SYS_unlinkat, libc::AT_FDCWD, c"/nonexistent/x".as_ptr(), 0)
        }),
        ("make a directory", || {
            call!(
                SYS_mkdirat,
                libc::AT_FDCWD,
                c"/nonexistent/x".as_ptr(),
                0o700
            )
        }),
        ("rename", || {
            let path = c"/nonexistent/x".as_ptr();
            call!(SYS_renameat2, libc::AT_FDCWD, path, libc::AT_FDCWD, path, 0)
        }),
        ("link", || {
            let path = c"/nonexistent/x".as_ptr();
            call!(SYS_linkat, libc::AT_FDCWD, path, libc::AT_FDCWD, path, 0)
        }),
        ("change a mode", || {
            call!(SYS_fchmodat, libc::AT_FDCWD, c"/nonexistent".as_ptr(), 0, 0)
        }),
        ("cut a file", || {
            call!(SYS_truncate, c"/nonexistent".as_ptr(), 0)
        }),
        ("cut an open file", || call!(SYS_ftruncate, -1, 0)),
        ("punch a hole", || call!(SYS_fallocate, -1, 3, 0, 1)),
        ("openat2", || {
            call!(SYS_openat2, libc::AT_FDCWD, FILE.as_ptr(), 0, 0)
        }),
        ("open by handle", || call!(SYS_open_by_handle_at, -1, 0, 0)),
        ("connect", || call!(SYS_connect, -1, 0, 0)),
        ("bind", || call!(SYS_bind, -1, 0, 0)),
        ("listen", || call!(SYS_listen, -1, 0)),
        ("accept", || call!(SYS_accept4, -1, 0, 0, 0)),
        ("many messages", || call!(SYS_sendmmsg, -1, 0, 0, 0)),
        ("trace the parent", || {
            // SAFETY: plain system call.
            let parent = unsafe { libc::getppid() };
            call!(SYS_ptrace, libc::PTRACE_SEIZE, parent, 0, 0)
        }),
        ("take a descriptor of another process", || {
            call!(SYS_pidfd_getfd, -1, 0, 0)
        }),
        ("signal by pidfd", || {
            call!(SYS_pidfd_send_signal, -1, 0, 0, 0)
        }),
        ("signal to all", || call!(SYS_kill, -1, 0)),
        ("tkill", || call!(SYS_tkill, -1, 0)),
        ("new user namespace", || {
            call!(SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0)
        }),
        ("thread in a new namespace", || {
            let flags =
                libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_NEWNET;
            call!(SYS_clone, flags, 0, 0, 0, 0)
        }),
        ("unshare", || call!(SYS_unshare, libc::CLONE_NEWNET)),
        ("setns", || call!(SYS_setns, -1, 0)),
        ("mount", || {
            call!(SYS_mount, 0, c"/nonexistent".as_ptr(), 0, 0, 0)
        }),
        ("unmount", || {
            call!(SYS_umount2, c"/nonexistent".as_ptr(), 0)
        }),
        ("chroot", || call!(SYS_chroot, c"/nonexistent".as_ptr())),
        ("pivot_root", || {
            call!(
                SYS_pivot_root,
                c"/nonexistent".as_ptr(),
                c"/nonexistent".as_ptr()
            )
        }),
        ("become another user", || call!(SYS_setresuid, -1, -1, -1)),
        ("capabilities", || call!(SYS_capset, 0, 0)),
        ("leave the sandbox", || {
            call!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, 0)
        }),
        ("io_uring", || call!(SYS_io_uring_setup, 1, 0)),
        ("bpf", || call!(SYS_bpf, 0, 0, 0)),
        ("perf", || call!(SYS_perf_event_open, 0, 0, 0, 0, 0)),
        ("userfaultfd", || call!(SYS_userfaultfd, 0)),
        ("keys", || call!(SYS_keyctl, 0, 0, 0, 0, 0)),
        ("kernel module", || call!(SYS_finit_module, -1, 0, 0)),
        ("kexec", || call!(SYS_kexec_load, 0, 0, 0, 0)),
        ("reboot", || call!(SYS_reboot, 0, 0, 0, 0)),
        ("clock", || call!(SYS_clock_settime, -1, 0)),
        ("priority", || call!(SYS_sched_setscheduler, -1, 0, 0)),
        ("shared memory of System V", || call!(SYS_shmget, 0, 0, 0)),
        ("a call that is not there", || {
            c_int_or_errno(
                // SAFETY: no such call.
                unsafe { libc::syscall(100_000) },
            )
        }),
    ]
}

/// clone3 must look like a kernel without it: the C library then takes clone.
fn clone3() -> i64 {
    call!(SYS_clone3, null_mut::<u8>(), 0)
}

#[test]
fn doors_are_open_outside() {
    for (name, door) in open_outside() {
        let end = as_child(door);
        assert!(
            matches!(end, End::Result(n) if n >= 0) || end == End::Exit(0),
            "{name}: {end:?}"
        );
    }
}

#[test]
fn a_worker_finds_every_door_closed() {
    let parts = Parts::available();
    assert!(
        parts.is_whole(),
        "{parts:?}: this test needs a kernel with seccomp and Landlock"
    );
    for (name, door) in open_outside().into_iter().chain(closed_outside()) {
        let end = as_child(|| {
            confine_worker(parts).expect("confined");
            door()
        });
        let refused = end == End::Result(-i64::from(libc::EPERM));
        assert!(
            refused || end == End::Signal(libc::SIGSYS),
            "{name}: {end:?}"
        );
    }
    let end = as_child(|| {
        confine_worker(parts).expect("confined");
        clone3()
    });
    assert_eq!(end, End::Result(-i64::from(libc::ENOSYS)));
}

#[test]
fn without_seccomp_landlock_still_closes_files_ports_and_signals() {
    let parts = Parts {
        seccomp: false,
        ..Parts::available()
    };
    for (name, expected) in [
        ("open for reading", libc::EACCES),
        ("open for writing", libc::EACCES),
        ("make a file", libc::EACCES),
        ("exec", libc::EACCES),
        ("read the memory of the parent", libc::EPERM),
        ("signal to the parent", libc::EPERM),
        ("signal to a thread of the parent", libc::EPERM),
    ] {
        if name.starts_with("signal") && parts.landlock < 6 {
            continue; // before Linux 6.12
        }
        let door = door(&open_outside(), name);
        let end = as_child(|| {
            confine_worker(parts).expect("confined");
            door()
        });
        assert_eq!(end, End::Result(-i64::from(expected)), "{name}");
    }
    if parts.landlock < 4 {
        return; // before Linux 6.7
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let end = as_child(|| {
        confine_worker(parts).expect("confined");
        match std::net::TcpStream::connect(address) {
            Ok(_) => 0,
            Err(e) => -i64::from(e.raw_os_error().unwrap_or(0)),
        }
    });
    assert_eq!(end, End::Result(-i64::from(libc::EACCES)));
}

#[test]
fn a_worker_has_no_privileges_left() {
    let status = confined(|| confine_worker(Parts::available()));
    for (field, value) in [
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ] {
        assert_eq!(common::field(&status, field), value, "{field}");
    }
}

#[test]
fn a_worker_of_an_ordinary_user_is_confined_as_well() {
    for (name, door) in open_outside() {
        let end = as_child(|| {
            // SAFETY: plain system call; it fails where the tests run as an ordinary user already.
            unsafe { libc::setresuid(65534, 65534, 65534) };
            confine_worker(Parts::available()).expect("confined");
            door()
        });
        let refused = end == End::Result(-i64::from(libc::EPERM));
        assert!(
            refused || end == End::Signal(libc::SIGSYS),
            "{name}: {end:?}"
        );
    }
}

#[test]
fn a_second_sandbox_is_no_way_out() {
    let parts = Parts::available();
    let end = as_child(|| {
        confine_worker(parts).expect("confined");
        i64::from(confine_worker(parts).is_ok())
    });
    assert_eq!(end, End::Signal(libc::SIGSYS));
}
