//! What the sandbox costs: putting it on, and each system call in it. `cargo run --release -p sandbox --example cost`.
//!
//! Medians over children that each put it on once; the calls are timed in one child per kind, in turn, and of each
//! kind the fastest round counts: whatever else the machine does only adds to it.

use std::path::Path;
use std::time::Instant;

use sandbox::{Access, Allowed, Parts, confine_daemon, confine_worker};

const CHILDREN: usize = 200;
const ROUNDS: usize = 60;
const CALLS: u32 = 20_000;

/// The number that `body` returns, of a child.
fn child(body: impl FnOnce() -> f64) -> f64 {
    let mut fds = [0; 2];
    let mut number = 0f64;
    // SAFETY: plain system calls on descriptors of our own; the child ends by _exit.
    unsafe {
        assert_eq!(libc::pipe(fds.as_mut_ptr()), 0);
        let pid = libc::fork();
        if pid == 0 {
            let number = body();
            libc::write(fds[1], (&raw const number).cast(), 8);
            libc::_exit(0);
        }
        assert_eq!(libc::read(fds[0], (&raw mut number).cast(), 8), 8);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
        libc::close(fds[0]);
        libc::close(fds[1]);
    }
    number
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Microseconds that `body` takes.
fn timed(body: impl Fn()) -> f64 {
    let once = || {
        let start = Instant::now();
        body();
        start.elapsed().as_secs_f64() * 1e6
    };
    median((0..CHILDREN).map(|_| child(once)).collect())
}

/// Nanoseconds of a `pread64` of one byte after `prepare`.
fn per_call(prepare: impl FnOnce()) -> f64 {
    let file = std::fs::File::open("/proc/self/exe").expect("this program");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    child(|| {
        prepare();
        let mut byte = 0u8;
        let start = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: one byte of ours.
            unsafe { libc::pread(fd, (&raw mut byte).cast(), 1, 0) };
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
    })
}

fn main() {
    let parts = Parts::available();
    let paths = [
        "/usr",
        "/bin",
        "/lib",
        "/etc",
        "/proc",
        "/opt",
        "/dev/null",
        "/tmp",
    ];
    let allowed: Vec<_> = paths
        .iter()
        .cycle()
        .take(48)
        .map(|path| Allowed {
            path: Path::new(path),
            access: Access::Read,
        })
        .collect();
    println!("{parts:?}");
    let daemon = timed(|| drop(confine_daemon(&allowed).expect("confined")));
    println!("daemon, 48 paths: {daemon:.0} us");
    let worker = timed(|| confine_worker(parts).expect("confined"));
    println!("worker: {worker:.0} us");
    let (mut free, mut confined) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        free.push(per_call(|| ()));
        confined.push(per_call(|| {
            confine_daemon(&[]).expect("confined");
            confine_worker(parts).expect("confined");
        }));
    }
    let fastest = |rounds: Vec<f64>| rounds.into_iter().fold(f64::INFINITY, f64::min);
    println!(
        "pread of one byte: {:.0} ns free, {:.0} ns confined twice",
        fastest(free),
        fastest(confined)
    );
}
