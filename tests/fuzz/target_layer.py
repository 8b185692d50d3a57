"""Invariant: any bootstrap layer is unpacked or refused, in bounded memory, in time bounded by its size."""

from __future__ import annotations

import gzip
import io
import time

import zstandard

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.image.layer import decompress, extract_layer, pack_layer

LIMIT = 1 << 20
# A hang guard, not a measurement: the largest input takes milliseconds.
SECONDS = 10


def run(data: bytes) -> None:
    """The first byte: compressed bytes, or a tar."""
    kind, data = data[:1], data[1:]
    start = time.monotonic()
    try:
        tar = data if kind and kind[0] & 1 else decompress(io.BytesIO(data), limit=LIMIT)
        assert len(tar) <= max(LIMIT, len(data))
        files = extract_layer(tar)
        assert len(files.bootstrap) <= len(tar)
        assert all(len(blob) == 64 for blob in files.blob_metas)
    except BadImage as e:
        _ = str(e)
    assert time.monotonic() - start < SECONDS


def seeds() -> list[bytes]:
    """A layer as it is, and compressed in every way; many empty members."""
    tar = pack_layer(b"boot" * 300, {"1" * 64: b"meta" * 100, "2" * 64: b""})
    member = gzip.compress(b"", mtime=0)
    return [
        b"\x01" + tar,
        b"\x00" + tar,
        b"\x00" + gzip.compress(tar, mtime=0),
        b"\x00" + gzip.compress(tar[:512], mtime=0) + gzip.compress(tar[512:], mtime=0) + bytes(100),
        b"\x00" + zstandard.ZstdCompressor().compress(tar),
        b"\x00" + member * 1000,
        b"\x00" + gzip.compress(bytes(LIMIT + 1), mtime=0),
    ]
