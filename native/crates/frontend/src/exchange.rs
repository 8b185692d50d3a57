//! The buffers of one request: where its bytes lie in guest memory, how they are cut into descriptors, and the
//! checks that the device wrote what it may and nothing else.
//!
//! ```text
//! request span   header | arguments | indirect table            (the device only reads)
//! reply span     guard 64 | out header 16 | … | data, page aligned | guard 64   (all poison before submission)
//! ```

use std::sync::Arc;

use crate::error::Error;
use crate::fault::{FaultKind, Faults};
use crate::fuse::{IN_HEADER, OUT_HEADER, OutHeader};
use crate::memory::{Memory, Span};
use crate::ring::{Desc, table_size, write_table};

/// Poisoned bytes before and behind the writable buffers.
const GUARD: usize = 64;
const PAGE: usize = 4096;

/// How a request is cut into descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// As Linux does: in header, arguments; out header, one descriptor per page of the answer.
    Linux,
    /// One readable and one writable descriptor.
    Compact,
    /// Pieces of at most this many bytes, without regard to any structure.
    Pieces(u32),
}

/// Framing and whether the chain goes through an indirect table.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub framing: Framing,
    pub indirect: bool,
}

/// A part of the reply span that the device may write: [at, at + len).
#[derive(Clone, Copy)]
struct Piece {
    at: usize,
    len: usize,
}

/// The buffers of a request with room for `request_len` readable and `reply_len` writable bytes.
pub struct Exchange {
    request: Span,
    request_len: usize,
    reply: Option<Arc<Span>>,
    /// The reply's writable bytes in order: at most the out header and the data.
    areas: Vec<Piece>,
    descs: Vec<Desc>,
    table: Option<Span>,
}

impl Exchange {
    /// Allocates buffers from `region` (by its first address) or anywhere; the reply is poisoned.
    pub fn new(
        memory: &Memory,
        request_len: usize,
        reply_len: usize,
        layout: Layout,
        region: Option<u64>,
    ) -> Result<Self, Error> {
        let request = memory.alloc(request_len, 8, region)?;
        let mut exchange = Exchange {
            request,
            request_len,
            reply: None,
            areas: Vec::new(),
            descs: Vec::new(),
            table: None,
        };
        if reply_len > 0 {
            let header = if layout.framing == Framing::Compact {
                0
            } else {
                reply_len.min(OUT_HEADER)
            };
            let data = reply_len - header;
            // The out header lies in front of the page-aligned data, with a gap of poison in between.
            let span = memory.alloc(PAGE + data + GUARD, PAGE, region)?;
            exchange.areas.extend((header > 0).then_some(Piece {
                at: GUARD,
                len: header,
            }));
            exchange.areas.extend((data > 0).then_some(Piece {
                at: PAGE,
                len: data,
            }));
            span.poison(0, span.len());
            exchange.reply = Some(Arc::new(span));
        }
        exchange.cut(layout.framing)?;
        if layout.indirect {
            let table = memory.alloc(table_size(exchange.descs.len()), 16, region)?;
            write_table(&table, &exchange.descs);
            exchange.table = Some(table);
        }
        Ok(exchange)
    }

    /// Changes the number of readable bytes, and with it the descriptors; buffers grow where they must.
    pub fn set_request_len(
        &mut self,
        memory: &Memory,
        len: usize,
        layout: Layout,
    ) -> Result<(), Error> {
        if len == self.request_len {
            return Ok(());
        }
        if len > self.request.len() {
            self.request = memory.alloc(len, 8, None)?;
        }
        self.request_len = len;
        self.cut(layout.framing)?;
        let Some(table) = &self.table else {
            return Ok(());
        };
        if table_size(self.descs.len()) > table.len() {
            self.table = Some(memory.alloc(table_size(self.descs.len()), 16, None)?);
        }
        self.table
            .iter()
            .for_each(|table| write_table(table, &self.descs));
        Ok(())
    }

    fn cut(&mut self, framing: Framing) -> Result<(), Error> {
        self.descs.clear();
        let request = Piece {
            at: 0,
            len: self.request_len,
        };
        let gpa = self.request.gpa();
        match framing {
            Framing::Linux => {
                let header = request.len.min(IN_HEADER);
                push_pieces(
                    &mut self.descs,
                    gpa,
                    Piece { at: 0, len: header },
                    header,
                    false,
                )?;
                let rest = Piece {
                    at: header,
                    len: request.len - header,
                };
                push_pieces(&mut self.descs, gpa, rest, rest.len, false)?;
            }
            Framing::Compact => push_pieces(&mut self.descs, gpa, request, request.len, false)?,
            Framing::Pieces(n) => push_pieces(&mut self.descs, gpa, request, n as usize, false)?,
        }
        let Some(reply) = &self.reply else {
            return Ok(());
        };
        for &area in &self.areas {
            let step = match framing {
                Framing::Linux => PAGE,
                Framing::Compact => area.len,
                Framing::Pieces(n) => n as usize,
            };
            push_pieces(&mut self.descs, reply.gpa(), area, step, true)?;
        }
        Ok(())
    }

    /// Descriptors of the chain, and the indirect table (address, bytes) when there is one.
    pub fn chain(&self) -> (&[Desc], Option<(u64, u32)>) {
        let table = self
            .table
            .as_ref()
            .map(|t| (t.gpa(), table_size(self.descs.len()) as u32));
        (&self.descs, table)
    }

    /// The memory that the device may write.
    pub fn watch(&self) -> Option<Arc<Span>> {
        self.reply.clone()
    }

    pub fn reply_capacity(&self) -> usize {
        self.areas.iter().map(|a| a.len).sum()
    }

    pub fn write_request(&self, at: usize, bytes: &[u8]) {
        self.request.write(at, bytes);
    }

    /// Runs `access(offset in the reply span, range in the reply)` for the reply's bytes [from, to).
    fn pieces(
        &self,
        from: usize,
        to: usize,
        mut access: impl FnMut(usize, std::ops::Range<usize>),
    ) {
        let mut start = 0;
        for area in &self.areas {
            let (a, b) = (from.max(start), to.min(start + area.len));
            if a < b {
                access(area.at + a - start, a..b);
            }
            start += area.len;
        }
    }

    /// Copies the reply's bytes from `from` on; the rest of `bytes` stays when the reply is shorter.
    pub fn read_reply(&self, from: usize, bytes: &mut [u8]) {
        let Some(reply) = &self.reply else { return };
        self.pieces(from, from + bytes.len(), |at, range| {
            if let Some(part) = bytes.get_mut(range.start - from..range.end - from) {
                reply.read(at, part);
            }
        });
    }

    /// Whether the reply from byte `from` on is `expected`.
    pub fn reply_equals(&self, from: usize, expected: &[u8]) -> bool {
        let Some(reply) = &self.reply else {
            return expected.is_empty();
        };
        let mut equal = from + expected.len() <= self.reply_capacity();
        self.pieces(from, from + expected.len(), |at, range| {
            let part = expected.get(range.start - from..range.end - from);
            equal = equal && part.is_some_and(|part| reply.equals(at, part));
        });
        equal
    }

    pub fn out_header(&self) -> OutHeader {
        let mut b = [0u8; OUT_HEADER];
        self.read_reply(0, &mut b);
        OutHeader::parse(&b)
    }

    /// Checks a FUSE completion; faults are recorded. Returns the out header when there is one, also when the used
    /// length denies it: some back-ends complete everything with used length 0.
    ///
    /// Source: virtio 1.2, 5.11.6 (the reply is header and body), 2.7.8.2 (used length = bytes written);
    /// Linux ≥ 7.1 fs/fuse/virtio_fs.c, virtio_fs_verify_response.
    pub fn verify(&self, unique: u64, used: u32, faults: &Faults, queue: u16) -> Option<OutHeader> {
        let capacity = self.reply_capacity();
        let fault = |kind, what: std::fmt::Arguments<'_>| {
            faults.record(kind, || {
                format!("queue {queue}, unique {unique:#x}: {what}")
            })
        };
        if capacity == 0 {
            if used != 0 {
                fault(
                    FaultKind::UsedLength,
                    format_args!("used length {used} without a writable descriptor"),
                );
            }
            return None;
        }
        if used as usize > capacity {
            fault(
                FaultKind::UsedLengthRange,
                format_args!("used length {used}, writable {capacity}"),
            );
        }
        if (used as usize) < OUT_HEADER || capacity < OUT_HEADER {
            fault(
                FaultKind::UsedLength,
                format_args!("used length {used} is no out header"),
            );
            let header = (capacity >= OUT_HEADER).then(|| self.out_header());
            return header.filter(|h| {
                h.unique == unique && (OUT_HEADER..=capacity).contains(&(h.len as usize))
            });
        }
        let header = self.out_header();
        if header.len != used {
            fault(
                FaultKind::UsedLength,
                format_args!("used length {used}, out header {}", header.len),
            );
        }
        if header.error != 0 && used as usize != OUT_HEADER {
            fault(
                FaultKind::UsedLength,
                format_args!("used length {used} of an error reply"),
            );
        }
        if header.unique != unique {
            fault(
                FaultKind::Unique,
                format_args!("answered with unique {:#x}", header.unique),
            );
        }
        if !(-4095..=0).contains(&header.error) {
            fault(
                FaultKind::ErrorRange,
                format_args!("error {}", header.error),
            );
        }
        Some(header)
    }

    /// Bytes of the reply: what the used length says, or the out header where the used length is none.
    pub fn reply_len(&self, used: u32, header: Option<OutHeader>) -> usize {
        let denied = header.filter(|_| (used as usize) < OUT_HEADER);
        denied.map_or(used, |h| h.len) as usize
    }

    /// Checks that nothing past the reply's first `len` bytes and nothing around it was written.
    pub fn verify_poison(&self, len: usize, unique: u64, faults: &Faults, queue: u16) {
        let Some(reply) = &self.reply else { return };
        let mut clean_from = 0;
        let mut bad = None;
        self.pieces(0, len, |at, range| {
            bad = bad.or_else(|| reply.first_unpoisoned(clean_from, at - clean_from));
            clean_from = at + range.len();
        });
        bad = bad.or_else(|| reply.first_unpoisoned(clean_from, reply.len() - clean_from));
        if let Some(gpa) = bad {
            let (at, end) = (
                gpa - reply.gpa(),
                self.areas.last().map_or(0, |a| a.at + a.len),
            );
            faults.record(FaultKind::WriteOutside, || {
                format!(
                    "queue {queue}, unique {unique:#x}: byte {at:#x} of its buffer was written, reply of {len} bytes, \
                     buffers end at {end:#x}"
                )
            });
        }
    }

    /// Checks that the request still reads as `sent`.
    pub fn verify_request(&self, sent: &[u8], unique: u64, faults: &Faults, queue: u16) {
        if !self.request.equals(0, sent) {
            faults.record(FaultKind::RequestModified, || {
                format!("queue {queue}, unique {unique:#x}")
            });
        }
    }

    /// Poisons the whole reply again, for the next use or for the quarantine.
    pub fn poison(&self) {
        if let Some(reply) = &self.reply {
            reply.poison(0, reply.len());
        }
    }

    /// Checks that a poisoned reply is untouched.
    pub fn verify_untouched(&self, what: &str, faults: &Faults, queue: u16) {
        if let Some(reply) = &self.reply {
            verify_untouched(reply, what, faults, queue);
        }
    }
}

/// Checks that a poisoned, completed buffer is still untouched.
pub fn verify_untouched(reply: &Span, what: &str, faults: &Faults, queue: u16) {
    if let Some(gpa) = reply.first_unpoisoned(0, reply.len()) {
        let at = gpa - reply.gpa();
        faults.record(FaultKind::LateWrite, || {
            format!(
                "queue {queue}, {what}: byte {at:#x} of its buffer was written after completion"
            )
        });
    }
}

fn push_pieces(
    descs: &mut Vec<Desc>,
    base: u64,
    area: Piece,
    step: usize,
    writable: bool,
) -> Result<(), Error> {
    if step == 0 && area.len > 0 {
        return Err(Error::Invalid(
            "descriptors of 0 bytes cannot cover a buffer".into(),
        ));
    }
    let end = area.at + area.len;
    let mut at = area.at;
    while at < end {
        let len = step.min(end - at);
        let len32 =
            u32::try_from(len).map_err(|_| Error::Invalid("a descriptor beyond 4 GiB".into()))?;
        descs.push(Desc {
            gpa: base + at as u64,
            len: len32,
            writable,
            indirect: false,
        });
        at += len;
    }
    Ok(())
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
