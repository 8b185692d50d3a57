"""Small images made on the spot, and what is in their blobs."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.blob.chunk_map import ChunkInfo, ChunkMap
from virtiofsd_rafs.blob.codecs import decompress
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from pathlib import Path

CHUNK_SIZE = 4096


class MadeImage(NamedTuple):
    """An image of one blob."""

    bootstrap: bytes
    blob: bytes
    blob_id: str
    folder: Path
    chunks: list[ChunkInfo]
    plain: list[bytes]
    """The uncompressed bytes of each chunk, as the Python codecs see them."""


def make_image(
    folder: Path,
    *,
    n_files: int = 6,
    chunks_each: int = 4,
    seed: int = 1,
    compressor: str = "zstd",
    digester: str = "blake3",
    chunk_size: int = CHUNK_SIZE,
) -> MadeImage:
    """An image of *n_files* files, the last chunk of each one shorter than the others."""
    rng = random.Random(seed)
    source = folder / "source"
    source.mkdir(parents=True)
    for i in range(n_files):
        words = [rng.randbytes(6).hex().encode() for _ in range(64)]
        size = chunk_size * (chunks_each - 1) + rng.randrange(1, chunk_size)
        content = b" ".join(rng.choices(words, k=size // 13 + 1))[:size]
        (source / f"file{i:03}").write_bytes(content)
    result = build_image(
        source, folder / "image", compressor=compressor, digester=digester, chunk_size=chunk_size
    )
    assert result.blob is not None
    assert result.blob_id is not None
    bootstrap, blob = result.bootstrap.read_bytes(), result.blob.read_bytes()
    (chunk_map,) = ChunkMap.from_chunk_table(Tree.parse(bootstrap))
    chunks = sorted(chunk_map, key=lambda chunk: chunk.chunk_index)
    plain = []
    for chunk in chunks:
        stored = blob[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
        if chunk.compressed:
            stored = decompress(stored, chunk_map.blob.compressor, chunk.uncompressed_size)
        plain.append(stored)
    return MadeImage(bootstrap, blob, result.blob_id, result.blob.parent, chunks, plain)
