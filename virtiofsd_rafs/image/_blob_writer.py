"""Writes a data blob, chunk by chunk: data, then chunk information, digests and table of contents.

Memory holds one chunk, and 32 + 56 bytes or so for each chunk written. The sections are those of
docs/formats/rafs-v6.md, "Blob file".
"""

from __future__ import annotations

import hashlib
from typing import IO

from virtiofsd_rafs.blob import c_blob, codecs, toc
from virtiofsd_rafs.blob.chunk_info import CiEntry, build_header, build_v1
from virtiofsd_rafs.blob.digest import digest_of
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.records import align_up

FEATURES = (
    c.BlobFeatures.ALIGNED
    | c.BlobFeatures.INLINED_CHUNK_DIGEST
    | c.BlobFeatures.HAS_TAR_HEADER
    | c.BlobFeatures.HAS_TOC
    | c.BlobFeatures.CAP_TAR_TOC
)


class BlobFull(ValueError):
    """The blob has no room for another chunk; the text says why."""


class BlobWriter:
    """The one blob of an image under construction, written to *out* from its start."""

    def __init__(
        self, out: IO[bytes], *, chunk_size: int, compressor: c.Compressor, digester: c.Digester
    ) -> None:
        self._out = out
        self._chunk_size = chunk_size
        self._compressor = compressor
        self._digester = digester
        self._compress = codecs.new_compressor(compressor)
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._index_of: dict[bytes, int] = {}
        self._digests = bytearray()
        self.chunks: list[CiEntry] = []
        self.file_offsets: list[int] = []
        self.n_duplicates = 0
        self.uncompressed_size = 0

    def add(self, data: bytes, file_offset: int) -> int:
        """The index of the chunk *data* (1 to chunk_size bytes), written unless the blob has it already.

        Raises BlobFull.
        """
        digest = digest_of(data, self._digester)
        known = self._index_of.get(digest)
        if known is not None:
            self.n_duplicates += 1
            return known
        index = len(self.chunks)
        stored = self._compress(data)
        # One less than a reader takes: nydus-image leaves the last index unused.
        if index >= c.CHUNKS_MAX - 1:
            raise BlobFull(f"the blob has {index} chunks, which is the most that an image can address")
        end = self.uncompressed_size + align_up(len(data), c.BLOCK_SIZE)
        if (
            end > c.UNCOMPRESSED_BLOB_MAX
            or self._offset + len(stored) + self._metadata_max() > c.COMPRESSED_BLOB_MAX
        ):
            raise BlobFull("the blob would become larger than 1 TiB")
        self.chunks.append(
            CiEntry(
                self._offset,
                len(stored),
                self.uncompressed_size,
                len(data),
                compressed=len(stored) != len(data),
            )
        )
        self.file_offsets.append(file_offset)
        self._index_of[digest] = index
        self._digests += digest
        self._write(stored)
        if self._compressor is c.Compressor.NONE:
            # The blob is its own address space then: the kernel's EROFS can read it as a device.
            self._write(bytes(-len(data) % c.BLOCK_SIZE))
        self.uncompressed_size = end
        return index

    def _metadata_max(self) -> int:
        """An upper bound of what finish() writes."""
        return (len(self.chunks) + 1) * (c_blob.CI_V1.size + 32) + 16 * 1024

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._sha256.update(data)
        self._offset += len(data)

    def digest(self, index: int) -> bytes:
        return bytes(self._digests[index * 32 : index * 32 + 32])

    def finish(self) -> c.BlobRecord:
        """The blob table record, after the sections behind the chunks (at least one) are written."""
        data_size = self._offset
        self._write(toc.build_tar_header(c_blob.NAME_BLOB, data_size))
        # This entry's digest is over the stored bytes and their header, unlike the others'.
        sections = [
            toc.Section(
                c_blob.NAME_BLOB,
                c.Compressor.NONE,
                self._sha256.digest(),
                0,
                data_size,
                self.uncompressed_size,
            )
        ]
        array = b"".join(map(build_v1, self.chunks))
        # In the table of contents gzip has no number, and nydusd does not unpack lz4_block from there.
        stored = self._compress(array) if self._compressor is c.Compressor.ZSTD else array
        ci_compressor = self._compressor if len(stored) < len(array) else c.Compressor.NONE
        ci_offset = self._offset
        header = build_header(
            c_blob.CiHeader(
                c_blob.CI_MAGIC,
                FEATURES,
                ci_compressor,
                len(self.chunks),
                ci_offset,
                len(stored),
                len(array),
            )
        )
        self._write(stored)
        self._write(header)
        self._write(toc.build_tar_header(c_blob.NAME_META, len(stored) + len(header)))
        digests_offset = self._offset
        self._write(bytes(self._digests))
        self._write(toc.build_tar_header(c_blob.NAME_DIGEST, len(self._digests)))
        sections += [
            _section(c_blob.NAME_META, array, ci_offset, ci_compressor, len(stored)),
            _section(c_blob.NAME_META_HEADER, header, ci_offset + len(stored)),
            _section(c_blob.NAME_DIGEST, self._digests, digests_offset),
        ]
        table = toc.build_toc(sections)
        self._write(table)
        return c.BlobRecord(
            blob_id=self._sha256.hexdigest().encode(),
            blob_index=0,
            chunk_size=self._chunk_size,
            chunk_count=len(self.chunks),
            compression_algo=self._compressor,
            digest_algo=self._digester,
            features=FEATURES,
            compressed_size=self._offset,
            uncompressed_size=self.uncompressed_size,
            blob_toc_size=len(table),
            ci_compressor=ci_compressor,
            ci_offset=ci_offset,
            ci_compressed_size=len(stored),
            ci_uncompressed_size=len(array),
            blob_toc_digest=hashlib.sha256(table).digest(),
            blob_meta_digest=bytes(32),
            blob_meta_size=0,
            cipher_iv_high=bytes(8),
            cipher_algo=0,
        )


def _section(
    name: bytes,
    content: bytes | bytearray,
    offset: int,
    compressor: c.Compressor = c.Compressor.NONE,
    compressed_size: int | None = None,
) -> toc.Section:
    size = len(content)
    digest = hashlib.sha256(content).digest()
    return toc.Section(
        name, compressor, digest, offset, size if compressed_size is None else compressed_size, size
    )
