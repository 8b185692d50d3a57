//! C ABI of the sandbox: what the kernel offers, and confining the calling process.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ::sandbox::{Access, Allowed, Parts};

use crate::{Failure, VR_E_INVALID, guard};

/// In the result of `vr_sandbox_available` and `vr_sandbox_confine`: system calls are filtered.
pub const VR_SANDBOX_SECCOMP: i64 = 0x10000;
/// ... and nothing that matters is missing. The low 16 bits are the ABI of Landlock, 0: none.
pub const VR_SANDBOX_WHOLE: i64 = 0x20000;

fn code(parts: Parts) -> i64 {
    let flag = |is: bool, bit: i64| if is { bit } else { 0 };
    i64::from(parts.landlock)
        | flag(parts.seccomp, VR_SANDBOX_SECCOMP)
        | flag(parts.is_whole(), VR_SANDBOX_WHOLE)
}

/// What `code` stands for.
pub(crate) fn parts(code: i64) -> Parts {
    Parts {
        seccomp: code & VR_SANDBOX_SECCOMP != 0,
        landlock: (code & 0xffff) as u32,
    }
}

/// What this kernel offers to this process. Changes nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vr_sandbox_available() -> i64 {
    guard(|| Ok(code(Parts::available())))
}

/// Confines the calling process, which must have one thread, and all that it starts. `allowed` are `len` bytes of
/// entries, each a letter (r: read, x: read and run, w: read and write, d: remove files), a path and a NUL. Returns
/// what is in force; if that is not all, `vr_last_error` says why.
///
/// # Safety
/// `allowed` is valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_sandbox_confine(allowed: *const u8, len: usize) -> i64 {
    guard(|| {
        let bytes = if len == 0 {
            &[]
        } else {
            // SAFETY: promised by the caller.
            unsafe { std::slice::from_raw_parts(allowed, len) }
        };
        let (parts, missing) = ::sandbox::confine_daemon(&entries(bytes)?)?;
        if !missing.is_empty() {
            let texts: Vec<_> = missing.iter().map(ToString::to_string).collect();
            crate::note(texts.join("; "));
        }
        Ok(code(parts))
    })
}

fn entries(bytes: &[u8]) -> Result<Vec<Allowed<'_>>, Failure> {
    bytes
        .split(|&byte| byte == 0)
        .filter(|entry| !entry.is_empty())
        .map(|entry| {
            let access = match entry[0] {
                b'r' => Access::Read,
                b'x' => Access::Run,
                b'w' => Access::Write,
                b'd' => Access::Remove,
                _ => return Err(Failure::new(VR_E_INVALID, "no such access")),
            };
            Ok(Allowed {
                path: Path::new(OsStr::from_bytes(&entry[1..])),
                access,
            })
        })
        .collect()
}
