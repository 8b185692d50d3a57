//! The worker's side: where a chunk's verified bytes lie.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use crate::fds::{SharedFds, map_table};
use crate::layout::{
    EXTENT_HEADER, EXTENT_MAGIC, EXTENT_SIZE, EXTENT_VALID, STATE_HEADER, STATE_MAGIC, TOUCHED_NOW,
    VERIFIED, extent_len, split_spill, state_header, state_len, state_of, touched_len,
};
use crate::mapping::Mapping;

/// Which file holds the bytes of an [`Extent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The blob's data file: [`BlobView::data_fd`].
    Data,
    /// The daemon's spill memfd, which the caller holds.
    Spill,
}

/// Bytes of one verified chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub file: Source,
    /// Byte offset in `file`.
    pub offset: u64,
    /// Uncompressed size in bytes.
    pub size: u32,
    /// What [`BlobView::unchanged`] wants after the copy.
    pub stamp: u64,
}

/// What is known about a chunk right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// The image promises no such chunk: a request that needs it can never succeed.
    Invalid,
    /// Not here, or not verified: post it and wait.
    Absent,
    /// Copy it, then ask [`BlobView::unchanged`].
    Ready(Extent),
}

/// State and extent tables of one blob, mapped read-only, and its touched table.
#[derive(Debug)]
pub struct BlobView {
    states: Mapping,
    extents: Mapping,
    touched: Mapping,
    count: u32,
    data: Option<OwnedFd>,
    _state_fd: OwnedFd,
    _extent_fd: OwnedFd,
    _touched_fd: OwnedFd,
}

impl BlobView {
    /// Maps the tables behind `fds`. Errors when magic, version, sizes or counts do not fit.
    pub fn open(fds: SharedFds) -> io::Result<BlobView> {
        let SharedFds {
            state,
            extents,
            touched,
            data,
        } = fds;
        let (states, count) = map_table(
            state.as_fd(),
            STATE_MAGIC,
            state_header::DATA_SIZE + 8,
            state_len,
            false,
            "state file",
        )?;
        let (extent_map, extent_count) = map_table(
            extents.as_fd(),
            EXTENT_MAGIC,
            EXTENT_HEADER,
            extent_len,
            false,
            "extent table",
        )?;
        if count != extent_count {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("state file has {count} chunks, extent table {extent_count}"),
            ));
        }
        let touched_map = Mapping::new(touched.as_fd(), touched_len(count), true)?;
        Ok(BlobView {
            states,
            extents: extent_map,
            touched: touched_map,
            count,
            data,
            _state_fd: state,
            _extent_fd: extents,
            _touched_fd: touched,
        })
    }

    /// Number of chunks in the blob's address space.
    pub fn chunk_count(&self) -> u32 {
        self.count
    }

    /// The data file; `None` when the daemon runs without a cache directory.
    pub fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        self.data.as_ref().map(|fd| fd.as_fd())
    }

    fn state_word(&self, chunk: u32) -> Option<u32> {
        if chunk >= self.count {
            return None;
        }
        self.states
            .u32_at(STATE_HEADER + chunk as usize * 4)
            .map(|w| w.load(Ordering::Acquire))
    }

    fn spill_word(&self, chunk: u32) -> Option<u64> {
        if chunk >= self.count {
            return None;
        }
        self.extents
            .u64_at(EXTENT_HEADER + chunk as usize * EXTENT_SIZE + 16)
            .map(|w| w.load(Ordering::Acquire))
    }

    /// Where `chunk` lies. The data file is preferred: its bytes do not move.
    pub fn locate(&self, chunk: u32) -> Location {
        let Some(state) = self.state_word(chunk) else {
            return Location::Invalid;
        };
        let at = EXTENT_HEADER + chunk as usize * EXTENT_SIZE;
        let (Some(offset), Some(size), Some(flags)) = (
            self.extents.u64_at(at),
            self.extents.u32_at(at + 8),
            self.extents.u32_at(at + 12),
        ) else {
            return Location::Invalid;
        };
        if flags.load(Ordering::Relaxed) & EXTENT_VALID == 0 {
            return Location::Invalid;
        }
        let size = size.load(Ordering::Relaxed);
        if state_of(state) == VERIFIED && self.data.is_some() {
            let offset = offset.load(Ordering::Relaxed);
            return Location::Ready(Extent {
                file: Source::Data,
                offset,
                size,
                stamp: u64::from(state),
            });
        }
        let word = self.spill_word(chunk).unwrap_or(0);
        match split_spill(word) {
            Some((_, offset)) => Location::Ready(Extent {
                file: Source::Spill,
                offset,
                size,
                stamp: word,
            }),
            None => Location::Absent,
        }
    }

    /// Notes that a read was answered from `chunk`. One load; a store only for the first read since the agent looked.
    #[inline]
    pub fn touch(&self, chunk: u32) {
        if let Some(byte) = self.touched.u8_at(chunk as usize) {
            let seen = byte.load(Ordering::Relaxed);
            if seen & TOUCHED_NOW == 0 {
                byte.store(seen | TOUCHED_NOW, Ordering::Relaxed);
            }
        }
    }

    /// Whether the bytes copied since [`BlobView::locate`] gave `stamp` are those of `chunk`; if not, locate again.
    pub fn unchanged(&self, chunk: u32, stamp: u64) -> bool {
        // Orders the copy before the second look at the word.
        fence(Ordering::Acquire);
        // A spill generation is never 0, so the two kinds of stamps cannot meet.
        match u32::try_from(stamp) {
            Ok(word) => self.state_word(chunk) == Some(word),
            Err(_) => self.spill_word(chunk) == Some(stamp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::VERSION;
    use crate::layout::{ABSENT, PRESENT, TOUCHED_BEFORE, next_word, spill_word};
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;

    fn memfd() -> File {
        // SAFETY: the name is a C string; the result is checked and owned.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: a fresh descriptor that nobody else owns.
        unsafe { File::from_raw_fd(fd) }
    }

    /// Tables of `count` chunks: every chunk valid, `size` 100, at 4096 × index.
    fn tables(count: u32) -> (File, File) {
        let (state, extents) = (memfd(), memfd());
        state.set_len(state_len(count) as u64).unwrap();
        extents.set_len(extent_len(count) as u64).unwrap();
        for (file, magic) in [(&state, STATE_MAGIC), (&extents, EXTENT_MAGIC)] {
            file.write_all_at(&magic.to_le_bytes(), 0).unwrap();
            file.write_all_at(&VERSION.to_le_bytes(), 8).unwrap();
            file.write_all_at(&count.to_le_bytes(), 12).unwrap();
        }
        for i in 0..count {
            let at = (EXTENT_HEADER + i as usize * EXTENT_SIZE) as u64;
            extents
                .write_all_at(&(u64::from(i) * 4096).to_le_bytes(), at)
                .unwrap();
            extents.write_all_at(&100u32.to_le_bytes(), at + 8).unwrap();
            extents
                .write_all_at(&EXTENT_VALID.to_le_bytes(), at + 12)
                .unwrap();
        }
        (state, extents)
    }

    fn open(state: &File, extents: &File) -> io::Result<BlobView> {
        let data = OwnedFd::from(memfd());
        let touched = memfd();
        touched.set_len(16).unwrap();
        BlobView::open(SharedFds {
            state: state.try_clone().unwrap().into(),
            extents: extents.try_clone().unwrap().into(),
            touched: touched.into(),
            data: Some(data),
        })
    }

    fn set_state(state: &File, chunk: u32, word: u32) {
        state
            .write_all_at(
                &word.to_le_bytes(),
                (STATE_HEADER + chunk as usize * 4) as u64,
            )
            .unwrap();
    }

    fn set_spill(extents: &File, chunk: u32, word: u64) {
        let at = (EXTENT_HEADER + chunk as usize * EXTENT_SIZE + 16) as u64;
        extents.write_all_at(&word.to_le_bytes(), at).unwrap();
    }

    #[test]
    fn only_verified_chunks_are_ready() {
        let (state, extents) = tables(4);
        let view = open(&state, &extents).unwrap();
        assert_eq!(view.chunk_count(), 4);
        assert_eq!(view.locate(1), Location::Absent);
        assert_eq!(view.locate(4), Location::Invalid);
        let present = next_word(0, PRESENT);
        set_state(&state, 1, present);
        assert_eq!(view.locate(1), Location::Absent);
        let verified = next_word(present, VERIFIED);
        set_state(&state, 1, verified);
        let Location::Ready(extent) = view.locate(1) else {
            panic!("not ready")
        };
        assert_eq!(
            (extent.file, extent.offset, extent.size),
            (Source::Data, 4096, 100)
        );
        assert!(view.unchanged(1, extent.stamp));
        set_state(&state, 1, next_word(verified, ABSENT));
        assert!(!view.unchanged(1, extent.stamp));
    }

    #[test]
    fn spill_stands_in_and_reuse_is_noticed() {
        let (state, extents) = tables(2);
        let view = open(&state, &extents).unwrap();
        set_spill(&extents, 0, spill_word(7, 8192));
        let Location::Ready(extent) = view.locate(0) else {
            panic!("not ready")
        };
        assert_eq!((extent.file, extent.offset), (Source::Spill, 8192));
        assert!(view.unchanged(0, extent.stamp));
        set_spill(&extents, 0, spill_word(8, 8192));
        assert!(!view.unchanged(0, extent.stamp));
        set_spill(&extents, 0, 5); // generation 0: malformed
        assert_eq!(view.locate(0), Location::Absent);
    }

    #[test]
    fn a_touch_is_seen_until_it_is_taken_and_leaves_a_mark() {
        let (state, extents) = tables(2);
        let touched = memfd();
        touched.set_len(2).unwrap();
        let byte = |chunk: u64| {
            let mut b = [0];
            touched.read_exact_at(&mut b, chunk).unwrap();
            b[0]
        };
        let fds = |touched: &File| SharedFds {
            state: state.try_clone().unwrap().into(),
            extents: extents.try_clone().unwrap().into(),
            touched: touched.try_clone().unwrap().into(),
            data: None,
        };
        let view = BlobView::open(fds(&touched)).unwrap();
        view.touch(1);
        view.touch(2); // there is no such chunk
        assert_eq!((byte(0), byte(1)), (0, TOUCHED_NOW));
        touched.write_all_at(&[TOUCHED_BEFORE], 1).unwrap();
        view.touch(1);
        assert_eq!(byte(1), TOUCHED_NOW | TOUCHED_BEFORE);
        touched.set_len(1).unwrap();
        assert!(BlobView::open(fds(&touched)).is_err(), "too short");
    }

    #[test]
    fn unreferenced_chunks_are_invalid() {
        let (state, extents) = tables(1);
        extents
            .write_all_at(&0u32.to_le_bytes(), EXTENT_HEADER as u64 + 12)
            .unwrap();
        set_state(&state, 0, next_word(0, VERIFIED));
        assert_eq!(open(&state, &extents).unwrap().locate(0), Location::Invalid);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let (state, extents) = tables(4);
        let (other, _) = tables(3);
        assert!(open(&other, &extents).is_err(), "counts differ");
        assert!(open(&extents, &state).is_err(), "magics swapped");
        state.set_len(state_len(4) as u64 - 1).unwrap();
        assert!(open(&state, &extents).is_err(), "file too short");
    }
}
