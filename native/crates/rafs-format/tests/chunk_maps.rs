//! Chunk maps: the chunk table, both versions of the chunk-info array, and what must not be in them.

mod support;

use rafs_format::{
    BlobEntry, ChunkMap, ChunkTable, ErrorKind, Tree, chunk_flag, chunk_info, feature,
};
use support::{Body, Builder, Chunk, Spec};

const MIB: u32 = 1 << 20;

fn image(chunk_size: u32, chunks: &[Chunk]) -> Vec<u8> {
    let mut b = Builder::new(chunk_size, 1);
    b.blobs[0] = chunks.to_vec();
    b.finish(&[])
}

/// Chunks of 5000 bytes, stored in 3000.
fn chunks(count: u32) -> Vec<Chunk> {
    (0..count)
        .map(|i| Chunk {
            digest: i as u8,
            flags: 1,
            compressed_offset: u64::from(i) * 3000,
            compressed_size: 3000,
            uncompressed_offset: u64::from(i) * 8192,
            uncompressed_size: 5000,
            index: i,
        })
        .collect()
}

#[test]
fn table_in_any_order_and_with_gaps() {
    let mut all = chunks(10);
    all.reverse();
    all.push(all[3]);
    let mut img = image(MIB, &all);
    // The builder counts records: tell the blob table the number of chunks of the blob.
    set_count(&mut img, 10);
    let tree = Tree::parse(&img).unwrap();
    let table = ChunkTable::parse(&tree).unwrap();
    let map = table.map(0).unwrap();
    assert_eq!(map.len(), 10);
    assert!(map.iter().map(|c| c.index).eq(0..10));
    assert_eq!(map.get(7).unwrap().digest, Some([7; 32]));
    assert!(map.get(10).is_none() && table.map(1).is_none());

    // Only chunks that files use are in the table of a merged image.
    let some: Vec<_> = all.into_iter().filter(|c| c.index % 3 == 2).collect();
    let mut img = image(MIB, &some);
    set_count(&mut img, 10);
    let tree = Tree::parse(&img).unwrap();
    let table = ChunkTable::parse(&tree).unwrap();
    let map = table.map(0).unwrap();
    assert_eq!((map.len(), map.chunk_count()), (3, 10));
    assert_eq!(map.get(5).unwrap().index, 5);
    assert!(map.get(0).is_none() && map.get(4).is_none() && map.get(u32::MAX).is_none());
}

fn set_count(image: &mut [u8], count: u32) {
    let blob_table = 4096;
    image[blob_table + 72..blob_table + 76].copy_from_slice(&count.to_le_bytes());
    for at in [120, 128] {
        let size = u64::from(count) * 16;
        image[blob_table + at..blob_table + at + 8].copy_from_slice(&size.to_le_bytes());
    }
}

#[test]
fn records_that_cannot_be() {
    type Change = fn(&mut Chunk);
    let cases: &[Change] = &[
        |c| c.flags = 0,
        |c| c.flags = 3,
        |c| c.flags = 0x21,
        |c| c.uncompressed_size = 0,
        |c| c.uncompressed_size = MIB + 1,
        |c| c.compressed_size = 0,
        |c| c.compressed_size = (16 << 20) + 1,
        |c| c.uncompressed_offset += 1,
        |c| c.uncompressed_offset = 0,
        |c| c.uncompressed_offset = 4096,
        |c| c.uncompressed_offset = u64::MAX - 4095,
        |c| c.uncompressed_offset = 10 << 30,
        |c| c.compressed_offset = u64::MAX,
        |c| c.compressed_offset += 6001,
        |c| c.index = 4,
        |c| c.index = 2,
        |c| c.index = u32::MAX,
    ];
    for (i, change) in cases.iter().enumerate() {
        let good = chunks(4);
        let mut bad = good.clone();
        change(&mut bad[1]);
        // Tables of the undamaged image, with the damaged record in place.
        let mut img = image(MIB, &good);
        let table = u64::from_le_bytes(img[1152 + 24..1152 + 32].try_into().unwrap()) as usize;
        let mut other = Builder::new(MIB, 1);
        other.blobs[0] = bad;
        let other = other.finish(&[]);
        img[table..table + 320].copy_from_slice(&other[table..table + 320]);
        let tree = Tree::parse(&img).unwrap();
        let error = ChunkTable::parse(&tree).unwrap_err();
        assert_eq!(
            (error.what, error.kind),
            ("chunk_table", ErrorKind::Malformed),
            "case {i}: {error}"
        );
    }
    for flags in [5, 9] {
        let mut bad = chunks(2);
        bad[1].flags = flags;
        let img = image(MIB, &bad);
        let error = ChunkTable::parse(&Tree::parse(&img).unwrap()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
    }
    let mut img = image(MIB, &chunks(1));
    let table = u64::from_le_bytes(img[1152 + 24..1152 + 32].try_into().unwrap()) as usize;
    img[table + 32] = 1;
    let error = ChunkTable::parse(&Tree::parse(&img).unwrap()).unwrap_err();
    assert_eq!(error.what, "chunk_table.blob_index");
}

/// The blob table entry of an image with these chunks; `v2` sets the feature.
fn blob_entry(chunk_size: u32, chunks: &[Chunk], v2: bool) -> BlobEntry {
    let mut img = image(chunk_size, chunks);
    if v2 {
        img[4096 + 84] |= feature::CHUNK_INFO_V2 as u8;
        let size = 24 * chunks.len() as u64;
        img[4096 + 120..4096 + 128].copy_from_slice(&size.to_le_bytes());
        img[4096 + 128..4096 + 136].copy_from_slice(&size.to_le_bytes());
    }
    Tree::parse(&img).unwrap().blob(0).unwrap()
}

fn v1(c: &Chunk) -> Vec<u8> {
    let (u, s) = (
        u64::from(c.uncompressed_size - 1),
        u64::from(c.compressed_size - 1),
    );
    let place = c.uncompressed_offset | (u & 0xf_ffff) << 44 | (u >> 20) << 8;
    let stored = c.compressed_offset | (s & 0xf_ffff) << 44 | (s >> 20) << 40;
    [place.to_le_bytes(), stored.to_le_bytes()].concat()
}

fn v2(c: &Chunk, flags: u64, data: u64) -> Vec<u8> {
    let place =
        c.uncompressed_offset >> 12 | u64::from(c.uncompressed_size - 1) << 32 | flags << 56;
    let stored = c.compressed_offset | u64::from(c.compressed_size) << 40;
    [
        place.to_le_bytes(),
        stored.to_le_bytes(),
        data.to_le_bytes(),
    ]
    .concat()
}

/// Two chunks whose sizes use all 24 bits: one stored as it is, one compressed.
fn large_chunks() -> Vec<Chunk> {
    let size = 16 << 20;
    let whole = Chunk {
        digest: 1,
        flags: 0,
        compressed_offset: 0,
        compressed_size: size - 1,
        uncompressed_offset: 0,
        uncompressed_size: size - 1,
        index: 0,
    };
    let compressed = Chunk {
        digest: 2,
        flags: 1,
        compressed_offset: u64::from(size - 1),
        compressed_size: (9 << 20) + 5,
        uncompressed_offset: size.into(),
        uncompressed_size: size,
        index: 1,
    };
    vec![whole, compressed]
}

#[test]
fn chunk_info_of_both_versions() {
    let chunks = large_chunks();
    let img = image(16 << 20, &chunks);
    let table = ChunkTable::parse(&Tree::parse(&img).unwrap()).unwrap();
    let digests = [[1u8; 32], [2; 32]].concat();
    let array = chunks.iter().flat_map(v1).collect::<Vec<_>>();
    let blob = blob_entry(16 << 20, &chunks, false);
    let map = ChunkMap::from_chunk_info(&blob, &array, Some(&digests)).unwrap();
    assert_eq!(&map, table.map(0).unwrap());

    let blob = blob_entry(16 << 20, &chunks, true);
    let array = [v2(&chunks[0], 0, 0), v2(&chunks[1], 1, 0)].concat();
    let map = ChunkMap::from_chunk_info(&blob, &array, Some(&digests)).unwrap();
    assert_eq!(&map, table.map(0).unwrap());
    let array = [v2(&chunks[0], 0x10, 0xdead_beef), v2(&chunks[1], 1, 7)].concat();
    let map = ChunkMap::from_chunk_info(&blob, &array, None).unwrap();
    let crc: Vec<_> = map.iter().map(|c| (c.flags, c.crc32, c.digest)).collect();
    assert_eq!(
        crc,
        [
            (chunk_flag::HAS_CRC32, 0xdead_beef, None),
            (chunk_flag::COMPRESSED, 0, None)
        ]
    );
}

#[test]
fn chunk_info_that_cannot_be() {
    let chunks = large_chunks();
    let blob = blob_entry(16 << 20, &chunks, true);
    let good = v2(&chunks[0], 0, 0);
    for flags in [2, 4, 8] {
        let array = [good.clone(), v2(&chunks[1], flags, 0)].concat();
        let error = ChunkMap::from_chunk_info(&blob, &array, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
    }
    let array = [good.clone(), v2(&chunks[1], 0x20, 0)].concat();
    assert_eq!(
        ChunkMap::from_chunk_info(&blob, &array, None)
            .unwrap_err()
            .what,
        "chunk_info.flags"
    );
    let array = [good.clone(), v2(&chunks[1], 0, 0)].concat();
    assert_eq!(
        ChunkMap::from_chunk_info(&blob, &array, None)
            .unwrap_err()
            .what,
        "chunk_info"
    );
    assert!(ChunkMap::from_chunk_info(&blob, &array[..47], None).is_err());
    let array = [good.clone(), v2(&chunks[1], 1, 0)].concat();
    assert!(ChunkMap::from_chunk_info(&blob, &array, Some(&[0; 63])).is_err());
    // Both chunks at the same place of the address space.
    let array = [
        good,
        v2(
            &Chunk {
                uncompressed_offset: 0,
                ..chunks[1]
            },
            1,
            0,
        ),
    ]
    .concat();
    assert!(ChunkMap::from_chunk_info(&blob, &array, None).is_err());
}

#[test]
fn meta_file_must_agree_with_the_blob_table() {
    let chunks = chunks(300);
    let blob = blob_entry(MIB, &chunks, false);
    let array = chunks.iter().flat_map(v1).collect::<Vec<_>>();
    let mut file = array.clone();
    file.resize(8192, 0);
    let mut header = [0u8; 4096];
    header[..4].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[4..8].copy_from_slice(&1u32.to_le_bytes());
    header[12..16].copy_from_slice(&300u32.to_le_bytes());
    header[16..24].copy_from_slice(&blob.ci_offset.to_le_bytes());
    header[24..32].copy_from_slice(&4800u64.to_le_bytes());
    header[32..40].copy_from_slice(&4800u64.to_le_bytes());
    header[4092..].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    file.extend(header);
    assert_eq!(chunk_info::from_meta_file(&blob, &file).unwrap(), array);
    let fields = [
        (0, "blob_meta.magic"),
        (4092, "blob_meta.magic"),
        (8, "blob_meta.ci_compressor"),
        (12, "blob_meta.ci_entries"),
        (16, "blob_meta.ci_offset"),
        (24, "blob_meta.ci_compressed_size"),
        (32, "blob_meta.ci_uncompressed_size"),
    ];
    for (at, what) in fields {
        let mut bad = file.clone();
        bad[8192 + at] ^= 1;
        assert_eq!(
            chunk_info::from_meta_file(&blob, &bad).unwrap_err().what,
            what
        );
    }
    let mut bad = file.clone();
    bad[8192 + 4] ^= 4;
    assert_eq!(
        chunk_info::from_meta_file(&blob, &bad).unwrap_err().what,
        "blob_meta.features"
    );
    for len in [0, 100, 8192, file.len() - 1] {
        assert!(chunk_info::from_meta_file(&blob, &file[..len]).is_err());
    }
}

#[test]
fn parts_are_resolved_against_the_map() {
    let mut b = Builder::new(4096, 1);
    let (first, at) = b.chunk(0, 4096, 4096);
    let (second, other) = b.chunk(0, 50, 100);
    let good = vec![(0, first, at), (0, second, other)];
    let whole = b.inode(
        &Spec {
            size: Some(4196),
            ..Spec::new(0o100644)
        },
        &Body::Chunks(good.clone()),
    );
    let too_long = b.inode(
        &Spec {
            size: Some(4197),
            ..Spec::new(0o100644)
        },
        &Body::Chunks(good),
    );
    let elsewhere = b.inode(&Spec::new(0o100644), &Body::Chunks(vec![(0, first, other)]));
    let img = b.finish(&[]);
    let tree = Tree::parse(&img).unwrap();
    let table = ChunkTable::parse(&tree).unwrap();
    let map = table.map(0).unwrap();
    let resolve = |nid| {
        let inode = tree.inode(nid).unwrap();
        tree.chunks(&inode, 0, u64::MAX)
            .map(|p| map.resolve(&p.unwrap()).map(|c| c.index))
            .collect::<Result<Vec<_>, _>>()
    };
    assert_eq!(resolve(whole).unwrap(), [0, 1]);
    assert!(
        resolve(too_long)
            .unwrap_err()
            .message
            .contains("fewer than a file needs")
    );
    assert!(
        resolve(elsewhere)
            .unwrap_err()
            .message
            .contains("lies at 0, not at 4096")
    );
    let empty = ChunkMap::default();
    let inode = tree.inode(whole).unwrap();
    let part = tree.chunks(&inode, 0, 1).next().unwrap().unwrap();
    assert!(
        empty.is_empty()
            && empty
                .resolve(&part)
                .unwrap_err()
                .message
                .contains("not described")
    );
}

#[test]
fn canonical_form_covers_every_promise() {
    let form = |chunks: &[Chunk]| {
        let img = image(MIB, chunks);
        let mut bytes = Vec::new();
        ChunkTable::parse(&Tree::parse(&img).unwrap())
            .unwrap()
            .map(0)
            .unwrap()
            .canonical(|b| bytes.extend_from_slice(b));
        bytes
    };
    let good = chunks(3);
    assert_eq!(form(&good).len(), 3 * 65);
    type Change = fn(&mut Chunk);
    let changes: &[Change] = &[
        |c| c.digest = 9,
        |c| c.compressed_size = 2999,
        |c| c.compressed_offset = 1,
        |c| c.uncompressed_size = 4999,
        |c| c.uncompressed_offset = 0x10_0000,
        |c| c.flags = 0x11,
    ];
    for change in changes {
        let mut other = good.clone();
        change(&mut other[2]);
        assert_ne!(form(&other), form(&good));
    }
}
