"""nydusd's files beside ours: its chunk map of a blob, and its record of what is stored.

The record (``.blob.data.chunk_map``) is the store's work (crate ``chunk-store``, ``nydusd.rs``).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.cache import inventory as inv
from virtiofsd_rafs.cache.names import DATA_SUFFIX, META_SUFFIX, RECORD_SUFFIX, STATE_SUFFIX
from virtiofsd_rafs.errors import CacheError, VirtiofsdRafsError

_log = logging.getLogger(__name__)

# 24 bytes for each of the most chunks that a blob can have, and the header.
MAX_META_LEN = (24 << 24) + 8192

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def write_meta(folder: Path, blob_id: str, meta: bytes | None) -> None:
    """Puts nydusd's chunk map of a blob beside its data, unless it is there."""
    path = folder / (blob_id + META_SUFFIX)
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
        with (folder / (blob_id + META_SUFFIX)).open("rb") as f:
            data = f.read(MAX_META_LEN + 1)
    except OSError:
        return None
    return data if len(data) <= MAX_META_LEN else None


class Used(NamedTuple):
    """A file that a nydusd has open."""

    pid: int
    path: Path


def users(folder: Path, blob_ids: Iterable[str]) -> Iterator[Used]:
    """Each nydusd that has files of these blobs open that we share with it.

    Only blobs with its record and our states can be meant: what it alone has is left alone
    (docs/adr/0008-eviction.md). Sees nothing from inside a sandbox.
    """
    shared = [
        folder / (blob_id + DATA_SUFFIX)
        for blob_id in blob_ids
        if os.path.exists(folder / (blob_id + RECORD_SUFFIX))
        and os.path.exists(folder / (blob_id + STATE_SUFFIX))
    ]
    for pid, path in inv.users_of(shared):
        if _command(pid).startswith("nydusd"):
            yield Used(pid, path)


def check_unused(folder: Path, blob_ids: Iterable[str], seen: Iterable[Used] | None = None) -> None:
    """Raises CacheError when a nydusd has files of these blobs open that we share with it.

    It takes no lock, and writes what it has not verified where we have verified. *seen* is what :func:`users`
    told before this process was confined.
    """
    paths = {folder / (blob_id + DATA_SUFFIX) for blob_id in blob_ids}
    for pid, path in users(folder, blob_ids) if seen is None else seen:
        if path in paths:
            raise CacheError(
                f"nydusd (pid {pid}) uses {path}",
                remedy="end it first, or give another --cache-dir: both at once damage what is stored",
            )


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as f:
            return f.read()
    except OSError:
        return ""


def export(folder: Path, bootstraps: list[Path]) -> dict[str, int]:
    """Makes nydusd's record of the blobs in *folder*, and its chunk map where the image has one.

    Returns verified chunks by blob. Blobs that are stored under another name than nydusd's are left out.
    Raises CacheError.
    """
    from virtiofsd_rafs.cache.verify import Report, layers
    from virtiofsd_rafs.native.store import Store

    found = inv.scan(folder)
    check_unused(folder, {blob.blob_id for blob in found.blobs})
    stems = {blob.map_digest: blob.stem for blob in found.blobs}
    exported: dict[str, int] = {}
    named = {str(path) for path in bootstraps}
    for name, layer in layers(folder, found, bootstraps, Report()):
        try:
            store = Store(layer.bootstrap, cache_dir=folder, spill_size=4096, for_nydusd=True)
        except VirtiofsdRafsError as e:
            if name in named:
                raise
            # What was served from there once is something else by now.
            _log.warning("%s is left out: %s", name, e)
            continue
        with store:
            for info in store.blobs():
                stem = None if info.needs_chunk_info else stems.get(store.map_digest(info.blob_index).hex())
                if stem != info.blob_id or not store.open_blob(info.blob_index):
                    continue
                write_meta(folder, info.blob_id, layer.blob_metas.get(info.blob_id))
                exported[stem] = store.states(info.blob_index).verified
    return exported
