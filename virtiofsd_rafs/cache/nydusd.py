"""nydusd's files beside ours: its chunk map of a blob, and its record of what is stored.

The record (``.blob.data.chunk_map``) is the store's work (crate ``chunk-store``, ``nydusd.rs``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from virtiofsd_rafs.cache import inventory as inv

# 24 bytes for each of the most chunks that a blob can have, and the header.
MAX_META_LEN = (24 << 24) + 8192

if TYPE_CHECKING:
    from pathlib import Path


def write_meta(folder: Path, blob_id: str, meta: bytes | None) -> None:
    """Puts nydusd's chunk map of a blob beside its data, unless it is there."""
    path = folder / (blob_id + inv.META_SUFFIX)
    if meta is None or path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(meta)
    temporary.replace(path)


def read_meta(folder: Path | None, blob_id: str) -> bytes | None:
    """The chunk map of a blob that nydusd, or :func:`write_meta`, left. Nothing vouches for it."""
    if folder is None:
        return None
    try:
        with (folder / (blob_id + inv.META_SUFFIX)).open("rb") as f:
            data = f.read(MAX_META_LEN + 1)
    except OSError:
        return None
    return data if len(data) <= MAX_META_LEN else None


def export(folder: Path, bootstraps: list[Path]) -> dict[str, int]:
    """Makes nydusd's record of the blobs in *folder*, and its chunk map where the image has one.

    Returns verified chunks by blob. Blobs that are stored under another name than nydusd's are left out.
    Raises CacheError.
    """
    from virtiofsd_rafs.cache.verify import Report, layers
    from virtiofsd_rafs.native.store import Store

    found = inv.scan(folder)
    stems = {blob.map_digest: blob.stem for blob in found.blobs}
    exported: dict[str, int] = {}
    for _, layer in layers(folder, found, bootstraps, Report()):
        with Store(layer.bootstrap, cache_dir=folder, spill_size=4096, for_nydusd=True) as store:
            for info in store.blobs():
                stem = None if info.needs_chunk_info else stems.get(store.map_digest(info.blob_index).hex())
                if stem != info.blob_id or not store.open_blob(info.blob_index):
                    continue
                write_meta(folder, info.blob_id, layer.blob_metas.get(info.blob_id))
                exported[stem] = store.states(info.blob_index).verified
    return exported
