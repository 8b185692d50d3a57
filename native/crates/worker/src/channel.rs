//! Commands from keeper to ring thread: fixed-size packets over a SOCK_SEQPACKET pair, descriptors by SCM_RIGHTS,
//! each answered by one packet. Both ends are this project's own; a malformed packet is a bug.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// What a ring thread is told to do.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Map a memory region: args guest address, size, user address, mmap offset; one fd.
    AddRegion = 1,
    /// Unmap a region: args guest address, size, user address.
    RemoveRegion = 2,
    /// Start or replace a ring: args desc, avail, used, packed numbers (see [`RingWords`]); fds kick, call.
    SetRing = 4,
    /// Replace the call fd: fd, or none.
    SetCall = 5,
    /// Replace the kick fd: fd, or none.
    SetKick = 6,
    /// Enable (arg 1) or disable (arg 0) a ring.
    Enable = 7,
    /// Stop a ring; answers the next avail position. Nothing is written for it afterwards.
    Stop = 8,
    /// Post the chunks of all parked requests again: control has been replaced.
    Repost = 9,
}

impl Op {
    fn from_u32(n: u32) -> Option<Op> {
        use Op::*;
        [
            AddRegion,
            RemoveRegion,
            SetRing,
            SetCall,
            SetKick,
            Enable,
            Stop,
            Repost,
        ]
        .into_iter()
        .find(|op| *op as u32 == n)
    }
}

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    pub op: Op,
    pub queue: u32,
    pub args: [u64; 4],
}

impl Command {
    /// A command without arguments.
    pub fn new(op: Op, queue: usize) -> Command {
        Command {
            op,
            queue: queue as u32,
            args: [0; 4],
        }
    }

    /// The same with arguments.
    pub fn with(self, args: [u64; 4]) -> Command {
        Command { args, ..self }
    }
}

/// Size, base and flags of [`Op::SetRing`] in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingWords {
    pub size: u16,
    pub base: u16,
    pub resume: bool,
    pub enabled: bool,
    pub event_idx: bool,
    pub has_kick: bool,
    pub has_call: bool,
}

impl RingWords {
    pub fn pack(self) -> u64 {
        let flags = [
            self.resume,
            self.enabled,
            self.event_idx,
            self.has_kick,
            self.has_call,
        ];
        flags.iter().enumerate().fold(
            u64::from(self.size) | u64::from(self.base) << 16,
            |word, (i, &flag)| word | u64::from(flag) << (32 + i),
        )
    }

    pub fn unpack(word: u64) -> RingWords {
        let flag = |i: u32| word >> (32 + i) & 1 == 1;
        RingWords {
            size: word as u16,
            base: (word >> 16) as u16,
            resume: flag(0),
            enabled: flag(1),
            event_idx: flag(2),
            has_kick: flag(3),
            has_call: flag(4),
        }
    }
}

/// Status 0 or an errno, and a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: i32,
    pub value: u32,
}

const COMMAND_LEN: usize = 40;
const ANSWER_LEN: usize = 8;
const MAX_FDS: usize = 2;

/// A connected pair, close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors into `fds`.
    if unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    } != 0
    {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

#[repr(C, align(8))]
struct ControlBuffer([u8; 64]);

/// Sends `bytes` as one packet with `fds`. Never blocks: a peer that does not read is a peer that hangs.
pub fn send_packet(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = ControlBuffer([0; 64]);
    // SAFETY: an all-zero msghdr is valid; pointers set below outlive the call.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        assert!(fds.len() <= 4, "more descriptors than a packet carries");
        let payload = std::mem::size_of_val(fds) as u32;
        msg.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the buffer of 64 bytes holds a header (16) and four descriptors (16).
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(payload) as usize;
            let header = libc::CMSG_FIRSTHDR(&msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as usize;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                payload as usize,
            );
        }
    }
    loop {
        // SAFETY: `msg` is fully initialised.
        let n = unsafe { libc::sendmsg(socket, &msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        if n >= 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EINTR) {
            return Err(e);
        }
    }
}

/// Receives one packet without blocking: its length (0 = the peer is gone) and descriptors. `None`: nothing there. The
/// length is that of the packet, also where `buf` is shorter and has its beginning only.
pub fn receive_packet(socket: RawFd, buf: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let mut control = ControlBuffer([0; 64]);
    // SAFETY: an all-zero msghdr is valid; pointers set below outlive the call.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len();
    let n = loop {
        // SAFETY: `msg` is fully initialised.
        let n = unsafe {
            libc::recvmsg(
                socket,
                &mut msg,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC,
            )
        };
        if n >= 0 {
            break n as usize;
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EINTR) => continue,
            Some(libc::EAGAIN) => return Ok(None),
            _ => return Err(e),
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control buffer; CMSG macros stay inside msg_controllen.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&msg);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let len = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&msg, header);
        }
    }
    Ok(Some((n, fds)))
}

/// Sends a command.
pub fn send_command(socket: RawFd, command: &Command, fds: &[RawFd]) -> io::Result<()> {
    debug_assert!(fds.len() <= MAX_FDS);
    let mut bytes = [0u8; COMMAND_LEN];
    bytes[0..4].copy_from_slice(&(command.op as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&command.queue.to_le_bytes());
    for (i, arg) in command.args.iter().enumerate() {
        bytes[8 + 8 * i..16 + 8 * i].copy_from_slice(&arg.to_le_bytes());
    }
    send_packet(socket, &bytes, fds)
}

/// What was found on a command socket.
pub enum Received {
    Nothing,
    /// The keeper is gone.
    Closed,
    Command(Command, Vec<OwnedFd>),
}

/// Receives a command without blocking.
pub fn receive_command(socket: RawFd) -> io::Result<Received> {
    let mut bytes = [0u8; COMMAND_LEN];
    let Some((n, fds)) = receive_packet(socket, &mut bytes)? else {
        return Ok(Received::Nothing);
    };
    if n == 0 {
        return Ok(Received::Closed);
    }
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let op = (n == COMMAND_LEN).then(|| Op::from_u32(word(0))).flatten();
    let Some(op) = op else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "malformed command",
        ));
    };
    let args =
        std::array::from_fn(|i| u64::from(word(8 + 8 * i)) | u64::from(word(12 + 8 * i)) << 32);
    Ok(Received::Command(
        Command {
            op,
            queue: word(4),
            args,
        },
        fds,
    ))
}

/// Sends an answer.
pub fn send_answer(socket: RawFd, answer: Answer) -> io::Result<()> {
    let mut bytes = [0u8; ANSWER_LEN];
    bytes[0..4].copy_from_slice(&answer.status.to_le_bytes());
    bytes[4..8].copy_from_slice(&answer.value.to_le_bytes());
    send_packet(socket, &bytes, &[])
}

/// Waits up to `timeout_ms` for an answer; `None` when none came or the worker is gone.
pub fn receive_answer(socket: RawFd, timeout_ms: i32) -> Option<Answer> {
    let mut poll = libc::pollfd {
        fd: socket,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that we own.
    if unsafe { libc::poll(&mut poll, 1, timeout_ms) } <= 0 {
        return None;
    }
    let mut bytes = [0u8; ANSWER_LEN];
    match receive_packet(socket, &mut bytes) {
        Ok(Some((ANSWER_LEN, _))) => Some(Answer {
            status: i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            value: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn commands_and_descriptors_arrive() {
        let (a, b) = pair().unwrap();
        let words = RingWords {
            size: 1024,
            base: 65535,
            resume: true,
            enabled: false,
            event_idx: true,
            has_kick: true,
            has_call: false,
        };
        let command = Command::new(Op::SetRing, 3).with([1, 2, u64::MAX, words.pack()]);
        send_command(a.as_raw_fd(), &command, &[a.as_raw_fd()]).unwrap();
        let Received::Command(got, fds) = receive_command(b.as_raw_fd()).unwrap() else {
            panic!("no command")
        };
        assert_eq!((got.op, got.queue, got.args), (command.op, 3, command.args));
        assert_eq!(RingWords::unpack(got.args[3]), words);
        assert_eq!(fds.len(), 1);
        send_packet(a.as_raw_fd(), &[9; COMMAND_LEN + 1], &[]).unwrap();
        assert!(receive_command(b.as_raw_fd()).is_err(), "longer than any");
        send_packet(a.as_raw_fd(), &[0; ANSWER_LEN + 1], &[]).unwrap();
        assert_eq!(receive_answer(b.as_raw_fd(), 0), None);
        drop((a, fds));
        assert!(matches!(
            receive_command(b.as_raw_fd()).unwrap(),
            Received::Closed
        ));
    }
}
