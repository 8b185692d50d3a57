//! Reads the source tree once, in the order of the inodes: all children of a directory side by side, then what is
//! below each of them. The order decides where inodes and chunks lie, so a directory is read from few blocks, and
//! neighbours in the tree are neighbours in the blob. Files go to the pipeline as they are found; what the bootstrap
//! needs goes to spools.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::BuildError;
use crate::feeder::{Feed, Feeder};
use crate::job::{FilePath, Progress, join};
use crate::layout::{BLOCK, DIRENT};
use crate::prefetch::Listed;
use crate::source::{self, Stat, XattrReader};
use crate::spool::{Reader, Spool};
use crate::worker::changed;
use crate::xattr::Xattrs;

/// File types of EROFS, by S_IFMT.
const TYPES: [(u32, u8); 7] = [
    (libc::S_IFREG, 1),
    (libc::S_IFDIR, 2),
    (libc::S_IFCHR, 3),
    (libc::S_IFBLK, 4),
    (libc::S_IFIFO, 5),
    (libc::S_IFSOCK, 6),
    (libc::S_IFLNK, 7),
];

/// A directory, in the order of the inodes.
pub struct Dir {
    /// Its place in the list of directories' parents.
    parent: u32,
    name: Box<[u8]>,
    pub ino: u32,
    /// Its entries in the spool, "." and ".." among them.
    pub entries_at: u64,
    pub n_entries: u32,
    pub n_subdirs: u32,
    /// i_size: up to the end of the names in the last block.
    pub size: u64,
}

/// What was found; inode numbers count from 1.
pub struct Tree {
    pub inodes: Spool,
    pub entries: Spool,
    pub dirs: Vec<Dir>,
    /// The EROFS file type by inode.
    pub types: Vec<u8>,
    /// Names in the tree of inodes that may have several.
    pub links: HashMap<u32, u32>,
    /// Which inodes have their chunks kept apart, and under which number.
    pub kept: HashMap<u32, u32>,
    /// Inodes of what is listed for prefetching, in the order of the list.
    pub listed: Vec<Option<u32>>,
    pub has_xattr: bool,
    /// Of regular files, each counted once.
    pub content_size: u64,
}

/// An inode on its way through the spool.
pub struct InodeRecord {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub size: u64,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub xattrs: Vec<u8>,
    pub target: Vec<u8>,
}

impl InodeRecord {
    fn write(&self, spool: &mut Spool) -> io::Result<()> {
        let mut fixed = [0; 44];
        fixed[..4].copy_from_slice(&self.mode.to_le_bytes());
        fixed[4..8].copy_from_slice(&self.uid.to_le_bytes());
        fixed[8..12].copy_from_slice(&self.gid.to_le_bytes());
        fixed[12..16].copy_from_slice(&self.rdev.to_le_bytes());
        fixed[16..24].copy_from_slice(&self.size.to_le_bytes());
        fixed[24..32].copy_from_slice(&self.mtime.to_le_bytes());
        fixed[32..36].copy_from_slice(&self.mtime_nsec.to_le_bytes());
        fixed[36..40].copy_from_slice(&(self.xattrs.len() as u32).to_le_bytes());
        fixed[40..].copy_from_slice(&(self.target.len() as u32).to_le_bytes());
        spool.push(&fixed)?;
        spool.push(&self.xattrs)?;
        spool.push(&self.target)
    }

    /// The next inode of the spool.
    pub fn read(reader: &mut Reader<'_>) -> io::Result<InodeRecord> {
        let fixed: [u8; 44] = reader.array()?;
        let u32_at = |at: usize| {
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]])
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Ok(InodeRecord {
            mode: u32_at(0),
            uid: u32_at(4),
            gid: u32_at(8),
            rdev: u32_at(12),
            size: u64_at(16),
            mtime: u64_at(24) as i64,
            mtime_nsec: u32_at(32),
            xattrs: reader.take(u32_at(36) as usize)?.to_vec(),
            target: reader.take(u32_at(40) as usize)?.to_vec(),
        })
    }
}

/// Reads the tree below `top`, the path of which is `top_path`, and feeds its files.
pub struct Scanner<'a, 'f> {
    top: BorrowedFd<'a>,
    top_path: &'a [u8],
    feeder: &'a mut Feeder<'f>,
    progress: &'a Progress,
    listed: &'a Listed,
    xattrs: XattrReader,
    /// Inodes of files that have further names, by device and inode number of the source.
    known: HashMap<(u64, u64), u32>,
    tree: Tree,
}

impl<'a, 'f> Scanner<'a, 'f> {
    pub fn new(
        (top, top_path): (BorrowedFd<'a>, &'a [u8]),
        folder: &Path,
        feeder: &'a mut Feeder<'f>,
        progress: &'a Progress,
        listed: &'a Listed,
    ) -> Self {
        Scanner {
            top,
            top_path,
            feeder,
            progress,
            listed,
            xattrs: XattrReader::default(),
            known: HashMap::new(),
            tree: Tree {
                inodes: Spool::new(folder),
                entries: Spool::new(folder),
                dirs: Vec::new(),
                types: Vec::new(),
                links: HashMap::new(),
                kept: HashMap::new(),
                listed: vec![None; listed.len()],
                has_xattr: false,
                content_size: 0,
            },
        }
    }

    pub fn run(mut self) -> Result<Tree, Feed> {
        let st = source::stat_fd(self.top).map_err(|e| BuildError::system(b"", &e))?;
        let ino = self.inode(b"", &st, Vec::new())?;
        self.directory(0, b"", ino);
        let mut pending = vec![0_u32];
        while let Some(dir) = pending.pop() {
            let first = self.tree.dirs.len() as u32;
            self.children(dir)?;
            pending.extend((first..self.tree.dirs.len() as u32).rev());
        }
        Ok(self.tree)
    }

    fn directory(&mut self, parent: u32, name: &[u8], ino: u32) {
        self.tree.dirs.push(Dir {
            parent,
            name: name.into(),
            ino,
            entries_at: 0,
            n_entries: 0,
            n_subdirs: 0,
            size: 0,
        });
    }

    fn dir(&mut self, number: u32) -> &mut Dir {
        &mut self.tree.dirs[number as usize]
    }

    /// The path of a directory, relative to the top.
    fn path(&self, number: u32) -> Vec<u8> {
        let mut names = Vec::new();
        let mut dir = &self.tree.dirs[number as usize];
        while !dir.name.is_empty() {
            names.push(&*dir.name);
            dir = &self.tree.dirs[dir.parent as usize];
        }
        names.reverse();
        names.join(&b'/')
    }

    fn children(&mut self, number: u32) -> Result<(), Feed> {
        let path: Arc<[u8]> = self.path(number).into();
        let failed = |e: io::Error| BuildError::system(&path, &e);
        let fd = source::open_dir(self.top, &path).map_err(failed)?;
        let names = source::list(fd.try_clone().map_err(failed)?).map_err(failed)?;
        let (ino, parent) = (self.dir(number).ino, self.dir(number).parent);
        let parent_ino = self.dir(parent).ino;
        let mut entries = Entries {
            at: self.tree.entries.len(),
            count: 0,
            blocks: 0,
            used: 0,
        };
        let mut dots = [(&b"."[..], ino), (b"..", parent_ino)]
            .into_iter()
            .peekable();
        for name in names.iter() {
            while let Some((dot, ino)) = dots.next_if(|(dot, _)| *dot < name) {
                entries
                    .push(&mut self.tree.entries, dot, ino)
                    .map_err(BuildError::from)?;
            }
            let child = self.child(number, fd.as_fd(), &path, name)?;
            entries
                .push(&mut self.tree.entries, name, child)
                .map_err(BuildError::from)?;
        }
        for (dot, ino) in dots {
            entries
                .push(&mut self.tree.entries, dot, ino)
                .map_err(BuildError::from)?;
        }
        let dir = self.dir(number);
        dir.entries_at = entries.at;
        dir.n_entries = entries.count;
        dir.size = entries.blocks * BLOCK + entries.used;
        Ok(())
    }

    /// The inode of `name` in the directory `parent`, new or known.
    fn child(
        &mut self,
        parent: u32,
        fd: BorrowedFd<'_>,
        folder: &Arc<[u8]>,
        name: &[u8],
    ) -> Result<u32, Feed> {
        self.feeder.alive()?;
        let failed = |e: io::Error| BuildError::system(&join(folder, name), &e);
        let st = source::stat_at(fd, name).map_err(failed)?;
        let several = st.nlink > 1 && !st.is_dir();
        if let Some(ino) = self.known.get(&st.key()).filter(|_| several) {
            *self.tree.links.entry(*ino).or_default() += 1;
            return Ok(*ino);
        }
        let target = match st.is(libc::S_IFLNK) {
            true => source::read_link_at(fd, name).map_err(failed)?,
            false => Vec::new(),
        };
        let ino = self.inode(&join(folder, name), &st, target)?;
        if st.is_dir() {
            self.dir(parent).n_subdirs += 1;
            self.directory(parent, name, ino);
        } else if several {
            self.known.insert(st.key(), ino);
            self.tree.links.insert(ino, 1);
        }
        if st.is_reg() {
            let path = FilePath {
                folder: folder.clone(),
                name: name.into(),
            };
            self.content(ino, path, st)?;
        }
        Ok(ino)
    }

    fn content(&mut self, ino: u32, path: FilePath, st: Stat) -> Result<(), Feed> {
        self.tree.content_size += st.size;
        if let Some((slot, listed)) = self.listed.slot(st.key()) {
            if !listed.same_content(&st) {
                return Err(changed(&path.full()).into());
            }
            self.tree.kept.insert(ino, slot);
            for (first, count) in self.listed.rest(slot) {
                self.feeder.range(&path, &st, first, count, Some(slot))?;
            }
        } else if st.size > 0 {
            self.feeder.file(path, st)?;
        }
        Ok(())
    }

    fn inode(&mut self, path: &[u8], st: &Stat, target: Vec<u8>) -> Result<u32, Feed> {
        let kind = st.mode & libc::S_IFMT;
        let Some((_, erofs)) = TYPES.iter().find(|(mode, _)| *mode == kind) else {
            return Err(
                BuildError::source(path, format!("file type 0o{kind:o} is unknown")).into(),
            );
        };
        let record = InodeRecord {
            mode: st.mode,
            uid: st.uid,
            gid: st.gid,
            rdev: st.rdev,
            size: st.size,
            mtime: st.mtime,
            mtime_nsec: st.mtime_nsec,
            xattrs: self.read_xattrs(path)?,
            target,
        };
        self.tree.has_xattr |= !record.xattrs.is_empty();
        record
            .write(&mut self.tree.inodes)
            .map_err(BuildError::from)?;
        self.tree.types.push(*erofs);
        let Ok(ino) = u32::try_from(self.tree.types.len()) else {
            return Err(BuildError::TooLarge(
                "the tree has more inodes than an image can number".into(),
            )
            .into());
        };
        if let Some(place) = self.listed.place(st.key()) {
            self.tree.listed[place] = Some(ino);
        }
        self.progress.inodes.fetch_add(1, Ordering::Relaxed);
        Ok(ino)
    }

    fn read_xattrs(&mut self, path: &[u8]) -> Result<Vec<u8>, BuildError> {
        let failed = |e: &io::Error| {
            BuildError::source(
                path,
                format!("extended attributes: {}", crate::error::text(e)),
            )
        };
        let mut full = join(self.top_path, path);
        let parent;
        if full.len() >= 4096 {
            // Too long for the system: through the descriptor of the directory.
            let cut = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
            parent = source::open_dir(self.top, &path[..cut]).map_err(|e| failed(&e))?;
            let number = std::os::fd::AsRawFd::as_raw_fd(&parent);
            full = join(
                format!("/proc/self/fd/{number}").as_bytes(),
                &path[cut + 1..],
            );
        }
        if path.is_empty() {
            full.push(b'.');
        }
        let full = CString::new(full).map_err(|e| failed(&e.into()))?;
        let mut xattrs = Xattrs::default();
        self.xattrs
            .read(&full, |name, value| xattrs.add(name, value))
            .map_err(|e| failed(&e))?;
        xattrs.body(path)
    }
}

/// Appends the entries of one directory to the spool and counts its blocks.
struct Entries {
    at: u64,
    count: u32,
    /// Full blocks, and bytes in the last one.
    blocks: u64,
    used: u64,
}

impl Entries {
    fn push(&mut self, spool: &mut Spool, name: &[u8], ino: u32) -> io::Result<()> {
        let size = (DIRENT + name.len()) as u64;
        if self.used + size > BLOCK {
            self.blocks += 1;
            self.used = 0;
        }
        self.used += size;
        self.count += 1;
        spool.push(&ino.to_le_bytes())?;
        spool.push(&[name.len() as u8])?;
        spool.push(name)
    }
}
