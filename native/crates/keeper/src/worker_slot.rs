//! The current worker: fork, commands, death, replacement.
//!
//! Whatever goes wrong with a worker has one remedy: kill it, reap it, fork another from the keeper's state. Nothing
//! is lost, because everything that a worker must remember lies in shared memory.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use session::Shared;
use session::clock::now_ns;
use virtq::{Away, RegionSpec};
use worker::channel::{self, Command};
use worker::{MountFds, RingSetup, Setup, thread_of};

use crate::mount_table::{ControlMessage, MountTable};
use crate::process;

/// A worker answers a command within microseconds; one that needs longer hangs. GET_VRING_BASE has to be answered
/// within 100 ms, replacement included.
const ANSWER_MS: i32 = 50;
/// One that is starting maps guest memory and the image first.
const STARTING_MS: i32 = 1000;
/// ... unless GET_VRING_BASE waits for it.
const STARTING_STOP_MS: i32 = 100;
/// How long an ending keeper waits for a worker that it has killed: one that is stuck in a disk's driver ends without it.
const END_MS: i32 = 300;
/// A worker that dies at once again and again is forked anew after pauses that grow up to this.
const MAX_PAUSE_NS: u64 = 1_000_000_000;
/// More answers than that wait only from a worker that wants to keep us busy.
const MAX_STALE_ANSWERS: usize = 64;
/// The pause after a worker that did nothing, doubled each time.
const MIN_PAUSE_NS: u64 = 1_000_000;
/// Up to here the pause is not made: a few unlucky deaths in a row cost the guest nothing.
const FREE_PAUSE_NS: u64 = 16_000_000;

/// How often somebody has to look whether the worker hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A thread does not sleep.
    Busy,
    /// All sleep, and wake up without saying so.
    Idle,
    /// Nobody runs, or all sleep for good and will say when they wake up.
    Resting,
}

struct Running {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    channels: Vec<OwnedFd>,
    /// Which threads have answered a command yet.
    answered: Vec<Cell<bool>>,
    /// Progress of all threads when it was forked.
    progress: u64,
}

/// The worker, or the place where it will be.
pub struct WorkerSlot {
    shared: &'static Shared,
    mounts: MountTable,
    running: Option<Running>,
    wakes: Vec<RawFd>,
    post: RawFd,
    awake: RawFd,
    /// What confines a worker; `None`: nothing.
    sandbox: Option<sandbox::Parts>,
    pause_ns: u64,
    due_ns: u64,
    /// Progress that each thread had at the last look, for the heartbeat.
    seen_progress: Vec<(u64, u64)>,
}

impl WorkerSlot {
    /// No worker yet.
    pub fn new(
        shared: &'static Shared,
        wakes: Vec<RawFd>,
        post: RawFd,
        awake: RawFd,
    ) -> WorkerSlot {
        let seen_progress = vec![(0, 0); wakes.len()];
        WorkerSlot {
            shared,
            mounts: MountTable::default(),
            running: None,
            wakes,
            post,
            awake,
            sandbox: None,
            pause_ns: 0,
            due_ns: 0,
            seen_progress,
        }
    }

    /// Confines workers from the next one on.
    pub fn confine(&mut self, parts: sandbox::Parts) {
        self.sandbox = Some(parts);
    }

    /// Takes a message of control in; true when an image is mounted by it.
    pub fn mount_message(&mut self, message: ControlMessage) -> io::Result<bool> {
        self.mounts.message(message)
    }

    /// Whether there is something to serve.
    pub fn has_mount(&self) -> bool {
        self.mounts.current.is_some()
    }

    /// Descriptors of the mounted image.
    pub fn mount_fds(&self) -> Option<MountFds> {
        self.mounts.current.as_ref().map(|m| m.fds())
    }

    /// Whether a worker runs, as far as is known.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Becomes readable when the worker ends.
    pub fn pidfd(&self) -> Option<RawFd> {
        self.running.as_ref().map(|r| r.pidfd.as_raw_fd())
    }

    /// When the next worker may be forked, if one has to wait for its predecessor's sake.
    pub fn spawn_due_ns(&self) -> Option<u64> {
        (self.running.is_none() && self.due_ns > 0).then_some(self.due_ns)
    }

    /// Forks a worker with the given state, unless it is too early after a crash.
    pub fn spawn(
        &mut self,
        regions: &[(RegionSpec, File)],
        away: Away,
        rings: Vec<RingSetup>,
    ) -> io::Result<bool> {
        let Some(mount) = self.mount_fds() else {
            return Ok(false);
        };
        if now_ns() < self.due_ns {
            return Ok(false);
        }
        self.due_ns = 0;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in &self.wakes {
            let (a, b) = channel::pair()?;
            ours.push(a);
            theirs.push(b);
        }
        let regions: Vec<_> = regions
            .iter()
            .map(|(spec, file)| (*spec, file.as_raw_fd()))
            .collect();
        for thread in 0..self.wakes.len() {
            let record = self.shared.thread(thread);
            record.busy_since_ns.store(0, Ordering::Relaxed);
            record.resting.store(0, Ordering::Relaxed);
        }
        // Not from shared memory, in which a worker may write.
        let parent = std::process::id();
        // SAFETY: this process has one thread, so the child may do what it likes.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            // Before it serves anything: a worker that answers is known by its number.
            let record = self.shared.record();
            record
                .worker_pid
                .store(std::process::id(), Ordering::Relaxed);
            record.worker_generation.fetch_add(1, Ordering::Relaxed);
            let setup = Setup {
                shared: self.shared,
                regions,
                away,
                rings,
                mount,
                channels: theirs.iter().map(AsRawFd::as_raw_fd).collect(),
                wakes: self.wakes.clone(),
                post: self.post,
                awake: self.awake,
            };
            run_child(setup, parent, self.sandbox);
        }
        let record = self.shared.record();
        let pidfd = process::pidfd(pid).inspect_err(|_| {
            // One that cannot be watched must not serve beside the next.
            process::kill_and_reap(pid);
            record.worker_pid.store(0, Ordering::Relaxed);
        })?;
        // Its predecessor's silence is not its own.
        let now = now_ns();
        for (thread, seen) in self.seen_progress.iter_mut().enumerate() {
            let progress = &self.shared.thread(thread).progress;
            *seen = (progress.load(Ordering::Relaxed), now);
        }
        self.running = Some(Running {
            pid,
            pidfd,
            answered: ours.iter().map(|_| Cell::new(false)).collect(),
            channels: ours,
            progress: self.progress(),
        });
        Ok(true)
    }

    /// Sends a command to the thread that serves the command's queue. `None`: it did not answer in time.
    pub fn command(&self, command: &Command, fds: &[RawFd]) -> Option<channel::Answer> {
        self.command_thread(self.thread_of(command), command, fds, STARTING_MS)
    }

    /// Sends a command to every thread; false when one did not answer.
    pub fn command_all(&self, command: &Command, fds: &[RawFd]) -> bool {
        (0..self.wakes.len()).all(|thread| {
            self.command_thread(thread, command, fds, STARTING_MS)
                .is_some()
        })
    }

    /// Stops a queue: its next avail position, or `None` when no worker says so in time.
    pub fn stop(&self, queue: usize) -> Option<u16> {
        let command = Command::new(channel::Op::Stop, queue);
        self.command_thread(self.thread_of(&command), &command, &[], STARTING_STOP_MS)
            .filter(|answer| answer.status == 0)
            .map(|answer| answer.value as u16)
    }

    fn thread_of(&self, command: &Command) -> usize {
        thread_of(command.queue as usize, self.wakes.len())
    }

    fn command_thread(
        &self,
        thread: usize,
        command: &Command,
        fds: &[RawFd],
        starting_ms: i32,
    ) -> Option<channel::Answer> {
        let running = self.running.as_ref()?;
        let socket = running.channels.get(thread)?.as_raw_fd();
        let answered = running.answered.get(thread)?;
        // An answer that nobody asked for must not be taken for that of this command.
        for _ in 0..MAX_STALE_ANSWERS {
            if channel::receive_answer(socket, 0).is_none() {
                break;
            }
        }
        channel::send_command(socket, command, fds).ok()?;
        let limit = if answered.get() {
            ANSWER_MS
        } else {
            starting_ms
        };
        let answer = channel::receive_answer(socket, limit)?;
        answered.set(true);
        Some(answer)
    }

    /// Ends the worker on purpose.
    pub fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            process::kill_and_reap(running.pid);
            self.gone();
        }
    }

    /// Ends the worker together with the keeper.
    pub fn end(&mut self) {
        if let Some(running) = self.running.take() {
            process::kill_and_wait(running.pid, &running.pidfd, END_MS);
            self.gone();
        }
    }

    /// Ends a worker that makes no progress. True when what it was doing may be to blame.
    pub fn kill_stuck(&mut self) -> bool {
        let died = self
            .running
            .as_ref()
            .is_none_or(|r| process::has_ended(&r.pidfd));
        self.kill_silent() || !died
    }

    /// Ends a worker that does not answer. True when it had died of what it was doing: a busy host is no fault of it.
    pub fn kill_silent(&mut self) -> bool {
        if let Some(running) = self.running.as_ref() {
            if !process::has_ended(&running.pidfd) {
                session::say!("rafs-keeper: the worker hangs");
                process::kill(running.pid);
            }
        }
        self.reap()
    }

    /// Reaps a worker that ended. True when what it was doing may be to blame: a SIGKILL comes from outside.
    pub fn reap(&mut self) -> bool {
        let Some(running) = self.running.take() else {
            return false;
        };
        let status = process::reap(running.pid);
        self.gone();
        // Only a worker that dies before it has done anything has to wait: it would do so for ever.
        self.pause_ns = if self.progress() != running.progress {
            0
        } else {
            (self.pause_ns * 2).clamp(MIN_PAUSE_NS, MAX_PAUSE_NS)
        };
        self.due_ns = if self.pause_ns > FREE_PAUSE_NS {
            now_ns() + self.pause_ns
        } else {
            0
        };
        let crashes = &self.shared.record().worker_crashes;
        crashes.fetch_add(1, Ordering::Relaxed);
        session::say!(
            "rafs-keeper: the worker ended ({}) and is replaced",
            process::describe_status(status)
        );
        !(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL)
    }

    fn progress(&self) -> u64 {
        (0..self.wakes.len())
            .map(|thread| self.shared.thread(thread).progress.load(Ordering::Relaxed))
            .fold(0, u64::wrapping_add)
    }

    fn gone(&self) {
        let record = self.shared.record();
        record.worker_pid.store(0, Ordering::Relaxed);
        record.worker_reaped_ns.store(now_ns(), Ordering::Relaxed);
    }

    /// Whether a thread has been busy without progress for longer than `limit_ns`.
    pub fn is_stuck(&mut self, limit_ns: u64) -> bool {
        if self.running.is_none() {
            return false;
        }
        let now = now_ns();
        let mut stuck = false;
        for (thread, seen) in self.seen_progress.iter_mut().enumerate() {
            let record = self.shared.thread(thread);
            let progress = record.progress.load(Ordering::Relaxed);
            let busy_since = record.busy_since_ns.load(Ordering::Relaxed);
            if busy_since == 0 || progress != seen.0 {
                *seen = (progress, now);
            } else if now.saturating_sub(seen.1.max(busy_since)) > limit_ns {
                // Its last look may be long ago, when the thread slept.
                stuck = true;
            }
        }
        stuck
    }

    /// What the worker's threads are doing, as far as is seen just now.
    pub fn pace(&self) -> Pace {
        let any = |what: fn(&session::ThreadRecord) -> bool| {
            (0..self.wakes.len()).any(|thread| what(self.shared.thread(thread)))
        };
        if self.running.is_none() {
            Pace::Resting
        } else if any(|thread| thread.busy_since_ns.load(Ordering::Relaxed) != 0) {
            Pace::Busy
        } else if any(|thread| thread.resting.load(Ordering::Relaxed) == 0) {
            Pace::Idle
        } else {
            Pace::Resting
        }
    }
}

/// The child's side of the fork; never returns into the keeper's code.
fn run_child(setup: Setup, parent: u32, sandbox: Option<sandbox::Parts>) -> ! {
    let mut keep = vec![
        setup.shared.raw_fd(),
        setup.post,
        setup.awake,
        setup.mount.bootstrap,
        setup.mount.spill,
    ];
    keep.extend(&setup.wakes);
    keep.extend(&setup.channels);
    keep.extend(setup.regions.iter().map(|(_, fd)| *fd));
    keep.extend(setup.rings.iter().flat_map(|r| [r.kick, r.call]).flatten());
    keep.extend(
        setup
            .mount
            .blobs
            .iter()
            .flat_map(|b| [Some(b.state), Some(b.extents), Some(b.touched), b.data])
            .flatten(),
    );
    process::become_child(c"rafs-worker", parent, &keep);
    // Before its first thread, and before it looks at anything that a guest can write.
    if let Some(Err(e)) = sandbox.map(sandbox::confine_worker) {
        session::say!("rafs-worker: it serves nothing outside its sandbox: {e}");
        // SAFETY: as below.
        unsafe { libc::_exit(1) };
    }
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker::run(setup)))
        .unwrap_or(101);
    // SAFETY: ends the process without running the parent's destructors or Python's exit handlers.
    unsafe { libc::_exit(code) }
}
