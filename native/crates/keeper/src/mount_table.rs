//! Messages between control and keeper, and the mount that they build up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use worker::channel::receive_packet;
use worker::{BlobFds, MountFds};

/// Bytes of a message: four little-endian u32.
pub const MESSAGE_LEN: usize = 16;
/// More blobs than an EROFS device id can name.
const MAX_BLOBS: u32 = 255;

const MOUNT_BEGIN: u32 = 1;
const MOUNT_BLOB: u32 = 2;
const MOUNT_COMMIT: u32 = 3;
const FATAL: u32 = 4;
const FRONTEND: u32 = 17;

/// What control says.
pub enum ControlMessage {
    Begin {
        blobs: u32,
        bootstrap: OwnedFd,
        spill: OwnedFd,
    },
    Blob {
        index: u32,
        state: OwnedFd,
        extents: OwnedFd,
        touched: OwnedFd,
        data: Option<OwnedFd>,
    },
    Commit,
    /// Nothing can be served; the text has been printed.
    Fatal(i32),
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// The next message, `None` when there is none. An error of kind `UnexpectedEof` is the end.
pub fn receive(socket: RawFd) -> io::Result<Option<ControlMessage>> {
    let mut bytes = [0u8; MESSAGE_LEN];
    let Some((n, fds)) = receive_packet(socket, &mut bytes)? else {
        return Ok(None);
    };
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if n != MESSAGE_LEN {
        return Err(invalid("message of a wrong length"));
    }
    let word = |i: usize| {
        u32::from_le_bytes([
            bytes[4 * i],
            bytes[4 * i + 1],
            bytes[4 * i + 2],
            bytes[4 * i + 3],
        ])
    };
    let mut fds = fds.into_iter();
    let mut fd = || {
        fds.next()
            .ok_or_else(|| invalid("message without its descriptors"))
    };
    Ok(Some(match word(0) {
        MOUNT_BEGIN => ControlMessage::Begin {
            blobs: word(2),
            bootstrap: fd()?,
            spill: fd()?,
        },
        MOUNT_BLOB => ControlMessage::Blob {
            index: word(2),
            state: fd()?,
            extents: fd()?,
            touched: fd()?,
            data: fd().ok(),
        },
        MOUNT_COMMIT => ControlMessage::Commit,
        FATAL => ControlMessage::Fatal(word(1) as i32),
        _ => return Err(invalid("unknown message")),
    }))
}

/// The message that tells control whether a front-end is connected.
pub fn frontend(connected: bool) -> [u8; MESSAGE_LEN] {
    let mut out = [0; MESSAGE_LEN];
    out[0..4].copy_from_slice(&FRONTEND.to_le_bytes());
    out[4] = u8::from(connected);
    out
}

struct Blob {
    state: OwnedFd,
    extents: OwnedFd,
    touched: OwnedFd,
    data: Option<OwnedFd>,
}

/// A mount, complete or on its way.
pub struct Mount {
    bootstrap: OwnedFd,
    spill: OwnedFd,
    expected: u32,
    blobs: Vec<Blob>,
}

impl Mount {
    /// The descriptors, still owned by this table.
    pub fn fds(&self) -> MountFds {
        MountFds {
            bootstrap: self.bootstrap.as_raw_fd(),
            spill: self.spill.as_raw_fd(),
            blobs: self
                .blobs
                .iter()
                .map(|b| BlobFds {
                    state: b.state.as_raw_fd(),
                    extents: b.extents.as_raw_fd(),
                    touched: b.touched.as_raw_fd(),
                    data: b.data.as_ref().map(AsRawFd::as_raw_fd),
                })
                .collect(),
        }
    }
}

/// The mounted image, and the one that is being handed over.
#[derive(Default)]
pub struct MountTable {
    pub current: Option<Mount>,
    pending: Option<Mount>,
}

impl MountTable {
    /// Takes one message in; true when it completed a mount, which is `current` then.
    pub fn message(&mut self, message: ControlMessage) -> io::Result<bool> {
        match message {
            ControlMessage::Begin {
                blobs,
                bootstrap,
                spill,
            } => {
                if blobs > MAX_BLOBS {
                    return Err(invalid("too many blobs"));
                }
                self.pending = Some(Mount {
                    bootstrap,
                    spill,
                    expected: blobs,
                    blobs: Vec::new(),
                });
            }
            ControlMessage::Blob {
                index,
                state,
                extents,
                touched,
                data,
            } => {
                let pending = self
                    .pending
                    .as_mut()
                    .ok_or_else(|| invalid("a blob without a mount"))?;
                if index as usize != pending.blobs.len() || index >= pending.expected {
                    return Err(invalid("blobs out of order"));
                }
                pending.blobs.push(Blob {
                    state,
                    extents,
                    touched,
                    data,
                });
            }
            ControlMessage::Commit => {
                let pending = self
                    .pending
                    .take()
                    .ok_or_else(|| invalid("a commit without a mount"))?;
                if pending.blobs.len() != pending.expected as usize {
                    return Err(invalid("a mount lacks blobs"));
                }
                self.current = Some(pending);
                return Ok(true);
            }
            ControlMessage::Fatal(_) => {}
        }
        Ok(false)
    }
}

#[cfg(test)]
#[path = "mount_table_tests.rs"]
mod tests;
