//! Capabilities and other properties of the process that are given up for good.

use std::io;

/// linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`, two words of 32 bits per set.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// From now on exec gives no privileges: neither set-user-ID bits nor file capabilities count.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// Gives up all capabilities but `kept`, also for programs that are started later; those that the process did not have
/// it does not get.
pub fn keep(kept: &[u32]) -> io::Result<()> {
    let is_kept = |capability: u32| kept.contains(&capability);
    // SAFETY: plain system calls. Without CAP_SETPCAP the bounding set stays as it is, which no_new_privs makes harmless;
    // EINVAL is behind the last capability that the kernel knows.
    unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        for capability in (0..64u32).filter(|&c| !is_kept(c)) {
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 {
                break;
            }
        }
    }
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: capget(2) reads the header and writes two sets.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) })?;
    for (word, set) in sets.iter_mut().enumerate() {
        let mask = kept
            .iter()
            .filter(|&&c| c / 32 == word as u32)
            .fold(0, |mask, &c| mask | 1u32 << (c % 32));
        set.effective &= mask;
        set.permitted &= mask;
        set.inheritable = 0;
    }
    // SAFETY: capset(2) reads the header and two sets.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })
}

/// A core of a worker would hold the guest's memory. 1 is the value that also keeps the kernel from starting a program
/// that takes cores (`do_coredump`); a file cannot be that short.
pub fn no_core_dumps() -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: 1,
        rlim_max: 1,
    };
    let mut now = limit;
    // SAFETY: reads and writes limits that we own.
    unsafe {
        check(libc::getrlimit(libc::RLIMIT_CORE, &mut now).into())?;
        if now.rlim_max == 0 {
            return Ok(());
        }
        check(libc::setrlimit(libc::RLIMIT_CORE, &limit).into())
    }
}
