"""Compresses and decompresses chunks, by the compressor number of an image.

Each chunk stands alone: one zstd frame, one raw LZ4 block without a size, one gzip member. A chunk that would
not shrink is stored as it is.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING

import lz4.block
import zstandard

from virtiofsd_rafs.errors import DigestMismatch
from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.rafs.records import Buffer

ZSTD_LEVEL = 3  # zstd's default, and what nydus-image writes
_GZIP_LEVEL = 6  # zlib's default
_GZIP_WBITS = 31  # 32 KiB window, gzip header and trailer
_UNKNOWN_CONTENT_SIZES = (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)


def new_compressor(compressor: Compressor) -> Callable[[bytes], bytes]:
    """A function that compresses one chunk; it returns the chunk itself when that would not become shorter.

    The function keeps a context for the next chunk and belongs to one thread.
    """
    match compressor:
        case Compressor.NONE:
            return _keep
        case Compressor.LZ4_BLOCK:
            pack: Callable[[bytes], bytes] = partial(lz4.block.compress, store_size=False)
        case Compressor.GZIP:
            pack = _gzip
        case Compressor.ZSTD:
            pack = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress

    def shorter(data: bytes) -> bytes:
        packed = pack(data)
        return packed if len(packed) < len(data) else data

    return shorter


def _keep(data: bytes) -> bytes:
    return data


def _gzip(data: bytes) -> bytes:
    stream = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WBITS)
    return stream.compress(data) + stream.flush()


def decompress(data: Buffer, compressor: Compressor, size: int) -> bytes:
    """The *size* bytes that *data* stands for; never allocates more than that.

    Raises DigestMismatch when *data* is not what the compressor wrote: these are not the promised bytes.
    """
    try:
        match compressor:
            case Compressor.NONE:
                unpacked = bytes(data)
            case Compressor.LZ4_BLOCK:
                unpacked = lz4.block.decompress(data, uncompressed_size=size)
            case Compressor.GZIP:
                stream = zlib.decompressobj(_GZIP_WBITS)
                # One byte more than expected, so that a longer stream is noticed.
                unpacked = stream.decompress(data, size + 1)
                if not stream.eof or stream.unused_data:
                    raise DigestMismatch(f"a gzip member does not end after {size} bytes")
            case Compressor.ZSTD:
                content = zstandard.get_frame_parameters(data).content_size
                if content not in _UNKNOWN_CONTENT_SIZES and content != size:
                    raise DigestMismatch(f"a zstd frame of {content} bytes instead of {size}")
                unpacked = zstandard.ZstdDecompressor().decompress(
                    data, max_output_size=size, allow_extra_data=False
                )
    except (lz4.block.LZ4BlockError, zlib.error, zstandard.ZstdError, MemoryError) as e:
        raise DigestMismatch(
            f"{len(data)} bytes do not decompress with {compressor.name.lower()}: {e}"
        ) from e
    if len(unpacked) != size:
        raise DigestMismatch(
            f"{len(data)} bytes decompress ({compressor.name.lower()}) to {len(unpacked)} instead of {size}"
        )
    return unpacked
