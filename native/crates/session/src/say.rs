//! One line on stderr for people, by processes that must not depend on anybody reading it.
//!
//! `eprintln!` panics when the pipe behind stderr is broken, and blocks when it is full: a guest must not lose its disk
//! because a log collector died. What cannot be written at once is lost.

/// Writes `text` and a newline to stderr if that does not block; see [`say!`](crate::say).
pub fn say_line(text: &str) {
    let line = format!("{text}\n");
    let mut poll = libc::pollfd {
        fd: 2,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one pollfd that we own, then a write from our buffer. Errors are for nobody.
    unsafe {
        if libc::poll(&mut poll, 1, 0) > 0 && poll.revents & libc::POLLOUT != 0 {
            libc::write(2, line.as_ptr().cast(), line.len());
        }
    }
}

/// Like `eprintln!`, but never panics and never blocks.
#[macro_export]
macro_rules! say {
    ($($args:tt)*) => { $crate::say::say_line(&format!($($args)*)) };
}
