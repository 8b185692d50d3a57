use super::*;
use crate::testing::Folder;

const OPTIONS: Options = Options {
    chunk_size: 4096,
    compressor: Compressor::Zstd,
    digester: Digester::Blake3,
    jobs: 2,
    limits: Limits {
        chunks: 1 << 24,
        uncompressed: 1 << 44,
        compressed: 1 << 40,
    },
};

fn builder(folder: &Folder) -> Builder {
    let source = folder.path().join("src");
    let top = source.as_os_str().as_encoded_bytes();
    Builder::new(top, folder.path().into(), OPTIONS).unwrap()
}

fn source() -> (Folder, PathBuf) {
    let folder = Folder::new();
    let source = folder.path().join("src");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("a"), vec![b'a'; 20_000]).unwrap();
    std::fs::write(source.join("b"), vec![b'b'; 20_000]).unwrap();
    (folder, source)
}

fn blob(folder: &Folder) -> File {
    File::create(folder.path().join("blob")).unwrap()
}

#[test]
fn a_listed_file_that_changes_before_the_tree_is_read_is_refused() {
    for (offset, length) in [(0, u64::MAX), (4096, 1), (1 << 30, 1)] {
        for longer in [true, false] {
            let (folder, source) = source();
            let mut builder = builder(&folder);
            assert!(builder.prefetch(b"/b", offset, length).unwrap());
            std::fs::write(
                source.join("b"),
                vec![b'c'; if longer { 30_000 } else { 100 }],
            )
            .unwrap();
            let built = builder.run(blob(&folder), &Progress::default());
            if offset > 20_000 {
                // Nothing of it was laid out, so it is a file like any other.
                assert!(built.is_ok());
                continue;
            }
            let Err(BuildError::Source { path, reason, .. }) = built else {
                panic!("built");
            };
            assert_eq!(
                (path.as_slice(), reason.as_str()),
                (&b"b"[..], "the file changed while the image was built")
            );
        }
    }
}

#[test]
fn a_listed_file_that_goes_is_refused() {
    let (folder, source) = source();
    let mut builder = builder(&folder);
    assert!(builder.prefetch(b"/b", 0, u64::MAX).unwrap());
    std::fs::remove_file(source.join("b")).unwrap();
    let built = builder.run(blob(&folder), &Progress::default());
    assert!(matches!(built, Err(BuildError::Source { path, .. }) if path == b"b"));
}

#[test]
fn what_is_listed_has_its_nid_in_the_table() {
    let (folder, _) = source();
    let mut builder = builder(&folder);
    for path in [&b"/b"[..], b"/", b"/b", b"/a"] {
        assert!(builder.prefetch(path, 0, u64::MAX).unwrap());
    }
    assert!(!builder.prefetch(b"/c", 0, u64::MAX).unwrap());
    let built = builder.run(blob(&folder), &Progress::default()).unwrap();
    let plan = built.layout(8192).unwrap();
    assert_eq!(plan.nids.len(), 3);
    assert_eq!(
        built.prefetch_nids(&plan),
        [plan.nids[2], plan.nids[0], plan.nids[1]]
    );
}

#[test]
fn a_source_that_is_no_directory_is_refused() {
    let (folder, source) = source();
    for top in [source.join("a"), source.join("none")] {
        let top = top.as_os_str().as_encoded_bytes();
        assert!(matches!(
            Builder::new(top, folder.path().into(), OPTIONS),
            Err(BuildError::Source { .. })
        ));
    }
}
