//! The descriptors by which a blob's tables are shared, and how a table behind one is mapped.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use crate::layout::VERSION;
use crate::mapping::Mapping;

/// The descriptors of one blob's tables.
#[derive(Debug, Clone, Copy)]
pub struct TableFds<'a> {
    pub state: BorrowedFd<'a>,
    pub extents: BorrowedFd<'a>,
    pub touched: BorrowedFd<'a>,
    pub data: Option<BorrowedFd<'a>>,
}

/// The descriptors of one blob's tables, shared with a worker. Only the touched table may be written by it.
#[derive(Debug)]
pub struct SharedFds {
    pub state: OwnedFd,
    pub extents: OwnedFd,
    pub touched: OwnedFd,
    pub data: Option<OwnedFd>,
}

fn header_count(map: &Mapping, magic: u64, what: &str) -> io::Result<u32> {
    let found = map.u64_at(0).map(|w| w.load(Ordering::Acquire));
    let version = map.u32_at(8).map(|w| w.load(Ordering::Relaxed));
    let count = map.u32_at(12).map(|w| w.load(Ordering::Relaxed));
    match (found, version, count) {
        (Some(m), Some(VERSION), Some(count)) if m == magic => Ok(count),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{what}: wrong magic or version"),
        )),
    }
}

/// Maps a whole table: the header says how long it must be, the file has to be that long.
pub fn map_table(
    fd: BorrowedFd<'_>,
    magic: u64,
    header_len: usize,
    len_for: fn(u32) -> usize,
    writable: bool,
    what: &str,
) -> io::Result<(Mapping, u32)> {
    let count = header_count(&Mapping::new(fd, header_len, false)?, magic, what)?;
    let map = Mapping::new(fd, len_for(count), writable)?;
    if header_count(&map, magic, what)? != count {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{what}: changed while it was opened"),
        ));
    }
    Ok((map, count))
}
