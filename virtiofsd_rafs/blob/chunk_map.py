"""The chunks of a blob: where each one lies in the blob and in the uncompressed address space, and its
digest.

There are two sources. The chunk table of the bootstrap has everything. The chunk information of the blob has
no digests; they come from the blob's digest section when its table of contents is authenticated. A chunk
without a digest says so, and it is for the caller to refuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import attrs

from virtiofsd_rafs.blob import c_blob
from virtiofsd_rafs.blob.chunk_info import CiEntry, parse_array
from virtiofsd_rafs.blob.digest import DIGEST_SIZE
from virtiofsd_rafs.errors import BadImage, UnsupportedFeature
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from virtiofsd_rafs.rafs.records import Buffer
    from virtiofsd_rafs.rafs.superblock import BlobEntry
    from virtiofsd_rafs.rafs.v6 import ChunkRef, Tree


class ChunkInfo(NamedTuple):
    """One chunk of a blob; offsets and sizes in bytes.

    ``flags`` are those of the chunk table, only COMPRESSED and HAS_CRC32. ``digest`` is that of the
    uncompressed bytes, None when the image does not promise any.
    """

    chunk_index: int
    flags: int
    compressed_offset: int
    uncompressed_offset: int
    compressed_size: int
    uncompressed_size: int
    crc32: int
    digest: bytes | None

    @property
    def compressed(self) -> bool:
        return bool(self.flags & c.ChunkFlags.COMPRESSED)


@attrs.frozen
class ChunkMap:
    """The known chunks of ``blob`` by index. A chunk that no file of the image uses may be missing."""

    blob: BlobEntry
    chunks: dict[int, ChunkInfo]

    @classmethod
    def from_chunk_table(cls, tree: Tree) -> list[ChunkMap]:
        """The maps of all blobs of *tree*, in the order of its blob table. Raises BadImage or
        UnsupportedFeature.
        """
        per_blob: list[list[ChunkInfo]] = [[] for _ in tree.blobs]
        for r in tree.chunk_table():
            chunk = ChunkInfo(
                r.chunk_index,
                r.flags,
                r.compressed_offset,
                r.uncompressed_offset,
                r.compressed_size,
                r.uncompressed_size,
                r.crc32,
                r.digest,
            )
            _check(tree.blobs[r.blob_index], chunk, "chunk table")
            per_blob[r.blob_index].append(chunk)
        return [_assemble(*pair, "chunk table") for pair in zip(tree.blobs, per_blob, strict=True)]

    @classmethod
    def from_chunk_info(cls, blob: BlobEntry, array: Buffer, digests: Buffer | None = None) -> ChunkMap:
        """The map of *blob* by its uncompressed ci array and, 32 bytes per chunk, its digest section.

        Pass digests only after their source was authenticated: the bootstrap does not cover them.
        Raises BadImage or UnsupportedFeature.
        """
        if digests is not None and len(digests) != blob.chunk_count * DIGEST_SIZE:
            raise BadImage("blob.digest", f"{len(digests)} bytes for {blob.chunk_count} chunks")
        v2 = bool(blob.record.features & c.BlobFeatures.CHUNK_INFO_V2)
        chunks = []
        for index, entry in enumerate(parse_array(array, blob.chunk_count, v2=v2)):
            at = index * DIGEST_SIZE
            digest = None if digests is None else bytes(digests[at : at + DIGEST_SIZE])
            chunk = _from_entry(index, entry, digest)
            _check(blob, chunk, "chunk info")
            chunks.append(chunk)
        return _assemble(blob, chunks, "chunk info")

    def __iter__(self) -> Iterator[ChunkInfo]:
        return iter(self.chunks.values())

    def resolve(self, part: ChunkRef) -> ChunkInfo:
        """The chunk that *part* of a file needs; BadImage when it is not known, lies elsewhere, or is too
        short.
        """
        name = f"chunk {part.chunk_index} of blob {part.blob_index}"
        chunk = self.chunks.get(part.chunk_index)
        if chunk is None:
            raise BadImage("chunk index", f"{name} is not described")
        if chunk.uncompressed_offset != part.data_offset:
            raise BadImage(
                "chunk index", f"{name} lies at {chunk.uncompressed_offset}, not at {part.data_offset}"
            )
        if part.chunk_offset + part.length > chunk.uncompressed_size:
            raise BadImage(
                "chunk index", f"{name} has {chunk.uncompressed_size} bytes, fewer than a file needs"
            )
        return chunk


def _from_entry(index: int, entry: CiEntry, digest: bytes | None) -> ChunkInfo:
    if entry.flags & (c_blob.CI_V2_ZRAN | c_blob.CI_V2_BATCH | c_blob.CI_V2_ENCRYPTED):
        raise UnsupportedFeature(f"chunk {index} is of an unsupported kind (zran, batch or encrypted)")
    if entry.flags & ~(c_blob.CI_V2_COMPRESSED | c_blob.CI_V2_HAS_CRC32):
        raise BadImage("chunk info", f"chunk {index} has unknown flags {entry.flags:#x}")
    flags = c.ChunkFlags.COMPRESSED if entry.compressed else c.ChunkFlags(0)
    if entry.crc32 is not None:
        flags |= c.ChunkFlags.HAS_CRC32
    return ChunkInfo(
        index,
        flags,
        entry.compressed_offset,
        entry.uncompressed_offset,
        entry.compressed_size,
        entry.uncompressed_size,
        entry.crc32 or 0,
        digest,
    )


def _check(blob: BlobEntry, chunk: ChunkInfo, where: str) -> None:
    """Everything about one chunk that its blob decides."""
    where = f"{where}, chunk {chunk.chunk_index} of blob {blob.index}"
    # Plain numbers: ~ of an IntFlag knows nothing of the unknown bits.
    served = int(c.ChunkFlags.COMPRESSED | c.ChunkFlags.HAS_CRC32)
    if chunk.flags & ~(served | int(c.ChunkFlags.ENCRYPTED | c.ChunkFlags.BATCH)):
        raise BadImage(where, f"flags {chunk.flags:#x}")
    if chunk.flags & ~served:
        raise UnsupportedFeature(f"{where}: encrypted and batched chunks are not supported")
    if not 0 < chunk.uncompressed_size <= blob.record.chunk_size:
        raise BadImage(where, f"{chunk.uncompressed_size} uncompressed bytes")
    if not 0 < chunk.compressed_size <= c.CHUNK_SIZE_MAX or (
        not chunk.compressed and chunk.compressed_size != chunk.uncompressed_size
    ):
        raise BadImage(where, f"{chunk.compressed_size} stored bytes")
    if (
        chunk.uncompressed_offset % c.BLOCK_SIZE
        or chunk.uncompressed_offset + chunk.uncompressed_size > blob.uncompressed_size
    ):
        raise BadImage(where, f"uncompressed offset {chunk.uncompressed_offset}")
    if chunk.compressed_offset + chunk.compressed_size > blob.data_size:
        raise BadImage(where, f"offset {chunk.compressed_offset} is beyond the data")


def _assemble(blob: BlobEntry, chunks: Iterable[ChunkInfo], where: str) -> ChunkMap:
    """Two records of one chunk must say the same; no two chunks may share a byte of the address space."""
    known: dict[int, ChunkInfo] = {}
    for chunk in sorted(chunks):
        if known.setdefault(chunk.chunk_index, chunk) != chunk:
            raise BadImage(where, f"chunk {chunk.chunk_index} of blob {blob.index} is described in two ways")
    free = 0
    for chunk in sorted(known.values(), key=lambda chunk: chunk.uncompressed_offset):
        if chunk.uncompressed_offset < free:
            raise BadImage(where, f"chunk {chunk.chunk_index} of blob {blob.index} overlaps another one")
        free = chunk.uncompressed_offset + chunk.uncompressed_size
    return ChunkMap(blob, known)
