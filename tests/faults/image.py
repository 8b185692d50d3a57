"""The image of the fault matrix: one directory for each cell, so that each finds a cold cache.

All directories have the same files in the same sizes; the bytes differ. That way one daemon goes through all
patterns with one fault.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME, build_image
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 16 << 10
# Read-ahead grows to four times that, a quarter of a folder: each pattern needs several fetches, and one that
# is repeated in vain shows.
AMPLIFY = CHUNK
N_SMALL = 24
BIG = ("lib0", "lib1")
BIG_SIZE = 12 * CHUNK + 1234


@attrs.frozen
class Chunk:
    """Where a chunk is: *length* bytes at *offset* of its file, *stored* bytes at *at* of the blob."""

    number: int
    offset: int
    length: int
    at: int
    stored: int

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte in the blob, as a Fault wants it."""
        return self.at, self.at + self.stored - 1


@attrs.frozen
class Folder:
    """The files of one cell, by name, and their chunks."""

    name: str
    files: dict[str, bytes]
    chunks: dict[str, list[Chunk]]

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte of the folder's chunks in the blob."""
        every = [chunk for chunks in self.chunks.values() for chunk in chunks]
        return min(c.at for c in every), max(c.at + c.stored for c in every) - 1

    def touched(self, name: str, offset: int, size: int) -> list[Chunk]:
        """The chunks that a read needs."""
        return [c for c in self.chunks[name] if c.offset < offset + size and offset < c.offset + c.length]


@attrs.frozen
class Image:
    """A built image and its folders by name."""

    out: Path
    blob_id: str
    blob_size: int
    folders: dict[str, Folder]

    @property
    def digest(self) -> str:
        return f"sha256:{self.blob_id}"


def _content(rng: random.Random, size: int) -> bytes:
    """Half noise, half text: about half of it is left when it is compressed."""
    data = bytearray()
    while len(data) < size:
        data += rng.randbytes(512) + b"%08x of the fault matrix " % rng.getrandbits(32) * 16
    return bytes(data[:size])


def make_image(base: Path, names: list[str]) -> Image:
    """An image with a folder for each of *names*, each of them smaller than 600 KB."""
    contents: dict[str, dict[str, bytes]] = {}
    for seed, name in enumerate(names):
        rng = random.Random(seed)
        files = {f"etc{i:02}": _content(rng, 200 + (i * 977) % 9000) for i in range(N_SMALL)}
        files |= {big: _content(rng, BIG_SIZE) for big in BIG}
        contents[name] = files
        folder = base / "source" / name
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
    built = build_image(base / "source", base / "out", chunk_size=CHUNK)
    assert built.blob is not None
    assert built.blob_id is not None
    tree = Tree.parse((base / "out" / BOOTSTRAP_NAME).read_bytes())
    (chunk_map,) = ChunkMap.from_chunk_table(tree)
    folders = {}
    for name, files in contents.items():
        folder_inode = tree.inode(tree.lookup(tree.inode(tree.root), name.encode())[0])  # type: ignore[index]
        chunks: dict[str, list[Chunk]] = {}
        for file in files:
            found = tree.lookup(folder_inode, file.encode())
            assert found is not None
            offset = 0
            chunks[file] = []
            for part in tree.chunks(tree.inode(found[0])):
                info = chunk_map.resolve(part)
                chunks[file].append(
                    Chunk(part.chunk_index, offset, part.length, info.compressed_offset, info.compressed_size)
                )
                offset += part.length
        folders[name] = Folder(name, files, chunks)
    return Image(base / "out", built.blob_id, built.blob.stat().st_size, folders)
