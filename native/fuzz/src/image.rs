//! Images of our own builder for the targets to start from: a small tree, built once per process.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::OnceLock;

use image_builder::{Builder, Limits, Options, Progress};
use rafs_format::format::{
    BLOB_ENTRY_SIZE, BLOCK_SIZE, CHUNK_ENTRY_SIZE, DEVICE_TABLE_OFFSET, EXT_SUPER_OFFSET,
    SUPER_OFFSET,
};
use rafs_format::{Compressor, Digester, feature, flag};

/// Chunks of the built image, in bytes.
pub const CHUNK_SIZE: u32 = 4096;
/// Where the blob table of the built image lies.
pub const BLOB_TABLE: usize = BLOCK_SIZE as usize;
/// Links in the directory that has several blocks.
const MANY: usize = 300;

/// What the builder has made.
pub struct Image {
    pub bootstrap: Vec<u8>,
    /// The chunks, as they are stored.
    pub blob: Vec<u8>,
    /// The array of chunk information as the blob has it, and uncompressed.
    pub ci_stored: Vec<u8>,
    pub ci_array: Vec<u8>,
    /// The digests of the chunks, 32 bytes each.
    pub digests: Vec<u8>,
    /// SHA-256 of the blob: its id.
    pub blob_id: String,
}

/// The image that most targets use.
pub fn built() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(build)
}

/// An image of the other writer that the tests of `rafs-format` have: with attributes, devices, two blobs, and files in the
/// bootstrap.
pub fn sample() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(worker::testing::sample)
}

/// Bytes that do not shrink much and are the same in every run.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    virtq::testing::Random::new(seed).fill(&mut bytes);
    bytes
}

fn source(top: &Path) {
    fs::create_dir_all(top.join("dir/many")).expect("a folder");
    fs::write(top.join("big"), noise(1, 10_000)).expect("a file");
    fs::set_permissions(top.join("big"), fs::Permissions::from_mode(0o755)).expect("a mode");
    fs::write(top.join("small"), b"small\n".repeat(20)).expect("a file");
    fs::write(top.join("zeros"), vec![0; 9000]).expect("a file");
    fs::write(top.join("empty"), b"").expect("a file");
    fs::hard_link(top.join("big"), top.join("dir/again")).expect("a link");
    for i in 0..MANY {
        let name = format!("dir/many/a-name-of-some-length-{i:04}");
        fs::hard_link(top.join("small"), top.join(name)).expect("a link");
    }
    std::os::unix::fs::symlink("big", top.join("link")).expect("a link");
    std::os::unix::fs::symlink("x".repeat(4000), top.join("long-link")).expect("a link");
    let fifo = std::ffi::CString::new(top.join("fifo").into_os_string().into_encoded_bytes());
    // SAFETY: a NUL-terminated path; failure only makes the tree poorer.
    unsafe { libc::mkfifo(fifo.expect("a path").as_ptr(), 0o600) };
    let old = std::time::UNIX_EPOCH + std::time::Duration::new(1_700_000_000, 5);
    for name in ["big", "small", "zeros", "empty", "dir/many", "dir", "."] {
        let file = fs::File::open(top.join(name)).expect("a file");
        file.set_modified(old).expect("a time");
    }
}

fn build() -> Image {
    let folder = std::env::temp_dir().join(format!("rafs-fuzz-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    let top = folder.join("source");
    source(&top);
    let image = pack(&folder, &top);
    fs::remove_dir_all(&folder).expect("the folder");
    image
}

fn whole(mut file: fs::File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().expect("a file");
    file.read_to_end(&mut bytes).expect("a file");
    bytes
}

fn pack(folder: &Path, top: &Path) -> Image {
    let options = Options {
        chunk_size: CHUNK_SIZE,
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        jobs: 1,
        limits: Limits {
            chunks: 1 << 24,
            uncompressed: 1 << 44,
            compressed: 1 << 40,
        },
    };
    let open = |name: &str| {
        let mut options = fs::File::options();
        options.read(true).write(true).create(true);
        options
            .truncate(true)
            .open(folder.join(name))
            .expect("a file")
    };
    let blob = open("blob");
    let mut builder = Builder::new(
        top.as_os_str().as_encoded_bytes(),
        folder.to_owned(),
        options,
    )
    .expect("a tree");
    assert!(builder.prefetch(b"/big", 0, u64::MAX).expect("a file"));
    let mut built = builder
        .run(
            blob.try_clone().expect("a descriptor"),
            &Progress::default(),
        )
        .expect("a blob");
    let data_size = built.tail.size;
    let ci = built
        .tail
        .append_chunk_info(&built.blob, Compressor::Zstd)
        .expect("chunk information");
    let ci_end = built.tail.size;
    built.tail.append_digests(&built.blob).expect("digests");
    let blob_size = built.tail.size;
    let mut blob_id = String::new();
    for byte in built.tail.sha256() {
        write!(blob_id, "{byte:02x}").expect("a string grows");
    }
    let plan = built.layout(2 * BLOCK_SIZE).expect("a plan");
    let nids = built.prefetch_nids(&plan);

    let mut head = vec![0; 2 * BLOCK_SIZE as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        head[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    let sb = SUPER_OFFSET;
    put(sb, &0xe0f5_e1e2_u32.to_le_bytes());
    put(sb + 8, &0x4000_0000_u32.to_le_bytes());
    put(sb + 12, &[12]);
    put(sb + 14, &(plan.nids[0] as u16).to_le_bytes());
    put(sb + 16, &(plan.nids.len() as u64).to_le_bytes());
    put(sb + 36, &((plan.size / BLOCK_SIZE) as u32).to_le_bytes());
    put(sb + 40, &2u32.to_le_bytes());
    put(sb + 80, &0xcu32.to_le_bytes());
    put(sb + 86, &1u16.to_le_bytes());
    put(sb + 88, &11u16.to_le_bytes());
    let n_chunks = built.blob.n_chunks;
    let flags = flag::COMPRESSION_ZSTD
        | flag::HASH_BLAKE3
        | flag::EXPLICIT_UID_GID
        | flag::HAS_XATTR
        | flag::INLINED_CHUNK_DIGEST;
    let ext = EXT_SUPER_OFFSET;
    let prefetch = BLOCK_SIZE + BLOB_ENTRY_SIZE;
    put(ext, &flags.to_le_bytes());
    put(ext + 8, &BLOCK_SIZE.to_le_bytes());
    put(ext + 16, &(BLOB_ENTRY_SIZE as u32).to_le_bytes());
    put(ext + 20, &CHUNK_SIZE.to_le_bytes());
    put(ext + 24, &plan.chunk_table_offset.to_le_bytes());
    put(
        ext + 32,
        &(u64::from(n_chunks) * CHUNK_ENTRY_SIZE).to_le_bytes(),
    );
    put(ext + 40, &prefetch.to_le_bytes());
    put(ext + 48, &(4 * nids.len() as u32).to_le_bytes());
    put(DEVICE_TABLE_OFFSET, blob_id.as_bytes());
    put(
        DEVICE_TABLE_OFFSET + 64,
        &((built.blob.uncompressed_size / BLOCK_SIZE) as u32).to_le_bytes(),
    );
    let features =
        feature::ALIGNED | feature::INLINED_CHUNK_DIGEST | feature::HAS_TOC | feature::CAP_TAR_TOC;
    let entry = BLOCK_SIZE;
    put(entry, blob_id.as_bytes());
    for (at, word) in [
        (68, CHUNK_SIZE),
        (72, n_chunks),
        (76, Compressor::Zstd as u32),
        (80, Digester::Blake3 as u32),
        (84, features),
        (
            108,
            if ci.packed {
                Compressor::Zstd as u32
            } else {
                0
            },
        ),
    ] {
        put(entry + at, &word.to_le_bytes());
    }
    for (at, word) in [
        (88, blob_size),
        (96, built.blob.uncompressed_size),
        (112, data_size),
        (120, ci.stored),
        (128, ci.size),
    ] {
        put(entry + at, &word.to_le_bytes());
    }
    for (i, nid) in nids.iter().enumerate() {
        put(prefetch + 4 * i as u64, &nid.to_le_bytes());
    }
    let out = open("bootstrap");
    built.write(&plan, &head, &out).expect("a bootstrap");
    let blob = whole(blob);
    let ci_stored = blob[data_size as usize..ci_end as usize].to_vec();
    let ci_array = if ci.packed {
        zstd::bulk::decompress(&ci_stored, ci.size as usize).expect("chunk information")
    } else {
        ci_stored.clone()
    };
    Image {
        bootstrap: whole(out),
        digests: blob[ci_end as usize..].to_vec(),
        blob,
        ci_stored,
        ci_array,
        blob_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rafs_format::{ChunkTable, Tree, check_references};

    #[test]
    fn the_image_is_whole() {
        let image = built();
        let tree = Tree::parse(&image.bootstrap).unwrap();
        let maps = ChunkTable::parse(&tree).unwrap().into_maps();
        let usage = check_references(&tree, &maps).unwrap();
        assert_eq!((usage.directories, usage.without_digest), (3, 0));
        let info = rafs_format::ChunkMap::from_chunk_info(
            &tree.blob(0).unwrap(),
            &image.ci_array,
            Some(&image.digests),
        );
        assert_eq!(info.unwrap(), maps[0]);
        assert_eq!(tree.prefetch().count(), 1);
    }
}
