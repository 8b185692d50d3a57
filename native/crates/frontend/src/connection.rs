//! vhost-user framing: a 12-byte header {request, flags, size}, a payload, and file descriptors beside it
//! (docs/interop/vhost-user.rst of QEMU, "Message Specification"). What the payloads mean is the caller's
//! business, so that malformed ones can be sent too.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::sys;

/// Protocol version in the two lowest bits of `flags`.
pub const FLAG_VERSION: u32 = 1;
/// Set in every reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// The sender wants a reply although the request has none of its own (REPLY_ACK).
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

const HEADER: usize = 12;
/// Larger replies are refused; the largest real one is a device configuration of a few hundred bytes.
const MAX_PAYLOAD: usize = 1 << 16;
/// SCM_MAX_FD of Linux is 253; vhost-user itself never passes more than 8.
const MAX_FDS: usize = 64;

/// A received message.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// The front-end's end of a vhost-user socket.
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Connects to a back-end that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(|e| Error::Os("connect", e))?;
        Ok(Connection { stream })
    }

    /// Takes a connected socket.
    pub fn adopt(socket: OwnedFd) -> Self {
        Connection {
            stream: UnixStream::from(socket),
        }
    }

    pub fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Sends one message. `size` overrides the header's size field, so that it can lie.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        size: Option<u32>,
    ) -> Result<(), Error> {
        let size = size.unwrap_or(payload.len() as u32);
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        for field in [request, flags, size] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes as they are, the descriptors with the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if fds.len() > MAX_FDS {
            return Err(Error::Invalid(format!(
                "{} descriptors in one message, at most {MAX_FDS}",
                fds.len()
            )));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        while sent < bytes.len() {
            let with_fds: &[RawFd] = if sent == 0 { &raw } else { &[] };
            sent += self.sendmsg(bytes.get(sent..).unwrap_or_default(), with_fds)?;
        }
        Ok(())
    }

    fn sendmsg(&self, bytes: &[u8], fds: &[RawFd]) -> Result<usize, Error> {
        let fds_len = std::mem::size_of_val(fds);
        let mut iov = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = Control::new();
        // SAFETY: msghdr is plain data; all-zero is its empty value.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        if !fds.is_empty() {
            msg.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: pure arithmetic on a length that fits (at most MAX_FDS descriptors).
            msg.msg_controllen = unsafe { libc::CMSG_SPACE(fds_len as u32) } as usize;
            // SAFETY: the control buffer holds CMSG_SPACE of MAX_FDS descriptors, aligned for cmsghdr, so the
            // first header and its data lie inside it.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&msg);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN(fds_len as u32) as usize;
                std::ptr::copy_nonoverlapping(
                    fds.as_ptr().cast::<u8>(),
                    libc::CMSG_DATA(cmsg),
                    fds_len,
                );
            }
        }
        loop {
            // SAFETY: msg and everything it points at live across the call.
            let n = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
            if n >= 0 {
                return Ok(n as usize);
            }
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed);
                }
                _ => return Err(Error::Os("sendmsg", e)),
            }
        }
    }

    /// The next message, at the latest after `timeout`.
    ///
    /// Errors: [`Error::Closed`] at the end of the stream, [`Error::Timeout`], [`Error::Broken`] for a reply
    /// with an impossible size.
    pub fn recv(&self, timeout: Duration) -> Result<Message, Error> {
        let deadline = Instant::now() + timeout;
        let mut fds = Vec::new();
        let mut header = [0u8; HEADER];
        self.recv_exact(&mut header, &mut fds, deadline)?;
        let field = |i: usize| {
            let mut b = [0u8; 4];
            b.copy_from_slice(&header[i * 4..i * 4 + 4]);
            u32::from_le_bytes(b)
        };
        let (request, flags, size) = (field(0), field(1), field(2) as usize);
        if size > MAX_PAYLOAD {
            return Err(Error::Broken(format!(
                "the reply to request {request} announces {size} bytes"
            )));
        }
        let mut payload = vec![0u8; size];
        self.recv_exact(&mut payload, &mut fds, deadline)?;
        Ok(Message {
            request,
            flags,
            payload,
            fds,
        })
    }

    fn recv_exact(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), Error> {
        let mut got = 0;
        while got < buf.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if sys::poll(&[sys::Until::Readable(self.stream.as_raw_fd())], left)? == 0 {
                if left.is_zero() {
                    return Err(Error::Timeout);
                }
                continue;
            }
            match self.recvmsg(buf.get_mut(got..).unwrap_or_default(), fds)? {
                0 => return Err(Error::Closed),
                n => got += n,
            }
        }
        Ok(())
    }

    fn recvmsg(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Error> {
        let mut iov = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        let mut control = Control::new();
        // SAFETY: msghdr is plain data; all-zero is its empty value.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.0.as_mut_ptr().cast();
        msg.msg_controllen = std::mem::size_of_val(&control.0);
        // SAFETY: msg and the buffers it points at live across the call.
        let n = unsafe {
            libc::recvmsg(
                self.stream.as_raw_fd(),
                &raw mut msg,
                libc::MSG_CMSG_CLOEXEC,
            )
        };
        if n < 0 {
            let e = io::Error::last_os_error();
            return match e.kind() {
                io::ErrorKind::Interrupted => self.recvmsg(buf, fds),
                io::ErrorKind::ConnectionReset => Err(Error::Closed),
                _ => Err(Error::Os("recvmsg", e)),
            };
        }
        // SAFETY: the kernel filled msg_control up to msg_controllen with well-formed control messages; each
        // SCM_RIGHTS message carries descriptors that are now ours alone.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
            while !cmsg.is_null() {
                if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                    let bytes = (*cmsg).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                    for i in 0..bytes / size_of::<RawFd>() {
                        let fd = libc::CMSG_DATA(cmsg)
                            .cast::<RawFd>()
                            .add(i)
                            .read_unaligned();
                        fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
            }
        }
        Ok(n as usize)
    }
}

/// Room for MAX_FDS descriptors, aligned for `cmsghdr`.
struct Control([u64; 64]);

impl Control {
    fn new() -> Self {
        const { assert!(64 * 8 >= 24 + MAX_FDS * 4) };
        Control([0; 64])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    fn pair() -> (Connection, UnixStream) {
        let (a, b) = UnixStream::pair().expect("socketpair");
        (Connection::adopt(a.into()), b)
    }

    #[test]
    fn a_message_is_header_and_payload() {
        let (front, mut back) = pair();
        front
            .send(
                2,
                FLAG_VERSION | FLAG_NEED_REPLY,
                &7u64.to_le_bytes(),
                &[],
                None,
            )
            .unwrap();
        let mut got = [0u8; 20];
        back.read_exact(&mut got).unwrap();
        assert_eq!(
            got,
            [2, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn descriptors_travel_and_work() {
        let (front, back) = pair();
        let back = Connection::adopt(back.into());
        let event = sys::eventfd().unwrap();
        front
            .send(
                13,
                FLAG_VERSION,
                &[1, 2],
                &[event.as_fd(), event.as_fd()],
                None,
            )
            .unwrap();
        let message = back.recv(Duration::from_secs(5)).unwrap();
        assert_eq!(
            (
                message.request,
                message.payload.as_slice(),
                message.fds.len()
            ),
            (13, &[1u8, 2][..], 2)
        );
        sys::signal(message.fds[1].as_fd()).unwrap();
        assert_eq!(sys::take_signal(event.as_fd()), 1);
    }

    #[test]
    fn a_reply_in_pieces_a_closed_and_a_silent_peer() {
        let (front, mut back) = pair();
        assert!(matches!(
            front.recv(Duration::from_millis(10)),
            Err(Error::Timeout)
        ));
        back.write_all(&[1, 0, 0, 0, 5, 0]).unwrap();
        let writer = std::thread::spawn(move || {
            back.write_all(&[0, 0, 2, 0, 0, 0, 9]).unwrap();
            back.write_all(&[8]).unwrap();
        });
        let message = front.recv(Duration::from_secs(5)).unwrap();
        assert_eq!(
            (message.request, message.flags, message.payload),
            (1, 5, vec![9, 8])
        );
        writer.join().unwrap();
        assert!(matches!(
            front.recv(Duration::from_secs(5)),
            Err(Error::Closed)
        ));
    }

    #[test]
    fn a_reply_of_impossible_size_is_refused() {
        let (front, mut back) = pair();
        back.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 255, 255, 255, 255])
            .unwrap();
        assert!(matches!(
            front.recv(Duration::from_secs(5)),
            Err(Error::Broken(_))
        ));
    }
}
