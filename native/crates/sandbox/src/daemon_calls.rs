//! What keeper, control and credential helpers may not ask of the kernel. They run an interpreter, TLS, a resolver and
//! programs of other people: a list of what such code calls would be wrong on the next system. So this names what none
//! of them needs and what takes over a host, and such a call fails, instead of ending whoever tried it.

use libc::{EPERM, c_long, sock_filter};

use crate::bpf::{Check, Rule, Verdict, compile};

/// CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER (linux/capability.h): of root's privileges those to reach cache
/// directories and images that belong to others; Landlock says which. CAP_SYS_NICE: control's event loop comes first;
/// the filter leaves it for the caller itself and without real time.
pub const KEPT_CAPABILITIES: [u32; 4] = [1, 2, 3, 23];

const DENIED: &[c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_perf_event_open,
    // Mounts, roots and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    // Landlock up to ABI 2 lets files be cut that it keeps from being written. open(O_TRUNC): below.
    libc::SYS_truncate,
    // Who runs first. The others of that kind: below.
    libc::SYS_sched_setattr,
    libc::SYS_ioprio_set,
    // Time and names of the host.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Rings go around every filter; page faults in user space and keys help who attacks the kernel.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_fanotify_init,
    libc::SYS_vhangup,
    libc::SYS_mbind,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
];

const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Families of sockets that it may make: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (the resolver asks for addresses).
const FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];

/// TIOCSTI, TIOCLINUX: typing into the terminal of whoever started the daemon.
const TYPING: [u32; 2] = [0x5412, 0x541c];

/// Fails if one of `checks` holds.
fn not_if(call: c_long, checks: Vec<Check>) -> Rule {
    Rule {
        call,
        verdict: Verdict::Fail(EPERM),
        if_one_of: checks,
        otherwise: Verdict::Allow,
    }
}

/// Priorities: of the caller, and no policy that can take a processor from everybody else.
fn priorities() -> [Rule; 4] {
    let own = || Check::differs(0, 0);
    let policy =
        |policy: libc::c_int| Check::masked(1, !(libc::SCHED_RESET_ON_FORK as u32), policy as u32);
    [
        not_if(
            libc::SYS_sched_setscheduler,
            vec![
                own(),
                policy(libc::SCHED_FIFO),
                policy(libc::SCHED_RR),
                policy(libc::SCHED_DEADLINE),
            ],
        ),
        not_if(libc::SYS_sched_setparam, vec![own()]),
        not_if(libc::SYS_sched_setaffinity, vec![own()]),
        // Which: a process; who: the caller.
        not_if(libc::SYS_setpriority, vec![own(), Check::differs(1, 0)]),
    ]
}

fn rules() -> Vec<Rule> {
    let mut rules: Vec<Rule> = DENIED
        .iter()
        .map(|&call| Rule::always(call, Verdict::Fail(EPERM)))
        .collect();
    rules.extend(priorities());
    let cut_unwritten = |call, argument| {
        let flags = Check::masked(
            argument,
            (libc::O_TRUNC | libc::O_ACCMODE) as u32,
            (libc::O_TRUNC | libc::O_RDONLY) as u32,
        );
        not_if(call, vec![flags])
    };
    #[cfg(target_arch = "x86_64")]
    rules.push(cut_unwritten(libc::SYS_open, 1));
    let namespaces = NAMESPACES.iter().fold(0, |all, &flag| all | flag as u32);
    rules.extend([
        cut_unwritten(libc::SYS_openat, 2),
        // Flags in memory, as those of clone3.
        Rule::always(libc::SYS_openat2, Verdict::Fail(libc::ENOSYS)),
        // As for workers: its flags cannot be looked at, and everybody falls back to clone.
        Rule::always(libc::SYS_clone3, Verdict::Fail(libc::ENOSYS)),
        Rule {
            call: libc::SYS_clone,
            verdict: Verdict::Allow,
            if_one_of: vec![Check::lacks(0, namespaces)],
            otherwise: Verdict::Fail(EPERM),
        },
        Rule {
            call: libc::SYS_socket,
            verdict: Verdict::Allow,
            if_one_of: FAMILIES
                .iter()
                .map(|&family| Check::equals(0, family as u32))
                .collect(),
            otherwise: Verdict::Fail(libc::EAFNOSUPPORT),
        },
        not_if(
            libc::SYS_ioctl,
            TYPING.iter().map(|&n| Check::equals(1, n)).collect(),
        ),
    ]);
    rules
}

/// The filter of a daemon.
pub fn filter() -> Vec<sock_filter> {
    compile(&rules(), Verdict::Allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_one_rule() {
        let mut calls: Vec<_> = rules().iter().map(|r| r.call).collect();
        let n = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), n);
    }
}
