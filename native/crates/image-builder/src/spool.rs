//! A sequence of bytes that is written once, front to back, and read afterwards: in memory while it is short, in an
//! unnamed file beside the output when it grows. What is known about a million files stays out of memory this way.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes kept in memory before they go to the file.
const BUFFER: usize = 256 << 10;
const READ_BUFFER: usize = 64 << 10;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The bytes; see the module.
pub struct Spool {
    folder: PathBuf,
    file: Option<File>,
    flushed: u64,
    tail: Vec<u8>,
}

impl Spool {
    /// An empty one, whose file will lie in `folder`.
    pub fn new(folder: &Path) -> Spool {
        Spool {
            folder: folder.into(),
            file: None,
            flushed: 0,
            tail: Vec::new(),
        }
    }

    pub fn len(&self) -> u64 {
        self.flushed + self.tail.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.tail.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        self.tail.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(unnamed_file(&self.folder)?),
        };
        file.write_all_at(&self.tail, self.flushed)?;
        self.flushed += self.tail.len() as u64;
        self.tail.clear();
        Ok(())
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The file cannot be read, or the range is not inside what was written.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let from_file = self.flushed.saturating_sub(offset).min(out.len() as u64) as usize;
        let (head, rest) = out.split_at_mut(from_file);
        if let (Some(file), false) = (&self.file, head.is_empty()) {
            file.read_exact_at(head, offset)?;
        }
        if !rest.is_empty() {
            let at = (offset + from_file as u64).saturating_sub(self.flushed) as usize;
            let bytes = at
                .checked_add(rest.len())
                .and_then(|end| self.tail.get(at..end));
            rest.copy_from_slice(bytes.ok_or_else(short)?);
        }
        Ok(())
    }

    /// Reads from `offset` on.
    pub fn reader(&self, offset: u64) -> Reader<'_> {
        Reader {
            spool: self,
            next: offset,
            buffer: Vec::new(),
            at: 0,
        }
    }
}

/// Reads a [`Spool`] front to back through a buffer.
pub struct Reader<'a> {
    spool: &'a Spool,
    /// Where the bytes behind the buffer begin.
    next: u64,
    buffer: Vec<u8>,
    at: usize,
}

impl Reader<'_> {
    /// The next `n` bytes.
    ///
    /// # Errors
    /// As [`Spool::read_at`].
    pub fn take(&mut self, n: usize) -> io::Result<&[u8]> {
        if self.buffer.len() - self.at < n {
            self.buffer.drain(..self.at);
            self.at = 0;
            let have = self.buffer.len();
            let left = self.spool.len().saturating_sub(self.next);
            let more = (n.max(READ_BUFFER) - have).min(left as usize);
            self.buffer.resize(have + more, 0);
            self.spool.read_at(self.next, &mut self.buffer[have..])?;
            self.next += more as u64;
            if self.buffer.len() < n {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.at += n;
        Ok(&self.buffer[self.at - n..self.at])
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// As [`Spool::read_at`].
    pub fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
}

/// A file in `folder` that nobody else sees and that is gone with its descriptor.
fn unnamed_file(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(folder);
    match unnamed {
        // Network and stacked file systems may not know O_TMPFILE.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL)
            ) =>
        {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".build-{}-{number}", std::process::id()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        std::env::temp_dir()
    }

    #[test]
    fn what_was_pushed_is_read_whatever_the_pieces() {
        let mut spool = Spool::new(&folder());
        let mut all = Vec::new();
        for i in 0..3000_usize {
            let piece = vec![i as u8; i % 700];
            spool.push(&piece).unwrap();
            all.extend(piece);
        }
        assert!(spool.flushed > 0 && !spool.tail.is_empty());
        assert_eq!(spool.len(), all.len() as u64);
        for (at, n) in [
            (0, 10),
            (spool.flushed as usize - 5, 10),
            (all.len() - 3, 3),
            (all.len(), 0),
        ] {
            let mut out = vec![0; n];
            spool.read_at(at as u64, &mut out).unwrap();
            assert_eq!(out, all[at..at + n], "{at}");
        }
        let mut reader = spool.reader(7);
        let mut read = Vec::new();
        for i in 0.. {
            let n = (i * 37 % 5000).min(all.len() - 7 - read.len());
            read.extend_from_slice(reader.take(n).unwrap());
            if read.len() == all.len() - 7 {
                break;
            }
        }
        assert_eq!(read, all[7..]);
        assert!(reader.take(1).is_err());
    }

    #[test]
    fn nothing_is_read_beyond_the_end() {
        let mut spool = Spool::new(&folder());
        assert!(spool.is_empty());
        assert!(spool.read_at(0, &mut [0]).is_err());
        spool.push(b"abc").unwrap();
        assert!(spool.read_at(1, &mut [0; 3]).is_err());
        assert!(spool.read_at(u64::MAX, &mut [0]).is_err());
        assert_eq!(&spool.reader(1).array::<2>().unwrap(), b"bc");
    }
}
