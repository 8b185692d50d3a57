//! What is watched here are numbers in shared memory, and those above 0 have changed.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;

struct Rig {
    cells: Arc<[AtomicU32; 4]>,
    looks: Arc<AtomicU32>,
    came: Arc<AtomicU32>,
    watch: Watch<usize>,
}

const CAME: u32 = 1;
const GONE: u32 = 2;

fn rig() -> Rig {
    let cells: Arc<[AtomicU32; 4]> = Arc::default();
    let looks = Arc::new(AtomicU32::new(0));
    let came = Arc::new(AtomicU32::new(0));
    let (seen, counted, noted) = (Arc::clone(&cells), Arc::clone(&looks), Arc::clone(&came));
    let look = move |i: &usize| {
        counted.fetch_add(1, Ordering::Relaxed);
        match seen[*i].load(Ordering::Acquire) {
            0 => Seen::Same,
            CAME => Seen::Came,
            _ => Seen::Gone,
        }
    };
    let watch = Watch::new(look, move || {
        noted.fetch_add(1, Ordering::Relaxed);
    });
    Rig {
        cells,
        looks,
        came,
        watch: watch.unwrap(),
    }
}

impl Rig {
    fn told(&self, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd {
            fd: self.watch.event().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&mut poll, 1, timeout_ms) == 1 }
    }

    fn change(&self, i: usize, to: u32) {
        self.cells[i].store(to, Ordering::Release);
    }

    /// Waits for another look that begins after this call.
    fn look(&self) {
        let before = self.looks.load(Ordering::Relaxed);
        while self.looks.load(Ordering::Relaxed) < before + 5 {
            thread::yield_now();
        }
    }

    fn came(&self) -> u32 {
        self.came.load(Ordering::Relaxed)
    }
}

#[test]
fn each_is_told_once_and_the_others_are_watched_on() {
    let rig = rig();
    rig.watch.set(vec![0, 1, 2]);
    rig.look();
    assert_eq!(rig.came(), 0);
    rig.change(1, CAME);
    rig.look();
    assert_eq!(rig.came(), 1);
    assert!(!rig.told(0), "nobody has to do anything about it");
    rig.change(2, GONE);
    assert!(rig.told(10_000));
    rig.watch.seen();
    rig.look();
    assert!(!rig.told(0));
    assert_eq!(rig.came(), 1);
}

#[test]
fn what_has_changed_before_is_told_too() {
    let rig = rig();
    rig.change(2, CAME);
    rig.change(3, GONE);
    rig.watch.set(vec![2, 3]);
    assert!(rig.told(10_000));
    assert_eq!(rig.came(), 1);
}

#[test]
fn what_is_not_watched_any_more_is_not_told() {
    let rig = rig();
    rig.watch.set(vec![0]);
    rig.watch.set(vec![1]);
    rig.look(); // one may have begun before
    rig.change(0, GONE);
    rig.look();
    assert!(!rig.told(0));
    rig.watch.set(vec![]);
    rig.change(1, GONE);
    assert!(!rig.told(50));
}

#[test]
fn it_sleeps_while_nothing_is_watched() {
    let rig = rig();
    rig.watch.set(vec![0]);
    rig.look();
    rig.change(0, CAME);
    while rig.came() == 0 {
        thread::yield_now();
    }
    let looks = rig.looks.load(Ordering::Relaxed);
    thread::sleep(4 * LOOK);
    assert_eq!(rig.looks.load(Ordering::Relaxed), looks);
}

#[test]
fn it_ends_whatever_it_does() {
    for watched in [vec![], vec![0]] {
        let rig = rig();
        rig.watch.set(watched);
        drop(rig);
    }
}
