//! Directories: blocks of 4 KiB, each with its entries in front and their names behind, sorted by name.

use crate::error::{FormatError, Result};
use crate::format::*;
use crate::inode::{Inode, Nid};

/// `DT_*` of each EROFS file type, in their order: unknown, file, directory, character device, block device, fifo,
/// socket, symbolic link.
const DT: [u8; 8] = [0, 8, 4, 2, 6, 1, 12, 10];

/// A directory entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// 1 to 255 bytes without '/' and NUL; "." and ".." are among them.
    pub name: &'a [u8],
    pub nid: Nid,
    /// File type, a `DT_*` value.
    pub d_type: u8,
    /// Cookie that continues behind this entry; never 0.
    pub next_cookie: u64,
}

/// A block of a directory.
#[derive(Clone, Copy)]
struct Block<'a> {
    data: &'a [u8],
    /// Offset of the block in the image, for messages.
    offset: u64,
    /// Number of entries, at least 1.
    count: usize,
}

impl<'a> Block<'a> {
    #[inline]
    fn read(image: &'a [u8], dir: &Inode, index: u64) -> Result<Block<'a>> {
        let position = index * BLOCK_SIZE;
        let Some((offset, len)) = dir.flat_extent(position) else {
            return Err(FormatError::malformed(
                "dirent",
                dir.offset,
                "a block beyond the directory's end",
            ));
        };
        let data = need_slice(image, offset, len.min(BLOCK_SIZE), "dirent")?;
        let names = usize::from(le16(need::<DIRENT_SIZE>(data, 0, "dirent")?, 8));
        if names % DIRENT_SIZE != 0 || names < DIRENT_SIZE || names >= data.len() {
            return Err(FormatError::malformed(
                "dirent.nameoff",
                offset,
                format!("{names} is not the end of the entries of this block"),
            ));
        }
        Ok(Block {
            data,
            offset,
            count: names / DIRENT_SIZE,
        })
    }

    /// Entry `index` without its name; below `count`.
    #[inline(always)]
    fn raw(&self, index: usize) -> Result<&'a [u8; DIRENT_SIZE]> {
        let rest = self.data.get(index * DIRENT_SIZE..);
        match rest.and_then(|rest| rest.first_chunk()) {
            Some(raw) => Ok(raw),
            None => Err(self.bad("dirent", index, "reaches beyond the block")),
        }
    }

    /// The bytes between the start of name `index` and that of the next one: a name, if [`Block::entry`] finds no fault
    /// with it.
    #[inline(always)]
    fn name_bytes(&self, index: usize) -> Result<&'a [u8]> {
        let start = usize::from(le16(self.raw(index)?, 8));
        let end = if index + 1 < self.count {
            usize::from(le16(self.raw(index + 1)?, 8))
        } else {
            self.last_end(start)
        };
        match self.data.get(start..end) {
            Some(name) if start >= self.count * DIRENT_SIZE => Ok(name),
            _ => Err(self.bad(
                "dirent.nameoff",
                index,
                "a name among the entries or beyond the block",
            )),
        }
    }

    /// The last name ends with the block, or at a NUL before.
    #[cold]
    fn last_end(&self, start: usize) -> usize {
        let rest = self.data.get(start..).unwrap_or_default();
        rest.iter()
            .position(|&b| b == 0)
            .map_or(self.data.len(), |n| start + n)
    }

    /// Name, node id and `DT_*` of entry `index`.
    #[inline]
    fn entry(&self, index: usize) -> Result<(&'a [u8], Nid, u8)> {
        let name = self.name_bytes(index)?;
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(self.bad("dirent.name", index, "not of 1 to 255 bytes"));
        }
        if has_forbidden(name) {
            return Err(self.bad("dirent.name", index, "a NUL or '/' inside"));
        }
        let raw = self.raw(index)?;
        let Some(&d_type) = DT.get(usize::from(raw[10])) else {
            return Err(self.bad("dirent.file_type", index, "unknown"));
        };
        Ok((name, le64(raw, 0), d_type))
    }

    #[cold]
    fn bad(&self, what: &'static str, index: usize, message: &'static str) -> FormatError {
        FormatError::malformed(what, self.offset + (index * DIRENT_SIZE) as u64, message)
    }
}

/// Whether a NUL or '/' is among `name`'s bytes. Eight at a time: an answer to READDIRPLUS has dozens of names.
#[inline]
fn has_forbidden(name: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const SLASHES: u64 = u64::from_ne_bytes([b'/'; 8]);
    // The highest bit of each byte that is 0, and perhaps of bytes above one that is.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & (ONES << 7);
    let find = |word: u64| zeros(word) | zeros(word ^ SLASHES);
    let mut words = name.chunks_exact(8);
    let mut found = 0;
    for word in words.by_ref() {
        found |= word
            .first_chunk()
            .map_or(0, |w| find(u64::from_ne_bytes(*w)));
    }
    let rest = words.remainder();
    found != 0 || rest.iter().any(|&b| b == 0 || b == b'/')
}

#[inline]
fn require_dir(dir: &Inode) -> Result<()> {
    if dir.is_dir() {
        Ok(())
    } else {
        Err(FormatError::malformed(
            "inode.i_mode",
            dir.offset,
            "not a directory",
        ))
    }
}

/// Finds `name` in `dir`: a binary search over the blocks by their first names, then inside one block.
#[inline]
pub(crate) fn lookup(image: &[u8], dir: &Inode, name: &[u8]) -> Result<Option<(Nid, u8)>> {
    require_dir(dir)?;
    let blocks = dir.size.div_ceil(BLOCK_SIZE);
    if blocks == 0 {
        return Ok(None);
    }
    // Invariant: the first name of block `low` is not above `name`, unless `low` is 0; that of `high` is.
    let (mut low, mut high) = (0, blocks);
    let mut block = None;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let candidate = Block::read(image, dir, middle)?;
        if candidate.name_bytes(0)? <= name {
            low = middle;
            block = Some(candidate);
        } else {
            high = middle;
        }
    }
    let block = match block {
        Some(block) => block,
        None => Block::read(image, dir, 0)?,
    };
    let (mut low, mut high) = (0, block.count);
    while low < high {
        let middle = low + (high - low) / 2;
        // Names that only show the way are compared as bytes; the one that is found is checked.
        match block.name_bytes(middle)?.cmp(name) {
            std::cmp::Ordering::Equal => {
                let (_, nid, d_type) = block.entry(middle)?;
                return Ok(Some((nid, d_type)));
            }
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    Ok(None)
}

/// A block has at most 315 entries, so that 10 bits hold the place inside it.
const COOKIE_BITS: u32 = 10;

/// The entries of a directory from a cookie on. Ends after the first error.
pub struct Entries<'a> {
    image: &'a [u8],
    dir: Inode,
    block_index: u64,
    index: usize,
    block: Option<Block<'a>>,
    previous: Option<&'a [u8]>,
    started: bool,
    done: bool,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(image: &'a [u8], dir: &Inode, cookie: u64) -> Entries<'a> {
        Entries {
            image,
            dir: *dir,
            block_index: cookie >> COOKIE_BITS,
            index: (cookie & ((1 << COOKIE_BITS) - 1)) as usize,
            block: None,
            previous: None,
            started: false,
            done: false,
        }
    }

    /// The name before the place that a cookie stands for, so that the order is checked across calls as well.
    fn name_before(&self) -> Result<Option<&'a [u8]>> {
        let (block_index, count) = match (self.index, self.block_index.checked_sub(1)) {
            (0, None) => return Ok(None),
            (0, Some(before)) => (before, usize::MAX),
            (index, _) => (self.block_index, index),
        };
        let block = Block::read(self.image, &self.dir, block_index)?;
        let (name, ..) = block.entry(count.min(block.count) - 1)?;
        Ok(Some(name))
    }

    fn advance(&mut self) -> Result<Option<Dirent<'a>>> {
        require_dir(&self.dir)?;
        loop {
            if self.block_index >= self.dir.size.div_ceil(BLOCK_SIZE) {
                return Ok(None);
            }
            if !self.started {
                self.previous = self.name_before()?;
                self.started = true;
            }
            let block = match self.block {
                Some(block) => block,
                None => Block::read(self.image, &self.dir, self.block_index)?,
            };
            self.block = Some(block);
            if self.index >= block.count {
                self.block = None;
                self.block_index += 1;
                self.index = 0;
                continue;
            }
            let (name, nid, d_type) = block.entry(self.index)?;
            if self.previous.is_some_and(|previous| previous >= name) {
                return Err(block.bad("dirent.name", self.index, "not above the one before it"));
            }
            self.previous = Some(name);
            self.index += 1;
            let next_cookie = (self.block_index << COOKIE_BITS) | self.index as u64;
            return Ok(Some(Dirent {
                name,
                nid,
                d_type,
                next_cookie,
            }));
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Dirent<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

impl std::iter::FusedIterator for Entries<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forbidden_bytes_are_found_at_every_place() {
        for len in 0..40 {
            for fill in [1u8, b'.', b'0', 0x7f, 0x80, 0xaf, 0xff] {
                let mut name = vec![fill; len];
                assert!(!has_forbidden(&name), "{fill} {len}");
                for at in 0..len {
                    for bad in [0, b'/'] {
                        name[at] = bad;
                        assert!(has_forbidden(&name), "{bad} at {at} of {len}");
                    }
                    name[at] = fill;
                }
            }
        }
    }
}
