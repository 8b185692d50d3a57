"""What stands behind the chunks of a blob: chunk information, digests and table of contents.

The sections are those of docs/formats/rafs-v6.md, "Blob file".
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from virtiofsd_rafs.blob import c_blob, toc
from virtiofsd_rafs.blob.chunk_info import build_header
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from virtiofsd_rafs.blob.chunk_info import CiSection

FEATURES = (
    c.BlobFeatures.ALIGNED
    | c.BlobFeatures.INLINED_CHUNK_DIGEST
    | c.BlobFeatures.HAS_TAR_HEADER
    | c.BlobFeatures.HAS_TOC
    | c.BlobFeatures.CAP_TAR_TOC
)


class Blob(Protocol):
    """A blob whose chunks are written; it grows by what is appended."""

    @property
    def size(self) -> int: ...
    @property
    def uncompressed_size(self) -> int: ...
    @property
    def n_chunks(self) -> int: ...
    def append(self, data: bytes) -> None: ...
    def sha256(self) -> bytes:
        """Of everything up to here."""

    def append_chunk_info(self, compressor: c.Compressor) -> CiSection:
        """Appends the array of version 1, compressed if that is shorter."""

    def append_digests(self) -> bytes:
        """Appends the digests of all chunks; returns their SHA-256."""


def finish_blob(
    blob: Blob, *, chunk_size: int, compressor: c.Compressor, digester: c.Digester
) -> c.BlobRecord:
    """The blob table record, after the sections behind the chunks (at least one) are written."""
    data_size = blob.size
    blob.append(toc.build_tar_header(c_blob.NAME_BLOB, data_size))
    # This entry's digest is over the stored bytes and their header, unlike the others'.
    data = toc.Section(
        c_blob.NAME_BLOB, c.Compressor.NONE, blob.sha256(), 0, data_size, blob.uncompressed_size
    )
    ci_offset = blob.size
    # In the table of contents gzip has no number, and nydusd does not unpack lz4_block from there.
    ci = blob.append_chunk_info(compressor if compressor is c.Compressor.ZSTD else c.Compressor.NONE)
    ci_compressor = compressor if ci.compressed else c.Compressor.NONE
    header = build_header(
        c_blob.CiHeader(
            c_blob.CI_MAGIC, FEATURES, ci_compressor, blob.n_chunks, ci_offset, ci.stored_size, ci.size
        )
    )
    blob.append(header)
    blob.append(toc.build_tar_header(c_blob.NAME_META, ci.stored_size + len(header)))
    digests_offset, digests_size = blob.size, blob.n_chunks * 32
    digests_sha256 = blob.append_digests()
    blob.append(toc.build_tar_header(c_blob.NAME_DIGEST, digests_size))
    plain = c.Compressor.NONE
    header_sha256, header_offset = hashlib.sha256(header).digest(), ci_offset + ci.stored_size
    table = toc.build_toc(
        [
            data,
            toc.Section(c_blob.NAME_META, ci_compressor, ci.sha256, ci_offset, ci.stored_size, ci.size),
            toc.Section(
                c_blob.NAME_META_HEADER, plain, header_sha256, header_offset, len(header), len(header)
            ),
            toc.Section(
                c_blob.NAME_DIGEST, plain, digests_sha256, digests_offset, digests_size, digests_size
            ),
        ]
    )
    blob.append(table)
    return c.BlobRecord(
        blob_id=blob.sha256().hex().encode(),
        blob_index=0,
        chunk_size=chunk_size,
        chunk_count=blob.n_chunks,
        compression_algo=compressor,
        digest_algo=digester,
        features=FEATURES,
        compressed_size=blob.size,
        uncompressed_size=blob.uncompressed_size,
        blob_toc_size=len(table),
        ci_compressor=ci_compressor,
        ci_offset=ci_offset,
        ci_compressed_size=ci.stored_size,
        ci_uncompressed_size=ci.size,
        blob_toc_digest=hashlib.sha256(table).digest(),
        blob_meta_digest=bytes(32),
        blob_meta_size=0,
        cipher_iv_high=bytes(8),
        cipher_algo=0,
    )
