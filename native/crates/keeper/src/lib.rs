//! The process that owns what must survive a worker: sockets, vhost-user messages, the descriptors of guest memory
//! and rings, the in-flight log, the mount table.
//!
//! One thread, no locks that could be held elsewhere, no credentials: it can fork a fresh worker at any time. It
//! parses nothing that a guest or a registry controls.
//!
//! * `frontend`: connections of VMMs; `device`: the vhost-user device, told by the VMM through the `vhost` crate's message
//!   layer;
//! * `worker_slot`: the current worker: fork, commands, replacement;
//! * `mount_table`: the image as control hands it over;
//! * `process`: what every child does first; `stream`: the front-end's socket.

mod device;
mod frontend;
mod mount_table;
pub mod process;
mod ring;
mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod worker_slot;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use session::clock::now_ns;
use session::{MAX_THREADS, Shared};

use device::Device;
use frontend::Connection;
use mount_table::ControlMessage;
use worker_slot::Pace;

/// What the caller has to do when [`Keeper::run`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Everything has ended; the process exits with this code.
    Exit(i32),
    /// Fork control, give it this end of the socket pair, then call [`Keeper::control_started`] and `run` again.
    ForkControl(RawFd),
}

/// How the daemon was asked to behave.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Listen again when the VMM goes, instead of ending.
    pub keep: bool,
    /// When a request that waits for data gets EIO, in ns.
    pub io_deadline_ns: u64,
    /// How long ring threads look for more requests before they sleep, at most, in ns.
    pub poll_ns: u64,
}

/// A worker that is busy without progress for so long hangs.
const HEARTBEAT_NS: u64 = 5_000_000_000;
/// How often heartbeats are looked at, in ms, while a thread of the worker does not sleep.
const TICK_MS: i32 = 1000;
/// The same while all of them sleep: a thread that wakes up and hangs is found out a little later. Threads that have
/// slept for long say when they wake up, and nothing is looked at before.
const IDLE_TICK_MS: i32 = 5000;
/// How long an ending keeper waits for a control that it has killed, in ms.
const CONTROL_END_MS: i32 = 300;
/// Control is restarted at once, then ever more slowly, up to this pause.
const MAX_CONTROL_PAUSE_NS: u64 = 5_000_000_000;

struct Control {
    socket: OwnedFd,
    pid: Option<libc::pid_t>,
    pidfd: Option<OwnedFd>,
    started_ns: u64,
    /// Since when it has hung up, although it has not ended.
    hung_up_ns: Option<u64>,
}

/// The keeper of one daemon.
pub struct Keeper {
    shared: &'static Shared,
    options: Options,
    listener: UnixListener,
    signals: OwnedFd,
    device: Arc<Mutex<Device>>,
    connection: Option<Connection>,
    control: Option<Control>,
    control_pause_ns: u64,
    control_due_ns: u64,
    exit_code: Option<i32>,
    post: OwnedFd,
    awake: OwnedFd,
    wakes: Vec<OwnedFd>,
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Threads that serve rings: no more than there are processors.
fn ring_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    cpus.clamp(1, MAX_THREADS.min(4))
}

impl Keeper {
    /// Takes over `listener` (a bound and listening unix socket) and blocks the signals that it will handle.
    pub fn new(listener: OwnedFd, options: Options) -> io::Result<Keeper> {
        let shared: &'static Shared = Box::leak(Box::new(Shared::create()?));
        let record = shared.record();
        let now = now_ns();
        record
            .start_ns
            .store(process::start_time_ns().unwrap_or(now), Ordering::Relaxed);
        record.bound_ns.store(now, Ordering::Relaxed);
        record
            .io_deadline_ns
            .store(options.io_deadline_ns, Ordering::Relaxed);
        record.poll_ns.store(options.poll_ns, Ordering::Relaxed);
        record
            .keeper_pid
            .store(std::process::id(), Ordering::Relaxed);
        let wakes = (0..ring_threads())
            .map(|_| eventfd())
            .collect::<io::Result<Vec<_>>>()?;
        let post = eventfd()?;
        let awake = eventfd()?;
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let slot = worker_slot::WorkerSlot::new(
            shared,
            wakes.iter().map(AsRawFd::as_raw_fd).collect(),
            post.as_raw_fd(),
            awake.as_raw_fd(),
        );
        process::set_name(c"rafs-keeper");
        process::raise_descriptor_limit();
        Ok(Keeper {
            shared,
            options,
            listener,
            signals: process::signalfd(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?,
            device: Arc::new(Mutex::new(Device::new(shared, slot))),
            connection: None,
            control: None,
            control_pause_ns: 0,
            control_due_ns: 0,
            exit_code: None,
            post,
            awake,
            wakes,
        })
    }

    /// Confines all workers that will be forked to `parts`.
    pub fn confine_workers(&mut self, parts: sandbox::Parts) {
        self.device().slot.confine(parts);
    }

    /// The memory shared with worker and control.
    pub fn shared(&self) -> &'static Shared {
        self.shared
    }

    /// eventfd by which control learns of posts.
    pub fn post_fd(&self) -> RawFd {
        self.post.as_raw_fd()
    }

    /// eventfds by which ring threads learn that chunks became ready.
    pub fn wake_fds(&self) -> Vec<RawFd> {
        self.wakes.iter().map(AsRawFd::as_raw_fd).collect()
    }

    /// Descriptors of the mounted image, for a control that takes over. `None` before the first mount.
    pub fn mount(&self) -> Option<worker::MountFds> {
        self.device().slot.mount_fds()
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The control process has been forked as `pid`; its end of the pair is closed here by the caller.
    pub fn control_started(&mut self, pid: libc::pid_t) -> io::Result<()> {
        let record = self.shared.record();
        record.control_pid.store(pid as u32, Ordering::Relaxed);
        record.control_generation.fetch_add(1, Ordering::Relaxed);
        let pidfd = process::pidfd(pid).inspect_err(|_| {
            process::kill_and_reap(pid);
        })?;
        if let Some(control) = self.control.as_mut() {
            control.pid = Some(pid);
            control.pidfd = Some(pidfd);
            control.started_ns = now_ns();
        }
        if self.connection.as_ref().is_some_and(|c| c.spoke) {
            self.tell_control(mount_table::frontend(true));
        }
        // Chunks that the old control was asked for are asked for again.
        self.device().repost();
        Ok(())
    }

    /// Runs until something has to be done that only the caller can do.
    pub fn run(&mut self) -> Next {
        loop {
            if let Some(code) = self.exit_code {
                self.end_children();
                return Next::Exit(code);
            }
            let now = now_ns();
            if self.control.is_none() && now >= self.control_due_ns {
                match worker::channel::pair() {
                    Ok((ours, theirs)) => {
                        self.control = Some(Control {
                            socket: ours,
                            pid: None,
                            pidfd: None,
                            started_ns: now,
                            hung_up_ns: None,
                        });
                        return Next::ForkControl(std::os::fd::IntoRawFd::into_raw_fd(theirs));
                    }
                    Err(e) => {
                        session::say!("rafs-keeper: no socket pair for control: {e}");
                        self.exit_code = Some(70);
                        continue;
                    }
                }
            }
            if let Err(e) = self.wait(now) {
                session::say!("rafs-keeper: {e}");
                self.exit_code = Some(70);
            }
        }
    }

    /// When there is something to look after, if nothing happens before, in ms; -1 is never.
    fn tick_ms(&self) -> i32 {
        let deaf = self
            .control
            .as_ref()
            .is_some_and(|c| c.hung_up_ns.is_some());
        let device = self.device();
        match device.slot.pace() {
            _ if deaf || device.lacks_worker() => TICK_MS,
            Pace::Busy => TICK_MS,
            Pace::Idle => IDLE_TICK_MS,
            Pace::Resting => -1,
        }
    }

    /// Waits for one batch of events and handles it.
    fn wait(&mut self, now: u64) -> io::Result<()> {
        let mut timeout = self.tick_ms();
        let mut at_most = |ms: i32| {
            if timeout < 0 || timeout > ms {
                timeout = ms;
            }
        };
        let until = |due_ns: u64| (due_ns.saturating_sub(now) / 1_000_000) as i32 + 1;
        if self.control.is_none() {
            at_most(until(self.control_due_ns));
        }
        let partial = self
            .connection
            .as_ref()
            .is_some_and(|c| c.partial_ns.is_some());
        if partial {
            at_most(2);
        }
        if let Some(due) = self.device().slot.spawn_due_ns() {
            at_most(until(due));
        }
        let watch = |fd: Option<RawFd>| libc::pollfd {
            fd: fd.unwrap_or(-1),
            events: libc::POLLIN,
            revents: 0,
        };
        let control = self.control.as_ref();
        let worker_pidfd = self.device().slot.pidfd();
        let mut fds = [
            watch(Some(self.signals.as_raw_fd())),
            watch(worker_pidfd),
            watch(
                control
                    .and_then(|c| c.pidfd.as_ref())
                    .map(AsRawFd::as_raw_fd),
            ),
            watch(
                control
                    .filter(|c| c.hung_up_ns.is_none())
                    .map(|c| c.socket.as_raw_fd()),
            ),
            watch(self.connection.as_ref().map(|c| c.fd).filter(|_| !partial)),
            watch(Some(self.listener.as_raw_fd()).filter(|_| self.connection.is_none())),
            watch(Some(self.awake.as_raw_fd())),
        ];
        // SAFETY: an array of pollfds that we own.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if n < 0 {
            let e = io::Error::last_os_error();
            return if e.raw_os_error() == Some(libc::EINTR) {
                Ok(())
            } else {
                Err(e)
            };
        }
        let ready = |i: usize| fds[i].revents != 0;
        if ready(0) {
            self.exit_code = Some(0);
            return Ok(());
        }
        if ready(1) {
            self.device().worker_died();
        }
        if ready(3) {
            self.control_messages();
        }
        if ready(2) {
            self.control_died();
        }
        if ready(4) || partial {
            self.frontend_message();
        }
        if ready(5) {
            self.accept();
        }
        if ready(6) {
            let mut count = [0u8; 8];
            // SAFETY: eight bytes from our eventfd into our buffer.
            unsafe { libc::read(self.awake.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        }
        self.device().tick(HEARTBEAT_NS);
        self.end_deaf_control();
        Ok(())
    }

    /// A control that has closed its socket and stays is of no use; its successor is.
    fn end_deaf_control(&self) {
        if let Some((pid, since)) = self.control.as_ref().and_then(|c| c.pid.zip(c.hung_up_ns)) {
            if now_ns().saturating_sub(since) > HEARTBEAT_NS {
                process::kill(pid);
            }
        }
    }

    fn tell_control(&self, message: [u8; mount_table::MESSAGE_LEN]) {
        if let Some(control) = &self.control {
            // A control that is dead or not there yet learns the state when it starts.
            let _ = worker::channel::send_packet(control.socket.as_raw_fd(), &message, &[]);
        }
    }

    fn control_messages(&mut self) {
        loop {
            let Some(socket) = self.control.as_ref().map(|c| c.socket.as_raw_fd()) else {
                return;
            };
            match mount_table::receive(socket) {
                Ok(Some(ControlMessage::Fatal(code))) => self.exit_code = Some(code),
                Ok(Some(message)) => {
                    let mounted = self.device().slot.mount_message(message);
                    match mounted {
                        Ok(true) => {
                            self.shared
                                .record()
                                .mounted_ns
                                .store(now_ns(), Ordering::Relaxed);
                            self.control_pause_ns = 0;
                            self.device().mounted();
                        }
                        Ok(false) => {}
                        Err(e) => {
                            session::say!(
                                "rafs-keeper: control sent a mount that makes no sense: {e}"
                            )
                        }
                    }
                }
                Ok(None) => return,
                Err(e) => {
                    if e.kind() != io::ErrorKind::UnexpectedEof {
                        session::say!("rafs-keeper: control: {e}");
                        return;
                    }
                    // The end of the socket: its pidfd tells the rest.
                    match self.control.as_mut().filter(|c| c.pidfd.is_some()) {
                        Some(control) => control.hung_up_ns = Some(now_ns()),
                        None => self.control = None,
                    }
                    return;
                }
            }
        }
    }

    fn control_died(&mut self) {
        let Some(control) = self.control.take() else {
            return;
        };
        let status = control.pid.map(process::reap);
        self.shared.record().control_pid.store(0, Ordering::Relaxed);
        if self.exit_code.is_some() {
            return;
        }
        // A control that ran for a while starts again at once; one that dies at start gets ever longer pauses.
        let lived = now_ns().saturating_sub(control.started_ns);
        self.control_pause_ns = if lived > 2 * MAX_CONTROL_PAUSE_NS {
            0
        } else {
            (self.control_pause_ns * 2).clamp(50_000_000, MAX_CONTROL_PAUSE_NS)
        };
        let pause = if lived > 1_000_000_000 {
            0
        } else {
            self.control_pause_ns
        };
        self.control_due_ns = now_ns() + pause;
        session::say!(
            "rafs-keeper: control ended ({}); what is cached is served on, control starts again in {} ms",
            status.map_or_else(|| "never started".to_owned(), process::describe_status),
            pause / 1_000_000
        );
    }

    fn end_children(&mut self) {
        self.device().slot.end();
        if let Some((pid, pidfd)) = self.control.take().and_then(|c| c.pid.zip(c.pidfd)) {
            process::kill_and_wait(pid, &pidfd, CONTROL_END_MS);
        }
    }
}
