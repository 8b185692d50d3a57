"""Completes what a bootstrap promises about a blob: chunk information that its chunk table lacks.

Three sources, the best one first: the sections of the blob whose table of contents the bootstrap
authenticates (places and digests), the ``blob.meta`` file of the bootstrap layer (places, no digests), the
chunk-info array of the blob itself (places, unauthenticated). Without digests the data cannot be verified,
and is served only when that is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.errors import BadImage, UnverifiedImage

if TYPE_CHECKING:
    from virtiofsd_rafs.backends.base import BlobSource
    from virtiofsd_rafs.native.store import BlobInfo, Store

# 24 bytes for each of the most chunks that a blob can have, and some tables behind them.
_MAX_SECTION = 24 << 24


def check_verifiable(blobs: list[BlobInfo], *, allow_unverified: bool) -> None:
    """Raises UnverifiedImage when data would be served that nothing can verify, unless that is allowed."""
    for blob in blobs:
        if blob.n_without_digest and not allow_unverified:
            raise UnverifiedImage(
                f"{blob.n_without_digest} of {blob.n_known} chunks of blob {blob.blob_id} have no digest",
                remedy="build the image with chunk digests, or accept the risk with --allow-unverified",
            )


async def complete_blob(
    store: Store, blob: BlobInfo, source: BlobSource, *, meta: bytes | None, allow_unverified: bool
) -> None:
    """Fills in the chunks of *blob*. One attempt: retries are the caller's.

    *meta* is the ``blob.meta`` file of the (verified) bootstrap layer. Raises BackendError; BadImage,
    DigestMismatch when what comes is not what the bootstrap promises; UnverifiedImage.
    """
    if blob.toc_size:
        await _from_sections(store, blob, source)
        return
    if not allow_unverified:
        raise UnverifiedImage(
            f"the bootstrap lacks chunks of blob {blob.blob_id}, and nothing authenticates the blob's list",
            remedy="build the image with a chunk table, or accept the risk with --allow-unverified",
        )
    if meta is not None:
        store.set_chunk_info(blob.blob_index, meta, meta_file=True)
        return
    if not 0 < blob.ci_compressed_size <= _MAX_SECTION or blob.ci_uncompressed_size > _MAX_SECTION:
        raise BadImage("blob.ci_compressed_size", f"blob {blob.blob_id} has no usable list of chunks")
    from virtiofsd_rafs.blob import codecs
    from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor

    stored = await source.read_range(blob.blob_id, blob.ci_offset, blob.ci_compressed_size)
    array = codecs.decompress(stored, Compressor(blob.ci_compressor), blob.ci_uncompressed_size)
    store.set_chunk_info(blob.blob_index, array)


async def _from_sections(store: Store, blob: BlobInfo, source: BlobSource) -> None:
    from virtiofsd_rafs.blob import c_blob as c
    from virtiofsd_rafs.blob import toc

    size = await source.blob_size(blob.blob_id)
    if size < blob.toc_size:
        raise BadImage("blob.toc_size", f"blob {blob.blob_id} has {size} bytes, fewer than its contents list")
    tail = await source.read_range(blob.blob_id, size - blob.toc_size, blob.toc_size)
    sections = toc.parse_toc(tail, size, size=blob.toc_size, digest=blob.toc_digest)

    async def read(name: bytes) -> bytes | None:
        section = sections.get(name)
        if section is None:
            return None
        if not 0 < section.compressed_size <= _MAX_SECTION:
            raise BadImage("toc entry", f"{name!r} has {section.compressed_size} bytes")
        stored = await source.read_range(blob.blob_id, section.offset, section.compressed_size)
        return toc.extract(section, stored, _MAX_SECTION)

    array = await read(c.NAME_META)
    if array is None:
        raise BadImage("toc", f"blob {blob.blob_id} has no list of chunks")
    store.set_chunk_info(blob.blob_index, array, digests=await read(c.NAME_DIGEST))
