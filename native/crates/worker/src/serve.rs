//! One request: from a head of the avail ring to a completed, parked or submitted request.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use fuse_abi::request::{IN_HEADER_LEN, InHeader};
use fuse_abi::{opcode, reply};
use rafs_format::Tree;
use session::failpoint::Point;
use session::inflight::Outstanding;
use session::rings::Trace;
use session::{Shared, clock};
use virtq::{Chain, ChainError, GuestMemory};

use crate::mount::Mount;
use crate::ops::{self, Errno};
use crate::parked::{ChunkId, Parked, Parking};
use crate::pool::{Finished, Job, Pool, Ticket};
use crate::queue::Queue;
use crate::read::{ReadOutcome, Reader, settled};

/// Arguments beyond this many bytes are never looked at: the longest are an attribute name of 255 bytes after 8 more.
const ARGS_MAX: usize = 512;
/// A header and its arguments, which are filled as far as there are any.
type Message = [MaybeUninit<u8>; IN_HEADER_LEN + ARGS_MAX];
const EMPTY: Message = [MaybeUninit::uninit(); IN_HEADER_LEN + ARGS_MAX];

/// What a ring thread needs for every request.
pub struct Server {
    pub thread: usize,
    pub shared: &'static Shared,
    pub mount: &'static Mount,
    pub tree: Tree<'static>,
    pub pool: &'static Pool,
    pub mem: GuestMemory,
    pub parking: Parking,
    pub io_deadline_ns: u64,
    chain: Chain,
    reader: Reader,
    out: Vec<u8>,
}

/// A head to be served, and since when it is known.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub head: u16,
    pub taken_ns: u64,
    /// It has been parked before: its stall is worth a trace.
    pub waited: bool,
}

impl Head {
    fn outstanding(self) -> Outstanding {
        Outstanding {
            head: self.head,
            counter: 0,
            taken_ns: self.taken_ns,
            poisonous: false,
        }
    }
}

/// Why a request cannot be read.
enum Unopened {
    /// Nothing to answer, nowhere to answer it: the buffer is given back empty.
    Unusable,
    /// Its memory may come back.
    MemoryAway,
}

impl Server {
    pub fn new(
        thread: usize,
        shared: &'static Shared,
        mount: &'static Mount,
        tree: Tree<'static>,
        pool: &'static Pool,
    ) -> Server {
        Server {
            thread,
            shared,
            mount,
            tree,
            pool,
            mem: GuestMemory::default(),
            parking: Parking::default(),
            io_deadline_ns: shared.record().io_deadline_ns.load(Ordering::Relaxed),
            chain: Chain::default(),
            reader: Reader::default(),
            out: Vec::with_capacity(4096),
        }
    }

    /// Reads the header and up to `ARGS_MAX` argument bytes into `message`: header and arguments.
    #[inline]
    fn open<'m>(
        &mut self,
        queue: &Queue<'_>,
        head: u16,
        message: &'m mut Message,
    ) -> Result<(InHeader, &'m [u8]), Unopened> {
        match queue.walk(&self.mem, head, &mut self.chain) {
            Ok(()) => {}
            Err(ChainError::MemoryAway) => return Err(Unopened::MemoryAway),
            Err(_) => return Err(Unopened::Unusable),
        }
        let raw = self.chain.read_into(0, message);
        let header = InHeader::parse(raw).ok_or(Unopened::Unusable)?;
        let declared = (header.len as usize).clamp(IN_HEADER_LEN, raw.len());
        Ok((header, &raw[IN_HEADER_LEN..declared]))
    }

    /// What becomes of a head that could not be opened.
    fn put_aside(&self, queue: &mut Queue<'_>, at: Head, why: &Unopened) {
        match why {
            Unopened::Unusable => {
                self.count_error();
                queue.complete(at.head, 0);
            }
            Unopened::MemoryAway => queue.wait_for_memory(at.outstanding()),
        }
    }

    /// Serves one head; bytes copied to the guest, as a measure of the work done.
    pub fn serve(&mut self, queue: &mut Queue<'_>, at: Head) -> usize {
        let mut message = EMPTY;
        let (header, args) = match self.open(queue, at.head, &mut message) {
            Ok(opened) => opened,
            Err(why) => {
                self.put_aside(queue, at, &why);
                return 0;
            }
        };
        if !at.waited {
            self.shared.thread(self.thread).count(header.opcode);
        }
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => {
                queue.complete(at.head, 0);
                0
            }
            opcode::READ => self.serve_read(queue, at, &header, args),
            opcode::INIT => {
                self.serve_init(queue, at.head, &header, args);
                0
            }
            _ => {
                self.out.clear();
                self.out.extend_from_slice(&[0; reply::OUT_HEADER_LEN]);
                let room = self
                    .chain
                    .writable_len()
                    .saturating_sub(reply::OUT_HEADER_LEN);
                let done = ops::answer(
                    &self.tree,
                    header.opcode,
                    header.nodeid,
                    args,
                    room,
                    &mut self.out,
                );
                if header.opcode == opcode::DESTROY {
                    self.shared.record().initialised.store(0, Ordering::Relaxed);
                }
                self.finish(queue, at.head, &header, done);
                0
            }
        }
    }

    fn serve_init(&mut self, queue: &mut Queue<'_>, head: u16, header: &InHeader, args: &[u8]) {
        self.out.clear();
        self.out.extend_from_slice(&[0; reply::OUT_HEADER_LEN]);
        let queue_size = self.shared.queue(queue.index).size.load(Ordering::Relaxed) as u16;
        let has_xattr = self.tree.superblock().has_xattr();
        let done = ops::init(args, queue_size, has_xattr, &mut self.out).map(|agreed| {
            if let Some(agreed) = agreed {
                // Written before INIT is answered, so that whoever takes over knows the session.
                let record = self.shared.record();
                record.minor.store(agreed.minor, Ordering::Relaxed);
                record.flags.store(agreed.flags, Ordering::Relaxed);
                record.init_ns.store(clock::now_ns(), Ordering::Relaxed);
                record.first_exec_ns.store(0, Ordering::Relaxed);
                record.initialised.store(1, Ordering::SeqCst);
                self.shared.failpoint().pass(Point::InitRecorded);
            }
        });
        self.finish(queue, head, header, done);
    }

    fn serve_read(
        &mut self,
        queue: &mut Queue<'_>,
        at: Head,
        header: &InHeader,
        args: &[u8],
    ) -> usize {
        self.shared.failpoint().pass(Point::Copying);
        let outcome = self.reader.read(
            self.mount,
            &self.tree,
            header.nodeid,
            args,
            &self.chain,
            reply::OUT_HEADER_LEN,
        );
        match outcome {
            Ok(ReadOutcome::Copied(n)) => {
                self.shared.failpoint().pass(Point::Copied);
                self.finish_read(queue, at, header, args, n);
                n
            }
            Ok(ReadOutcome::Missing) => {
                self.park(queue, at, header, args);
                0
            }
            Ok(ReadOutcome::WouldBlock) => {
                self.submit(queue, at, header, args);
                0
            }
            Err(errno) => {
                self.fail_open(queue, at.head, header, errno);
                0
            }
        }
    }

    /// Serves a head whose bytes the pool has read.
    pub fn serve_finished(&mut self, queue: &mut Queue<'_>, finished: &Finished) {
        let at = Head {
            head: finished.ticket.head,
            taken_ns: finished.taken_ns,
            waited: finished.waited,
        };
        let Ok(data) = &finished.data else {
            if !self.fail(queue, at.head, Errno(libc::EIO)) {
                queue.wait_for_memory(at.outstanding());
            }
            return;
        };
        if !settled(self.mount, &finished.pieces) {
            self.serve(queue, at);
            return;
        }
        let mut message = EMPTY;
        let (header, args) = match self.open(queue, at.head, &mut message) {
            Ok(opened) => opened,
            Err(why) => return self.put_aside(queue, at, &why),
        };
        // The guest may have changed the request meanwhile; it gets what it asked for first, as far as that fits.
        self.shared.failpoint().pass(Point::Copying);
        let copied = self.chain.write_at(reply::OUT_HEADER_LEN, data);
        self.shared.failpoint().pass(Point::Copied);
        self.finish_read(queue, at, &header, args, copied);
    }

    fn finish_read(
        &mut self,
        queue: &mut Queue<'_>,
        at: Head,
        header: &InHeader,
        args: &[u8],
        n: usize,
    ) {
        let thread = self.shared.thread(self.thread);
        session::add(&thread.bytes_read, n as u64);
        let len = (reply::OUT_HEADER_LEN + n) as u32;
        if self
            .chain
            .write_at(0, &reply::out_header(len, 0, header.unique))
            < reply::OUT_HEADER_LEN
        {
            queue.complete(at.head, 0);
            return;
        }
        queue.complete(at.head, len);
        let record = self.shared.record();
        if self.reader.executable && record.first_exec_ns.load(Ordering::Relaxed) == 0 {
            record
                .first_exec_ns
                .store(clock::now_ns(), Ordering::Relaxed);
        }
        if at.waited {
            let asked = fuse_abi::request::ReadIn::parse(args).unwrap_or_default();
            thread.traces.push(&Trace {
                nodeid: header.nodeid,
                offset: asked.offset,
                len: n as u64,
                parked_ns: at.taken_ns,
                done_ns: clock::now_ns(),
            });
        }
    }

    /// Has the pool read what the page cache lacks.
    fn submit(&mut self, queue: &Queue<'_>, at: Head, header: &InHeader, args: &[u8]) {
        queue.park(at.head);
        let submitted = self.pool.submit(Job {
            thread: self.thread,
            ticket: Ticket {
                queue: queue.index,
                epoch: queue.epoch,
                head: at.head,
            },
            pieces: self.reader.pieces.clone(),
            taken_ns: at.taken_ns,
            waited: at.waited,
        });
        if submitted {
            let reads = &self.shared.thread(self.thread).pool_reads;
            session::add(reads, 1);
            self.shared.failpoint().pass(Point::PoolSubmitted);
        } else if let Some(first) = self.reader.pieces.first() {
            // The chunk is here: it is looked at again with the others that wait, and nobody needs to be asked for it.
            self.parking.pool_was_full = true;
            let chunk = ChunkId {
                blob_index: first.blob_index,
                chunk_index: first.chunk_index,
            };
            self.wait_for(queue, at, header, args, chunk, clock::now_ns());
        }
    }

    fn park(&mut self, queue: &Queue<'_>, at: Head, header: &InHeader, args: &[u8]) {
        queue.park(at.head);
        self.shared.failpoint().pass(Point::Parking);
        let thread = self.shared.thread(self.thread);
        if !at.waited {
            session::add(&thread.parks, 1);
        }
        let now = clock::now_ns();
        let mut posted_ns = now;
        for &(chunk, file_offset) in &self.reader.missing {
            if !self.parking.post(
                &thread.posts,
                chunk,
                header.nodeid,
                file_offset,
                at.taken_ns,
            ) {
                posted_ns = 0;
            }
        }
        let Some(&(missing, _)) = self.reader.missing.first() else {
            return;
        };
        self.wait_for(queue, at, header, args, missing, posted_ns);
        self.shared.failpoint().pass(Point::Posted);
    }

    fn wait_for(
        &mut self,
        queue: &Queue<'_>,
        at: Head,
        header: &InHeader,
        args: &[u8],
        missing: ChunkId,
        posted_ns: u64,
    ) {
        let asked = fuse_abi::request::ReadIn::parse(args).unwrap_or_default();
        self.parking.list.push(Parked {
            queue: queue.index,
            head: at.head,
            missing,
            nodeid: header.nodeid,
            offset: asked.offset,
            taken_ns: at.taken_ns,
            deadline_ns: at.taken_ns.saturating_add(self.io_deadline_ns),
            posted_ns,
        });
    }

    fn count_error(&self) {
        let errors = &self.shared.thread(self.thread).errors;
        session::add(errors, 1);
    }

    /// Completes a head whose reply, or failure, is in `out` after room for the header.
    fn finish(
        &mut self,
        queue: &mut Queue<'_>,
        head: u16,
        header: &InHeader,
        done: Result<(), Errno>,
    ) {
        let room = self.chain.writable_len();
        match done {
            Ok(()) if self.out.len() <= room => {
                let len = self.out.len() as u32;
                self.out[..reply::OUT_HEADER_LEN].copy_from_slice(&reply::out_header(
                    len,
                    0,
                    header.unique,
                ));
                self.shared.failpoint().pass(Point::Copying);
                self.chain.write_at(0, &self.out);
                self.shared.failpoint().pass(Point::Copied);
                queue.complete(head, len);
            }
            Ok(()) => self.fail_open(queue, head, header, Errno(libc::EIO)),
            Err(errno) => self.fail_open(queue, head, header, errno),
        }
    }

    fn fail_open(&mut self, queue: &mut Queue<'_>, head: u16, header: &InHeader, errno: Errno) {
        if errno == Errno(libc::EIO) {
            self.count_error();
        }
        let len = reply::OUT_HEADER_LEN as u32;
        let written = self
            .chain
            .write_at(0, &reply::out_header(len, errno.0, header.unique));
        queue.complete(
            head,
            if written == reply::OUT_HEADER_LEN {
                len
            } else {
                0
            },
        );
    }

    /// Answers `head` with an error. False when the memory for that is away: then it is not answered.
    #[must_use]
    pub fn fail(&mut self, queue: &mut Queue<'_>, head: u16, errno: Errno) -> bool {
        let mut message = EMPTY;
        match self.open(queue, head, &mut message) {
            Ok((header, _)) => self.fail_open(queue, head, &header, errno),
            Err(Unopened::Unusable) => queue.complete(head, 0),
            Err(Unopened::MemoryAway) => return false,
        }
        true
    }
}
