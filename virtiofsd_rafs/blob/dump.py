"""The metadata of a blob as text: byte offset, field and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.blob import c_blob as c
from virtiofsd_rafs.blob.chunk_info import parse_array, parse_header, unpack_section
from virtiofsd_rafs.blob.toc import parse_toc
from virtiofsd_rafs.rafs.c_rafs_v6 import BlobFeatures
from virtiofsd_rafs.rafs.dump import record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.rafs.superblock import BlobEntry


def dump_blob(blob: BlobEntry, content: bytes) -> Iterator[str]:
    """The lines about the blob file *content*: its chunk information and, when it has one, table of contents.

    Raises BadImage or DigestMismatch.
    """
    r = blob.record
    section = content[r.ci_offset : r.ci_offset + r.ci_compressed_size + c.CI_HEADER_SIZE]
    array = unpack_section(blob, section)
    header = parse_header(section, r.ci_compressed_size)
    yield from record("ci header", c.CI_HEADER, header, r.ci_offset + r.ci_compressed_size)
    yield f"# ci array at {r.ci_offset}"
    v2 = bool(r.features & BlobFeatures.CHUNK_INFO_V2)
    for index, entry in enumerate(parse_array(array, blob.chunk_count, v2=v2)):
        yield (
            f"          {index}: {entry.compressed_size} bytes at {entry.compressed_offset} ->"
            f" {entry.uncompressed_size} bytes at {entry.uncompressed_offset}"
        )
    if r.features & BlobFeatures.HAS_TOC:
        toc = parse_toc(content[-4096:], len(content), size=r.blob_toc_size, digest=r.blob_toc_digest)
        for s in toc.values():
            yield f"# section {s.name.decode()}"
            sizes = f"{s.compressed_size} bytes ({s.compressor.name.lower()}) -> {s.uncompressed_size}"
            yield f"{s.offset:8}  {sizes}"
            yield f"          sha256 {s.digest.hex()}"
