//! Invariant: no table of contents makes its reader panic, and a section that it names lies inside the blob.

use rafs_format::Toc;

use crate::input::Input;

const ENTRY: usize = 128;
const TAR: usize = 512;

/// Eight bytes: the blob's size. One: bit 0 = the tar header is made right. Then the table.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let blob_size = input.u64();
    let kind = input.u8();
    let mut tail = input.rest().to_vec();
    if kind & 1 != 0 {
        tail.extend(header(tail.len()));
    }
    let Ok(toc) = Toc::parse(&tail, blob_size) else {
        return;
    };
    assert!(toc.iter().count() <= tail.len() / ENTRY);
    for section in toc.iter() {
        let name = section.name();
        assert!(!name.is_empty());
        assert!(toc.section(name).is_some());
        if name != rafs_format::toc::IMAGE_BLOB {
            let end = section
                .compressed_offset
                .checked_add(section.compressed_size);
            assert!(end.is_some_and(|end| end <= blob_size));
        }
    }
}

/// The tar header behind a table of `len` bytes.
fn header(len: usize) -> Vec<u8> {
    let mut header = vec![0u8; TAR];
    header[..13].copy_from_slice(b"rafs.blob.toc");
    header[124..136].copy_from_slice(format!("{len:011o}\0").as_bytes());
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn entry(name: &str, flags: u32, offset: u64, stored: u64, size: u64) -> Vec<u8> {
    let mut entry = vec![0; ENTRY];
    entry[..4].copy_from_slice(&flags.to_le_bytes());
    entry[8..8 + name.len()].copy_from_slice(name.as_bytes());
    entry[24..56].fill(7);
    for (at, number) in [(56, offset), (64, stored), (72, size)] {
        entry[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    entry
}

pub fn seeds() -> Vec<Vec<u8>> {
    let table = [
        entry("image.blob", 1, 1000, 1000, 2000),
        entry("blob.meta", 2, 1512, 100, 160),
        entry("blob.meta.header", 1, 1612, 4096, 4096),
        entry("blob.digest", 4, 6000, 320, 320),
    ]
    .concat();
    let size = 10_000u64.to_le_bytes();
    vec![
        [&size[..], &[1], &table].concat(),
        [&size[..], &[0], &table, &header(table.len())].concat(),
        [&size[..], &[1], &table[..ENTRY], &table[..ENTRY]].concat(),
        [&size[..], &[1]].concat(),
    ]
}
