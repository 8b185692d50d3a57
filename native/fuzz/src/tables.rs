//! Invariant: state, extent and data files and nydusd's records that anybody left in a cache are used, replaced or refused: no panic, no signal, nothing served that was verified before the last boot.

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use chunk_store::spec::{BlobSpec, CHUNK_DIGEST, ChunkSpec, Compressor, Digester};
use chunk_store::{BlobView, Location, Options, SharedFds, Tables};
use virtq::testing::memfd;

use crate::input::{Input, damage};

const CHUNKS: u32 = 9;
const SIZE: u32 = 4096;
const DATA: u64 = CHUNKS as u64 * SIZE as u64;
const NAMES: [&str; 3] = [
    "blob.chunk_state",
    "blob.blob.data",
    "blob.blob.data.chunk_map",
];

struct Folder {
    path: PathBuf,
    /// What a daemon makes: the three files.
    files: Vec<Vec<u8>>,
    /// The extent table that goes with it.
    extents: Vec<u8>,
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn spec() -> BlobSpec {
    let mut spec = BlobSpec::new("blob", DATA, Compressor::None, Digester::Blake3, 9).expect("one");
    for i in 0..CHUNKS - 1 {
        let chunk = ChunkSpec {
            compressed_offset: u64::from(i * SIZE),
            compressed_size: SIZE,
            data_offset: u64::from(i * SIZE),
            size: SIZE,
            flags: CHUNK_DIGEST,
            digest: [7; 32],
        };
        spec.set(i as usize, chunk).expect("a chunk");
    }
    spec
}

fn open(folder: &std::path::Path, boot: u8) -> std::io::Result<Tables> {
    let dir = fs::File::open(folder)?;
    let options = Options { for_nydusd: true };
    let spec = spec();
    Tables::on_disk(dir.as_fd(), &spec, &spec.map_digest(), &[boot; 16], options)
}

fn whole(fd: OwnedFd) -> Vec<u8> {
    let file = fs::File::from(fd);
    let mut bytes = vec![0; file.metadata().expect("a file").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("a file");
    bytes
}

impl Folder {
    fn new() -> Folder {
        let name = format!(
            "rafs-fuzz-tables-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        );
        // In memory where that is possible: making files is all that this target does.
        let shm = PathBuf::from("/dev/shm");
        let base = if shm.is_dir() {
            shm
        } else {
            std::env::temp_dir()
        };
        let path = base.join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder");
        let tables = open(&path, 1).expect("tables");
        let extents = whole(tables.share().expect("descriptors").extents);
        let read = |name: &&str| fs::read(path.join(name)).expect("a file");
        let files = NAMES.iter().map(read).collect();
        Folder {
            path,
            files,
            extents,
        }
    }
}

fn look(view: &BlobView) {
    for chunk in (0..CHUNKS + 2).chain([u32::MAX, 1 << 24]) {
        match view.locate(chunk) {
            Location::Ready(extent) => {
                assert!(chunk < view.chunk_count());
                assert!(view.unchanged(chunk, extent.stamp));
            }
            Location::Absent => assert!(chunk < view.chunk_count()),
            Location::Invalid => {}
        }
        view.touch(chunk);
    }
}

/// First byte: bit 0 = the tables that a worker gets, else the files that an agent finds; bits 1 to 3: which files are
/// there at all; bits 4 to 6: which of them are damaged. The rest is the damage.
pub fn run(data: &[u8]) {
    thread_local! {
        static FOLDER: RefCell<Option<Folder>> = const { RefCell::new(None) };
    }
    FOLDER.with(|cell| {
        let mut folder = cell.borrow_mut();
        let folder = &*folder.get_or_insert_with(Folder::new);
        let mut input = Input::new(data);
        let kind = input.u8();
        if kind & 1 != 0 {
            worker_side(folder, kind, &mut input);
        } else {
            agent_side(folder, kind, &mut input);
        }
    });
}

fn worker_side(folder: &Folder, kind: u8, input: &mut Input<'_>) {
    let mut state = folder.files[0].clone();
    let mut extents = folder.extents.clone();
    if kind & 16 != 0 {
        damage(input, &mut state);
    } else {
        damage(input, &mut extents);
    }
    let file = |bytes: &[u8]| {
        let file = memfd(bytes.len() as u64);
        file.write_all_at(bytes, 0).expect("memory");
        OwnedFd::from(file)
    };
    let fds = SharedFds {
        state: file(&state),
        extents: file(&extents),
        touched: file(&vec![0; if kind & 2 == 0 { 4096 } else { 3 }]),
        data: (kind & 4 == 0).then(|| file(&[0; 100])),
    };
    if let Ok(view) = BlobView::open(fds) {
        assert!(view.chunk_count() as usize <= state.len() / 4);
        look(&view);
    }
}

fn agent_side(folder: &Folder, kind: u8, input: &mut Input<'_>) {
    for entry in fs::read_dir(&folder.path).expect("the folder").flatten() {
        fs::remove_file(entry.path()).expect("a file");
    }
    let boot = 1 + input.u8() % 2;
    for (i, name) in NAMES.iter().enumerate() {
        if kind >> (1 + i) & 1 != 0 {
            continue;
        }
        let mut bytes = folder.files[i].clone();
        if kind >> (4 + i) & 1 != 0 {
            let n = usize::from(input.u8());
            damage(&mut Input::new(input.bytes(n)), &mut bytes);
        }
        fs::write(folder.path.join(name), bytes).expect("a file");
    }
    // A file that is nobody's may be refused, but the blob is usable under its other name.
    let tables = open(&folder.path, boot).expect("tables, whatever was there");
    assert_eq!(tables.count(), CHUNKS);
    let view = BlobView::open(tables.share().expect("descriptors")).expect("whole tables");
    look(&view);
    if boot == 2 {
        for chunk in 0..CHUNKS {
            assert!(!tables.ready(chunk), "served across a boot");
        }
    }
    let length = tables
        .data()
        .expect("a file")
        .metadata()
        .expect("a file")
        .len();
    assert!(length >= DATA, "a read beyond the end");
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in 0..128u8 {
        // What is not there cannot be damaged; a worker's tables are damaged by fields, below.
        if kind & 1 != 0 || kind >> 4 & kind >> 1 & 7 != 0 {
            continue;
        }
        let mut seed = vec![kind, kind >> 1];
        seed.extend([
            5, 0, 16, 0, 0, 0xff, 5, 0, 200, 8, 0, 0xff, 5, 0, 0, 16, 0, 0x0b,
        ]);
        seeds.push(seed);
    }
    // Fields of the headers, one by one; states of all kinds.
    for at in (0..160u8).step_by(8) {
        seeds.push(vec![1 | 16, 0x30, at, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        seeds.push(vec![1, 0x30, at, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        seeds.push(vec![0x10, 1, 8, 0x30, at, 0, 0, 9, 0, 0, 0]);
    }
    seeds
}
