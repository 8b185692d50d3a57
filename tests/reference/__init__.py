"""The builder in its plainest form: one thread, everything in memory, chunk after chunk.

It shares nothing with the native builder but the fixed-size records, and says what that one has to write:
tests compare them byte by byte.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from tests.reference.blob_writer import BlobWriter
from tests.reference.bootstrap_writer import BootstrapWriter
from tests.reference.scan import in_order, scan
from virtiofsd_rafs.image._blob_tail import finish_blob
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from pathlib import Path


def reference_image(
    source: Path, *, compressor: str = "zstd", digester: str = "blake3", chunk_size: int = 1 << 20
) -> tuple[bytes, bytes]:
    """Bootstrap and blob of the tree *source*; no blob is empty."""
    kinds = (c.Compressor[compressor.upper()], c.Digester[digester.upper()])
    root = scan(source)
    out = io.BytesIO()
    blob = BlobWriter(out, compressor=kinds[0], digester=kinds[1])
    for inode in in_order(root):
        if inode.is_reg:
            with open(os.path.join(os.fsencode(source), inode.path), "rb") as file:
                for offset in range(0, inode.st.st_size, chunk_size):
                    inode.chunks.append(blob.add(file.read(chunk_size), offset))
    record = None
    if blob.chunks:
        record = finish_blob(blob, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1])
    writer = BootstrapWriter(
        root, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1], blob=blob, record=record
    )
    bootstrap = io.BytesIO()
    writer.write(bootstrap)
    return bootstrap.getvalue(), out.getvalue()
