"""Removes what nobody needs from a cache directory, beside running daemons.

A blob goes only when its lease can be had alone, under the lock of its state file, as an opening daemon takes
them; a daemon that opens it at the same moment makes new files.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.cache import inventory as inv
from virtiofsd_rafs.cache.names import DATA_SUFFIX, STATE_SUFFIX

if TYPE_CHECKING:
    from pathlib import Path

# What was written so recently may belong to an image that is being pulled.
GRACE_S = 600.0


@attrs.define
class Removed:
    """What was removed, or would be."""

    images: list[str] = attrs.Factory(list)
    blobs: list[str] = attrs.Factory(list)
    """Names of their files, without suffix."""
    n_files: int = 0
    """Others: content of removed images, rests of interrupted writes."""
    disk_bytes: int = 0
    kept_in_use: list[str] = attrs.Factory(list)
    """Images that would have gone, but a running daemon uses them."""
    disk_bytes_left: int = 0


def collect(
    folder: Path, *, max_size: int | None = None, older_than_s: float | None = None, dry_run: bool = False
) -> Removed:
    """Removes images that are not in use, and blobs that no image refers to.

    Args:
        folder: the cache directory.
        max_size: images go, the one used longest ago first, until all files use no more than this.
        older_than_s: images go that were not used for so long.
        dry_run: only says what would go.

    Without the two limits only images go whose bootstrap file is gone, and what no image needs. Raises
    CacheError.
    """
    found = inv.scan(folder)
    done = Removed()
    now = time.time()
    kept = list(found.images)
    ages = {image.name: inv.last_used(found, image) or 0.0 for image in kept}

    def give_up(image: inv.CachedImage) -> bool:
        if inv.in_use(found, image):
            done.kept_in_use.append(image.name)
            return False
        kept.remove(image)
        done.images.append(image.name)
        return True

    for image in found.images:
        if not image.manifest_digest and not image.complete:
            give_up(image)  # a bootstrap file that is gone
    if older_than_s is not None:
        for image in list(kept):
            if now - ages[image.name] > older_than_s:
                give_up(image)
    if max_size is not None:
        for image in sorted(kept, key=lambda image: ages[image.name]):
            if _size_with(found, kept) <= max_size:
                break
            give_up(image)
    needed = {blob_id for image in kept for blob_id in image.blob_ids}
    done.disk_bytes_left = found.disk_bytes
    for image_name in done.images:
        _forget(folder, image_name, done, dry_run)
    content = {name for image in kept for name in image.content}
    given_up = {name for image in found.images if image not in kept for name in image.content}
    _remove_files(folder, content, given_up, done, dry_run)
    for blob in found.blobs:
        if blob.blob_id in needed or blob.in_use or not blob.map_digest:
            continue  # nydusd's own files are nydusd's
        if blob.nydusd and inv.open_by_anybody(folder / (blob.stem + DATA_SUFFIX)):
            continue
        if dry_run or remove_blob(folder, blob.stem):
            done.blobs.append(blob.stem)
            done.disk_bytes += blob.disk_bytes
    done.disk_bytes_left = found.disk_bytes - done.disk_bytes
    return done


def _size_with(found: inv.Inventory, kept: list[inv.CachedImage]) -> int:
    """What would be left with these images, blobs that are in use included."""
    needed = {blob_id for image in kept for blob_id in image.blob_ids}
    blobs = sum(b.disk_bytes for b in found.blobs if b.blob_id in needed or b.in_use or not b.map_digest)
    content = {name for image in kept for name in image.content}
    return blobs + sum(inv.used(found.folder / "content" / "sha256" / name) for name in content)


def _forget(folder: Path, name: str, done: Removed, dry_run: bool) -> None:
    """Removes the record of a tag."""
    from virtiofsd_rafs.image.content import ContentStore

    path = ContentStore(folder).record_path_of(name)
    if path is not None and path.exists():
        _unlink(path, done, dry_run)


def _unlink(path: Path, done: Removed, dry_run: bool) -> None:
    size = inv.used(path)
    if not dry_run:
        path.unlink(missing_ok=True)
    done.n_files += 1
    done.disk_bytes += size


def _remove_files(folder: Path, needed: set[str], given_up: set[str], done: Removed, dry_run: bool) -> None:
    """Content of images that were given up; of no image at all, and rests of writes, when it is not new."""
    old = time.time() - GRACE_S
    for part in (folder / "content" / "sha256", folder / "images"):
        if not part.is_dir():
            continue
        for path in part.iterdir():
            rest = path.name.startswith(".")
            if path.name in needed or (part.name == "images" and not rest):
                continue
            try:
                recent = path.stat().st_mtime > old
            except OSError:
                continue
            if path.name in given_up or not recent:
                _unlink(path, done, dry_run)


def remove_blob(folder: Path, stem: str) -> bool:
    """Removes the files of a blob unless somebody uses them. Whether they are gone."""
    names = [folder / name for name in inv.files_of(stem)]
    state, data = folder / (stem + STATE_SUFFIX), folder / (stem + DATA_SUFFIX)
    try:
        with state.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _same(lock.fileno(), state):
                return False  # replaced meanwhile: somebody uses it
            try:
                lease = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                lease = -1
            try:
                if lease >= 0:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in names:
                    path.unlink(missing_ok=True)
            finally:
                if lease >= 0:
                    os.close(lease)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return False
    return True


def _same(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
