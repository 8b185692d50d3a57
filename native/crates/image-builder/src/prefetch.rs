//! Files that are wanted first: their chunks stand at the start of the blob in the order of a list, and the image's
//! prefetch table names them.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::error::BuildError;
use crate::feeder::{Feed, Feeder};
use crate::job::{FilePath, join};
use crate::source::{self, Stat, list_dir};
use crate::worker::changed;

/// What the system says of a path that leads to nothing in the tree; EINVAL of one that holds NUL.
const ABSENT: [i32; 6] = [
    libc::ENOENT,
    libc::ENOTDIR,
    libc::ELOOP,
    libc::EXDEV,
    libc::ENAMETOOLONG,
    libc::EINVAL,
];

/// The list, resolved.
#[derive(Default)]
pub struct Listed {
    /// What the prefetch table names: files and directories of the list, by device and inode number.
    places: HashMap<(u64, u64), usize>,
    items: Vec<Item>,
    /// Numbers of the files whose chunks are laid out by the list.
    slots: HashMap<(u64, u64), Slot>,
    /// By number, the chunks that are not laid out by the list: first and count.
    rests: Vec<Vec<(u64, u64)>>,
}

/// A file whose chunks are laid out by the list, as it was found then.
struct Slot {
    number: u32,
    stat: Stat,
}

struct Item {
    path: Vec<u8>,
    stat: Stat,
    offset: u64,
    length: u64,
}

impl Listed {
    /// Adds bytes `[offset, offset + length)` of the file at `path`, or all files below the directory. Returns false
    /// when the tree has no such file or directory.
    pub fn add(
        &mut self,
        top: BorrowedFd<'_>,
        path: &[u8],
        offset: u64,
        length: u64,
    ) -> Result<bool, BuildError> {
        let failed = |e| BuildError::system(path, &e);
        let fd = match source::open_in_root(top, path) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error().is_some_and(|code| ABSENT.contains(&code)) => {
                return Ok(false);
            }
            Err(e) => return Err(failed(e)),
        };
        let stat = source::stat_fd(fd.as_fd()).map_err(failed)?;
        if !stat.is_reg() && !stat.is_dir() {
            return Ok(false);
        }
        let top_path = source::path_of(top).map_err(failed)?;
        let full = source::path_of(fd.as_fd()).map_err(failed)?;
        let below = full.strip_prefix(&*top_path).unwrap_or_default();
        let path = below.strip_prefix(b"/").unwrap_or(below).to_vec();
        let next = self.places.len();
        self.places.entry(stat.key()).or_insert(next);
        self.items.push(Item {
            path,
            stat,
            offset,
            length,
        });
        Ok(true)
    }

    /// Entries of the prefetch table.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// The place in the prefetch table of a file or directory.
    pub fn place(&self, key: (u64, u64)) -> Option<usize> {
        self.places.get(&key).copied()
    }

    /// The number of a file whose chunks are laid out by the list, and what it was when it was listed.
    pub fn slot(&self, key: (u64, u64)) -> Option<(u32, &Stat)> {
        self.slots.get(&key).map(|slot| (slot.number, &slot.stat))
    }

    /// The chunks of such a file that are not.
    pub fn rest(&self, slot: u32) -> impl Iterator<Item = (u64, u64)> {
        self.rests[slot as usize].iter().copied()
    }

    /// Stores what is listed, in the order of the list, each chunk once.
    pub fn feed(
        &mut self,
        top: BorrowedFd<'_>,
        chunk_size: u32,
        feeder: &mut Feeder<'_>,
    ) -> Result<(), Feed> {
        for item in std::mem::take(&mut self.items) {
            if item.stat.is_dir() {
                self.feed_dir(top, chunk_size, item.path, feeder)?;
            } else {
                let cut = item.path.iter().rposition(|b| *b == b'/');
                let (folder, name) = match cut {
                    Some(cut) => (&item.path[..cut], &item.path[cut + 1..]),
                    None => (&b""[..], &item.path[..]),
                };
                let path = FilePath {
                    folder: folder.into(),
                    name: name.into(),
                };
                self.feed_file(
                    &path,
                    &item.stat,
                    item.offset,
                    item.length,
                    chunk_size,
                    feeder,
                )?;
            }
        }
        Ok(())
    }

    fn feed_dir(
        &mut self,
        top: BorrowedFd<'_>,
        chunk_size: u32,
        path: Vec<u8>,
        feeder: &mut Feeder<'_>,
    ) -> Result<(), Feed> {
        let mut pending = vec![path];
        while let Some(path) = pending.pop() {
            let (fd, names) = list_dir(top, &path)?;
            let folder: Arc<[u8]> = path.into();
            let mut below = Vec::new();
            for name in names.iter() {
                let full = join(&folder, name);
                let stat =
                    source::stat_at(fd.as_fd(), name).map_err(|e| BuildError::system(&full, &e))?;
                if stat.is_dir() {
                    below.push(full);
                } else if stat.is_reg() {
                    let path = FilePath {
                        folder: folder.clone(),
                        name: name.into(),
                    };
                    self.feed_file(&path, &stat, 0, u64::MAX, chunk_size, feeder)?;
                }
            }
            pending.extend(below.into_iter().rev());
        }
        Ok(())
    }

    fn feed_file(
        &mut self,
        path: &FilePath,
        stat: &Stat,
        offset: u64,
        length: u64,
        chunk_size: u32,
        feeder: &mut Feeder<'_>,
    ) -> Result<(), Feed> {
        let size = u64::from(chunk_size);
        let end = offset.saturating_add(length).min(stat.size);
        if offset >= end {
            return Ok(());
        }
        let slot = self.slots.entry(stat.key()).or_insert_with(|| {
            self.rests.push(vec![(0, stat.size.div_ceil(size))]);
            Slot {
                number: self.rests.len() as u32 - 1,
                stat: *stat,
            }
        });
        if !slot.stat.same_content(stat) {
            return Err(changed(&path.full()).into());
        }
        let slot = slot.number;
        let rest = &mut self.rests[slot as usize];
        for (first, count) in claim(rest, offset / size, end.div_ceil(size)) {
            feeder.range(path, stat, first, count, Some(slot))?;
        }
        Ok(())
    }
}

/// Takes chunks `[from, to)` out of the ranges `rest`; returns those that were in it, as first and count.
fn claim(rest: &mut Vec<(u64, u64)>, from: u64, to: u64) -> Vec<(u64, u64)> {
    let (mut left, mut taken) = (Vec::new(), Vec::new());
    for (first, count) in rest.drain(..) {
        let end = first + count;
        let (a, b) = (from.clamp(first, end), to.clamp(first, end));
        for (ours, start, stop) in [(false, first, a), (true, a, b), (false, b, end)] {
            if stop > start {
                let range = if ours { &mut taken } else { &mut left };
                range.push((start, stop - start));
            }
        }
    }
    *rest = left;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_chunk_is_claimed_once() {
        let mut rest = vec![(0, 100)];
        assert_eq!(claim(&mut rest, 10, 20), [(10, 10)]);
        assert_eq!(claim(&mut rest, 5, 25), [(5, 5), (20, 5)]);
        assert_eq!(rest, [(0, 5), (25, 75)]);
        assert_eq!(claim(&mut rest, 5, 25), []);
        assert_eq!(claim(&mut rest, 99, 200), [(99, 1)]);
        assert_eq!(claim(&mut rest, 0, 1000), [(0, 5), (25, 74)]);
        assert!(rest.is_empty());
    }
}
