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

    /// Name, node id and `DT_*` of entry `index`.
    #[inline]
    fn entry(&self, index: usize) -> Result<(&'a [u8], Nid, u8)> {
        let at = index * DIRENT_SIZE;
        let raw: &[u8; DIRENT_SIZE] = need(self.data, at as u64, "dirent")?;
        let start = usize::from(le16(raw, 8));
        let name = if index + 1 < self.count {
            let next: &[u8; DIRENT_SIZE] = need(self.data, (at + DIRENT_SIZE) as u64, "dirent")?;
            self.data.get(start..usize::from(le16(next, 8)))
        } else {
            // The last name ends with the block, or at a NUL before.
            self.data
                .get(start..)
                .map(|rest| match rest.iter().position(|&b| b == 0) {
                    Some(end) => rest.split_at(end).0,
                    None => rest,
                })
        };
        let Some(name) = name else {
            return Err(self.bad("dirent.nameoff", index, "a name reaches beyond the block"));
        };
        if start < self.count * DIRENT_SIZE {
            return Err(self.bad("dirent.nameoff", index, "a name among the entries"));
        }
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(self.bad("dirent.name", index, "not of 1 to 255 bytes"));
        }
        if name.iter().any(|&b| b == 0 || b == b'/') {
            return Err(self.bad("dirent.name", index, "a NUL or '/' inside"));
        }
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
        if candidate.entry(0)?.0 <= name {
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
        let (found, nid, d_type) = block.entry(middle)?;
        match found.cmp(name) {
            std::cmp::Ordering::Equal => return Ok(Some((nid, d_type))),
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
