use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::*;
use crate::exchange::{Framing, Layout};
use crate::fuse;
use crate::memory::new_file;
use crate::port::Wait;
use crate::sys::Mapping;
use crate::testing::{FakeDevice, queue};

const FILE: u64 = 20_000;

fn target(nodeid: u64, name: &str, expected: Expected) -> Target {
    Target {
        nodeid,
        fh: 9,
        size: FILE,
        name: name.as_bytes().to_vec(),
        expected,
    }
}

fn spec(ops: Vec<Op>) -> Spec {
    Spec {
        ops,
        depth: 8,
        count: 500,
        duration: Duration::from_secs(60),
        wait: Wait::Sleep,
        layout: Layout {
            framing: Framing::Linux,
            indirect: true,
        },
        canaries: true,
        resting: 4,
        seed: 1,
        stall: Duration::from_secs(10),
    }
}

fn op(kind: Kind, len: u32, random: bool, targets: Vec<Target>) -> Op {
    Op {
        kind,
        weight: 1,
        len,
        random,
        targets,
    }
}

fn content() -> Vec<u8> {
    (0..FILE).map(|i| (i * 7 % 251) as u8).collect()
}

/// Serves a load with `serve(request, served so far) -> body` in a thread of its own, two at a time and the later
/// one first.
fn with_device<T>(
    queue: &Arc<Queue>,
    serve: impl Fn(&[u8], u64) -> Option<Vec<u8>> + Send,
    load: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (device_queue, stop) = (queue.clone(), &stop);
        scope.spawn(move || {
            let mut device = FakeDevice::new(&device_queue);
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                let Some(first) = device.take() else {
                    std::thread::yield_now();
                    continue;
                };
                let second = device.take();
                for (head, descs, request) in second.into_iter().chain([first]) {
                    if !descs.iter().any(|d| d.writable) {
                        device.answer(head, &descs, &[], 0);
                    } else if let Some(body) = serve(&request, n) {
                        device.reply(head, &descs, &request, &body);
                    }
                    n += 1;
                }
            }
        });
        let result = load();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn read(request: &[u8]) -> Vec<u8> {
    let field = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
    let (offset, len) = (field(48), field(56) & 0xffff_ffff);
    assert_eq!(field(40), 9, "handle");
    content()[offset as usize..FILE.min(offset + len) as usize].to_vec()
}

fn serve(request: &[u8]) -> Vec<u8> {
    match u32::from_le_bytes(request[4..8].try_into().unwrap()) {
        fuse::GETATTR => vec![1; fuse::ATTR_OUT],
        fuse::LOOKUP => {
            assert!(matches!(&request[40..], b"a\0" | b"a-longer-name-than-a\0"));
            vec![2; fuse::ENTRY_OUT]
        }
        _ => read(request),
    }
}

#[test]
fn handles_are_given_back_and_both_requests_are_one_operation() {
    let queue = queue(16);
    let kinds = [Kind::Open, Kind::Forget, Kind::Absent];
    let ops = kinds.map(|kind| op(kind, 0, false, vec![target(5, "a", Expected::Anything)]));
    let (opened, released) = (AtomicU64::new(0), AtomicU64::new(0));
    let answer = |request: &[u8], _| match u32::from_le_bytes(request[4..8].try_into().unwrap()) {
        fuse::OPEN => {
            opened.fetch_add(1, Ordering::Relaxed);
            Some([77u64.to_le_bytes(), [0; 8]].concat())
        }
        fuse::RELEASE => {
            assert_eq!(request[40..48], 77u64.to_le_bytes());
            released.fetch_add(1, Ordering::Relaxed);
            Some(Vec::new())
        }
        opcode => {
            assert_eq!(opcode, fuse::LOOKUP);
            Some(vec![0; fuse::ENTRY_OUT])
        }
    };
    let spec = spec(ops.into());
    let outcome = with_device(&queue, answer, || {
        run(std::slice::from_ref(&queue), &spec, &AtomicU64::new(0))
    });
    let outcome = outcome.unwrap();
    let counts: Vec<_> = outcome.ops.iter().map(|op| op.latency.count()).collect();
    assert_eq!(counts.iter().sum::<u64>(), 500);
    assert_eq!(
        (opened.into_inner(), released.into_inner()),
        (counts[0], counts[0])
    );
    let total = outcome.total();
    assert_eq!((total.errors, total.wrong, outcome.lost), (0, 0, 0));
    assert_eq!(queue.faults.total(), 0);
}

#[test]
fn a_name_that_should_not_be_there_is_told() {
    let queue = queue(16);
    let absent = op(
        Kind::Absent,
        0,
        false,
        vec![target(5, "a", Expected::Anything)],
    );
    let spec = spec(vec![absent]);
    let outcome = with_device(
        &queue,
        |request, _| Some(serve(request)),
        || run(std::slice::from_ref(&queue), &spec, &AtomicU64::new(0)),
    );
    assert_eq!(outcome.unwrap().total().wrong, 500);
    assert_eq!(queue.faults.count(FaultKind::WrongData), 500);
}

#[test]
fn a_mix_is_served_and_counted() {
    for (wait, indirect) in [
        (Wait::Sleep, true),
        (Wait::Spin, true),
        (Wait::Sleep, false),
    ] {
        let queue = queue(64);
        let file = new_file(FILE, false).unwrap();
        let map = Mapping::new(std::os::fd::AsFd::as_fd(&file), 0, FILE as usize, false).unwrap();
        // SAFETY: a fresh mapping of FILE bytes that nobody else knows.
        unsafe { std::ptr::copy_nonoverlapping(content().as_ptr(), map.as_ptr(), FILE as usize) };
        let map = Arc::new(
            Mapping::new(std::os::fd::AsFd::as_fd(&file), 0, FILE as usize, true).unwrap(),
        );
        let blocks = content()
            .chunks(3000)
            .map(|b| Sha256::digest(b).into())
            .collect();
        let names = vec![
            target(1, "a", Expected::Anything),
            target(1, "a-longer-name-than-a", Expected::Anything),
        ];
        let mut spec = spec(vec![
            op(
                Kind::Getattr,
                0,
                true,
                vec![target(1, "", Expected::Anything)],
            ),
            op(Kind::Lookup, 0, false, names),
            op(
                Kind::Read,
                4096,
                true,
                vec![target(5, "", Expected::File(map, 0))],
            ),
            op(
                Kind::Read,
                3000,
                false,
                vec![target(6, "", Expected::Blocks(blocks))],
            ),
        ]);
        spec.wait = wait;
        spec.layout.indirect = indirect;
        let stop = AtomicU64::new(0);
        let outcome = with_device(
            &queue,
            |r, _| Some(serve(r)),
            || run(std::slice::from_ref(&queue), &spec, &stop).unwrap(),
        );
        assert_eq!(queue.faults.texts(false), Vec::<String>::new());
        let total = outcome.total();
        assert_eq!(
            (
                total.latency.count(),
                total.errors,
                total.wrong,
                outcome.lost
            ),
            (500, 0, 0, 0)
        );
        assert!(outcome.ops.iter().all(|op| op.latency.count() > 50));
        assert_eq!(
            outcome.ops[1].bytes,
            outcome.ops[1].latency.count() * fuse::ENTRY_OUT as u64
        );
        assert!(outcome.kicks > 0 && total.latency.percentile(500_000) > 0);
        assert_eq!(wait == Wait::Sleep, outcome.interrupts > 0);
    }
}

#[test]
fn wrong_and_short_data_and_errors_are_counted() {
    let queue = queue(64);
    let blocks = || {
        Expected::Blocks(
            content()
                .chunks(4096)
                .map(|b| Sha256::digest(b).into())
                .collect(),
        )
    };
    let spec = spec(vec![op(
        Kind::Read,
        4096,
        true,
        vec![target(5, "", blocks())],
    )]);
    let bad = |request: &[u8], n| {
        let mut body = read(request);
        match n {
            100 => body[7] ^= 1,
            200 => drop(body.pop()),
            _ => {}
        }
        Some(body)
    };
    let stop = AtomicU64::new(0);
    let outcome = with_device(&queue, bad, || {
        run(std::slice::from_ref(&queue), &spec, &stop).unwrap()
    });
    assert_eq!(
        (
            outcome.total().wrong,
            queue.faults.count(FaultKind::WrongData)
        ),
        (2, 2)
    );
}

#[test]
fn requests_that_never_complete_are_lost() {
    let queue = queue(64);
    let mut spec = spec(vec![op(
        Kind::Getattr,
        0,
        true,
        vec![target(1, "", Expected::Anything)],
    )]);
    spec.stall = Duration::from_millis(50);
    let stop = AtomicU64::new(0);
    let lose = |request: &[u8], n| (n != 77).then(|| serve(request));
    let outcome = with_device(&queue, lose, || {
        run(std::slice::from_ref(&queue), &spec, &stop).unwrap()
    });
    assert_eq!((outcome.lost, outcome.total().latency.count()), (1, 499));
    assert_eq!(queue.indices().2, 1);
}

#[test]
fn other_requests_run_beside_a_load_and_a_load_survives_a_pause() {
    let queue = queue(64);
    let mut spec = spec(vec![op(
        Kind::Getattr,
        0,
        true,
        vec![target(1, "", Expected::Anything)],
    )]);
    spec.count = 0;
    let stop = AtomicU64::new(0);
    let outcome = with_device(
        &queue,
        |r, _| Some(serve(r)),
        || {
            std::thread::scope(|scope| {
                let load = scope.spawn(|| run(std::slice::from_ref(&queue), &spec, &stop).unwrap());
                for i in 0..200 {
                    let mut request = fuse::in_header(56, fuse::GETATTR, i, 1).to_vec();
                    request.extend([0; 16]);
                    let long = Duration::from_secs(10);
                    let token = queue.submit(request, 120, spec.layout, None, long).unwrap();
                    queue.wait(token, long).unwrap();
                    queue.take(token, &mut []).unwrap();
                }
                queue.pause();
                let before = queue.indices().0;
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(queue.indices().0, before);
                queue.resume();
                while queue.indices().0 == before {
                    std::thread::yield_now();
                }
                stop.fetch_add(1, Ordering::Relaxed);
                load.join().unwrap()
            })
        },
    );
    queue.check();
    assert_eq!(queue.faults.texts(false), Vec::<String>::new());
    assert!(outcome.total().latency.count() > 0 && outcome.lost == 0);
}
