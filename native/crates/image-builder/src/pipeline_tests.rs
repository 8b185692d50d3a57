use super::*;
use crate::Limits;
use crate::blob::{Blob, BlobWriter};
use crate::job::{FilePath, Placed};
use crate::source::{self, Stat};
use crate::testing::Folder;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rafs_format::{Compressor, Digester};

const MIB: usize = 1 << 20;

fn options(jobs: usize) -> Options {
    Options {
        chunk_size: 4096,
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        jobs,
        limits: Limits {
            chunks: 1 << 24,
            uncompressed: 1 << 44,
            compressed: 1 << 40,
        },
    }
}

/// A folder with a tree below `src`, and where blobs go.
struct Source {
    folder: Folder,
    top: std::os::fd::OwnedFd,
}

impl Source {
    fn new() -> Source {
        let folder = Folder::new();
        let path = folder.path().join("src");
        std::fs::create_dir(&path).unwrap();
        let top = source::open_top(path.as_os_str().as_encoded_bytes()).unwrap();
        Source { folder, top }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("src").join(name)
    }

    /// Writes a file; returns what the scan would hand over.
    fn file(&self, name: &str, content: &[u8]) -> (FilePath, Stat) {
        std::fs::write(self.path(name), content).unwrap();
        let stat = source::stat_at(self.top.as_fd(), name.as_bytes()).unwrap();
        let path = FilePath {
            folder: (*b"").into(),
            name: name.as_bytes().into(),
        };
        (path, stat)
    }

    fn run(
        &self,
        options: &Options,
        progress: &Progress,
        feed: impl FnOnce(&mut Feeder<'_>) -> Result<(), Feed>,
    ) -> Result<(Vec<u8>, Blob), BuildError> {
        let path = self.folder.path().join("blob");
        let out = File::create(&path).unwrap();
        let mut sink = BlobWriter::new(out, self.folder.path(), options, progress)?;
        run(self.top.as_fd(), options, progress, &mut sink, feed)?;
        let (blob, _) = sink.into_tail()?;
        Ok((std::fs::read(path).unwrap(), blob))
    }
}

fn pseudo_random(n: usize, seed: u32) -> Vec<u8> {
    let mut out = vec![0; n];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

fn spooled(blob: &Blob) -> (Vec<u8>, Vec<u8>) {
    [&blob.chunks, &blob.indexes]
        .map(|spool| {
            let mut bytes = vec![0; spool.len() as usize];
            spool.read_at(0, &mut bytes).unwrap();
            bytes
        })
        .into()
}

#[test]
fn what_is_written_does_not_depend_on_the_workers() {
    let source = Source::new();
    let files: Vec<_> = (0..400)
        .map(|i: u32| {
            // Small, of many chunks, and again what another file has.
            let size = [1, 100, 4096, 5000, 3 * MIB][i as usize % 5];
            source.file(&format!("{i}"), &pseudo_random(size, i % 90))
        })
        .collect();
    let mut seen = None;
    for jobs in [1, 2, 3, 16] {
        let progress = Progress::default();
        let (bytes, blob) = source
            .run(&options(jobs), &progress, |feeder| {
                files
                    .iter()
                    .try_for_each(|(path, stat)| feeder.file(path.clone(), *stat))
            })
            .unwrap();
        assert_eq!(progress.stored.load(Ordering::Relaxed), bytes.len() as u64);
        let total: u64 = files.iter().map(|(_, stat)| stat.size).sum();
        assert_eq!(progress.bytes.load(Ordering::Relaxed), total);
        let found = (bytes, spooled(&blob), blob.n_chunks, blob.n_duplicates);
        assert_eq!(
            seen.get_or_insert_with(|| found.clone()),
            &found,
            "{jobs} jobs"
        );
    }
}

/// What a build says about the file "b" that `change` has touched since the tree was read.
fn refusal(content: &[u8], change: impl FnOnce(&Source)) -> String {
    let source = Source::new();
    let files = [
        source.file("a", b"a"),
        source.file("b", content),
        source.file("c", b"c"),
    ];
    let failure = source.run(&options(2), &Progress::default(), |feeder| {
        change(&source);
        files
            .iter()
            .try_for_each(|(path, stat)| feeder.file(path.clone(), *stat))
    });
    match failure.err() {
        Some(BuildError::Source { path, reason, .. }) => {
            assert_eq!(path, b"b");
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_changes_meanwhile_is_refused() {
    let changed = "the file changed while the image was built";
    for content in [&pseudo_random(300, 1)[..], &pseudo_random(100_000, 1)] {
        let longer = [content, b"x"].concat();
        assert_eq!(
            refusal(content, |s| std::fs::write(s.path("b"), &longer).unwrap()),
            changed
        );
        assert_eq!(
            refusal(content, |s| std::fs::write(s.path("b"), &content[1..])
                .unwrap()),
            changed
        );
        assert_eq!(
            refusal(content, |s| std::fs::write(s.path("b"), b"").unwrap()),
            changed
        );
        let rewritten = |s: &Source| {
            let file = File::options().write(true).open(s.path("b")).unwrap();
            let then = std::time::SystemTime::UNIX_EPOCH;
            file.set_modified(then).unwrap();
        };
        assert_eq!(refusal(content, rewritten), changed);
        let replaced = |s: &Source| {
            std::fs::write(s.path("new"), content).unwrap();
            std::fs::rename(s.path("new"), s.path("b")).unwrap();
        };
        assert_eq!(refusal(content, replaced), changed);
    }
}

#[test]
fn a_file_that_goes_or_becomes_something_else_is_refused() {
    let remove = |s: &Source| std::fs::remove_file(s.path("b")).unwrap();
    for content in [&b"small"[..], &[7; 100_000]] {
        assert_eq!(refusal(content, remove), "No such file or directory");
        let link = |s: &Source| {
            remove(s);
            std::os::unix::fs::symlink("a", s.path("b")).unwrap();
        };
        assert!(refusal(content, link).contains("symbolic links"));
        let fifo = |s: &Source| {
            remove(s);
            let path = std::ffi::CString::new(s.path("b").as_os_str().as_encoded_bytes()).unwrap();
            // SAFETY: the path ends with NUL.
            assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        };
        assert_eq!(
            refusal(content, fifo),
            "the file changed while the image was built"
        );
    }
}

#[test]
fn the_first_failure_in_order_is_reported() {
    let source = Source::new();
    let files: Vec<_> = (0..300)
        .map(|i: u32| source.file(&format!("{i:03}"), &pseudo_random(9000, i)))
        .collect();
    for name in ["150", "100", "299"] {
        std::fs::remove_file(source.path(name)).unwrap();
    }
    for jobs in [1, 4] {
        let small = Options {
            chunk_size: 16_384,
            ..options(jobs)
        };
        let failure = source.run(&small, &Progress::default(), |feeder| {
            files
                .iter()
                .try_for_each(|(path, stat)| feeder.file(path.clone(), *stat))
        });
        assert!(
            matches!(failure.err(), Some(BuildError::Source { path, .. }) if path == b"100"),
            "{jobs} jobs"
        );
    }
}

#[test]
fn a_build_ends_when_that_is_asked_for() {
    let source = Source::new();
    let files: Vec<_> = (0..200)
        .map(|i: u32| source.file(&format!("{i}"), &pseudo_random(MIB, i)))
        .collect();
    let progress = Progress::default();
    let failure = source.run(&options(2), &progress, |feeder| {
        for (i, (path, stat)) in files.iter().enumerate() {
            if i == 50 {
                progress.cancelled.store(true, Ordering::Relaxed);
            }
            assert!(i < 60, "the feeder goes on");
            feeder.file(path.clone(), *stat)?;
        }
        Ok(())
    });
    assert!(matches!(failure.err(), Some(BuildError::Cancelled)));
}

struct Broken;

impl Sink for Broken {
    fn place(
        &mut self,
        _: &[u32],
        _: &[u8; 32],
        _: u64,
        _: u32,
        _: Bytes<'_>,
    ) -> Result<Placed, BuildError> {
        panic!("broken");
    }

    fn note(&mut self, _: [u8; 8], _: u64, _: Option<(u32, u64, u64)>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_of_any_thread_ends_the_build() {
    let source = Source::new();
    let file = source.file("a", &pseudo_random(40 * MIB, 1));
    let feed = |feeder: &mut Feeder<'_>| feeder.file(file.0.clone(), file.1);
    let failure = run(
        source.top.as_fd(),
        &options(2),
        &Progress::default(),
        &mut Broken,
        feed,
    );
    assert!(matches!(failure.err(), Some(BuildError::Panicked(text)) if text == "broken"));
    let failure = source.run(&options(2), &Progress::default(), |_| panic!("fed up"));
    assert!(matches!(failure.err(), Some(BuildError::Panicked(text)) if text == "fed up"));
}

#[test]
fn a_chunk_that_only_seems_to_be_stored_is_stored() {
    let folder = Folder::new();
    let path = folder.path().join("blob");
    let (options, progress) = (options(1), Progress::default());
    let out = File::create(&path).unwrap();
    let mut sink = BlobWriter::new(out, folder.path(), &options, &progress).unwrap();
    let (text, other) = ([b'a'; 4096], [b'b'; 4096]);
    let first = sink
        .place(&[], &[1; 32], 0, 4096, Bytes::Raw(&text))
        .unwrap();
    assert_eq!(first.new, Some(0));
    // The table of digests named chunk 0, which has another one.
    let second = sink
        .place(&[0], &[2; 32], 0, 4096, Bytes::Raw(&other))
        .unwrap();
    assert_eq!(second.new, Some(1));
    let again = sink
        .place(&[0, 1], &[2; 32], 0, 4096, Bytes::Raw(&other))
        .unwrap();
    assert_eq!((again.new, again.index), (None, second.index));
    let (blob, tail) = sink.into_tail().unwrap();
    assert_eq!((blob.n_chunks, blob.n_duplicates), (2, 1));
    assert!(tail.size < 200, "compressed: {}", tail.size);
}

#[test]
fn a_full_disk_is_an_error_of_the_output() {
    let source = Source::new();
    let file = source.file("a", &pseudo_random(4 * MIB, 1));
    let (options, progress) = (options(2), Progress::default());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut sink = BlobWriter::new(full, source.folder.path(), &options, &progress).unwrap();
    let feed = |feeder: &mut Feeder<'_>| feeder.file(file.0.clone(), file.1);
    let failure = run(source.top.as_fd(), &options, &progress, &mut sink, feed);
    assert!(
        matches!(failure, Err(BuildError::Output(e)) if e.raw_os_error() == Some(libc::ENOSPC))
    );
}
