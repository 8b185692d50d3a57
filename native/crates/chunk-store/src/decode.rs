//! Decoding and verification of one chunk. Output never exceeds the promised size, whatever the input says.

use std::cell::RefCell;
use std::io::Read;

use crate::spec::{CHUNK_COMPRESSED, CHUNK_DIGEST, ChunkSpec, Compressor, Digester};

/// Scratch memory above this size is given back after use; chunks are 1 MiB unless the image says otherwise.
const KEEP_SCRATCH: usize = 2 << 20;

/// Why a chunk's bytes are not what the image promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// The codec refuses the bytes, or they decode to another length.
    Decode,
    /// The length is right, the digest is not.
    Digest,
}

struct Scratch {
    out: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { out: Vec::new(), zstd: None }) };
}

/// Whether `bytes` have the chunk's digest; `None` when the image promises none.
pub fn digest_matches(digester: Digester, chunk: &ChunkSpec, bytes: &[u8]) -> Option<bool> {
    use sha2::Digest as _;
    if chunk.flags & CHUNK_DIGEST == 0 {
        return None;
    }
    Some(match digester {
        Digester::Blake3 => *blake3::hash(bytes).as_bytes() == chunk.digest,
        Digester::Sha256 => *sha2::Sha256::digest(bytes) == chunk.digest,
    })
}

fn gunzip(src: &[u8], out: &mut [u8]) -> Option<()> {
    let mut reader = flate2::read::GzDecoder::new(src);
    reader.read_exact(out).ok()?;
    // One more read makes the decoder check the trailer, and shows output beyond the promised size.
    let mut more = [0u8; 1];
    (reader.read(&mut more).ok()? == 0).then_some(())
}

/// Decodes `src` into exactly `out`; `None` when the bytes are malformed or have another length.
fn decode_into(
    compressor: Compressor,
    src: &[u8],
    out: &mut [u8],
    zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
) -> Option<()> {
    match compressor {
        Compressor::None => (src.len() == out.len()).then(|| out.copy_from_slice(src)),
        Compressor::Lz4Block => {
            (lz4_flex::block::decompress_into(src, out).ok()? == out.len()).then_some(())
        }
        Compressor::Gzip => gunzip(src, out),
        Compressor::Zstd => {
            if zstd.is_none() {
                *zstd = zstd::bulk::Decompressor::new().ok();
            }
            (zstd.as_mut()?.decompress_to_buffer(src, out).ok()? == out.len()).then_some(())
        }
    }
}

/// Decodes and verifies `src`, then hands the chunk's bytes to `store` (in the thread's scratch memory, or `src`
/// itself when it is stored uncompressed).
pub fn with_decoded<T>(
    compressor: Compressor,
    digester: Digester,
    chunk: &ChunkSpec,
    src: &[u8],
    store: impl FnOnce(&[u8]) -> T,
) -> Result<T, Defect> {
    let size = chunk.size as usize;
    if chunk.flags & CHUNK_COMPRESSED == 0 || compressor == Compressor::None {
        if src.len() != size {
            return Err(Defect::Decode);
        }
        return match digest_matches(digester, chunk, src) {
            Some(false) => Err(Defect::Digest),
            _ => Ok(store(src)),
        };
    }
    SCRATCH.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        let Scratch { out, zstd } = &mut *scratch;
        if out.len() < size {
            out.resize(size, 0);
        }
        let result = match out
            .get_mut(..size)
            .map(|bytes| (decode_into(compressor, src, bytes, zstd), bytes))
        {
            Some((Some(()), bytes)) => match digest_matches(digester, chunk, bytes) {
                Some(false) => Err(Defect::Digest),
                _ => Ok(store(bytes)),
            },
            _ => Err(Defect::Decode),
        };
        if out.len() > KEEP_SCRATCH {
            *out = Vec::new();
        }
        result
    })
}

/// Lends the thread's scratch memory, `size` bytes of it.
pub fn with_scratch<T>(size: usize, body: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        if scratch.out.len() < size {
            scratch.out.resize(size, 0);
        }
        let result = body(&mut scratch.out[..size]);
        if scratch.out.len() > KEEP_SCRATCH {
            scratch.out = Vec::new();
        }
        result
    })
}

/// Gives the calling thread's scratch memory back.
pub fn drop_scratch() {
    SCRATCH.with(|scratch| {
        *scratch.borrow_mut() = Scratch {
            out: Vec::new(),
            zstd: None,
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn data(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i / 7 % 251) as u8).collect()
    }

    fn compress(compressor: Compressor, bytes: &[u8]) -> Vec<u8> {
        match compressor {
            Compressor::None => bytes.to_vec(),
            Compressor::Lz4Block => lz4_flex::block::compress(bytes),
            Compressor::Gzip => {
                let mut e =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                e.write_all(bytes).unwrap();
                e.finish().unwrap()
            }
            Compressor::Zstd => zstd::bulk::compress(bytes, 3).unwrap(),
        }
    }

    fn chunk(bytes: &[u8], digester: Digester) -> ChunkSpec {
        use sha2::Digest as _;
        ChunkSpec {
            compressed_offset: 0,
            compressed_size: 1,
            data_offset: 0,
            size: bytes.len() as u32,
            flags: CHUNK_COMPRESSED | CHUNK_DIGEST,
            digest: match digester {
                Digester::Blake3 => *blake3::hash(bytes).as_bytes(),
                Digester::Sha256 => sha2::Sha256::digest(bytes).into(),
            },
        }
    }

    const ALL: [Compressor; 4] = [
        Compressor::None,
        Compressor::Lz4Block,
        Compressor::Gzip,
        Compressor::Zstd,
    ];

    #[test]
    fn every_codec_and_digest_round_trips() {
        for compressor in ALL {
            for digester in [Digester::Blake3, Digester::Sha256] {
                for n in [1, 4096, 100_000, 3 << 20] {
                    let bytes = data(n);
                    let packed = compress(compressor, &bytes);
                    let got = with_decoded(
                        compressor,
                        digester,
                        &chunk(&bytes, digester),
                        &packed,
                        <[u8]>::to_vec,
                    );
                    assert_eq!(got.unwrap(), bytes);
                }
            }
        }
    }

    #[test]
    fn other_lengths_are_decode_errors() {
        for compressor in ALL {
            let bytes = data(5000);
            let packed = compress(compressor, &bytes);
            for size in [4999, 5001] {
                let wrong = ChunkSpec {
                    size,
                    ..chunk(&bytes, Digester::Blake3)
                };
                let got = with_decoded(compressor, Digester::Blake3, &wrong, &packed, |_| ());
                assert_eq!(got, Err(Defect::Decode), "{compressor:?} {size}");
            }
            let cut = with_decoded(
                compressor,
                Digester::Blake3,
                &chunk(&bytes, Digester::Blake3),
                &packed[..packed.len() - 1],
                |_| (),
            );
            assert_eq!(cut, Err(Defect::Decode), "{compressor:?} cut");
        }
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        for compressor in ALL {
            let bytes = data(600);
            let packed = compress(compressor, &bytes);
            for at in 0..packed.len() {
                let mut wrong = packed.clone();
                wrong[at] ^= 0x10;
                let spec = chunk(&bytes, Digester::Sha256);
                // Some header bits do not change the output; then the output must be right.
                match with_decoded(compressor, Digester::Sha256, &spec, &wrong, <[u8]>::to_vec) {
                    Ok(got) => assert_eq!(got, bytes),
                    Err(Defect::Decode | Defect::Digest) => {}
                }
            }
        }
    }

    #[test]
    fn a_chunk_without_digest_is_only_decoded() {
        let bytes = data(10);
        let spec = ChunkSpec {
            flags: 0,
            ..chunk(&bytes, Digester::Blake3)
        };
        assert_eq!(
            with_decoded(Compressor::Zstd, Digester::Blake3, &spec, &bytes, |b| b
                .len()),
            Ok(10)
        );
        assert_eq!(digest_matches(Digester::Blake3, &spec, &bytes), None);
    }
}
