//! A thread with one queue, step by step.

use virtq::testing::Driver;

use super::{Bench, ring};
use crate::thread::RingThread;

/// Entries of a test's queue.
pub const SIZE: u16 = 256;

/// The sample image, a driver whose indexes start at `start`, and a thread that serves its queue 1.
pub fn running(start: u16) -> (Bench, Driver, RingThread) {
    let bench = Bench::sample();
    let driver = bench.driver(1, SIZE, start);
    let thread = bench.thread(vec![ring(&driver, 1)]);
    (bench, driver, thread)
}

/// The thread's own loop without the sleep.
pub fn turn(thread: &mut RingThread) {
    thread.finish_pool();
    thread.unpark();
    thread.round();
}
