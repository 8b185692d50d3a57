//! What is watched here are numbers in shared memory, and those above 0 have changed.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;

struct Rig {
    cells: Arc<[AtomicU32; 4]>,
    looks: Arc<AtomicU32>,
    watch: Watch<usize>,
}

fn rig() -> Rig {
    let cells: Arc<[AtomicU32; 4]> = Arc::default();
    let looks = Arc::new(AtomicU32::new(0));
    let (seen, counted) = (Arc::clone(&cells), Arc::clone(&looks));
    let watch = Watch::new(move |i: &usize| {
        counted.fetch_add(1, Ordering::Relaxed);
        seen[*i].load(Ordering::Acquire) == 0
    });
    Rig {
        cells,
        looks,
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

    fn change(&self, i: usize) {
        self.cells[i].store(1, Ordering::Release);
    }
}

#[test]
fn a_change_is_told_once() {
    let rig = rig();
    rig.watch.set(vec![0, 1]);
    assert!(!rig.told(50));
    rig.change(1);
    assert!(rig.told(10_000));
    rig.watch.seen();
    assert!(!rig.told(50), "nothing is watched any more");
}

#[test]
fn what_has_changed_before_is_told_too() {
    let rig = rig();
    rig.change(3);
    rig.watch.set(vec![2, 3]);
    assert!(rig.told(10_000));
}

#[test]
fn what_is_not_watched_any_more_is_not_told() {
    let rig = rig();
    rig.watch.set(vec![0]);
    rig.watch.set(vec![1]);
    rig.change(0);
    assert!(!rig.told(50));
    rig.watch.set(vec![]);
    rig.change(1);
    assert!(!rig.told(50));
}

#[test]
fn it_sleeps_while_nothing_is_watched() {
    let rig = rig();
    rig.watch.set(vec![0]);
    while rig.looks.load(Ordering::Relaxed) < 3 {
        thread::yield_now();
    }
    rig.watch.set(vec![]);
    // A look that had begun ends.
    thread::sleep(Duration::from_millis(50));
    let looks = rig.looks.load(Ordering::Relaxed);
    thread::sleep(Duration::from_millis(100));
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
