//! What the operations of a load ask, and what their answers must be.

use crate::error::Error;
use crate::exchange::Exchange;
use crate::fuse::{self, IN_HEADER, OUT_HEADER, OutHeader};
use crate::queue::Queue;
use crate::spec::{Kind, Op, Spec, Target};

/// Where an operation of several requests is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    First,
    /// The handle that the first request brought is given back.
    Release(u64),
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Rightly, so far as the header tells.
    Good,
    /// The operation goes on.
    Next(Step),
    /// With an errno.
    Refused(i32),
    /// With something else than it should have been.
    Wrong,
}

/// Writes a request into `exchange`: for reads of the bytes from `offset` on.
pub(crate) fn ask(
    exchange: &mut Exchange,
    (queue, spec): (&Queue, &Spec),
    (op, target): (&Op, &Target),
    step: Step,
    unique: u64,
    offset: u64,
) -> Result<(), Error> {
    let mut sized = |len: usize| -> Result<usize, Error> {
        exchange.set_request_len(&queue.memory, IN_HEADER + len, spec.layout)?;
        Ok(IN_HEADER + len)
    };
    let (opcode, len) = match (op.kind, step) {
        (Kind::Getattr, _) => (fuse::GETATTR, sized(16)?),
        (Kind::Lookup | Kind::Absent, _) => (fuse::LOOKUP, sized(target.name.len() + 1)?),
        (Kind::Read, _) => (fuse::READ, sized(40)?),
        (Kind::Open, Step::First) => (fuse::OPEN, sized(fuse::OPEN_IN.len())?),
        (Kind::Open, Step::Release(_)) => (fuse::RELEASE, sized(24)?),
        (Kind::Forget, _) => (fuse::FORGET, sized(fuse::FORGET_ONE.len())?),
    };
    match (op.kind, step) {
        (Kind::Getattr, _) => exchange.write_request(IN_HEADER, &[0; 16]),
        (Kind::Lookup | Kind::Absent, _) => {
            exchange.write_request(IN_HEADER, &target.name);
            exchange.write_request(len - 1, &[0]);
        }
        (Kind::Read, _) => {
            exchange.write_request(IN_HEADER, &fuse::read_in(target.fh, offset, op.len));
        }
        (Kind::Open, Step::First) => exchange.write_request(IN_HEADER, &fuse::OPEN_IN),
        (Kind::Open, Step::Release(fh)) => {
            exchange.write_request(IN_HEADER, &fuse::release_in(fh));
        }
        (Kind::Forget, _) => exchange.write_request(IN_HEADER, &fuse::FORGET_ONE),
    }
    let header = fuse::in_header(len as u32, opcode, unique, target.nodeid);
    exchange.write_request(0, &header);
    Ok(())
}

/// Judges an answer by its header, and where that is not enough by its first bytes.
pub(crate) fn judge(
    kind: Kind,
    step: Step,
    header: Option<OutHeader>,
    exchange: &Exchange,
) -> Verdict {
    let error = match (kind, header) {
        (Kind::Forget, _) => 0,
        (_, None) => libc::EPROTO,
        (_, Some(header)) => -header.error,
    };
    let mut word = [0u8; 8];
    exchange.read_reply(OUT_HEADER, &mut word);
    let word = u64::from_le_bytes(word);
    match (kind, step) {
        (Kind::Absent, _) if error == libc::ENOENT => Verdict::Good,
        _ if error != 0 => Verdict::Refused(error),
        // The first field of an entry is its node: none stands for an absence that may be remembered.
        (Kind::Absent, _) if word != 0 => Verdict::Wrong,
        (Kind::Open, Step::First) => Verdict::Next(Step::Release(word)),
        _ => Verdict::Good,
    }
}
