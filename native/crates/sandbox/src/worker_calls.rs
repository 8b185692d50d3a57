//! What a worker may ask of the kernel. Each call is here because something in the worker, the Rust library or the C
//! library makes it while it starts, serves, or dies.

use libc::{EPERM, c_long, sock_filter};

use crate::bpf::{Check, Rule, Verdict, compile};

/// Calls of the path of every request, most frequent first.
const HOT: &[c_long] = &[
    libc::SYS_preadv2,
    libc::SYS_write,       // eventfds: call, post; stderr
    libc::SYS_epoll_pwait, // the only wait that all architectures have
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_futex,
    libc::SYS_pread64,
    libc::SYS_read,
];

/// The others that need no look at their arguments.
const PLAIN: &[c_long] = &[
    // Readiness.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Commands of the keeper, with descriptors; answers. There is no way to make another socket.
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    // Descriptors that it has.
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_preadv,
    libc::SYS_readv,
    libc::SYS_writev,
    SYS_CACHESTAT,
    // Memory: guest regions, tables, heap, stacks. mmap and mprotect: below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads of its own. clone: below.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals and time.
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    // Hash seeds.
    libc::SYS_getrandom,
];

/// Calls that libraries make on their own account and can do without: the number of processors for malloc, /proc for a
/// backtrace, the size of the stack. They must not cost a guest its disk.
const REFUSED: &[c_long] = &[
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd,
    libc::SYS_ioctl,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_membarrier,
];

/// Threads, and nothing that clone can make beside them: the flags that pthread_create sets.
const THREAD: u32 = (libc::CLONE_VM | libc::CLONE_THREAD) as u32;
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

fn only_if(call: c_long, checks: Vec<Check>) -> Rule {
    Rule {
        call,
        verdict: Verdict::Allow,
        if_one_of: checks,
        otherwise: Verdict::Kill,
    }
}

/// The rules for the worker with process id `pid`.
fn rules(pid: u32) -> Vec<Rule> {
    let mut rules: Vec<Rule> = HOT
        .iter()
        .chain(PLAIN)
        .map(|&call| Rule::always(call, Verdict::Allow))
        .collect();
    rules.extend(
        REFUSED
            .iter()
            .map(|&call| Rule::always(call, Verdict::Fail(EPERM))),
    );
    let executable = libc::PROT_EXEC as u32;
    rules.extend([
        // The flags of clone3 lie in memory, where no filter can look: the C library takes clone instead.
        Rule::always(libc::SYS_clone3, Verdict::Fail(libc::ENOSYS)),
        only_if(
            libc::SYS_clone,
            vec![Check::masked(0, THREAD | NAMESPACES, THREAD)],
        ),
        // No memory that can be run, so no code that was not there.
        only_if(libc::SYS_mmap, vec![Check::lacks(2, executable)]),
        only_if(libc::SYS_mprotect, vec![Check::lacks(2, executable)]),
        only_if(
            libc::SYS_fcntl,
            vec![
                Check::equals(1, libc::F_DUPFD_CLOEXEC as u32),
                Check::equals(1, libc::F_GET_SEALS as u32),
                Check::equals(1, libc::F_GETFD as u32),
                Check::equals(1, libc::F_GETFL as u32),
            ],
        ),
        // Names of threads and of memory. Not: to be dumpable, other signals at the keeper's death.
        only_if(
            libc::SYS_prctl,
            vec![
                Check::equals(0, libc::PR_SET_NAME as u32),
                Check::equals(0, PR_SET_VMA),
            ],
        ),
        // abort(), and failpoints: to itself.
        only_if(libc::SYS_tgkill, vec![Check::equals(0, pid)]),
        only_if(libc::SYS_kill, vec![Check::equals(0, pid)]),
    ]);
    rules
}

/// linux/mman.h, Linux 6.5; one number for all architectures that we build for.
const SYS_CACHESTAT: c_long = 451;

/// linux/prctl.h; not in every version of the libc crate.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// The filter of the worker with process id `pid`.
pub fn filter(pid: u32) -> Vec<sock_filter> {
    compile(&rules(pid), Verdict::Kill)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_one_rule() {
        let mut calls: Vec<_> = rules(1).iter().map(|r| r.call).collect();
        let n = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), n);
    }

    #[test]
    fn frequent_calls_are_allowed_by_their_number_alone() {
        let rules = rules(1);
        for (rule, &call) in rules.iter().zip(HOT) {
            assert_eq!(rule.call, call);
            assert!(rule.if_one_of.is_empty() && rule.otherwise == Verdict::Allow);
        }
    }
}
