//! What the processes of a daemon may still do once they serve.
//!
//! Two rule sets, both irrevocable and inherited by children:
//!
//! * [`confine_daemon`], by the keeper before it forks anything, holds for keeper, control and the credential helpers
//!   that control starts. System calls that no such process needs fail with EPERM; files are those that it is told.
//! * [`confine_worker`], by each worker on top of that: a short list of system calls, anything else kills it; no file,
//!   no socket, no capability.
//!
//! Both belong before the first thread of a process: Landlock and capabilities hold for the calling thread and those
//! that it starts.
//!
//! * `bpf`: from rules to a seccomp filter; `worker_calls`, `daemon_calls`: the rules;
//! * `landlock`: files, ports, signals; `capabilities`: sets and limits of the process.

mod bpf;
mod capabilities;
mod daemon_calls;
mod landlock;
mod worker_calls;

use std::io;

pub use daemon_calls::KEPT_CAPABILITIES;
pub use landlock::{Access, Allowed};

/// What is in force, or what a kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// System calls are filtered.
    pub seccomp: bool,
    /// Version of Landlock's ABI, at most [`landlock::NEWEST`]; 0: none. Files from 1, TCP ports from 4, signals from 6.
    pub landlock: u32,
}

impl Parts {
    /// None of them.
    pub const NONE: Parts = Parts {
        seccomp: false,
        landlock: 0,
    };

    /// What this kernel offers to this process. Changes nothing.
    pub fn available() -> Parts {
        Parts {
            seccomp: bpf::is_available(),
            landlock: landlock::abi().unwrap_or(0),
        }
    }

    /// Whether files and system calls are confined. What an older Landlock lacks is closed by the filters (cutting
    /// files, up to 2; workers' sockets and signals), but for control's signals and listening ports.
    pub fn is_whole(self) -> bool {
        self.seccomp && self.landlock > 0
    }
}

fn step<T>(name: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))
}

/// Confines this process, which has one thread, and all that it will start, as far as this kernel can: files only as
/// `allowed`. Returns what is in force, and why the rest is not.
pub fn confine_daemon(allowed: &[Allowed<'_>]) -> io::Result<(Parts, Vec<io::Error>)> {
    step("no new privileges", capabilities::no_new_privileges())?;
    step("capabilities", capabilities::keep(&KEPT_CAPABILITIES))?;
    let (mut parts, mut missing) = (Parts::NONE, Vec::new());
    let abi = landlock::abi();
    let enforced = abi.and_then(|abi| {
        landlock::Ruleset::daemon(abi)
            .enforce(allowed)
            .map(|()| abi)
    });
    match step("Landlock", enforced) {
        Ok(abi) => parts.landlock = abi,
        Err(e) => missing.push(e),
    }
    match step("seccomp", bpf::install(&daemon_calls::filter())) {
        Ok(()) => parts.seccomp = true,
        Err(e) => missing.push(e),
    }
    Ok((parts, missing))
}

/// Confines this process, which has one thread, to serving rings from what it has open. The error names the step.
///
/// Must not be followed by anything that `worker_calls` does not list: the kernel kills the process for it.
pub fn confine_worker(parts: Parts) -> io::Result<()> {
    step("no new privileges", capabilities::no_new_privileges())?;
    step("capabilities", capabilities::keep(&[]))?;
    step("core dumps", capabilities::no_core_dumps())?;
    if parts.landlock > 0 {
        let rules = landlock::Ruleset::worker(parts.landlock);
        step("Landlock", rules.enforce(&[]))?;
    }
    if parts.seccomp {
        step(
            "seccomp",
            bpf::install(&worker_calls::filter(std::process::id())),
        )?;
    }
    Ok(())
}
