//! Each field that can be wrong, and the name that the error gives it.

mod support;

use rafs_format::{ChunkTable, ErrorKind, Tree, check_references};
use support::{BLOCK, Body, Builder, Chunk, ROOT, Spec, sample};

#[test]
fn wrong_fields_are_named() {
    let image = sample();
    let blob_table = 4096;
    let cases: &[(usize, &[u8], &str)] = &[
        (1024, &[0], "superblock.magic"),
        (1028, &[1], "superblock.checksum"),
        (1032 + 3, &[0], "superblock.feature_compat"),
        (1036, &[13], "superblock.blkszbits"),
        (1037, &[1], "superblock.extslots"),
        (1038, &[129], "inode.i_mode"),
        (1040, &[0], "superblock.inos"),
        (1056 + 3, &[0xff], "superblock.build_time_nsec"),
        (1064, &[0xff, 0xff], "superblock.meta_blkaddr"),
        (1068, &[1], "superblock.xattr_blkaddr"),
        (1104, &[0xd], "superblock.feature_incompat"),
        (1108, &[1], "superblock.u"),
        (1110, &[3], "superblock.extra_devices"),
        (1112, &[12], "superblock.devt_slotoff"),
        (1152, &[0x85], "ext_superblock.flags"),
        (1152, &[0x8c], "ext_superblock.flags"),
        (1152 + 2, &[1], "ext_superblock.flags"),
        (1152 + 8, &[1], "ext_superblock.blob_table_offset"),
        (1152 + 8 + 3, &[1], "ext_superblock.blob_table_offset"),
        (1152 + 16, &[1], "ext_superblock.blob_table_size"),
        (1152 + 20 + 1, &[0x18], "ext_superblock.chunk_size"),
        (1152 + 24, &[1], "ext_superblock.chunk_table_offset"),
        (1152 + 32, &[1], "ext_superblock.chunk_table_size"),
        (1152 + 48, &[1], "ext_superblock.prefetch_table_offset"),
        (1408, b"z", "device_slot.blob_id"),
        (blob_table, b"/", "blob.blob_id"),
        (blob_table + 64, &[1], "blob.blob_index"),
        (blob_table + 68, &[1], "blob.chunk_size"),
        (blob_table + 72 + 3, &[2], "blob.chunk_count"),
        (blob_table + 72, &[200], "blob.chunk_count"),
        (blob_table + 72, &[2], "blob.ci_uncompressed_size"),
        (blob_table + 76, &[4], "blob.compression_algo"),
        (blob_table + 80, &[2], "blob.digest_algo"),
        (blob_table + 84, &[0], "blob.features"),
        (blob_table + 85, &[0x10], "blob.features"),
        (blob_table + 88 + 6, &[1], "blob.compressed_size"),
        (blob_table + 96 + 6, &[1], "blob.uncompressed_size"),
        (blob_table + 108, &[4], "blob.ci_compressor"),
        (blob_table + 112 + 7, &[0xff], "blob.ci_offset"),
        (blob_table + 120 + 2, &[1], "blob.ci_compressed_size"),
    ];
    for (at, bytes, what) in cases {
        let mut damaged = image.clone();
        damaged[*at..at + bytes.len()].copy_from_slice(bytes);
        let error = Tree::parse(&damaged).unwrap_err();
        assert_eq!(
            (error.what, error.kind),
            (*what, ErrorKind::Malformed),
            "{error}"
        );
    }
    let unsupported: &[(usize, &[u8])] = &[
        (1036, &[9]),
        (1152 + 1, &[3]),
        (1152 + 3, &[2]),
        (blob_table + 84, &[0x9]),
        (blob_table + 84, &[0x41]),
        (blob_table + 84, &[0x81]),
        (blob_table + 85, &[0x1]),
        (blob_table + 85, &[0x8]),
        (blob_table + 216, &[1]),
    ];
    for (at, bytes) in unsupported {
        let mut damaged = image.clone();
        damaged[*at..at + bytes.len()].copy_from_slice(bytes);
        let error = Tree::parse(&damaged).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("not supported"), "{error}");
    }
}

#[test]
fn wrong_entries_and_inodes_are_named() {
    type Change = fn(&mut Vec<u8>, usize, usize);
    // Arguments: the image, the root's first block, the inode of "big" (extended, in three chunks).
    let cases: &[(Change, &str)] = &[
        (|i, dir, _| i[dir + 8] = 13, "dirent.nameoff"),
        (|i, dir, _| i[dir + 9] = 0xff, "dirent.nameoff"),
        (|i, dir, _| i[dir + 12 + 8] = 0, "dirent.nameoff"),
        (|i, dir, _| i[dir + 12 + 8] = 108, "dirent.name"),
        (|i, dir, _| i[dir + 12 + 10] = 8, "dirent.file_type"),
        (|i, dir, _| i[dir + 24 + 10] = 2, "dirent.file_type"),
        (|i, dir, _| i[dir + 108] = b'/', "dirent.name"),
        (|i, dir, _| i[dir + 111] = b'z', "dirent.name"),
        (|i, dir, _| i[dir + 24 + 7] = 0x10, "inode.nid"),
        (|i, dir, _| i[dir + 24 + 4] = 0x10, "inode"),
        (|i, _, big| i[big] |= 2, "inode.i_format"),
        (|i, _, big| i[big + 5] = 0, "inode.i_mode"),
        (|i, _, big| i[big + 3] = 0xff, "inode.i_xattr_icount"),
        (|i, _, big| i[big + 14] = 1, "inode.i_size"),
        (|i, _, big| i[big + 43] = 0xff, "inode.i_mtime_nsec"),
        (|i, _, big| i[big + 68] = 1, "xattr_header.shared_count"),
        (|i, _, big| i[big + 76] = 0xff, "xattr.e_value_size"),
        (|i, _, big| i[big + 77] = 9, "xattr.e_name_index"),
        (|i, _, big| i[big + 128] = 3, "chunk_index.ci_index"),
        (|i, _, big| i[big + 130] = 0, "chunk_index.device_id"),
        (|i, _, big| i[big + 130] = 3, "chunk_index.device_id"),
        (|i, _, big| i[big + 120] = 1, "chunk_index"),
    ];
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(ROOT).unwrap();
    let offset = |nid: u64| (tree.superblock().meta_offset + nid * 32) as usize;
    let union = offset(ROOT) + 16;
    let dir = BLOCK * u32::from_le_bytes(image[union..union + 4].try_into().unwrap()) as usize;
    let big = tree.lookup(&root, b"big").unwrap().unwrap().0;
    let indexes = tree.inode(big).unwrap();
    assert_eq!(tree.chunks(&indexes, 0, 1).count(), 1);
    for (change, what) in cases {
        let mut damaged = image.clone();
        change(&mut damaged, dir, offset(big));
        let error = support::read_everything(&damaged).expect_err(what);
        assert_eq!(error.what, *what, "{error}");
    }
}

#[test]
fn order_of_names_is_checked_across_cookies() {
    let mut image = sample();
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(ROOT).unwrap();
    let cookie = tree.entries(&root, 0).nth(2).unwrap().unwrap().next_cookie;
    assert_eq!(
        tree.entries(&root, cookie).next().unwrap().unwrap().name,
        b"device"
    );
    let start = (tree.superblock().meta_offset + ROOT * 32 + 16) as usize;
    let block = u32::from_le_bytes(image[start..start + 4].try_into().unwrap()) as usize;
    // "big" becomes "zig", which the entry behind the cookie is not above.
    image[block * BLOCK + 111] = b'z';
    let tree = Tree::parse(&image).unwrap();
    let error = tree.entries(&root, cookie).next().unwrap().unwrap_err();
    assert_eq!(error.what, "dirent.name");
}

/// Each inode is four chunk indexes of those before it: the work of a reader would grow with the square of the image.
#[test]
fn inodes_that_share_their_chunk_indexes_are_refused() {
    let mut b = Builder::new(4096, 1);
    // Chunk number, and block where the index says that it lies.
    let indexes: [(u32, u32); 4] = [(8, 0x8100), (1 << 16, 1), (5, 2), (6, 3)];
    for (index, block) in indexes {
        b.blobs[0].push(Chunk {
            digest: 1,
            flags: 0,
            compressed_offset: u64::from(block) * 4096,
            compressed_size: 4096,
            uncompressed_offset: u64::from(block) * 4096,
            uncompressed_size: 4096,
            index,
        });
    }
    let mut nids = Vec::new();
    for _ in 0..1500 {
        nids.push(b.inode(&Spec::new(0o100400), &Body::None));
        let at = b.image.len() - 32;
        let inode: [u32; 8] = [
            8 | 1 << 16, // chunk-based, a header of attributes
            0o100400,    // no links
            0x0101_0000, // size: 4112 chunks
            1,
            5 | 1 << 16,
            2,
            6 | 1 << 16,
            3,
        ];
        for (i, word) in inode.iter().enumerate() {
            b.image[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    let names: Vec<String> = (0..400).map(|i| format!("f{i:03}")).collect();
    let entries: Vec<(&[u8], u64, u8)> = names
        .iter()
        .zip(&nids)
        .map(|(name, nid)| (name.as_bytes(), *nid, 1))
        .collect();
    let mut image = b.finish(&entries);
    let count = (1u32 << 16) + 1;
    image[4096 + 72..4096 + 76].copy_from_slice(&count.to_le_bytes());
    image[4096 + 96..4096 + 104].copy_from_slice(&(u64::from(count) * 4096).to_le_bytes());
    for at in [120, 128] {
        let size = (u64::from(count) * 16).to_le_bytes();
        image[4096 + at..4096 + at + 8].copy_from_slice(&size);
    }
    let tree = Tree::parse(&image).unwrap();
    let maps = ChunkTable::parse(&tree).unwrap().into_maps();
    let error = check_references(&tree, &maps).unwrap_err();
    assert!(error.to_string().contains("share"), "{error}");
}
