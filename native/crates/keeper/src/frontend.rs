//! Connections of front-ends: one at a time, from accept to hang-up.
//!
//! Who connects and says nothing is no VMM: a second daemon that looks whether the socket is taken, a probe, or a VMM that
//! failed before it began. It is not spoken of, and its end is not the end of a VM: the keeper goes on listening.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use session::clock::now_ns;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::device::Device;
use crate::stream::{MessageState, is_writable, message_state};
use crate::{Keeper, mount_table};

/// A message whose rest does not come within this time breaks the connection.
const PARTIAL_MESSAGE_NS: u64 = 2_000_000_000;

/// A front-end that is connected.
pub(crate) struct Connection {
    handler: BackendReqHandler<Mutex<Device>>,
    pub fd: RawFd,
    /// Since when a message has been incomplete.
    pub partial_ns: Option<u64>,
    /// Whether anything has come from it.
    pub spoke: bool,
}

impl Keeper {
    /// Takes a connection that waits to be accepted.
    pub(crate) fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                if e.kind() != io::ErrorKind::WouldBlock {
                    session::say!("rafs-keeper: accept: {e}");
                    // Without descriptors the next try fails as fast as this one.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
                return;
            }
        };
        if let Err(e) = self.take_connection(stream) {
            session::say!("rafs-keeper: a front-end cannot be served: {e}");
        }
    }

    pub(crate) fn take_connection(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let fd = stream.as_raw_fd();
        let handler = BackendReqHandler::from_stream(stream, self.device.clone());
        self.connection = Some(Connection {
            handler,
            fd,
            partial_ns: None,
            spoke: false,
        });
        Ok(())
    }

    /// Whoever connected has said something: it is a VMM. Who only looks whether anybody listens here is none.
    fn frontend_spoke(&mut self) {
        let Some(connection) = self.connection.as_mut().filter(|c| !c.spoke) else {
            return;
        };
        connection.spoke = true;
        let record = self.shared.record();
        record.connected_ns.store(now_ns(), Ordering::Relaxed);
        record.frontend_connected.store(1, Ordering::Relaxed);
        self.tell_control(mount_table::frontend(true));
    }

    /// The front-end's socket is readable, or half a message has been there.
    pub(crate) fn frontend_message(&mut self) {
        let Some(fd) = self.connection.as_ref().map(|c| c.fd) else {
            return;
        };
        let state = match message_state(fd) {
            // An answer that finds no room would block this loop, signals and all.
            MessageState::Complete if !is_writable(fd) => MessageState::Partial,
            state => state,
        };
        if !matches!(state, MessageState::Closed) {
            self.frontend_spoke();
        }
        let Some(connection) = self.connection.as_mut() else {
            return;
        };
        match state {
            MessageState::Complete => {
                connection.partial_ns = None;
            }
            MessageState::Partial => {
                let since = *connection.partial_ns.get_or_insert_with(now_ns);
                if now_ns().saturating_sub(since) > PARTIAL_MESSAGE_NS {
                    session::say!(
                        "rafs-keeper: the front-end sent half a message, or reads no answers; the connection is closed"
                    );
                    self.frontend_gone();
                }
                return;
            }
            MessageState::Closed => {
                self.frontend_gone();
                return;
            }
        }
        let result = connection.handler.handle_request();
        if let Err(e) = result {
            let fatal = matches!(
                e,
                VhostError::Disconnected
                    | VhostError::PartialMessage
                    | VhostError::OversizedMsg
                    | VhostError::InvalidMessage
                    | VhostError::SocketBroken(_)
                    | VhostError::SocketError(_)
            );
            session::say!("rafs-keeper: front-end message: {e}");
            if fatal {
                self.frontend_gone();
            }
        }
    }

    fn frontend_gone(&mut self) {
        // Somebody who only looked whether anybody listens here, such as a second daemon, was no VMM: it ends nothing.
        let was_vmm = self.connection.take().is_some_and(|c| c.spoke);
        self.shared
            .record()
            .frontend_connected
            .store(0, Ordering::Relaxed);
        self.device().reset_all();
        if was_vmm {
            self.tell_control(mount_table::frontend(false));
        }
        if was_vmm && !self.options.keep {
            self.exit_code = Some(0);
        }
    }
}
