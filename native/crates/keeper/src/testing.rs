//! A keeper without processes around it: no image is mounted, so that no worker is forked. For fuzzing.

use std::io::Read as _;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use session::Shared;

use crate::device::Device;
use crate::mount_table::{self, MountTable};
use crate::stream::{MessageState, message_state};
use crate::worker_slot::WorkerSlot;
use crate::{Keeper, Options, UnixListener, eventfd};

/// A keeper, and the front-end's end of its connection.
pub struct Bench {
    keeper: Keeper,
    front: UnixStream,
}

impl Bench {
    /// A keeper that a front-end has just connected to.
    pub fn new() -> Bench {
        let shared: &'static Shared = Box::leak(Box::new(Shared::create().expect("memory")));
        let event = || eventfd().expect("an eventfd");
        let (wakes, post, awake) = (vec![event(), event()], event(), event());
        let raw = wakes.iter().map(AsRawFd::as_raw_fd).collect();
        let slot = WorkerSlot::new(shared, raw, post.as_raw_fd(), awake.as_raw_fd());
        // Nobody connects by it.
        let (unused, front) = UnixStream::pair().expect("sockets");
        let mut bench = Bench {
            keeper: Keeper {
                shared,
                options: Options {
                    keep: true,
                    io_deadline_ns: 1,
                    poll_ns: 0,
                },
                listener: UnixListener::from(OwnedFd::from(unused)),
                signals: event(),
                device: Arc::new(Mutex::new(Device::new(shared, slot))),
                connection: None,
                control: None,
                control_pause_ns: 0,
                control_due_ns: 0,
                exit_code: None,
                post,
                awake,
                wakes,
            },
            front,
        };
        bench.connect();
        bench
    }

    /// A new front-end in the place of the one that was there.
    pub fn connect(&mut self) {
        let (back, front) = UnixStream::pair().expect("sockets");
        front.set_nonblocking(true).expect("a socket");
        self.front = front;
        if self.keeper.connection.is_some() {
            // The old one has hung up.
            self.serve();
        }
        self.keeper.take_connection(back).expect("a connection");
    }

    /// Whether the keeper has not closed the connection.
    pub fn is_connected(&self) -> bool {
        self.keeper.connection.is_some()
    }

    /// The front-end says something.
    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) -> bool {
        worker::channel::send_packet(self.front.as_raw_fd(), bytes, fds).is_ok()
    }

    /// The keeper handles what is there, as its loop does; what it answers. Panics when it does not come to an end.
    pub fn serve(&mut self) -> Vec<u8> {
        let mut answers = Vec::new();
        for _ in 0..10_000 {
            let Some(connection) = &self.keeper.connection else {
                break;
            };
            if message_state(connection.fd) == MessageState::Partial {
                break;
            }
            self.keeper.frontend_message();
            let mut piece = [0; 8192];
            while let Ok(n @ 1..) = self.front.read(&mut piece) {
                answers.extend_from_slice(&piece[..n]);
            }
        }
        answers
    }

    /// How many descriptors of memory and rings the keeper holds.
    pub fn regions(&self) -> usize {
        self.keeper.device().regions()
    }
}

impl Default for Bench {
    fn default() -> Bench {
        Bench::new()
    }
}

/// What control says, taken in as a keeper does.
#[derive(Default)]
pub struct MountMessages(MountTable);

impl MountMessages {
    /// Takes in all messages that wait at `socket`. Malformed ones change nothing.
    pub fn receive(&mut self, socket: RawFd) {
        loop {
            match mount_table::receive(socket) {
                Ok(Some(message)) => {
                    let done = self.0.message(message);
                    assert!(!matches!(done, Ok(true)) || self.0.current.is_some());
                }
                Ok(None) => return,
                Err(_) => {}
            }
        }
    }
}
