//! Invariant: no stored bytes make a decoder panic or write beyond the promised size, and what one accepts has that size and digest.

use std::io::Write as _;

use chunk_store::decode::{Defect, digest_matches, with_decoded};
use chunk_store::spec::{CHUNK_COMPRESSED, CHUNK_DIGEST, ChunkSpec, Compressor, Digester};

use crate::image;
use crate::input::Input;

/// Largest chunk that is decoded: more only costs time.
const MOST: u32 = 1 << 20;
const ALL: [Compressor; 4] = [
    Compressor::None,
    Compressor::Lz4Block,
    Compressor::Gzip,
    Compressor::Zstd,
];

fn pack(compressor: Compressor, bytes: &[u8]) -> Vec<u8> {
    match compressor {
        Compressor::None => bytes.to_vec(),
        Compressor::Lz4Block => lz4_flex::block::compress(bytes),
        Compressor::Gzip => {
            let level = flate2::Compression::default();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(bytes).expect("memory");
            encoder.finish().expect("memory")
        }
        Compressor::Zstd => zstd::bulk::compress(bytes, 3).expect("memory"),
    }
}

/// One byte: bits 0 and 1 the compressor, 2 the digester, 3 a digest is promised, 4 marked as compressed, 5 = the bytes are
/// to be packed first. Three bytes: the promised size. Then the bytes.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let compressor = ALL[usize::from(kind & 3)];
    let digester = if kind & 4 == 0 {
        Digester::Blake3
    } else {
        Digester::Sha256
    };
    let size = input.u24() % (MOST + 1);
    let bytes = input.rest();
    let mut flags = 0;
    if kind & 8 != 0 {
        flags |= CHUNK_DIGEST;
    }
    if kind & 16 != 0 {
        flags |= CHUNK_COMPRESSED;
    }
    let chunk = ChunkSpec {
        compressed_offset: 0,
        compressed_size: 0,
        data_offset: 0,
        size,
        flags,
        digest: [0; 32],
    };
    if kind & 32 != 0 && !bytes.is_empty() {
        let stored = pack(compressor, bytes);
        let whole = ChunkSpec {
            size: bytes.len() as u32,
            flags: CHUNK_COMPRESSED,
            ..chunk
        };
        let same = with_decoded(compressor, digester, &whole, &stored, |out| out == bytes);
        assert_eq!(same, Ok(true), "what was packed comes back");
        let longer = ChunkSpec {
            size: bytes.len() as u32 + 1,
            ..whole
        };
        let result = with_decoded(compressor, digester, &longer, &stored, |_| ());
        assert_eq!(result, Err(Defect::Decode));
        return;
    }
    let decoded = with_decoded(compressor, digester, &chunk, bytes, |out| {
        assert_eq!(out.len(), size as usize);
        assert_ne!(digest_matches(digester, &chunk, out), Some(false));
    });
    if decoded.is_ok() && (flags & CHUNK_COMPRESSED == 0 || compressor == Compressor::None) {
        assert_eq!(bytes.len(), size as usize);
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let texts = [
        b"all work and no play ".repeat(40),
        vec![0; 5000],
        image::noise(3, 300),
        b"x".to_vec(),
    ];
    for (number, compressor) in ALL.into_iter().enumerate() {
        for text in &texts {
            let size = &(text.len() as u32).to_le_bytes()[..3];
            let stored = pack(compressor, text);
            let kind = number as u8 | 16;
            seeds.push([&[kind][..], size, &stored].concat());
            seeds.push([&[kind | 12][..], size, &stored].concat());
            seeds.push([&[kind | 32][..], size, text].concat());
        }
    }
    // A frame of the streaming encoder has no content size, and a block that repeats itself.
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).expect("memory");
    encoder.write_all(&texts[0]).expect("memory");
    let frame = encoder.finish().expect("memory");
    let size = &(texts[0].len() as u32).to_le_bytes()[..3];
    seeds.push([&[3 | 16][..], size, &frame].concat());
    seeds.push([&[3 | 16][..], size, &frame, &frame].concat());
    seeds
}
