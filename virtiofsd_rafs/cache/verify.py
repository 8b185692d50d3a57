"""Reads every stored chunk of a cache directory back and compares it with what the images promise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.cache import inventory as inv
from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native.store import Store, reclaim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtiofsd_rafs.image.layer import LayerFiles


@attrs.define
class Report:
    """What came out. A bad chunk is absent now, and will be fetched when it is next wanted."""

    n_good: int = 0
    n_bad: int = 0
    bad: list[dict[str, object]] = attrs.Factory(list)
    """Blob and number of each bad chunk."""
    n_reclaimed: int = 0
    """Absent chunks whose bytes were given back to the disk."""
    blobs: list[str] = attrs.Factory(list)
    unknown: list[str] = attrs.Factory(list)
    """Blobs that no image here vouches for; nothing can be said about them."""
    problems: list[str] = attrs.Factory(list)
    """Images whose metadata could not be used."""


def verify(folder: Path, bootstraps: list[Path], progress: Callable[[str], None]) -> Report:
    """Verifies all that the images in *folder*, and the *bootstraps*, vouch for. Raises CacheError."""
    found = inv.scan(folder)
    report = Report()
    stems = {blob.map_digest: blob.stem for blob in found.blobs if blob.map_digest}
    done: set[str] = set()
    for name, layer in layers(folder, found, bootstraps, report):
        try:
            with Store(layer.bootstrap, cache_dir=folder, spill_size=4096) as store:
                for info in store.blobs():
                    if info.needs_chunk_info:
                        report.problems.append(f"{name}: the list of chunks of {info.blob_id} is not here")
                        continue
                    stem = stems.get(store.map_digest(info.blob_index).hex())
                    # Blobs that are not here are not made, and one is read once.
                    if stem is not None and stem not in done and store.open_blob(info.blob_index):
                        done.add(stem)
                        progress(stem)
                        _verify_blob(store, info.blob_index, stem, report)
                        report.n_reclaimed += reclaim(folder, stem) or 0
        except VirtiofsdRafsError as e:
            report.problems.append(f"{name}: {e}")
    report.blobs = sorted(done)
    report.unknown = sorted(blob.stem for blob in found.blobs if blob.stem not in done)
    return report


def layers(
    folder: Path, found: inv.Inventory, bootstraps: list[Path], report: Report
) -> Iterator[tuple[str, LayerFiles]]:
    from virtiofsd_rafs.image.content import ContentStore
    from virtiofsd_rafs.image.layer import LayerFiles

    store = ContentStore(folder)
    for path in bootstraps:
        yield str(path), LayerFiles(path.read_bytes(), {})
    for image in found.images:
        if not image.manifest_digest and image.complete:
            try:
                bootstrap = Path(image.name).read_bytes()
            except OSError as e:
                report.problems.append(f"{image.name}: {e.strerror}")
            else:
                yield image.name, LayerFiles(bootstrap, {})
        for layer in inv.layers_of(store, image):
            if layer is None:
                report.problems.append(f"{image.name}: its bootstrap is not here")
            else:
                yield image.name, layer


def _verify_blob(store: Store, index: int, stem: str, report: Report) -> None:
    view = store.chunks(index)
    *fds, data = store.share(index)
    try:
        if data is not None:
            # What the disk has counts, not what memory still remembers.
            os.posix_fadvise(data, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        for fd in (*fds, data):
            if fd is not None:
                os.close(fd)
    for chunk in range(len(view)):
        if not view.promised(chunk) or not view.stored(chunk):
            continue
        if store.verify_present(index, chunk, force=True):
            report.n_good += 1
        elif not view.stored(chunk):
            report.n_bad += 1
            report.bad.append({"blob": stem, "chunk": chunk})
