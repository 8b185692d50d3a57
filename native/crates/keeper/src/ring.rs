//! What the VMM said about one queue.

use std::fs::File;
use std::os::fd::AsRawFd;

use virtq::RingAddresses;
use worker::RingSetup;

/// State of one virtqueue as vhost-user messages built it up.
#[derive(Default)]
pub struct Ring {
    pub size: u16,
    pub at: Option<RingAddresses>,
    pub base: u16,
    /// SET_VRING_KICK has come: the ring may run. `kick` may still be absent (the VMM wants it polled).
    pub started: bool,
    pub kick: Option<File>,
    pub call: Option<File>,
    pub err: Option<File>,
    pub enabled: bool,
    /// The in-flight log holds this ring's heads: a worker goes on from it.
    pub log_valid: bool,
    /// What GET_VRING_BASE answered last. A start at another base is a new driver.
    pub stopped_at: Option<u16>,
}

impl Ring {
    /// Whether a worker can serve it.
    pub fn is_complete(&self) -> bool {
        self.started && self.size != 0 && self.at.is_some()
    }

    /// The driver has gone: descriptors and positions mean nothing any more. Call and err fds stay, because VMMs
    /// set them before the device is reset.
    pub fn reset(&mut self) {
        self.started = false;
        self.kick = None;
        self.enabled = false;
        self.log_valid = false;
        self.stopped_at = None;
        self.base = 0;
        self.at = None;
    }

    /// What a worker is told, if it can be served.
    pub fn setup(&self, queue: usize, event_idx: bool) -> Option<RingSetup> {
        let at = self.at.filter(|_| self.is_complete())?;
        Some(RingSetup {
            queue,
            size: self.size,
            at,
            base: self.base,
            resume: self.log_valid,
            enabled: self.enabled,
            event_idx,
            kick: self.kick.as_ref().map(AsRawFd::as_raw_fd),
            call: self.call.as_ref().map(AsRawFd::as_raw_fd),
        })
    }
}
