"""Compressors and digesters: what comes back is what went in, or a named error."""

from __future__ import annotations

import random
import zlib

import lz4.block
import pytest
import zstandard

from virtiofsd_rafs.blob import codecs, digest
from virtiofsd_rafs.errors import DigestMismatch
from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor, Digester

TEXT = b"the quick brown fox jumps over the lazy dog\n" * 1000
COMPRESSORS = [Compressor.LZ4_BLOCK, Compressor.GZIP, Compressor.ZSTD]


@pytest.mark.parametrize("compressor", list(Compressor))
@pytest.mark.parametrize("data", [b"x", bytes(4096), TEXT, random.Random(1).randbytes(70_000)])
def test_round_trip(compressor: Compressor, data: bytes) -> None:
    compress = codecs.new_compressor(compressor)
    packed = compress(data)
    assert packed == compress(data)
    kind = compressor if len(packed) < len(data) else Compressor.NONE
    assert codecs.decompress(packed, kind, len(data)) == data
    assert codecs.decompress(memoryview(packed), kind, len(data)) == data


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_what_does_not_shrink_is_kept(compressor: Compressor) -> None:
    data = random.Random(2).randbytes(5000)
    assert codecs.new_compressor(compressor)(data) is data


def test_formats_are_those_that_other_tools_read() -> None:
    assert zstandard.ZstdDecompressor().decompress(codecs.new_compressor(Compressor.ZSTD)(TEXT)) == TEXT
    assert zlib.decompress(codecs.new_compressor(Compressor.GZIP)(TEXT), 31) == TEXT
    packed = codecs.new_compressor(Compressor.LZ4_BLOCK)(TEXT)
    assert lz4.block.decompress(packed, uncompressed_size=len(TEXT)) == TEXT


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("size", [0, 1, len(TEXT) - 1, len(TEXT) + 1, 1 << 24])
def test_other_size_than_promised(compressor: Compressor, size: int) -> None:
    packed = codecs.new_compressor(compressor)(TEXT)
    with pytest.raises(DigestMismatch):
        codecs.decompress(packed, compressor, size)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("data", [b"", b"\0", b"garbage" * 10, bytes(100)])
def test_garbage(compressor: Compressor, data: bytes) -> None:
    with pytest.raises(DigestMismatch):
        codecs.decompress(data, compressor, 4096)


@pytest.mark.parametrize("compressor", [Compressor.GZIP, Compressor.ZSTD])
def test_bytes_behind_the_end(compressor: Compressor) -> None:
    packed = codecs.new_compressor(compressor)(TEXT)
    for more in (b"\0", packed):
        with pytest.raises(DigestMismatch):
            codecs.decompress(packed + more, compressor, len(TEXT))


def test_frames_without_a_size_are_bounded() -> None:
    """A zstd frame need not say how long it is; it must not be unpacked beyond what the image promises."""
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100 << 20))
    with pytest.raises(DigestMismatch):
        codecs.decompress(bomb, Compressor.ZSTD, 4096)
    small = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    assert codecs.decompress(small, Compressor.ZSTD, len(TEXT)) == TEXT


def test_known_digests() -> None:
    assert (
        digest.digest_of(b"", Digester.SHA256).hex()
        == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    assert (
        digest.digest_of(b"", Digester.BLAKE3).hex()
        == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )


@pytest.mark.parametrize("digester", list(Digester))
def test_verify(digester: Digester) -> None:
    expected = digest.digest_of(TEXT, digester)
    digest.verify(TEXT, digester, expected, "chunk 7")
    with pytest.raises(DigestMismatch, match=f"chunk 7 .*{expected.hex()}"):
        digest.verify(TEXT[1:], digester, expected, "chunk 7")
