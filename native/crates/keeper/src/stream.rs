//! The front-end's socket, looked at without blocking.

use std::io;
use std::os::fd::RawFd;

/// Bytes of a vhost-user header: request, flags, size.
const HEADER_LEN: usize = 12;
/// Payloads beyond this many bytes are refused by the message layer at their header.
const MAX_PAYLOAD: usize = 4096;

/// What can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageState {
    Complete,
    Partial,
    Closed,
}

/// Whether a whole vhost-user message can be read: the message layer blocks in the middle of one, and a keeper that
/// waits for a slow front-end would look after nothing else.
pub fn message_state(fd: RawFd) -> MessageState {
    let mut header = [0u8; HEADER_LEN];
    // SAFETY: reads at most 12 bytes into our array; MSG_PEEK leaves bytes and descriptors where they are.
    let n = unsafe {
        libc::recv(
            fd,
            header.as_mut_ptr().cast(),
            HEADER_LEN,
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    if n == 0 {
        return MessageState::Closed;
    }
    if n < 0 {
        let e = io::Error::last_os_error().raw_os_error();
        return if e == Some(libc::EAGAIN) || e == Some(libc::EINTR) {
            MessageState::Partial
        } else {
            MessageState::Closed
        };
    }
    if (n as usize) < HEADER_LEN {
        return rest_to_come(fd);
    }
    let size = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    let mut queued: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(fd, libc::FIONREAD, &mut queued) } != 0 {
        return MessageState::Closed;
    }
    // An oversized message is refused by the message layer at its header.
    if size > MAX_PAYLOAD || queued as usize >= HEADER_LEN + size {
        MessageState::Complete
    } else {
        rest_to_come(fd)
    }
}

/// The rest of a message comes, unless its sender has hung up.
fn rest_to_come(fd: RawFd) -> MessageState {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one pollfd that we own.
    if unsafe { libc::poll(&mut poll, 1, 0) } > 0 {
        MessageState::Closed
    } else {
        MessageState::Partial
    }
}

/// Whether an answer finds room.
pub fn is_writable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one pollfd that we own.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
