//! The public test images of the Nydus project, read where they lie beside the project; nothing is tested where the
//! folder is absent.

use std::path::PathBuf;

use rafs_format::{
    ChunkMap, ChunkTable, Compressor, Digester, Layout, Toc, Tree, Usage, check_references,
    chunk_info, feature, flag, toc,
};

const BLOB: &str = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef";

/// Content of a fixture; None when the folder of all fixtures is absent.
fn fixture(path: &str) -> Option<Vec<u8>> {
    let folder =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../../shared/fixtures/nydus");
    folder
        .is_dir()
        .then(|| std::fs::read(folder.join(path)).expect("the fixture"))
}

fn bootstrap() -> Option<Vec<u8>> {
    fixture("bootstrap/rafs-v6-2.2.boot")
}

#[test]
fn superblock_and_blob_table() {
    let Some(image) = bootstrap() else { return };
    let tree = Tree::parse(&image).unwrap();
    let sb = tree.superblock();
    assert_eq!(sb.flags, 0x194);
    assert_eq!(
        (sb.compressor(), sb.digester()),
        (Compressor::Zstd, Digester::Blake3)
    );
    assert!(sb.explicit_uid_gid() && sb.inlined_chunk_digest() && !sb.has_xattr());
    assert_eq!(sb.flags & flag::TARFS_MODE, 0);
    assert_eq!(
        (sb.chunk_size, sb.inos, tree.root(), sb.blocks),
        (1 << 20, 3, 128, 9)
    );
    let blobs = tree.blobs().unwrap();
    assert_eq!(blobs.len(), 1);
    let blob = blobs[0];
    assert_eq!(blob.id(), BLOB);
    assert_eq!((blob.chunk_count, blob.features), (2, 0x7000_0021));
    assert_eq!(
        (
            blob.compressed_size,
            blob.uncompressed_size,
            blob.data_size()
        ),
        (14554, 0x9000, 7802)
    );
    assert_eq!(
        (
            blob.ci_offset,
            blob.ci_compressed_size,
            blob.ci_uncompressed_size
        ),
        (8314, 32, 32)
    );
    assert_eq!(blob.trusted_toc().map(|t| t.0), Some(1024));
    assert!(blob.has(feature::HAS_TOC | feature::HAS_TAR_HEADER));
    assert_eq!(tree.prefetch().count(), 0);
}

#[test]
fn tree_of_the_bootstrap() {
    let Some(image) = bootstrap() else { return };
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(tree.root()).unwrap();
    assert!(root.is_dir());
    assert_eq!(
        (root.mode, root.nlink, root.layout),
        (0o40755, 2, Layout::FlatInline)
    );
    let names: Vec<_> = tree
        .entries(&root, 0)
        .map(|e| e.unwrap())
        .map(|e| (e.name, e.nid, e.d_type))
        .collect();
    let expected: [(&[u8], u64, u8); 4] = [
        (b".", 128, 4),
        (b"..", 128, 4),
        (b"lib.rs", 133, 8),
        (b"sync_io.rs", 136, 8),
    ];
    assert_eq!(names, expected);
    for (name, nid, d_type) in expected {
        assert_eq!(tree.lookup(&root, name).unwrap(), Some((nid, d_type)));
    }
    for absent in [&b""[..], b"a", b"lib.r", b"lib.rs0", b"zzz"] {
        assert_eq!(tree.lookup(&root, absent).unwrap(), None);
    }
    let file = tree.inode(133).unwrap();
    assert_eq!(
        (file.mode, file.size, file.layout, file.disk_ino),
        (0o100644, 16931, Layout::ChunkBased, 2)
    );
    assert_eq!((file.mtime, file.mtime_nsec), (0x63f2_3c61, 0x2578_9c56));
    let parts: Vec<_> = tree
        .chunks(&file, 0, u64::MAX)
        .map(|c| c.unwrap())
        .collect();
    assert_eq!(parts.len(), 1);
    assert_eq!(
        (parts[0].blob_index, parts[0].chunk_index, parts[0].len),
        (0, 0, 16931)
    );
}

#[test]
fn chunk_table_chunk_info_and_digests_agree() {
    let (Some(image), Some(data)) = (bootstrap(), fixture(&format!("blobs/{BLOB}"))) else {
        return;
    };
    let tree = Tree::parse(&image).unwrap();
    let blob = tree.blob(0).unwrap();
    let table = ChunkTable::parse(&tree).unwrap();
    let map = table.map(0).unwrap();
    assert_eq!(
        (map.len(), map.chunk_count(), map.has_all_digests()),
        (2, 2, true)
    );
    let chunk = map.get(1).unwrap();
    assert_eq!(
        (chunk.compressed_offset, chunk.compressed_size),
        (4828, 2974)
    );
    assert_eq!(
        (chunk.uncompressed_offset, chunk.uncompressed_size),
        (0x5000, 13400)
    );
    assert!(chunk.is_compressed());

    let tail = &data[data.len() - blob.toc_size as usize..];
    let sections = Toc::parse(tail, data.len() as u64).unwrap();
    let section = |name| {
        let s = sections.section(name).unwrap();
        assert_eq!(s.compressor, Compressor::None);
        &data[s.compressed_offset as usize..][..s.compressed_size as usize]
    };
    let header: &[u8; 4096] = section(toc::BLOB_META_HEADER).try_into().unwrap();
    chunk_info::check_header(&blob, header, 0).unwrap();
    let array = section(toc::BLOB_META);
    let from_blob =
        ChunkMap::from_chunk_info(&blob, array, Some(section(toc::BLOB_DIGEST))).unwrap();
    assert_eq!(&from_blob, map);
    let without = ChunkMap::from_chunk_info(&blob, array, None).unwrap();
    assert!(!without.has_all_digests());

    // The file that bootstrap layers and cache directories hold.
    let mut file = array.to_vec();
    file.resize(4096, 0);
    file.extend_from_slice(header);
    assert_eq!(chunk_info::from_meta_file(&blob, &file).unwrap(), array);
    file[4096 + 12] ^= 1;
    assert_eq!(
        chunk_info::from_meta_file(&blob, &file).unwrap_err().what,
        "blob_meta.ci_entries"
    );

    let usage = check_references(&tree, &table.into_maps()).unwrap();
    let expected = Usage {
        directories: 1,
        files: 2,
        others: 0,
        bytes: 16931 + 13400,
        without_digest: 0,
    };
    assert_eq!(usage, expected);
    let usage = check_references(&tree, &[without]).unwrap();
    assert_eq!(usage.without_digest, 2);
}

#[test]
fn table_of_contents_of_an_inline_meta_blob() {
    let Some(blob) =
        fixture("toc/2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca")
    else {
        return;
    };
    let tail = &blob[9010..];
    let sections = Toc::parse(tail, blob.len() as u64).unwrap();
    let found: Vec<_> = sections
        .iter()
        .map(|s| (s.name(), s.compressed_offset, s.compressed_size))
        .collect();
    let expected = [
        ("image.blob", 2829, 2829),
        ("blob.meta", 3341, 48),
        ("blob.meta.header", 3389, 4096),
        ("image.boot", 7997, 501),
    ];
    assert_eq!(found, expected);
    let boot = sections.section(toc::IMAGE_BOOT).unwrap();
    assert_eq!(
        (boot.compressor, boot.uncompressed_size),
        (Compressor::Zstd, 20480)
    );
    for (at, what) in [
        (0, "toc.flags"),
        (8, "toc.name"),
        (128 + 63, "toc.compressed_offset"),
        (512, "toc.tar_header"),
    ] {
        let mut damaged = tail.to_vec();
        damaged[at] = 0xff;
        assert_eq!(
            Toc::parse(&damaged, blob.len() as u64).unwrap_err().what,
            what
        );
    }
    let mut twice = tail.to_vec();
    twice.copy_within(128..256, 256);
    assert_eq!(
        Toc::parse(&twice, blob.len() as u64).unwrap_err().what,
        "toc.name"
    );
    assert!(Toc::parse(&tail[128..], blob.len() as u64).is_err());
    assert!(Toc::parse(tail, 7997).is_err());
    assert!(Toc::parse(&[], 0).is_err());
}
