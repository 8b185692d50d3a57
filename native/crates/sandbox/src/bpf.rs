//! From rules to a seccomp filter: classic BPF over `struct seccomp_data` (linux/seccomp.h).
//!
//! A rule without checks is decided by the number of the call alone. Such verdicts "allow" are found once per process by
//! the kernel (5.11 and later: `seccomp_cache_prepare`), and the filter is not run for them any more. Older kernels
//! run it from its beginning, so frequent calls come first.

use std::io;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long,
    sock_filter, sock_fprog,
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    /// It is not made, and fails with this errno.
    Fail(i32),
    /// All threads end with SIGSYS; the kernel's audit log says which call it was.
    Kill,
}

/// Whether `(argument & mask) == value` is `holds`, of the low 32 bits: all that the kernel looks at in the arguments
/// checked here.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    pub argument: u8,
    pub mask: u32,
    pub value: u32,
    pub holds: bool,
}

impl Check {
    pub fn masked(argument: u8, mask: u32, value: u32) -> Check {
        Check {
            argument,
            mask,
            value,
            holds: true,
        }
    }

    pub fn equals(argument: u8, value: u32) -> Check {
        Check::masked(argument, u32::MAX, value)
    }

    pub fn differs(argument: u8, value: u32) -> Check {
        Check {
            holds: false,
            ..Check::equals(argument, value)
        }
    }

    pub fn lacks(argument: u8, bits: u32) -> Check {
        Check::masked(argument, bits, 0)
    }
}

/// What becomes of one system call.
#[derive(Clone, Debug)]
pub struct Rule {
    pub call: c_long,
    pub verdict: Verdict,
    /// The verdict holds if one of these holds; empty: always.
    pub if_one_of: Vec<Check>,
    /// ... and else this one.
    pub otherwise: Verdict,
}

impl Rule {
    pub fn always(call: c_long, verdict: Verdict) -> Rule {
        Rule {
            call,
            verdict,
            if_one_of: Vec::new(),
            otherwise: verdict,
        }
    }
}

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64
/// Calls of the x32 ABI have this bit and the same architecture: without a look at it they would go around every rule.
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data`: nr, arch, instruction pointer, six arguments of 64 bits (little endian).
const NR: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGUMENTS: u32 = 16;

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn give(verdict: Verdict) -> sock_filter {
    let value = match verdict {
        Verdict::Allow => libc::SECCOMP_RET_ALLOW,
        Verdict::Fail(errno) => libc::SECCOMP_RET_ERRNO | errno as u32,
        Verdict::Kill => libc::SECCOMP_RET_KILL_PROCESS,
    };
    statement(BPF_RET | BPF_K, value)
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Skips `then` instructions if A `test` `k`, else `otherwise`.
fn jump(test: u32, k: u32, then: u8, otherwise: u8) -> sock_filter {
    sock_filter {
        code: (BPF_JMP | test | BPF_K) as u16,
        jt: then,
        jf: otherwise,
        k,
    }
}

/// The filter: the first rule for a call decides, `default` where there is none. A call of another architecture kills.
pub fn compile(rules: &[Rule], default: Verdict) -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCH_AT),
        jump(BPF_JEQ, ARCH, 1, 0),
        give(Verdict::Kill),
        load(NR),
    ];
    #[cfg(target_arch = "x86_64")]
    program.extend([jump(BPF_JGE, X32, 0, 1), give(Verdict::Kill)]);
    for rule in rules {
        let mut body = Vec::new();
        for check in &rule.if_one_of {
            body.push(load(ARGUMENTS + 8 * u32::from(check.argument)));
            if check.mask != u32::MAX {
                body.push(statement(BPF_ALU | BPF_AND | BPF_K, check.mask));
            }
            let (then, otherwise) = if check.holds { (0, 1) } else { (1, 0) };
            body.push(jump(BPF_JEQ, check.value, then, otherwise));
            body.push(give(rule.verdict));
        }
        body.push(give(rule.otherwise));
        // A rule has a handful of checks: its length fits.
        program.push(jump(BPF_JEQ, rule.call as u32, 0, body.len() as u8));
        program.extend(body);
    }
    program.push(give(default));
    program
}

fn seccomp(operation: u32, flags: libc::c_ulong, argument: *const libc::c_void) -> io::Result<()> {
    // SAFETY: seccomp(2) reads what `argument` points to; the callers pass what the operation wants.
    if unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, argument) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether filters can be installed, and can do what ours do.
pub fn is_available() -> bool {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    seccomp(
        libc::SECCOMP_GET_ACTION_AVAIL,
        0,
        (&raw const action).cast(),
    )
    .is_ok()
}

/// Installs `program` for this thread and those that it starts. Needs no_new_privs.
pub fn install(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the filter is too long"))?;
    let program = sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // Before 5.16 a filter switched mitigations on that are meant for foreign code inside the process and cost every
    // memory access; there is no such code here.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    seccomp(
        libc::SECCOMP_SET_MODE_FILTER,
        flags,
        (&raw const program).cast(),
    )
}

#[cfg(test)]
#[path = "bpf_tests.rs"]
mod tests;
