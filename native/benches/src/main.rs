//! Requests that hit, served by a ring thread without processes around it, for callgrind to count.
//!
//! `hit-path CASE ROUNDS` offers [`BATCH`] requests at a time to each queue and has them served; the counter collects
//! inside `hit_path_measured` only, so that neither set-up nor the driver count. `hit-path list` names the cases and
//! how many requests a round has. `scripts/bench callgrind` runs all of it.

use std::process::ExitCode;

use virtq::testing::{Driver, INDIRECT, NEXT, WRITE, descriptor};
use worker::testing::image::{Builder, Spec};
use worker::testing::{Bench, PLACES, Worker, message, node, read_args, ring};

/// Requests in flight in each queue.
const BATCH: u16 = 32;
const CHUNK: u64 = 1 << 20;
const FILES: usize = 1000;
/// Room for one request and its buffer.
const PLACE: u64 = 0x4_0000;
const PAGE: u32 = 4096;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READ: u32 = 15;
const READDIRPLUS: u32 = 44;

/// One kind of request.
struct Case {
    name: &'static str,
    queues: u64,
    opcode: u32,
    /// Bytes of a fixed structure in front of the data, as a driver puts them into a descriptor of their own.
    out: u32,
    /// Bytes in pages.
    data: u32,
}

const fn case(name: &'static str, opcode: u32, out: u32, data: u32) -> Case {
    Case {
        name,
        queues: 1,
        opcode,
        out,
        data,
    }
}

const CASES: [Case; 7] = [
    case("getattr", GETATTR, 104, 0),
    Case {
        queues: 4,
        ..case("getattr-4-queues", GETATTR, 104, 0)
    },
    case("lookup", LOOKUP, 128, 0),
    case("lookup-negative", LOOKUP, 128, 0),
    case("read-4k", READ, 0, PAGE),
    case("read-128k", READ, 0, 32 * PAGE),
    case("readdirplus-4k", READDIRPLUS, 0, PAGE),
];

fn file_name(index: usize) -> String {
    format!("libsample-{index:04}.so.1")
}

fn image() -> Vec<u8> {
    let mut builder = Builder::new(CHUNK as u32, 1);
    let big = builder.file(&Spec::extended(0o100755), 0, 4 * CHUNK);
    let names: Vec<String> = (0..FILES).map(file_name).collect();
    let nids: Vec<u64> = names
        .iter()
        .map(|_| builder.file(&Spec::extended(0o100644), 0, 100))
        .collect();
    let mut entries: Vec<(&[u8], u64, u8)> = names
        .iter()
        .zip(nids)
        .map(|(name, nid)| (name.as_bytes(), nid, 1))
        .collect();
    entries.push((b"big", big, 1));
    builder.finish(&entries)
}

/// The request of a case that is number `n` of its queue.
fn request(case: &Case, bench: &Bench, n: u64) -> Vec<u8> {
    let spread = (n * 37 % FILES as u64) as usize;
    let name = |text: String| [text.as_bytes(), b"\0"].concat();
    match (case.opcode, case.name) {
        (LOOKUP, "lookup") => message(LOOKUP, 1, &name(file_name(spread))),
        (LOOKUP, _) => message(LOOKUP, 1, &name(file_name(spread) + "-none")),
        (READ, _) => {
            let len = u64::from(case.data);
            let offset = n * 7 % (2 * CHUNK / len) * len;
            message(
                READ,
                node(bench.mount, b"big"),
                &read_args(offset, case.data),
            )
        }
        (READDIRPLUS, _) => message(READDIRPLUS, 1, &read_args(0, case.data)),
        (opcode, _) => {
            let file = file_name(spread);
            message(opcode, node(bench.mount, file.as_bytes()), &[0; 16])
        }
    }
}

/// Lays a request out as Linux does: one indirect table with the header, the arguments, room for the out header, for the
/// fixed part, and one descriptor per page.
fn lay_out(case: &Case, bench: &Bench, driver: &Driver, place: u64, head: u16, request: &[u8]) {
    let (header, out_header, pages) = (place + 0x2000, place + 0x3000, place + 0x1_0000);
    bench.guest.write(header, request);
    let mut parts = vec![
        (header, 40, 0),
        (header + 40, request.len() as u32 - 40, 0),
        (out_header, 16, WRITE),
    ];
    if case.out > 0 {
        parts.push((out_header + 0x100, case.out, WRITE));
    }
    for page in 0..case.data / PAGE {
        parts.push((pages + u64::from(page * PAGE), PAGE, WRITE));
    }
    let mut table = Vec::new();
    for (i, &(addr, len, flags)) in parts.iter().enumerate() {
        let next = if i + 1 < parts.len() { NEXT } else { 0 };
        table.extend(descriptor(addr, len, flags | next, i as u16 + 1));
    }
    bench.guest.write(place, &table);
    driver.describe(&bench.guest, head, place, table.len() as u32, INDIRECT, 0);
}

/// What is counted: one round of the ring thread over filled rings.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hit_path_measured(worker: &mut Worker) {
    while worker.round() {}
}

fn run(case: &Case, rounds: u32) -> Result<(), String> {
    let bench = Bench::new(&image(), CHUNK, &[4 + FILES as u32]);
    (0..3).for_each(|chunk| bench.blobs[0].store(chunk, 0x5a));
    let mut drivers: Vec<Driver> = (0..case.queues)
        .map(|q| bench.driver(q + 1, 128, 0))
        .collect();
    for (q, driver) in (0u64..).zip(&drivers) {
        for head in 0..BATCH {
            let n = q * u64::from(BATCH) + u64::from(head);
            let request = request(case, &bench, n);
            lay_out(case, &bench, driver, PLACES + PLACE * n, head, &request);
        }
    }
    let rings = (1..).zip(&drivers).map(|(q, d)| ring(d, q)).collect();
    let mut worker = Worker::start(&bench, rings);
    let mut turn = |measured: bool| {
        for driver in &mut drivers {
            // The driver is awake: it asks for no signal.
            driver.set_used_event(&bench.guest, driver.seen.wrapping_sub(1));
            (0..BATCH).for_each(|head| driver.offer(&bench.guest, head));
        }
        if measured {
            hit_path_measured(&mut worker);
        } else {
            while worker.round() {}
        }
        for (q, driver) in (0u64..).zip(&mut drivers) {
            let answers = driver.answers(&bench.guest);
            if answers.len() != usize::from(BATCH) {
                return Err(format!("{} answers", answers.len()));
            }
            let n = q * u64::from(BATCH);
            let (len, error) = (
                answers[0].1,
                bench.guest.read_u32(PLACES + PLACE * n + 0x3004),
            );
            let least = 16 + case.out.max(case.data / 2);
            if error != 0 || answers.iter().any(|a| a.1 < least) {
                return Err(format!("an answer of {len} bytes, error {error:#x}"));
            }
        }
        Ok(())
    };
    for round in 0..rounds + 4 {
        turn(round >= 4)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "list") {
        for case in &CASES {
            println!("{} {}", case.name, case.queues * u64::from(BATCH));
        }
        return ExitCode::SUCCESS;
    }
    let case = args
        .first()
        .and_then(|name| CASES.iter().find(|case| case.name == name));
    let rounds = args.get(1).and_then(|n| n.parse().ok());
    let (Some(case), Some(rounds)) = (case, rounds) else {
        eprintln!("usage: hit-path list | CASE ROUNDS");
        return ExitCode::from(2);
    };
    match run(case, rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("hit-path: {}: {what}", case.name);
            ExitCode::FAILURE
        }
    }
}
