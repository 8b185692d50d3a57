"""A data blob, chunk by chunk."""

from __future__ import annotations

import hashlib
from typing import IO

from virtiofsd_rafs.blob import codecs
from virtiofsd_rafs.blob.chunk_info import CiEntry, CiSection, build_v1
from virtiofsd_rafs.blob.digest import digest_of
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import align_up


class BlobWriter:
    """The one blob of an image under construction, written to *out* from its start."""

    def __init__(self, out: IO[bytes], *, compressor: c.Compressor, digester: c.Digester) -> None:
        self._out = out
        self._compressor = compressor
        self._digester = digester
        self._compress = codecs.new_compressor(compressor)
        self._sha256 = hashlib.sha256()
        self.size = 0
        self._index_of: dict[bytes, int] = {}
        self._digests = bytearray()
        self.chunks: list[CiEntry] = []
        self.file_offsets: list[int] = []
        self.n_duplicates = 0
        self.uncompressed_size = 0

    def add(self, data: bytes, file_offset: int) -> int:
        """The index of the chunk *data* (1 to chunk_size bytes), written unless the blob has it already."""
        digest = digest_of(data, self._digester)
        known = self._index_of.get(digest)
        if known is not None:
            self.n_duplicates += 1
            return known
        index = len(self.chunks)
        stored = self._compress(data)
        end = self.uncompressed_size + align_up(len(data), c.BLOCK_SIZE)
        self.chunks.append(
            CiEntry(
                self.size,
                len(stored),
                self.uncompressed_size,
                len(data),
                compressed=len(stored) != len(data),
            )
        )
        self.file_offsets.append(file_offset)
        self._index_of[digest] = index
        self._digests += digest
        self.append(stored)
        if self._compressor is c.Compressor.NONE:
            # The blob is its own address space then: the kernel's EROFS can read it as a device.
            self.append(bytes(-len(data) % c.BLOCK_SIZE))
        self.uncompressed_size = end
        return index

    def append(self, data: bytes) -> None:
        self._out.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def digest(self, index: int) -> bytes:
        return bytes(self._digests[index * 32 : index * 32 + 32])

    @property
    def n_chunks(self) -> int:
        return len(self.chunks)

    def sha256(self) -> bytes:
        return self._sha256.digest()

    def append_chunk_info(self, compressor: c.Compressor) -> CiSection:
        array = b"".join(map(build_v1, self.chunks))
        stored = codecs.new_compressor(compressor)(array)
        self.append(stored)
        compressed = len(stored) < len(array)
        return CiSection(len(stored), len(array), compressed, hashlib.sha256(array).digest())

    def append_digests(self) -> bytes:
        self.append(bytes(self._digests))
        return hashlib.sha256(self._digests).digest()
