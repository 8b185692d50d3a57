//! Lays out and writes the bootstrap of a tree whose chunks are in the blob already (docs/formats/rafs-v6.md):
//!
//! ```text
//! 0      what the caller brings: superblocks, device slot, blob table, prefetch table
//! meta   one empty block, so that the root's nid is 128 and no inode has nid 0
//!        inodes in the order of the scan, each with its xattrs and chunk indexes or inline tail
//!        whole blocks of directories and links that are not inline
//!        chunk table
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Write as _};

use crate::Options;
use crate::blob::{Blob, CHUNK_RECORD};
use crate::error::BuildError;
use crate::layout::{BLOCK, DIRENT};
use crate::scan::{Dir, InodeRecord, Tree};
use crate::spool::Reader;
use crate::xattr;

const SLOT: u64 = 32;
const COMPACT: u64 = 32;
const EXTENDED: u64 = 64;
const CHUNK_INDEX: u64 = 8;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;
const CHUNK_FORMAT_INDEXES: u32 = 0x20;
const BOOTSTRAP_MAX: u64 = 2 << 30;

/// Where everything lies.
pub struct Plan {
    pub meta_offset: u64,
    pub chunk_table_offset: u64,
    /// Of the whole bootstrap.
    pub size: u64,
    pub nids: Vec<u32>,
    /// Inodes with whole blocks outside of the inode area, and their first block.
    with_blocks: Vec<(u32, u32)>,
}

/// What follows from an inode for its form on disk.
struct Shape {
    extended: bool,
    layout: u16,
    size: u64,
    nlink: u32,
    /// Blocks outside of the inode area.
    blocks: u64,
    n_chunks: u64,
}

impl Shape {
    /// Bytes of inode and xattrs.
    fn head(&self, inode: &InodeRecord) -> u64 {
        (if self.extended { EXTENDED } else { COMPACT }) + inode.xattrs.len() as u64
    }
}

/// An inode on its way to the bootstrap.
struct Found<'a> {
    ino: u32,
    inode: InodeRecord,
    shape: Shape,
    dir: Option<&'a Dir>,
}

/// Reads the inodes of a tree in order, with what the tree knows about each beside the spool.
struct Inodes<'a> {
    tree: &'a Tree,
    reader: Reader<'a>,
    ino: u32,
    dirs: std::slice::Iter<'a, Dir>,
    chunk_size: u64,
}

impl<'a> Inodes<'a> {
    fn new(tree: &'a Tree, options: &Options) -> Inodes<'a> {
        Inodes {
            tree,
            reader: tree.inodes.reader(0),
            ino: 0,
            dirs: tree.dirs.iter(),
            chunk_size: options.chunk_size.into(),
        }
    }

    fn next(&mut self) -> io::Result<Option<Found<'a>>> {
        if self.ino as usize == self.tree.types.len() {
            return Ok(None);
        }
        self.ino += 1;
        let inode = InodeRecord::read(&mut self.reader)?;
        let kind = inode.mode & libc::S_IFMT;
        let dir = if kind == libc::S_IFDIR {
            self.dirs.next()
        } else {
            None
        };
        let nlink = match dir {
            Some(dir) => 2 + dir.n_subdirs,
            None => self.tree.links.get(&self.ino).copied().unwrap_or(1),
        };
        let size = match (kind, dir) {
            (libc::S_IFREG, _) => inode.size,
            (libc::S_IFLNK, _) => inode.target.len() as u64,
            (_, Some(dir)) => dir.size,
            _ => 0,
        };
        // Compact inodes show the build time, which is 0, and nydusd reads no device number there.
        let extended = (inode.mtime, inode.mtime_nsec) != (0, 0)
            || matches!(kind, libc::S_IFCHR | libc::S_IFBLK)
            || inode.uid.max(inode.gid).max(nlink) > 0xffff
            || size > 0xffff_ffff;
        let head = (if extended { EXTENDED } else { COMPACT }) + inode.xattrs.len() as u64;
        let tail = size % BLOCK;
        let (layout, blocks) = match kind {
            libc::S_IFREG => (CHUNK_BASED, 0),
            _ if tail > 0 && head + tail <= BLOCK => (FLAT_INLINE, size / BLOCK),
            _ => (FLAT_PLAIN, size.div_ceil(BLOCK)),
        };
        let n_chunks = if kind == libc::S_IFREG {
            size.div_ceil(self.chunk_size)
        } else {
            0
        };
        let shape = Shape {
            extended,
            layout,
            size,
            nlink,
            blocks,
            n_chunks,
        };
        Ok(Some(Found {
            ino: self.ino,
            inode,
            shape,
            dir,
        }))
    }
}

/// Gives every inode its place. `meta_offset` is a multiple of the block size.
///
/// # Errors
/// A spool cannot be read, or the bootstrap would be too large.
pub fn layout(
    tree: &Tree,
    n_chunks: u32,
    options: &Options,
    meta_offset: u64,
) -> Result<Plan, BuildError> {
    let mut nids = Vec::with_capacity(tree.types.len());
    let mut with_blocks = Vec::new();
    let mut offset = meta_offset + BLOCK;
    let mut inodes = Inodes::new(tree, options);
    while let Some(Found {
        ino, inode, shape, ..
    }) = inodes.next()?
    {
        let mut size = shape.head(&inode);
        match shape.layout {
            CHUNK_BASED => {
                size =
                    size.next_multiple_of(CHUNK_INDEX) + shape.n_chunks.saturating_mul(CHUNK_INDEX);
            }
            FLAT_INLINE => {
                size += shape.size % BLOCK;
                // Inline data must not cross a block; the inode stays in the same one.
                if offset % BLOCK + size > BLOCK {
                    offset = offset.next_multiple_of(BLOCK);
                }
            }
            _ => {}
        }
        if shape.blocks > 0 {
            with_blocks.push((ino, shape.blocks as u32));
        }
        nids.push(((offset - meta_offset) / SLOT) as u32);
        offset = offset
            .saturating_add(size)
            .min(1 << 40)
            .next_multiple_of(SLOT);
    }
    offset = offset.next_multiple_of(BLOCK);
    for (_, blocks) in &mut with_blocks {
        let count = std::mem::replace(blocks, (offset / BLOCK) as u32);
        offset += u64::from(count) * BLOCK;
    }
    let size = (offset + u64::from(n_chunks) * CHUNK_RECORD as u64).next_multiple_of(BLOCK);
    if size > BOOTSTRAP_MAX {
        return Err(BuildError::TooLarge(format!(
            "the bootstrap would have {size} bytes, at most {BOOTSTRAP_MAX} are possible"
        )));
    }
    Ok(Plan {
        meta_offset,
        chunk_table_offset: offset,
        size,
        nids,
        with_blocks,
    })
}

/// Writes the whole bootstrap: `head`, which ends at the metadata offset or before, and everything behind it.
///
/// # Errors
/// `out` cannot be written, or a spool not be read.
pub fn write(
    plan: &Plan,
    tree: &Tree,
    blob: &Blob,
    options: &Options,
    head: &[u8],
    out: &File,
) -> io::Result<()> {
    let mut writer = Writer {
        out: BufWriter::with_capacity(256 << 10, out),
        position: 0,
        plan,
        tree,
    };
    writer.put(0, head)?;
    writer.inodes(blob, options)?;
    writer.blocks(options)?;
    writer.put(plan.chunk_table_offset, &[])?;
    let mut records = blob.chunks.reader(0);
    for _ in 0..blob.n_chunks {
        writer.write(records.take(CHUNK_RECORD)?)?;
    }
    writer.put(plan.size, &[])?;
    writer.out.flush()
}

struct Writer<'a> {
    out: BufWriter<&'a File>,
    position: u64,
    plan: &'a Plan,
    tree: &'a Tree,
}

impl Writer<'_> {
    /// Writes `data` at `offset`, which is not before the end of what is there; fills the gap.
    fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        while self.position < offset {
            let gap = (offset - self.position).min(BLOCK) as usize;
            self.write(&[0; BLOCK as usize][..gap])?;
        }
        self.write(data)
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.position += data.len() as u64;
        self.out.write_all(data)
    }

    fn inodes(&mut self, blob: &Blob, options: &Options) -> io::Result<()> {
        let mut indexes = blob.indexes.reader(0);
        let mut blocks = self.plan.with_blocks.iter().peekable();
        let mut inodes = Inodes::new(self.tree, options);
        let chunk_format =
            CHUNK_FORMAT_INDEXES | (options.chunk_size.trailing_zeros() - BLOCK.trailing_zeros());
        while let Some(Found {
            ino,
            inode,
            shape,
            dir,
        }) = inodes.next()?
        {
            let block = blocks
                .next_if(|(of, _)| *of == ino)
                .map_or(0, |(_, block)| *block);
            let union = match inode.mode & libc::S_IFMT {
                libc::S_IFREG => chunk_format,
                libc::S_IFCHR | libc::S_IFBLK => inode.rdev,
                _ => block,
            };
            let nid = self.plan.nids[ino as usize - 1];
            let offset = self.plan.meta_offset + u64::from(nid) * SLOT;
            self.put(offset, &encode(ino, &inode, &shape, union))?;
            self.write(&inode.xattrs)?;
            match shape.layout {
                FLAT_INLINE => match dir {
                    Some(dir) => self.directory(dir, shape.blocks..shape.blocks + 1)?,
                    None => self.write(&inode.target[(shape.blocks * BLOCK) as usize..])?,
                },
                CHUNK_BASED => {
                    self.put(self.position.next_multiple_of(CHUNK_INDEX), &[])?;
                    match self.tree.kept.get(&ino) {
                        Some(slot) => {
                            let kept = &blob.kept[*slot as usize];
                            kept.iter().try_for_each(|index| self.write(index))?;
                        }
                        None => {
                            for _ in 0..shape.n_chunks {
                                let index: [u8; 8] = indexes.array()?;
                                self.write(&index)?;
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The whole blocks of directories and links.
    fn blocks(&mut self, options: &Options) -> io::Result<()> {
        let mut blocks = self.plan.with_blocks.iter().peekable();
        let mut inodes = Inodes::new(self.tree, options);
        while let (Some(_), Some(found)) = (blocks.peek(), inodes.next()?) {
            let Found {
                ino,
                inode,
                shape,
                dir,
            } = found;
            let Some((_, block)) = blocks.next_if(|(of, _)| *of == ino) else {
                continue;
            };
            self.put(u64::from(*block) * BLOCK, &[])?;
            match dir {
                Some(dir) => self.directory(dir, 0..shape.blocks)?,
                None => {
                    let end = inode.target.len().min((shape.blocks * BLOCK) as usize);
                    self.write(&inode.target[..end])?;
                }
            }
        }
        Ok(())
    }

    /// Writes blocks `wanted` of a directory; the last one of the directory ends with its names.
    fn directory(&mut self, dir: &Dir, wanted: std::ops::Range<u64>) -> io::Result<()> {
        let mut reader = self.tree.entries.reader(dir.entries_at);
        let mut block = Block::default();
        let mut number = 0;
        let start = self.position;
        for _ in 0..dir.n_entries {
            let ino = u32::from_le_bytes(reader.array()?);
            let [len] = reader.array()?;
            if block.size() + DIRENT + usize::from(len) > BLOCK as usize {
                if wanted.contains(&number) {
                    let at = start + (number - wanted.start) * BLOCK;
                    self.put(at, &[])?;
                    block.write(self)?;
                }
                block = Block::default();
                number += 1;
                if number >= wanted.end {
                    return Ok(());
                }
            }
            block.names.extend_from_slice(reader.take(len.into())?);
            block.entries.push((ino, len));
        }
        let at = start + (number - wanted.start) * BLOCK;
        self.put(at, &[])?;
        block.write(self)
    }
}

/// A block of a directory: entries, and their names behind them.
#[derive(Default)]
struct Block {
    entries: Vec<(u32, u8)>,
    names: Vec<u8>,
}

impl Block {
    fn size(&self) -> usize {
        self.entries.len() * DIRENT + self.names.len()
    }

    fn write(&self, out: &mut Writer<'_>) -> io::Result<()> {
        let mut name_offset = self.entries.len() * DIRENT;
        for (ino, len) in &self.entries {
            let at = *ino as usize - 1;
            let mut entry = [0; DIRENT];
            entry[..8].copy_from_slice(&u64::from(out.plan.nids[at]).to_le_bytes());
            entry[8..10].copy_from_slice(&(name_offset as u16).to_le_bytes());
            entry[10] = out.tree.types[at];
            out.write(&entry)?;
            name_offset += usize::from(*len);
        }
        out.write(&self.names)
    }
}

/// The inode without its xattrs; `union` is a first block, a device number or a chunk format.
fn encode(ino: u32, inode: &InodeRecord, shape: &Shape, union: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(EXTENDED as usize);
    out.extend((shape.layout << 1 | u16::from(shape.extended)).to_le_bytes());
    out.extend(xattr::icount(inode.xattrs.len()).to_le_bytes());
    out.extend((inode.mode as u16).to_le_bytes());
    if shape.extended {
        out.extend([0; 2]);
        out.extend(shape.size.to_le_bytes());
        out.extend(union.to_le_bytes());
        out.extend(ino.to_le_bytes());
        out.extend(inode.uid.to_le_bytes());
        out.extend(inode.gid.to_le_bytes());
        out.extend(inode.mtime.to_le_bytes());
        out.extend(inode.mtime_nsec.to_le_bytes());
        out.extend(shape.nlink.to_le_bytes());
    } else {
        out.extend((shape.nlink as u16).to_le_bytes());
        out.extend((shape.size as u32).to_le_bytes());
        out.extend([0; 4]);
        out.extend(union.to_le_bytes());
        out.extend(ino.to_le_bytes());
        out.extend((inode.uid as u16).to_le_bytes());
        out.extend((inode.gid as u16).to_le_bytes());
        out.extend([0; 4]);
    }
    out.resize(if shape.extended { EXTENDED } else { COMPACT } as usize, 0);
    out
}
