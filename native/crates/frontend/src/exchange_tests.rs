use super::*;
use crate::testing::{answer, memory, readable, reply};

const ALL: [Framing; 4] = [
    Framing::Linux,
    Framing::Compact,
    Framing::Pieces(1),
    Framing::Pieces(1000),
];

fn exchange(memory: &Memory, framing: Framing, request: &[u8], reply_len: usize) -> Exchange {
    let layout = Layout {
        framing,
        indirect: false,
    };
    let exchange = Exchange::new(memory, request.len(), reply_len, layout, None).unwrap();
    exchange.write_request(0, request);
    exchange
}

#[test]
fn every_framing_carries_the_same_bytes() {
    let memory = memory();
    let request: Vec<u8> = (0..80).collect();
    let body: Vec<u8> = (0..9000u32).map(|i| (i % 251) as u8).collect();
    for framing in ALL {
        let faults = Faults::default();
        let x = exchange(&memory, framing, &request, 16 + 10_000);
        let (descs, _) = x.chain();
        assert_eq!(readable(&memory, descs), request);
        answer(&memory, descs, &reply(77, 0, &body));
        let header = x.verify(77, 9016, &faults, 1).unwrap();
        assert_eq!((header.len, header.error), (9016, 0));
        x.verify_poison(9016, 77, &faults, 1);
        x.verify_request(&request, 77, &faults, 1);
        let mut got = vec![0u8; body.len()];
        x.read_reply(16, &mut got);
        assert!(got == body && x.reply_equals(16, &body) && !x.reply_equals(15, &body));
        assert_eq!(faults.texts(false), Vec::<String>::new());
    }
}

#[test]
fn linux_framing_is_one_descriptor_per_page() {
    let memory = memory();
    let x = exchange(&memory, Framing::Linux, &[0; 80], 16 + 8193);
    let lens: Vec<(u32, bool)> = x.chain().0.iter().map(|d| (d.len, d.writable)).collect();
    assert_eq!(
        lens,
        [
            (40, false),
            (40, false),
            (16, true),
            (4096, true),
            (4096, true),
            (1, true)
        ]
    );
    assert!(x.chain().0[3].gpa % 4096 == 0);
}

#[test]
fn each_misdeed_has_its_fault() {
    use FaultKind::*;
    type Misdeed = fn(&Memory, &[Desc]) -> u32;
    let cases: [(FaultKind, Misdeed); 8] = [
        (UsedLength, |m, d| {
            answer(m, d, &reply(5, 0, &[1; 8]));
            0
        }),
        (UsedLength, |m, d| {
            answer(m, d, &reply(5, 0, &[1; 8]));
            25
        }),
        (UsedLengthRange, |m, d| {
            answer(m, d, &reply(5, 0, &[1; 8]));
            1000
        }),
        (Unique, |m, d| {
            answer(m, d, &reply(6, 0, &[1; 8]));
            24
        }),
        (ErrorRange, |m, d| {
            answer(m, d, &reply(5, 2, &[]));
            16
        }),
        (WriteOutside, |m, d| {
            answer(m, d, &[reply(5, 0, &[1; 8]), vec![9]].concat());
            24
        }),
        (WriteOutside, |m, d| {
            answer(m, d, &reply(5, 0, &[1; 100]));
            let last = d[d.len() - 1];
            m.write(last.gpa + u64::from(last.len), &[7]).unwrap();
            116
        }),
        (RequestModified, |m, d| {
            answer(m, d, &reply(5, 0, &[1; 8]));
            m.write(d[0].gpa + 3, &[7]).unwrap();
            24
        }),
    ];
    let memory = memory();
    for (i, (kind, misdeed)) in cases.into_iter().enumerate() {
        for framing in [Framing::Linux, Framing::Compact] {
            let faults = Faults::default();
            let x = exchange(&memory, framing, &[0; 48], 116);
            let used = misdeed(&memory, x.chain().0);
            let header = x.verify(5, used, &faults, 1);
            x.verify_poison(x.reply_len(used, header), 5, &faults, 1);
            x.verify_request(&[0; 48], 5, &faults, 1);
            assert!(
                faults.count(kind) > 0,
                "case {i}, {framing:?}: {:?}",
                faults.texts(false)
            );
        }
    }
}

#[test]
fn a_late_write_of_the_same_bytes_is_noticed() {
    let memory = memory();
    let faults = Faults::default();
    let x = exchange(&memory, Framing::Linux, &[0; 48], 116);
    let bytes = reply(5, 0, &[1; 100]);
    answer(&memory, x.chain().0, &bytes);
    x.verify(5, 116, &faults, 1);
    x.poison();
    x.verify_untouched("request", &faults, 1);
    assert_eq!(faults.total(), 0);
    answer(&memory, x.chain().0, &bytes);
    x.verify_untouched("request", &faults, 1);
    assert_eq!(faults.count(FaultKind::LateWrite), 1);
}

#[test]
fn a_request_without_reply_has_no_writable_part() {
    let memory = memory();
    let faults = Faults::default();
    let x = exchange(&memory, Framing::Linux, &[0; 48], 0);
    assert!(x.chain().0.iter().all(|d| !d.writable));
    assert_eq!(x.verify(5, 0, &faults, 0), None);
    assert_eq!(faults.total(), 0);
    x.verify(5, 16, &faults, 0);
    assert_eq!(faults.count(FaultKind::UsedLength), 1);
}
