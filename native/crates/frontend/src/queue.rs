//! Requests of a queue: submitting them in the background, and taking their replies.
//!
//! One thread at a time, the *leader*, sleeps on the call eventfd; the others sleep on the condition variable.
//! Who reaps completions of others tells them. A load loop leads as long as it runs, so that its latencies
//! hold no hop from thread to thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exchange::{Exchange, Layout};
use crate::memory::Span;
use crate::ring::{Desc, table_size, write_table};
use crate::state::{Pending, State};

pub use crate::state::{Completion, Queue, QueueOptions, Stats};

impl Queue {
    /// Submits a request of these readable bytes with `reply_len` writable ones; returns its token.
    ///
    /// Waits up to `timeout` for free descriptors. The bytes should begin with a FUSE in header: its `unique` is
    /// what the reply must carry.
    pub fn submit(
        &self,
        request: Vec<u8>,
        reply_len: usize,
        layout: Layout,
        region: Option<u64>,
        timeout: Duration,
    ) -> Result<u64, Error> {
        let exchange = self.exchange(request.len(), reply_len, layout, region)?;
        exchange.write_request(0, &request);
        let mut unique = [0u8; 8];
        unique
            .iter_mut()
            .zip(request.iter().skip(8))
            .for_each(|(to, from)| *to = *from);
        let unique = u64::from_le_bytes(unique);
        let mut pending = Some(Pending {
            exchange: Some(exchange),
            request,
            unique,
            submitted: Instant::now(),
        });
        self.wait_until(timeout, |state| {
            let exchange = pending.as_ref()?.exchange.as_ref()?;
            let (descs, table) = exchange.chain();
            Some(
                self.add(state, descs, table, exchange.watch())
                    .inspect(|&token| state.pending.extend(pending.take().map(|p| (token, p)))),
            )
            .filter(|added| !matches!(added, Err(Error::RingFull)))
        })
        .map_err(|e| {
            if matches!(e, Error::Timeout) {
                Error::RingFull
            } else {
                e
            }
        })?
    }

    /// Submits a chain of arbitrary descriptors, through an indirect table if asked. Nothing of its completion is
    /// checked but that it comes once; its memory is the caller's.
    pub fn submit_raw(&self, descs: &[Desc], indirect: bool) -> Result<u64, Error> {
        let table = if indirect {
            let table = self.memory.alloc(table_size(descs.len()), 16, None)?;
            write_table(&table, descs);
            Some(Arc::new(table))
        } else {
            None
        };
        let entry = table
            .as_ref()
            .map(|t| (t.gpa(), table_size(descs.len()) as u32));
        let mut state = self.lock();
        let token = self.add(&mut state, descs, entry, table)?;
        let pending = Pending {
            exchange: None,
            request: Vec::new(),
            unique: 0,
            submitted: Instant::now(),
        };
        state.pending.insert(token, pending);
        Ok(token)
    }

    fn add(
        &self,
        state: &mut State,
        descs: &[Desc],
        table: Option<(u64, u32)>,
        watch: Option<Arc<Span>>,
    ) -> Result<u64, Error> {
        let (token, old) = (state.next_tag, state.ring.avail_idx());
        state.ring.add(descs, table, token, watch)?;
        state.next_tag += 1;
        self.kick_if_needed(state, old)?;
        Ok(token)
    }

    /// Buffers for a request; the quarantine makes room when memory is short.
    pub(crate) fn exchange(
        &self,
        request_len: usize,
        reply_len: usize,
        layout: Layout,
        region: Option<u64>,
    ) -> Result<Exchange, Error> {
        loop {
            match Exchange::new(&self.memory, request_len, reply_len, layout, region) {
                Err(Error::OutOfMemory(n)) => {
                    let mut state = self.lock();
                    if !self.release_oldest(&mut state) {
                        return Err(Error::OutOfMemory(n));
                    }
                }
                other => return other,
            }
        }
    }

    /// Copies the reply of a completed request from byte 16 on into `data`, and puts its buffers into quarantine.
    pub fn take(&self, token: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut state = self.lock();
        let done = state
            .done
            .remove(&token)
            .ok_or_else(|| Error::Invalid(format!("request {token} is not completed")))?;
        if let Some(exchange) = done.exchange {
            let n = exchange
                .reply_capacity()
                .saturating_sub(crate::fuse::OUT_HEADER)
                .min(data.len());
            exchange.read_reply(
                crate::fuse::OUT_HEADER,
                data.get_mut(..n).unwrap_or_default(),
            );
            exchange.poison();
            if let Some(span) = exchange.watch() {
                self.quarantine(&mut state, span);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
