//! C ABI of the session: the keeper's loop, and what control and tests see of the shared memory.

use std::ffi::c_void;
use std::fmt::Write;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use keeper::{Keeper, Next, Options, process};
use session::{MAX_QUEUES, MAX_THREADS, Shared};

use crate::{Failure, VR_E_INVALID, VR_E_OS, guard};

/// What `vr_session_run` returns when control has to be forked; smaller values are exit codes.
pub const VR_SESSION_FORK_CONTROL: i64 = 256;
/// `u64` words of a post: mount, blob index, chunk index, node id, file offset, time.
pub const VR_POST_WORDS: u32 = 6;
/// `u64` words of a trace: node id, offset, length, parked at, done at.
pub const VR_TRACE_WORDS: u32 = 5;

struct Session {
    keeper: Option<Keeper>,
    shared: &'static Shared,
    post: RawFd,
    wakes: Vec<RawFd>,
    /// Of the process that made it: the keeper. Not read from shared memory, which a worker can write.
    pid: u32,
}

/// # Safety
/// `handle` comes from `vr_session_new` or `vr_session_attach` and is used by one thread at a time.
unsafe fn session<'a>(handle: *mut c_void) -> Result<&'a mut Session, Failure> {
    if handle.is_null() {
        return Err(Failure::new(VR_E_INVALID, "no session"));
    }
    // SAFETY: as promised by the caller.
    Ok(unsafe { &mut *handle.cast::<Session>() })
}

fn no_keeper() -> Failure {
    Failure::new(VR_E_INVALID, "an attached session has no keeper")
}

/// Makes the keeper around `listener`, a bound and listening unix socket, which it takes over. Blocks SIGTERM, SIGINT
/// and SIGHUP. Ring threads look for more requests for at most `poll_us` before they sleep. `keep` != 0 listens again
/// when a front-end goes.
///
/// # Safety
/// `out` is valid for one pointer; `listener` is an open descriptor that the caller gives away.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_new(
    listener: i32,
    io_deadline_ms: u64,
    poll_us: u32,
    keep: u32,
    out: *mut *mut c_void,
) -> i64 {
    guard(|| {
        if listener < 0 || out.is_null() {
            return Err(Failure::new(VR_E_INVALID, "no listener"));
        }
        // SAFETY: given away by the caller.
        let listener = unsafe { OwnedFd::from_raw_fd(listener) };
        let options = Options {
            keep: keep != 0,
            io_deadline_ns: io_deadline_ms.saturating_mul(1_000_000),
            poll_ns: u64::from(poll_us) * 1000,
        };
        let keeper = Keeper::new(listener, options)?;
        let session = Session {
            shared: keeper.shared(),
            post: keeper.post_fd(),
            wakes: keeper.wake_fds(),
            keeper: Some(keeper),
            pid: std::process::id(),
        };
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(session)).cast() };
        Ok(0)
    })
}

/// Confines all workers that will be forked, to what `parts` (of `vr_sandbox_confine`) says.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_confine_workers(handle: *mut c_void, parts: i64) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        session
            .keeper
            .as_mut()
            .ok_or_else(no_keeper)?
            .confine_workers(crate::sandbox::parts(parts));
        Ok(0)
    })
}

/// Maps the session memory of a running daemon through `fd` (a descriptor of its memfd), for tests and tools.
///
/// # Safety
/// As for `vr_session_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_attach(fd: i32, out: *mut *mut c_void) -> i64 {
    guard(|| {
        if fd < 0 || out.is_null() {
            return Err(Failure::new(VR_E_INVALID, "no descriptor"));
        }
        // SAFETY: given away by the caller.
        let shared: &'static Shared = Box::leak(Box::new(Shared::attach(unsafe {
            OwnedFd::from_raw_fd(fd)
        })?));
        let session = Session {
            keeper: None,
            shared,
            post: -1,
            wakes: Vec::new(),
            pid: 0,
        };
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(session)).cast() };
        Ok(0)
    })
}

/// Runs the keeper. Returns an exit code, or `VR_SESSION_FORK_CONTROL` with control's end of the socket pair in
/// `control_fd`. Blocks; must be called in a process with one thread.
///
/// # Safety
/// `handle` as for all functions here; `control_fd` is valid for one i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_run(handle: *mut c_void, control_fd: *mut i32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        match session.keeper.as_mut().ok_or_else(no_keeper)?.run() {
            Next::Exit(code) => Ok(i64::from(code)),
            Next::ForkControl(fd) => {
                // SAFETY: promised by the caller.
                unsafe { *control_fd = fd };
                Ok(VR_SESSION_FORK_CONTROL)
            }
        }
    })
}

/// Tells the keeper that control runs as `pid`.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_control_started(handle: *mut c_void, pid: i32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        session
            .keeper
            .as_mut()
            .ok_or_else(no_keeper)?
            .control_started(pid)?;
        Ok(0)
    })
}

/// Makes the calling, freshly forked process control: named, dying with the keeper, with default signals, and with no
/// descriptors but stderr, the session's own, the mount's, and the `n` in `keep`.
///
/// # Safety
/// `handle` as for all functions here; `keep` is valid for `n` i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_become_control(
    handle: *mut c_void,
    keep: *const i32,
    n: usize,
) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let mut fds = Vec::new();
        if n > 0 {
            // SAFETY: promised by the caller.
            fds.extend_from_slice(unsafe { std::slice::from_raw_parts(keep, n) });
        }
        fds.push(session.shared.raw_fd());
        fds.push(session.post);
        fds.extend(&session.wakes);
        if let Some(mount) = session.keeper.as_ref().and_then(Keeper::mount) {
            fds.extend([mount.bootstrap, mount.spill]);
            fds.extend(
                mount
                    .blobs
                    .iter()
                    .flat_map(|b| [Some(b.state), Some(b.extents), Some(b.touched), b.data])
                    .flatten(),
            );
        }
        process::become_child(c"rafs-control", session.pid, &fds);
        Ok(0)
    })
}

/// The eventfd that becomes readable when posts are there.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_post_fd(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        Ok(i64::from(session.post))
    })
}

/// Drains up to `max` posts of `VR_POST_WORDS` words each into `out`; returns how many.
///
/// # Safety
/// `handle` as for all functions here; `out` is valid for `max * VR_POST_WORDS` u64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_posts(handle: *mut c_void, out: *mut u64, max: u32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let words = VR_POST_WORDS as usize;
        // SAFETY: promised by the caller.
        let out = unsafe { std::slice::from_raw_parts_mut(out, max as usize * words) };
        let mut slots = out.chunks_exact_mut(words);
        let mut n = 0;
        for thread in 0..MAX_THREADS {
            let ring = &session.shared.thread(thread).posts;
            while slots.len() > 0 {
                let Some(post) = ring.pop() else { break };
                let Some(slot) = slots.next() else { break };
                slot.copy_from_slice(&[
                    u64::from(post.mount),
                    u64::from(post.blob_index),
                    u64::from(post.chunk_index),
                    post.nodeid,
                    post.file_offset,
                    post.time_ns,
                ]);
                n += 1;
            }
        }
        Ok(n)
    })
}

/// Drains up to `max` traces of `VR_TRACE_WORDS` words each into `out`; returns how many.
///
/// # Safety
/// `handle` as for all functions here; `out` is valid for `max * VR_TRACE_WORDS` u64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_traces(handle: *mut c_void, out: *mut u64, max: u32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let words = VR_TRACE_WORDS as usize;
        // SAFETY: promised by the caller.
        let out = unsafe { std::slice::from_raw_parts_mut(out, max as usize * words) };
        let mut slots = out.chunks_exact_mut(words);
        let mut n = 0;
        for thread in 0..MAX_THREADS {
            let ring = &session.shared.thread(thread).traces;
            while slots.len() > 0 {
                let Some(t) = ring.pop() else { break };
                let Some(slot) = slots.next() else { break };
                slot.copy_from_slice(&[t.nodeid, t.offset, t.len, t.parked_ns, t.done_ns]);
                n += 1;
            }
        }
        Ok(n)
    })
}

/// Wakes all ring threads: chunks have become ready.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_wake(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let one = 1u64.to_ne_bytes();
        for &fd in &session.wakes {
            // SAFETY: eight bytes to an eventfd; a full counter is a wake-up that is still pending.
            unsafe { libc::write(fd, one.as_ptr().cast(), 8) };
        }
        Ok(0)
    })
}

/// The eventfds that [`vr_session_wake`] writes into `out`; returns their number. They stay the handle's.
///
/// # Safety
/// `handle` as for all functions here; `out` is valid for `max` i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_wakes(handle: *mut c_void, out: *mut i32, max: u32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        for (i, &fd) in session.wakes.iter().take(max as usize).enumerate() {
            // SAFETY: `i` is below `max`.
            unsafe { out.add(i).write(fd) };
        }
        Ok(session.wakes.len() as i64)
    })
}

/// Descriptors of the mounted image into `out`: bootstrap, spill, then state, extents, touched, data (or -1) per blob. Returns
/// their number, 0 when nothing is mounted.
///
/// # Safety
/// `handle` as for all functions here; `out` is valid for `max` i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_mount(handle: *mut c_void, out: *mut i32, max: u32) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let Some(mount) = session.keeper.as_ref().and_then(Keeper::mount) else {
            return Ok(0);
        };
        let mut fds = vec![mount.bootstrap, mount.spill];
        for blob in &mount.blobs {
            fds.extend([
                blob.state,
                blob.extents,
                blob.touched,
                blob.data.unwrap_or(-1),
            ]);
        }
        if fds.len() > max as usize {
            return Err(Failure::new(
                VR_E_INVALID,
                "more descriptors than there is room for",
            ));
        }
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(fds.as_ptr(), out, fds.len()) };
        Ok(fds.len() as i64)
    })
}

/// Arms failpoint `point` (0 disarms) to act when the worker passes it for the `skip + 1`-th time, and
/// `times` times in all.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_failpoint(
    handle: *mut c_void,
    point: u32,
    skip: i32,
    action: u32,
    times: i32,
) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        unsafe { session(handle)? }
            .shared
            .failpoint()
            .arm(point, skip, action, times);
        Ok(0)
    })
}

/// The failpoint that is still armed, 0 when it has acted.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_failpoint_armed(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        Ok(i64::from(session.shared.failpoint().armed()))
    })
}

/// The session's state as JSON text into `buf` (at most `len` bytes); returns its full length.
///
/// # Safety
/// `handle` as for all functions here; `buf` is valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_status(handle: *mut c_void, buf: *mut u8, len: usize) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        let text = status(session.shared)
            .map_err(|e| Failure::new(VR_E_OS, format!("status cannot be formatted: {e}")))?;
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), buf, text.len().min(len)) };
        Ok(text.len() as i64)
    })
}

fn get(n: &AtomicU64) -> u64 {
    n.load(Ordering::Relaxed)
}

fn get32(n: &AtomicU32) -> u32 {
    n.load(Ordering::Relaxed)
}

fn status(shared: &Shared) -> Result<String, std::fmt::Error> {
    let r = shared.record();
    let mut out = String::with_capacity(2048);
    write!(
        out,
        "{{\"processes\":{{\"keeper\":{{\"pid\":{}}},\"worker\":{{\"pid\":{},\"generation\":{},\"crashes\":{},\
         \"reaped_ns\":{},\"ready_ns\":{}}},\"control\":{{\"pid\":{},\"generation\":{}}}}},",
        get32(&r.keeper_pid),
        get32(&r.worker_pid),
        get32(&r.worker_generation),
        get32(&r.worker_crashes),
        get(&r.worker_reaped_ns),
        get(&r.worker_ready_ns),
        get32(&r.control_pid),
        get32(&r.control_generation),
    )?;
    write!(
        out,
        "\"session\":{{\"frontend_connected\":{},\"initialised\":{},\"fuse_minor\":{},\"fuse_flags\":{},\
         \"io_deadline_ns\":{},\"start_ns\":{},\"bound_ns\":{},\"mounted_ns\":{},\"connected_ns\":{},\"init_ns\":{},\
         \"first_exec_ns\":{}}},",
        get32(&r.frontend_connected) != 0,
        get32(&r.initialised) != 0,
        get32(&r.minor),
        get(&r.flags),
        get(&r.io_deadline_ns),
        get(&r.start_ns),
        get(&r.bound_ns),
        get(&r.mounted_ns),
        get(&r.connected_ns),
        get(&r.init_ns),
        get(&r.first_exec_ns),
    )?;
    out.push_str("\"queues\":[");
    let mut first = true;
    for index in 0..MAX_QUEUES {
        let q = shared.queue(index);
        if get32(&q.size) == 0 {
            continue;
        }
        let log = shared.log(index);
        write!(
            out,
            "{}{{\"index\":{index},\"size\":{},\"enabled\":{},\"broken\":{},\"completed\":{},\"in_flight\":{},\
             \"parked\":{}}}",
            if first { "" } else { "," },
            get32(&q.size),
            get32(&q.enabled) != 0,
            get32(&q.broken) != 0,
            get(&q.completed),
            log.in_flight(),
            log.parked(),
        )?;
        first = false;
    }
    let sum = |field: fn(&session::ThreadRecord) -> &AtomicU64| -> u64 {
        (0..MAX_THREADS).map(|t| get(field(shared.thread(t)))).sum()
    };
    write!(
        out,
        "],\"counters\":{{\"wakeups\":{},\"signals\":{},\"parks\":{},\"pool_reads\":{},\"bytes_read\":{},\
         \"errors\":{},\"deadline_errors\":{},\"requests\":{{",
        sum(|t| &t.wakeups),
        sum(|t| &t.signals),
        sum(|t| &t.parks),
        sum(|t| &t.pool_reads),
        sum(|t| &t.bytes_read),
        sum(|t| &t.errors),
        sum(|t| &t.deadline_errors),
    )?;
    let mut first = true;
    for opcode in 0..shared.thread(0).requests.len() {
        let n: u64 = (0..MAX_THREADS)
            .map(|t| get(&shared.thread(t).requests[opcode]))
            .sum();
        if n > 0 {
            write!(out, "{}\"{opcode}\":{n}", if first { "" } else { "," })?;
            first = false;
        }
    }
    out.push_str("}}}");
    Ok(out)
}

/// The descriptor of the shared memory, so that a caller can pass it on.
///
/// # Safety
/// `handle` as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_session_shared_fd(handle: *mut c_void) -> i64 {
    guard(|| {
        // SAFETY: forwarded.
        let session = unsafe { session(handle)? };
        Ok(i64::from(session.shared.raw_fd()))
    })
}
