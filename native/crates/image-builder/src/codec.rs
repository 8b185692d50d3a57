//! Compression and digests of single chunks. The result depends on the chunk alone, never on what came before.

use std::io::{self, Write as _};

use rafs_format::{Compressor, Digester};
use sha2::Digest as _;

/// zstd's default, which is what nydus-image writes.
const ZSTD_LEVEL: i32 = 3;
/// zlib's default.
const GZIP_LEVEL: u32 = 6;

/// The digest of a chunk.
pub fn digest(digester: Digester, data: &[u8]) -> [u8; 32] {
    match digester {
        Digester::Blake3 => *blake3::hash(data).as_bytes(),
        Digester::Sha256 => sha2::Sha256::digest(data).into(),
    }
}

/// Compresses chunks; keeps its memory for the next one.
pub struct Packer {
    kind: Kind,
    out: Vec<u8>,
}

enum Kind {
    None,
    Lz4,
    Gzip,
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Packer {
    pub fn new(compressor: Compressor) -> io::Result<Packer> {
        let kind = match compressor {
            Compressor::None => Kind::None,
            Compressor::Lz4Block => Kind::Lz4,
            Compressor::Gzip => Kind::Gzip,
            Compressor::Zstd => Kind::Zstd(Box::new(zstd::bulk::Compressor::new(ZSTD_LEVEL)?)),
        };
        Ok(Packer {
            kind,
            out: Vec::new(),
        })
    }

    /// `data` compressed, or `None` when that is not shorter.
    pub fn pack(&mut self, data: &[u8]) -> io::Result<Option<&[u8]>> {
        let out = &mut self.out;
        out.clear();
        match &mut self.kind {
            Kind::None => return Ok(None),
            Kind::Lz4 => {
                out.resize(lz4_flex::block::get_maximum_output_size(data.len()), 0);
                let n = lz4_flex::block::compress_into(data, out).map_err(io::Error::other)?;
                out.truncate(n);
            }
            Kind::Gzip => {
                let level = flate2::Compression::new(GZIP_LEVEL);
                let mut stream = flate2::write::GzEncoder::new(&mut *out, level);
                stream.write_all(data)?;
                stream.finish()?;
            }
            Kind::Zstd(context) => {
                out.reserve(zstd::zstd_safe::compress_bound(data.len()));
                context.compress_to_buffer(data, out)?;
            }
        }
        Ok((out.len() < data.len()).then_some(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn unpack(compressor: Compressor, packed: &[u8], size: usize) -> Vec<u8> {
        match compressor {
            Compressor::None => packed.to_vec(),
            Compressor::Lz4Block => lz4_flex::block::decompress(packed, size).unwrap(),
            Compressor::Gzip => {
                let mut out = Vec::new();
                flate2::read::GzDecoder::new(packed)
                    .read_to_end(&mut out)
                    .unwrap();
                out
            }
            Compressor::Zstd => zstd::bulk::decompress(packed, size).unwrap(),
        }
    }

    const ALL: [Compressor; 4] = [
        Compressor::None,
        Compressor::Lz4Block,
        Compressor::Gzip,
        Compressor::Zstd,
    ];

    #[test]
    fn a_chunk_packs_the_same_whatever_came_before() {
        let text = b"some text that repeats, ".repeat(5000);
        for compressor in ALL {
            let first = Packer::new(compressor)
                .unwrap()
                .pack(&text)
                .unwrap()
                .map(<[u8]>::to_vec);
            let mut packer = Packer::new(compressor).unwrap();
            for other in [&text[..100], &[7; 1 << 20], &text[3..]] {
                packer.pack(other).unwrap();
            }
            let later = packer.pack(&text).unwrap().map(<[u8]>::to_vec);
            assert_eq!(first, later);
            match later {
                Some(packed) => assert_eq!(unpack(compressor, &packed, text.len()), text),
                None => assert_eq!(compressor, Compressor::None),
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_kept() {
        let noise: Vec<u8> = (0..100_u32)
            .flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes())
            .collect();
        for compressor in ALL {
            assert_eq!(Packer::new(compressor).unwrap().pack(&noise).unwrap(), None);
            assert_eq!(Packer::new(compressor).unwrap().pack(b"x").unwrap(), None);
        }
    }

    #[test]
    fn digests_are_those_of_their_algorithm() {
        assert_eq!(digest(Digester::Blake3, b"")[..4], [0xaf, 0x13, 0x49, 0xb9]);
        assert_eq!(digest(Digester::Sha256, b"")[..4], [0xe3, 0xb0, 0xc4, 0x42]);
    }
}
