//! Invariant: no blob table, chunk-info array, `blob.meta` file or digest section makes a reader panic, or promise chunks outside the blob.
//!
//! What is accepted must hold: chunks in order, each inside the blob, none sharing bytes with another one.

use chunk_store::Promise;
use rafs_format::format::BLOB_ENTRY_SIZE;
use rafs_format::{BlobEntry, Tree};

use crate::image::{self, BLOB_TABLE};
use crate::input::{Input, write_at};

/// Offset of the chunk table's size in the image; without a table the map must come from elsewhere.
const CHUNK_TABLE_SIZE: usize = 1152 + 32;
/// Arrays are padded to blocks in a `blob.meta` file, and end with this header.
const CI_HEADER: usize = 4096;

fn check(entry: &BlobEntry, promise: &Promise, index: usize) {
    let Ok(spec) = promise.spec(index) else {
        return;
    };
    spec.check_overlap().expect("no two chunks share bytes");
    assert!(spec.count() <= entry.chunk_count as usize);
    let (known, bare) = promise.known(index);
    assert_eq!(spec.promised(), (known, bare));
    for number in 0..spec.count() {
        let Some(chunk) = spec.chunk(number) else {
            continue;
        };
        assert!(chunk.size > 0 && chunk.size <= entry.chunk_size);
        assert!(chunk.data_offset + u64::from(chunk.size) <= entry.uncompressed_size);
        let end = chunk.compressed_offset + u64::from(chunk.compressed_size);
        assert!(end <= entry.data_size());
    }
    assert_eq!(spec.alone().len(), spec.count());
    spec.map_digest();
}

/// First byte: bit 0 = without a chunk table, bit 1 = with digests, bit 2 = the bytes are a `blob.meta` file, bit 3 =
/// damaged rather than given. Then changes to the blob's entry (count, then place and 8 bytes each), then the bytes.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let base = image::built();
    let mut bootstrap = base.bootstrap.clone();
    for _ in 0..input.below(8) {
        let at = BLOB_TABLE + input.below(BLOB_ENTRY_SIZE as usize - 8);
        bootstrap[at..at + 8].copy_from_slice(&input.u64().to_le_bytes());
    }
    // A blob's name stands in two places, and a change of one alone is refused at once.
    bootstrap.copy_within(BLOB_TABLE..BLOB_TABLE + 64, 1408);
    if kind & 1 != 0 {
        bootstrap[CHUNK_TABLE_SIZE..CHUNK_TABLE_SIZE + 8].fill(0);
    }
    let Ok(tree) = Tree::parse(&bootstrap) else {
        return;
    };
    let Ok(entry) = tree.blob(0) else { return };
    let _ = (entry.id(), entry.trusted_toc(), entry.has_chunk_info());
    let Ok(mut promise) = Promise::parse(&bootstrap) else {
        return;
    };
    check(&entry, &promise, 0);
    let mut bytes = if kind & 4 != 0 {
        meta_file()
    } else {
        base.ci_array.clone()
    };
    if kind & 8 != 0 {
        crate::input::damage(&mut input, &mut bytes);
    } else {
        bytes = input.rest().to_vec();
    }
    let digests = (kind & 2 != 0).then_some(&base.digests[..]);
    if promise
        .set_chunk_info(0, &bytes, kind & 4 != 0, digests)
        .is_ok()
    {
        check(&entry, &promise, 0);
    }
    assert!(promise.set_chunk_info(1, &bytes, false, None).is_err());
}

/// A `blob.meta` file that fits the built image.
fn meta_file() -> Vec<u8> {
    let base = image::built();
    let mut file = base.ci_array.clone();
    file.resize(file.len().next_multiple_of(4096), 0);
    let mut header = vec![0; CI_HEADER];
    let entry = &base.bootstrap[BLOB_TABLE..];
    let magic = 0xb10b_b10b_u32.to_le_bytes();
    for (at, bytes) in [
        (0, &magic[..]),
        (4, &entry[84..88]),
        (8, &entry[108..112]),
        (12, &entry[72..76]),
        (16, &entry[112..120]),
        (24, &entry[120..128]),
        (32, &entry[128..136]),
        (4092, &magic[..]),
    ] {
        header[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(header);
    file
}

pub fn seeds() -> Vec<Vec<u8>> {
    let base = image::built();
    let mut seeds = Vec::new();
    for kind in [0, 1, 2, 3] {
        seeds.push([&[kind, 0][..], &base.ci_array].concat());
        seeds.push([&[kind | 4, 0][..], &meta_file()].concat());
        seeds.push([&[kind | 8, 0][..], &write_at(16, &[0xff; 8])].concat());
        seeds.push([&[kind | 12, 0][..], &write_at(4096, &[0x5a; 4])].concat());
    }
    // One field of the entry each: numbers that other fields decide on.
    for at in [64u8, 68, 72, 76, 84, 88, 96, 108, 112, 120, 128] {
        for value in [0u64, 1, 5, 1 << 24, u64::MAX] {
            let mut seed = vec![9, 1, at];
            seed.extend(value.to_le_bytes());
            seeds.push(seed);
        }
    }
    // Version 2 of the array: twice as many bytes for half the chunks would be refused, so the sizes change too.
    let count = u64::from(u32::from_le_bytes(
        base.bootstrap[BLOB_TABLE + 72..BLOB_TABLE + 76]
            .try_into()
            .unwrap_or_default(),
    ));
    let mut seed = vec![1, 2, 84];
    seed.extend([&base.bootstrap[BLOB_TABLE + 84..BLOB_TABLE + 92]].concat());
    seed[3] |= 4;
    seed.push(128);
    seed.extend((24 * count).to_le_bytes());
    for i in 0..count {
        seed.extend((i | 4095 << 32).to_le_bytes());
        seed.extend((4096 * i | 4096 << 40).to_le_bytes());
        seed.extend(0u64.to_le_bytes());
    }
    seeds.push(seed);
    seeds
}
