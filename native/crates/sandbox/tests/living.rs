//! What must go on inside: everything that a worker does, and what control and credential helpers do.

mod common;

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Door, End, as_child, c_int_or_errno, confined, field};
use sandbox::{Access, Allowed, Parts, confine_daemon, confine_worker};

/// Runs `body` as a worker: 0 when it returned.
fn as_worker(body: impl FnOnce()) -> End {
    as_child(|| {
        confine_worker(Parts::available()).expect("confined");
        body();
        0
    })
}

#[test]
fn a_worker_starts_threads_waits_and_grows() {
    let end = as_worker(|| {
        let threads: Vec<_> = (0..8u64)
            .map(|n| {
                std::thread::Builder::new()
                    .name(format!("rafs-ring-{n}"))
                    .stack_size(256 * 1024)
                    .spawn(move || {
                        // Hash seeds; memory from brk and mmap, moved and given back.
                        let mut map = HashMap::new();
                        map.insert(n, vec![1u8; 1 << 20]);
                        let mut grown = vec![0u8; 1 << 20];
                        for _ in 0..4 {
                            grown.extend_from_within(..);
                        }
                        std::thread::sleep(std::time::Duration::from_millis(1));
                        map[&n].len() + grown.len()
                    })
                    .expect("a thread")
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().expect("it ended"), (1 << 20) + (16 << 20));
        }
    });
    assert_eq!(end, End::Result(0));
}

#[test]
fn a_worker_maps_what_it_is_sent_and_serves_with_it() {
    let mut pair = [0; 2];
    // SAFETY: plain system calls on descriptors of this test.
    let (file, memory) = unsafe {
        let seqpacket = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(
            libc::socketpair(libc::AF_UNIX, seqpacket, 0, pair.as_mut_ptr()),
            0
        );
        let memory = libc::memfd_create(c"guest".as_ptr(), 0);
        assert_eq!(libc::ftruncate(memory, 1 << 21), 0);
        (std::fs::File::open("/etc/passwd").expect("a file"), memory)
    };
    let end = as_worker(|| {
        let mut buf = [0u8; 64];
        // SAFETY: descriptors and buffers of this test, of the lengths that are named.
        unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let map = libc::mmap(std::ptr::null_mut(), 1 << 21, 3, flags, memory, 0);
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::madvise(map, 1 << 21, libc::MADV_DONTNEED), 0);
            let iov = libc::iovec {
                iov_base: map,
                iov_len: 64,
            };
            let read = libc::preadv2(file.as_raw_fd(), &iov, 1, 0, libc::RWF_NOWAIT);
            assert!(
                read > 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
            );
            assert!(libc::pread(file.as_raw_fd(), buf.as_mut_ptr().cast(), 64, 0) > 0);
            let mut stat: libc::stat = std::mem::zeroed();
            assert_eq!(libc::syscall(libc::SYS_fstat, memory, &raw mut stat), 0);
            assert!(libc::fcntl(memory, libc::F_DUPFD_CLOEXEC, 3) > 0);
            assert!(libc::fcntl(memory, libc::F_GET_SEALS) >= 0);
            let (epoll, event) = (libc::epoll_create1(0), libc::eventfd(0, libc::EFD_NONBLOCK));
            let mut wanted = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: 7,
            };
            assert_eq!(
                libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, event, &mut wanted),
                0
            );
            assert_eq!(libc::write(event, 1u64.to_ne_bytes().as_ptr().cast(), 8), 8);
            assert_eq!(libc::epoll_wait(epoll, &mut wanted, 1, 1000), 1);
            let mut poll = libc::pollfd {
                fd: pair[0],
                events: libc::POLLOUT,
                revents: 0,
            };
            assert_eq!(libc::poll(&mut poll, 1, 0), 1);
            assert_eq!(
                libc::send(pair[0], buf.as_ptr().cast(), 16, libc::MSG_DONTWAIT),
                16
            );
            assert_eq!(
                libc::recv(pair[1], buf.as_mut_ptr().cast(), 64, libc::MSG_DONTWAIT),
                16
            );
            assert_eq!(libc::munmap(map, 1 << 21), 0);
        }
    });
    assert_eq!(end, End::Result(0));
}

#[test]
fn a_worker_dies_as_it_means_to() {
    assert_eq!(
        as_worker(|| std::process::abort()),
        End::Signal(libc::SIGABRT)
    );
    let killed = as_worker(|| {
        // SAFETY: to ourselves, as failpoints do.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    });
    assert_eq!(killed, End::Signal(libc::SIGKILL));
    // The message of a panic, with a backtrace that may not read /proc.
    let panicked = as_worker(|| {
        std::panic::set_hook(Box::new(|info| {
            let text = format!("{info} {}", std::backtrace::Backtrace::force_capture());
            assert!(text.contains("on purpose"));
            std::process::abort();
        }));
        panic!("on purpose");
    });
    assert_eq!(panicked, End::Signal(libc::SIGABRT));
}

/// A folder with a file in it, which is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("sandbox-{}-{name}", std::process::id()));
        std::fs::create_dir_all(path.join("sub")).expect("a folder");
        std::fs::write(path.join("file"), b"x").expect("a file");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs `body` as control, which may use `allowed` and run programs of the system.
fn as_daemon(allowed: &[(&Path, Access)], body: impl FnOnce() -> i64) -> End {
    as_child(|| {
        let system = ["/usr", "/bin", "/lib", "/lib64"].map(|path| (Path::new(path), Access::Run));
        let all: Vec<_> = system
            .iter()
            .chain(allowed)
            .map(|&(path, access)| Allowed { path, access })
            .collect();
        let (parts, missing) = confine_daemon(&all).expect("confined");
        assert!(parts.is_whole(), "{missing:?}");
        body()
    })
}

fn errno<T>(result: std::io::Result<T>) -> i64 {
    match result {
        Ok(_) => 0,
        Err(e) => i64::from(e.raw_os_error().unwrap_or(-1)),
    }
}

#[test]
fn control_reaches_what_it_is_told_and_nothing_else() {
    let (mine, theirs) = (Folder::new("mine"), Folder::new("theirs"));
    let read_only = Folder::new("read");
    let allowed = [
        (mine.0.as_path(), Access::Write),
        (read_only.0.as_path(), Access::Read),
        (Path::new("/nonexistent/path"), Access::Write),
    ];
    type Check<'a> = (&'a str, Box<dyn Fn() -> i64 + 'a>, i32);
    let checks: [Check<'_>; 9] = [
        (
            "read",
            Box::new(|| errno(std::fs::read(mine.0.join("file")))),
            0,
        ),
        (
            "write",
            Box::new(|| errno(std::fs::write(mine.0.join("new"), b"x"))),
            0,
        ),
        (
            "rename",
            Box::new(|| errno(std::fs::rename(mine.0.join("new"), mine.0.join("sub/new")))),
            0,
        ),
        (
            "read only",
            Box::new(|| errno(std::fs::read(read_only.0.join("file")))),
            0,
        ),
        (
            "write read-only",
            Box::new(|| errno(std::fs::write(read_only.0.join("file"), b"x"))),
            libc::EACCES,
        ),
        (
            "cut read-only",
            Box::new(|| {
                errno(
                    std::fs::File::options()
                        .write(true)
                        .truncate(true)
                        .open(read_only.0.join("file")),
                )
            }),
            libc::EACCES,
        ),
        (
            "foreign",
            Box::new(|| errno(std::fs::read(theirs.0.join("file")))),
            libc::EACCES,
        ),
        (
            "foreign folder",
            Box::new(|| errno(std::fs::read_dir(&theirs.0))),
            libc::EACCES,
        ),
        (
            "remove foreign",
            Box::new(|| errno(std::fs::remove_file(theirs.0.join("file")))),
            libc::EACCES,
        ),
    ];
    for (name, check, expected) in &checks {
        assert_eq!(
            as_daemon(&allowed, check),
            End::Result(i64::from(*expected)),
            "{name}"
        );
    }
}

#[test]
fn control_runs_helpers_and_speaks_to_the_net() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let end = as_daemon(&[(Path::new("/dev/null"), Access::Write)], || {
        std::net::TcpStream::connect(address).expect("a connection");
        std::net::UdpSocket::bind("127.0.0.1:0").expect("a resolver's socket");
        std::os::unix::net::UnixStream::pair().expect("a socket pair");
        std::thread::spawn(|| ()).join().expect("a thread");
        // As control's event loop does it: its own, by itself.
        // SAFETY: plain system calls.
        unsafe {
            let (policy, none) = (libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, [0; 1]);
            assert_eq!(
                libc::syscall(libc::SYS_sched_setscheduler, 0, policy, none.as_ptr()),
                0
            );
            let nicer = if libc::geteuid() == 0 { -10 } else { 1 };
            assert_eq!(libc::setpriority(libc::PRIO_PROCESS, 0, nicer), 0);
        }
        let output = Command::new("sh")
            .args(["-c", "echo $((6 * 7)) | cat"])
            .output()
            .expect("a helper");
        assert_eq!(output.stdout, b"42\n");
        0
    });
    assert_eq!(end, End::Result(0));
}

#[test]
fn what_takes_over_a_host_fails_in_control() {
    macro_rules! call {
        ($nr:ident $(, $arg:expr)*) => {
            // SAFETY: refused before the kernel looks at arguments.
            || c_int_or_errno(unsafe { libc::syscall(libc::$nr $(, $arg)*) })
        };
    }
    static PRIORITY: [libc::c_int; 2] = [1, 0];
    let doors: [(Door, i32); 24] = [
        (
            (
                "real time",
                call!(
                    SYS_sched_setscheduler,
                    0,
                    libc::SCHED_FIFO,
                    PRIORITY.as_ptr()
                ),
            ),
            libc::EPERM,
        ),
        (
            (
                "real time until a fork",
                call!(
                    SYS_sched_setscheduler,
                    0,
                    libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
                    PRIORITY.as_ptr()
                ),
            ),
            libc::EPERM,
        ),
        (
            (
                "the policy of others",
                call!(
                    SYS_sched_setscheduler,
                    libc::getppid(),
                    libc::SCHED_OTHER,
                    PRIORITY[1..].as_ptr()
                ),
            ),
            libc::EPERM,
        ),
        (
            (
                "the priority of others",
                call!(SYS_setpriority, libc::PRIO_PROCESS, libc::getppid(), 5),
            ),
            libc::EPERM,
        ),
        (
            (
                "the processors of others",
                call!(SYS_sched_setaffinity, libc::getppid(), 8, PRIORITY.as_ptr()),
            ),
            libc::EPERM,
        ),
        (
            ("cut by name", call!(SYS_truncate, c"/dev/null".as_ptr(), 0)),
            libc::EPERM,
        ),
        (
            (
                "cut by opening",
                call!(
                    SYS_openat,
                    libc::AT_FDCWD,
                    c"/dev/null".as_ptr(),
                    libc::O_RDONLY | libc::O_TRUNC
                ),
            ),
            libc::EPERM,
        ),
        (
            (
                "openat2",
                call!(SYS_openat2, libc::AT_FDCWD, c"/dev/null".as_ptr(), 0, 0),
            ),
            libc::ENOSYS,
        ),
        (
            ("ptrace", call!(SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0)),
            libc::EPERM,
        ),
        (
            ("memory", call!(SYS_process_vm_readv, 1, 0, 0, 0, 0, 0)),
            libc::EPERM,
        ),
        (
            (
                "mount",
                call!(SYS_mount, 0, c"/".as_ptr(), 0, libc::MS_REMOUNT, 0),
            ),
            libc::EPERM,
        ),
        (
            ("new mount", call!(SYS_fsopen, c"tmpfs".as_ptr(), 0)),
            libc::EPERM,
        ),
        (("chroot", call!(SYS_chroot, c"/".as_ptr())), libc::EPERM),
        (
            ("unshare", call!(SYS_unshare, libc::CLONE_NEWUSER)),
            libc::EPERM,
        ),
        (
            (
                "clone",
                call!(SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0),
            ),
            libc::EPERM,
        ),
        (("clone3", call!(SYS_clone3, 0, 0)), libc::ENOSYS),
        (("bpf", call!(SYS_bpf, 0, 0, 0)), libc::EPERM),
        (("io_uring", call!(SYS_io_uring_setup, 1, 0)), libc::EPERM),
        (("module", call!(SYS_finit_module, -1, 0, 0)), libc::EPERM),
        (("kexec", call!(SYS_kexec_load, 0, 0, 0, 0)), libc::EPERM),
        (("keys", call!(SYS_keyctl, 0, 0, 0, 0, 0)), libc::EPERM),
        (
            (
                "raw packets",
                call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0),
            ),
            libc::EAFNOSUPPORT,
        ),
        (
            (
                "vsock",
                call!(SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0),
            ),
            libc::EAFNOSUPPORT,
        ),
        (
            ("typing", call!(SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr())),
            libc::EPERM,
        ),
    ];
    for ((name, door), expected) in doors {
        assert_eq!(
            as_daemon(&[], door),
            End::Result(-i64::from(expected)),
            "{name}"
        );
    }
    // Landlock: whoever started us, since Linux 6.12, and ports, since 6.7.
    let abi = Parts::available().landlock;
    let signal = as_daemon(&[], || {
        // SAFETY: plain system calls.
        c_int_or_errno(unsafe { libc::kill(libc::getppid(), 0) }.into())
    });
    let expected = if abi < 6 { 0 } else { -libc::EPERM };
    assert_eq!(signal, End::Result(i64::from(expected)));
    let listen = as_daemon(&[], || errno(std::net::TcpListener::bind("127.0.0.1:0")));
    let expected = if abi < 4 { 0 } else { libc::EACCES };
    assert_eq!(listen, End::Result(i64::from(expected)));
}

#[test]
fn a_worker_can_be_confined_inside_a_daemon() {
    let status = confined(|| {
        let (parts, _) = confine_daemon(&[])?;
        let daemon = std::fs::read_to_string("/proc/self/status");
        assert!(daemon.is_err(), "Landlock was not told of /proc");
        confine_worker(parts)
    });
    assert_eq!(field(&status, "Seccomp_filters"), "2");
    assert_eq!(field(&status, "CapEff"), "0000000000000000");
}

#[test]
fn control_keeps_of_its_privileges_those_to_reach_files() {
    let kept = sandbox::KEPT_CAPABILITIES
        .iter()
        .fold(0u64, |mask, c| mask | 1 << c);
    let status = confined(|| confine_daemon(&[]).map(drop));
    for name in ["CapPrm", "CapEff", "CapInh", "CapBnd"] {
        let mask = u64::from_str_radix(field(&status, name), 16).expect("a mask");
        // SAFETY: plain system call.
        if name == "CapBnd" && unsafe { libc::geteuid() } != 0 {
            continue; // only who may can drop it, and without privileges it is nothing
        }
        assert_eq!(mask & !kept, 0, "{name}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Seccomp"), "2");
}

#[test]
fn a_daemon_of_an_ordinary_user_is_confined_as_well() {
    let mine = Folder::new("user");
    let end = as_child(|| {
        // SAFETY: plain system call; it fails where the tests run as an ordinary user already.
        unsafe { libc::setresuid(65534, 65534, 65534) };
        let allowed = [Allowed {
            path: &mine.0,
            access: Access::Read,
        }];
        let (parts, missing) = confine_daemon(&allowed).expect("confined");
        assert!(parts.is_whole(), "{missing:?}");
        assert!(std::fs::read(mine.0.join("file")).is_ok());
        errno(std::fs::read("/etc/passwd"))
    });
    assert_eq!(end, End::Result(i64::from(libc::EACCES)));
}
