//! Writer and reader together: what one publishes the other may serve, through crashes, reboots and a full disk.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use chunk_store::layout::{ABSENT, FETCHING, STATE_HEADER, VERIFIED, next_word, state_header};
use chunk_store::spec::{
    BlobSpec, CHUNK_COMPRESSED, CHUNK_DIGEST, ChunkSpec, Compressor, Digester,
};
use chunk_store::{BlobView, Location, Outcome, Promise, Source, Store, TableFds, paths};

const BOOT: [u8; 16] = [1; 16];
const CHUNK: usize = 10_000;

/// A folder of its own for each test, gone at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "chunk-store-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn str(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn plain(index: usize, seed: u8) -> Vec<u8> {
    (0..CHUNK)
        .map(|i| (i / 13) as u8 ^ (index as u8).wrapping_mul(31) ^ seed)
        .collect()
}

/// A blob of `n` zstd chunks and its compressed bytes.
fn blob(n: usize, seed: u8) -> (BlobSpec, Vec<u8>) {
    let step = CHUNK.div_ceil(4096) * 4096;
    let mut spec = BlobSpec::new(
        &"ab".repeat(32),
        (n * step) as u64,
        Compressor::Zstd,
        Digester::Blake3,
        n,
    )
    .unwrap();
    let mut bytes = Vec::new();
    for i in 0..n {
        let chunk = plain(i, seed);
        let packed = zstd::bulk::compress(&chunk, 3).unwrap();
        let info = ChunkSpec {
            compressed_offset: bytes.len() as u64,
            compressed_size: packed.len() as u32,
            data_offset: (i * step) as u64,
            size: CHUNK as u32,
            flags: CHUNK_COMPRESSED | CHUNK_DIGEST,
            digest: *blake3::hash(&chunk).as_bytes(),
        };
        spec.set(i, info).unwrap();
        bytes.extend(packed);
    }
    (spec, bytes)
}

fn store(dir: Option<&str>, boot: [u8; 16], spec: &BlobSpec) -> Store {
    let store = Store::new(dir, 1, 1 << 20, boot).unwrap();
    store.open_blob(0, spec.clone()).unwrap();
    store
}

fn view(store: &Store) -> BlobView {
    BlobView::open(store.blob(0).unwrap().tables.share().unwrap()).unwrap()
}

fn ingest(store: &Store, base: u64, bytes: &[u8], chunks: &[u32]) -> Vec<u8> {
    let mut outcomes = vec![99; chunks.len()];
    store.ingest(0, base, bytes, chunks, &mut outcomes).unwrap();
    outcomes
}

/// Reads a chunk as the worker does; `None` when it is not ready.
fn read(store: &Store, view: &BlobView, chunk: u32) -> Option<Vec<u8>> {
    let spill = store.share_spill().unwrap();
    loop {
        let Location::Ready(extent) = view.locate(chunk) else {
            return None;
        };
        let fd = match extent.file {
            Source::Data => view.data_fd().unwrap(),
            Source::Spill => spill.as_fd(),
        };
        let mut buf = vec![0; extent.size as usize];
        let file = fs::File::from(fd.try_clone_to_owned().unwrap());
        file.read_exact_at(&mut buf, extent.offset).unwrap();
        if view.unchanged(chunk, extent.stamp) {
            return Some(buf);
        }
    }
}

#[test]
fn verified_chunks_are_served_and_survive_a_restart() {
    let dir = Folder::new();
    let (spec, bytes) = blob(5, 0);
    let first = store(Some(dir.str()), BOOT, &spec);
    let seen = view(&first);
    assert_eq!(read(&first, &seen, 2), None);
    assert_eq!(ingest(&first, 0, &bytes, &[1, 2, 3]), [0, 0, 0]);
    assert_eq!(read(&first, &seen, 2), Some(plain(2, 0)));
    assert_eq!(read(&first, &seen, 0), None);
    drop(first);

    let second = store(Some(dir.str()), BOOT, &spec);
    let counts = second.states(0).unwrap();
    assert_eq!((counts.absent, counts.verified), (2, 3));
    assert_eq!(read(&second, &view(&second), 3), Some(plain(3, 0)));
    let id = "ab".repeat(32);
    assert_eq!(
        dir.files(),
        [format!("{id}.blob.data"), format!("{id}.chunk_state")]
    );
}

#[test]
fn two_daemons_share_one_cache() {
    let dir = Folder::new();
    let (spec, bytes) = blob(2, 0);
    let (one, two) = (
        store(Some(dir.str()), BOOT, &spec),
        store(Some(dir.str()), BOOT, &spec),
    );
    let seen = view(&two);
    ingest(&one, 0, &bytes, &[0]);
    assert_eq!(read(&two, &seen, 0), Some(plain(0, 0)));
}

#[test]
fn a_bad_chunk_is_not_kept_and_does_not_harm_its_neighbours() {
    let dir = Folder::new();
    let (spec, bytes) = blob(3, 0);
    let (_, other) = blob(3, 1);
    let s = store(Some(dir.str()), BOOT, &spec);
    let (from, to) = (
        spec.compressed_offset[1] as usize,
        spec.compressed_offset[2] as usize,
    );
    let mut broken = bytes.clone();
    broken[from + 5..to].fill(0x55);
    assert_eq!(
        ingest(&s, 0, &broken, &[0, 1, 2]),
        [0, Outcome::DecodeError as u8, 0]
    );
    // Well-formed bytes of another chunk: only the digest can tell.
    let mut planted = bytes.clone();
    let fits = spec.compressed_size[1] as usize == to - from;
    assert!(fits);
    planted[from..to].copy_from_slice(&other[..to - from]);
    let outcome = ingest(&s, 0, &planted, &[1])[0];
    assert!([Outcome::DigestMismatch as u8, Outcome::DecodeError as u8].contains(&outcome));
    assert_eq!(read(&s, &view(&s), 1), None);
    assert_eq!(read(&s, &view(&s), 2), Some(plain(2, 0)));
    assert_eq!(
        ingest(&s, 0, &bytes[..to - 1], &[1, 7]),
        [Outcome::OutOfRange as u8, Outcome::Invalid as u8]
    );
    assert_eq!(ingest(&s, from as u64, &bytes[from..], &[1]), [0]);
    assert_eq!(read(&s, &view(&s), 1), Some(plain(1, 0)));
}

#[test]
fn another_boot_distrusts_and_verifies_again() {
    let dir = Folder::new();
    let (spec, bytes) = blob(3, 0);
    let s = store(Some(dir.str()), BOOT, &spec);
    ingest(&s, 0, &bytes, &[0, 1]);
    s.hint_fetching(0, &[2], true).unwrap();
    assert_eq!(s.states(0).unwrap().fetching, 1);
    drop(s);
    // What the crash of a host may leave: a block that never reached the disk.
    let data = OpenOptions::new()
        .write(true)
        .open(dir.0.join(format!("{}.blob.data", spec.blob_id)))
        .unwrap();
    data.write_all_at(&[0; 100], spec.data_offset[1]).unwrap();

    let s = store(Some(dir.str()), [2; 16], &spec);
    let counts = s.states(0).unwrap();
    assert_eq!(
        (
            counts.absent,
            counts.present,
            counts.verified,
            counts.fetching
        ),
        (1, 2, 0, 0)
    );
    assert_eq!(read(&s, &view(&s), 0), None);
    assert!(s.verify_present(0, 0, false).unwrap());
    assert!(!s.verify_present(0, 1, false).unwrap());
    assert!(!s.verify_present(0, 2, false).unwrap());
    assert_eq!(read(&s, &view(&s), 0), Some(plain(0, 0)));
    assert_eq!(s.states(0).unwrap().absent, 2);
}

#[test]
fn a_forced_check_finds_rotten_bytes() {
    let dir = Folder::new();
    let (spec, bytes) = blob(1, 0);
    let s = store(Some(dir.str()), BOOT, &spec);
    ingest(&s, 0, &bytes, &[0]);
    let data = OpenOptions::new()
        .write(true)
        .open(dir.0.join(format!("{}.blob.data", spec.blob_id)))
        .unwrap();
    data.write_all_at(b"rot", 77).unwrap();
    assert!(s.verify_present(0, 0, false).unwrap());
    assert!(!s.verify_present(0, 0, true).unwrap());
    assert_eq!(read(&s, &view(&s), 0), None);
}

#[test]
fn another_promise_for_the_same_blob_gets_files_of_its_own() {
    let dir = Folder::new();
    let (spec, bytes) = blob(2, 0);
    let (evil, evil_bytes) = blob(2, 9);
    let first = store(Some(dir.str()), BOOT, &evil);
    ingest(&first, 0, &evil_bytes, &[0, 1]);
    let s = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(s.states(0).unwrap().verified, 0);
    assert_eq!(ingest(&s, 0, &bytes, &[0]), [0]);
    assert_eq!(read(&s, &view(&s), 0), Some(plain(0, 0)));
    assert_eq!(read(&first, &view(&first), 0), Some(plain(0, 9)));
    assert_eq!(dir.files().len(), 4);
    // Both come back to their own.
    assert_eq!(
        store(Some(dir.str()), BOOT, &spec)
            .states(0)
            .unwrap()
            .verified,
        1
    );
    assert_eq!(
        store(Some(dir.str()), BOOT, &evil)
            .states(0)
            .unwrap()
            .verified,
        2
    );
}

#[test]
fn a_lost_data_file_takes_its_states_along() {
    let dir = Folder::new();
    let (spec, bytes) = blob(2, 0);
    let old = store(Some(dir.str()), BOOT, &spec);
    ingest(&old, 0, &bytes, &[0, 1]);
    fs::remove_file(dir.0.join(format!("{}.blob.data", spec.blob_id))).unwrap();
    let new = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(new.states(0).unwrap().verified, 0);
    // The old daemon goes on with its unlinked pair, and tells the new one nothing.
    assert_eq!(read(&old, &view(&old), 0), Some(plain(0, 0)));
    assert_eq!(read(&new, &view(&new), 0), None);
}

#[test]
fn a_cut_data_file_is_replaced() {
    let dir = Folder::new();
    let (spec, bytes) = blob(2, 0);
    ingest(&store(Some(dir.str()), BOOT, &spec), 0, &bytes, &[0, 1]);
    let path = dir.0.join(format!("{}.blob.data", spec.blob_id));
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(5000)
        .unwrap();
    let s = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(s.states(0).unwrap().verified, 0);
    assert_eq!(fs::metadata(&path).unwrap().len(), spec.data_size);
}

fn state_path(dir: &Folder, spec: &BlobSpec) -> PathBuf {
    dir.0.join(format!("{}.chunk_state", spec.blob_id))
}

fn patch(path: &Path, at: usize, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, at as u64)
        .unwrap();
}

#[test]
fn an_interrupted_creation_starts_again() {
    let dir = Folder::new();
    let (spec, bytes) = blob(3, 0);
    ingest(&store(Some(dir.str()), BOOT, &spec), 0, &bytes, &[0]);
    patch(&state_path(&dir, &spec), state_header::MAGIC, &[0; 8]);
    let s = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(s.states(0).unwrap().absent, 3);
    assert_eq!(s.disk_errors().0, 0);
}

#[test]
fn a_damaged_state_file_is_not_used() {
    let dir = Folder::new();
    let (spec, bytes) = blob(3, 0);
    ingest(&store(Some(dir.str()), BOOT, &spec), 0, &bytes, &[0]);
    patch(&state_path(&dir, &spec), state_header::MAP_DIGEST, b"x");
    let s = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(s.states(0).unwrap().absent, 3);
    // The name with the digest is this promise's alone, so a damaged one is replaced.
    let suffixed = dir
        .files()
        .into_iter()
        .find(|n| n.contains('-') && n.ends_with("chunk_state"))
        .unwrap();
    patch(&dir.0.join(&suffixed), state_header::MAP_DIGEST, b"y");
    let again = store(Some(dir.str()), BOOT, &spec);
    assert_eq!(ingest(&again, 0, &bytes, &[1]), [0]);
    assert_eq!(dir.files().len(), 4);
}

#[test]
fn unknown_state_values_are_not_served() {
    let dir = Folder::new();
    let (spec, _) = blob(4, 0);
    drop(store(Some(dir.str()), BOOT, &spec));
    for (chunk, state) in [(0, ABSENT), (1, FETCHING), (2, 5), (3, 7)] {
        patch(
            &state_path(&dir, &spec),
            STATE_HEADER + chunk * 4,
            &next_word(0, state).to_le_bytes(),
        );
    }
    let s = store(Some(dir.str()), BOOT, &spec);
    assert!((0..4).all(|chunk| read(&s, &view(&s), chunk).is_none()));
    let s = store(Some(dir.str()), [9; 16], &spec);
    assert_eq!(s.states(0).unwrap().absent, 4);
}

#[test]
fn without_a_cache_memory_serves_and_stays_bounded() {
    let (spec, bytes) = blob(200, 0);
    let s = Store::new(None, 1, 64 << 10, BOOT).unwrap();
    assert!(!s.open_blob(0, spec).unwrap());
    let seen = view(&s);
    for chunk in 0..200u32 {
        assert_eq!(ingest(&s, 0, &bytes, &[chunk]), [0]);
        assert_eq!(read(&s, &seen, chunk), Some(plain(chunk as usize, 0)));
    }
    let stats = s.spill_stats();
    assert_eq!((stats.capacity, stats.chunks), (64 << 10, 5));
    assert_eq!(stats.evicted, 195);
    assert_eq!(read(&s, &seen, 0), None);
    assert_eq!(s.states(0).unwrap().spilled, 5);
}

#[test]
fn a_chunk_larger_than_the_memory_is_refused() {
    let (spec, bytes) = blob(1, 0);
    let s = Store::new(None, 1, 4096, BOOT).unwrap();
    s.open_blob(0, spec).unwrap();
    assert_eq!(ingest(&s, 0, &bytes, &[0]), [Outcome::NoSpace as u8]);
}

#[test]
fn a_full_disk_spills() {
    let dir = Folder::new();
    let (spec, bytes) = blob(3, 0);
    let first = store(Some(dir.str()), BOOT, &spec);
    let shared = first.blob(0).unwrap().tables.share().unwrap();
    let full = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let s = Store::new(None, 1, 1 << 20, BOOT).unwrap();
    let fds = TableFds {
        state: shared.state.as_fd(),
        extents: shared.extents.as_fd(),
        touched: shared.touched.as_fd(),
        data: Some(full.as_fd()),
    };
    assert!(s.adopt_blob(0, spec.clone(), fds).unwrap());
    assert_eq!(ingest(&s, 0, &bytes, &[0, 1, 2]), [0, 0, 0]);
    assert_eq!(s.disk_errors(), (3, libc::ENOSPC));
    // Only the extents speak of it: another daemon's states stay untouched.
    assert_eq!(s.states(0).unwrap().verified, 0);
    assert_eq!(s.states(0).unwrap().spilled, 3);
    assert_eq!(read(&s, &view(&s), 1), Some(plain(1, 0)));
}

#[test]
fn a_cache_that_cannot_be_written_is_replaced_by_memory() {
    let dir = Folder::new();
    let (spec, bytes) = blob(2, 0);
    // Something that is no file stands where the state file should be.
    fs::create_dir(state_path(&dir, &spec)).unwrap();
    let s = Store::new(Some(dir.str()), 1, 1 << 20, BOOT).unwrap();
    assert!(!s.open_blob(0, spec).unwrap());
    assert_eq!(s.disk_errors(), (1, libc::EISDIR));
    assert_eq!(ingest(&s, 0, &bytes, &[0]), [0]);
    assert_eq!(read(&s, &view(&s), 0), Some(plain(0, 0)));
}

#[test]
fn a_successor_adopts_tables_and_spill_under_a_live_reader() {
    let (spec, bytes) = blob(12, 0);
    let first = Store::new(None, 1, 64 << 10, BOOT).unwrap();
    first.open_blob(0, spec.clone()).unwrap();
    let seen = view(&first);
    for chunk in 0..8 {
        ingest(&first, 0, &bytes, &[chunk]);
    }
    let shared = first.blob(0).unwrap().tables.share().unwrap();
    let spill = first.share_spill().unwrap();
    assert!(shared.data.is_none());
    drop(first);

    let second = Store::new(None, 1, 1, BOOT).unwrap();
    let fds = TableFds {
        state: shared.state.as_fd(),
        extents: shared.extents.as_fd(),
        touched: shared.touched.as_fd(),
        data: None,
    };
    second.adopt_blob(0, spec.clone(), fds).unwrap();
    second.adopt_spill(spill.as_fd()).unwrap();
    assert_eq!(second.spill_stats().chunks, 5);
    // The old reader sees what the successor does, and everything that is ready is right.
    for round in 0..30u32 {
        let chunk = round * 5 % 12;
        assert_eq!(ingest(&second, 0, &bytes, &[chunk]), [0]);
        assert_eq!(read(&second, &seen, chunk), Some(plain(chunk as usize, 0)));
        for other in 0..12 {
            if let Some(got) = read(&second, &seen, other) {
                assert_eq!(
                    got,
                    plain(other as usize, 0),
                    "chunk {other} in round {round}"
                );
            }
        }
    }
    let (other, _) = blob(12, 3);
    let third = Store::new(None, 1, 1, BOOT).unwrap();
    assert!(
        third.adopt_blob(0, other, fds).is_err(),
        "tables of another image"
    );
}

#[test]
fn a_reader_never_sees_bytes_of_another_chunk() {
    let (spec, bytes) = blob(16, 0);
    let s = Store::new(None, 1, 64 << 10, BOOT).unwrap();
    s.open_blob(0, spec).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let seen = view(&s);
                let (s, stop) = (&s, &stop);
                scope.spawn(move || {
                    let mut reads = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        for chunk in 0..16 {
                            if let Some(got) = read(s, &seen, chunk) {
                                assert_eq!(got, plain(chunk as usize, 0));
                                reads += 1;
                            }
                        }
                    }
                    reads
                })
            })
            .collect();
        for round in 0..3000u32 {
            ingest(&s, 0, &bytes, &[round * 7 % 16]);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(readers.into_iter().map(|r| r.join().unwrap()).sum::<u64>() > 0);
    });
}

#[test]
fn a_chunk_without_digest_is_never_taken_from_the_disk_of_another_boot() {
    let dir = Folder::new();
    let (mut spec, bytes) = blob(1, 0);
    spec.flags[0] &= !CHUNK_DIGEST;
    spec.digest[0] = [0; 32];
    ingest(&store(Some(dir.str()), BOOT, &spec), 0, &bytes, &[0]);
    let s = store(Some(dir.str()), [7; 16], &spec);
    assert!(!s.verify_present(0, 0, false).unwrap());
    assert_eq!(s.states(0).unwrap().absent, 1);
    assert_eq!(VERIFIED, 3);
}

#[test]
fn a_bootstrap_becomes_a_promise_and_its_blob_is_ingested() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../../shared/fixtures/nydus");
    if !fixtures.exists() {
        return; // the public test data lies beside the project, where it is there at all
    }
    let id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef";
    let image = fs::read(fixtures.join("bootstrap/rafs-v6-2.2.boot")).unwrap();
    let bytes = fs::read(fixtures.join("blobs").join(id)).unwrap();
    let promise = Promise::parse(&image).unwrap();
    assert!(!promise.needs_chunk_info(0));
    assert_eq!(promise.known(0), (2, 0));
    let spec = promise.spec(0).unwrap();
    assert_eq!((spec.blob_id.as_str(), spec.count()), (id, 2));
    let tree = rafs_format::Tree::parse(&image).unwrap();
    let root = tree.inode(tree.root()).unwrap();
    let (nid, _) = tree.lookup(&root, b"sync_io.rs").unwrap().unwrap();
    let names = paths(&image, &HashSet::from([nid, tree.root(), 1 << 30])).unwrap();
    assert_eq!(
        names,
        HashMap::from([(nid, b"/sync_io.rs".to_vec()), (tree.root(), b"/".to_vec())])
    );
    let s = store(None, BOOT, &spec);
    assert_eq!(ingest(&s, 0, &bytes, &[0, 1]), [0, 0]);
    let got = read(&s, &view(&s), 0).unwrap();
    assert_eq!(got.len(), 16931);

    // The same by the chunk-info array and the digest section of the blob.
    let mut again = Promise::parse(&image).unwrap();
    again
        .set_chunk_info(0, &bytes[8314..8346], false, Some(&bytes[12954..13018]))
        .unwrap();
    assert_eq!(again.spec(0).unwrap().map_digest(), spec.map_digest());
    again
        .set_chunk_info(0, &bytes[8314..8346], false, None)
        .unwrap();
    assert_eq!(again.known(0), (2, 2));
}
