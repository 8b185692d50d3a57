"""What is in a cache directory: blobs, images, and who uses them. Safe beside running daemons.

A blob's files are leased by the daemons that use them (docs/adr/0008-eviction.md); nothing here
takes a lock that a daemon would wait for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from array import array
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.cache.names import DATA_SUFFIX, META_SUFFIX, RECORD_SUFFIX, STATE_SUFFIX
from virtiofsd_rafs.errors import CacheError, VirtiofsdRafsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from virtiofsd_rafs.image.layer import LayerFiles

# native/crates/chunk-store/src/layout.rs
_HEADER = struct.Struct("<8sII16s32s64sQQI")
_HEADER_LEN = 4096
_MAGIC = b"VRCHSTAT"
_SECTIONS = 1
_PRESENT, _VERIFIED = 2, 3
_MAX_HOLD_S = 3600


def _round_up(n: int) -> int:
    return (n + 7) // 8 * 8


@attrs.frozen
class CachedBlob:
    """The files of one blob under one promise. Sizes are bytes."""

    stem: str
    """Its files are called so, with a suffix each."""
    blob_id: str
    map_digest: str
    """sha256 over what an image promises about the blob; empty for a blob that only nydusd knows."""
    n_chunks: int
    n_verified: int
    n_present: int
    """Stored, and not verified since the machine was booted."""
    size: int
    """Of the whole blob, uncompressed."""
    disk_bytes: int
    last_used: float | None
    """Seconds since the epoch."""
    in_use: bool
    """A running daemon has it open."""
    nydusd: bool
    """nydusd has, or is kept, a record of it."""


@attrs.frozen
class CachedImage:
    """An image whose metadata is here."""

    name: str
    """``host/repository:tag``; ``sha256:...`` when no tag names it any more; the path of a bootstrap file."""
    manifest_digest: str
    """Empty for a bootstrap file."""
    blob_ids: tuple[str, ...]
    content: tuple[str, ...]
    """Files below ``content/sha256`` that belong to it."""
    disk_bytes: int
    """Of these files alone."""
    complete: bool
    """Its bootstrap is here, or where the file was: it starts without the registry."""


@attrs.frozen
class Inventory:
    """All of a cache directory."""

    folder: Path
    blobs: tuple[CachedBlob, ...]
    images: tuple[CachedImage, ...]
    other_bytes: int
    """Of files that belong to no image."""

    @property
    def disk_bytes(self) -> int:
        """What everything uses on the disk."""
        images = {name: size for image in self.images for name, size in self._sizes(image).items()}
        return sum(blob.disk_bytes for blob in self.blobs) + sum(images.values()) + self.other_bytes

    def _sizes(self, image: CachedImage) -> dict[str, int]:
        return {name: used(self.folder / "content" / "sha256" / name) for name in image.content}

    def blobs_of(self, image: CachedImage) -> list[CachedBlob]:
        """The blobs that *image* refers to."""
        return [blob for blob in self.blobs if blob.blob_id in image.blob_ids]

    def images_of(self, blob: CachedBlob) -> list[str]:
        """Names of the images that refer to *blob*."""
        return [image.name for image in self.images if blob.blob_id in image.blob_ids]


def used(path: Path) -> int:
    """Bytes that a file uses on the disk; 0 when it is gone."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def open_folder(folder: Path) -> Path:
    """*folder*, if it can be read. Raises CacheError."""
    try:
        with os.scandir(folder):
            return folder
    except OSError as e:
        remedy = "name the directory that `serve --cache-dir` uses"
        if isinstance(e, PermissionError):
            remedy = "run this as the user that runs the daemons"
        raise CacheError(f"the cache directory {folder} cannot be read: {e.strerror}", remedy=remedy) from e


def scan(folder: Path) -> Inventory:
    """Everything in *folder*. Raises CacheError when it cannot be read."""
    open_folder(folder)
    images = tuple(_images(folder))
    known = {name for image in images for name in image.content}
    content = folder / "content" / "sha256"
    other = sum(used(path) for path in content.iterdir() if path.name not in known) if content.is_dir() else 0
    return Inventory(folder, tuple(_blobs(folder)), images, other)


def is_leased(path: Path) -> bool:
    """Whether a daemon uses the data file *path*."""
    try:
        with path.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def open_by_anybody(path: Path) -> bool:
    """Whether any process of this user has *path* open. Slow: looks at every descriptor."""
    return next(users_of([path]), None) is not None


def users_of(paths: Iterable[Path]) -> Iterator[tuple[int, Path]]:
    """Processes of this user that have one of *paths* open, as (pid, path). Slow, as above."""
    files = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            files[status.st_dev, status.st_ino] = path
    for pid in map(int, filter(str.isdigit, os.listdir("/proc") if files else ())):
        for fd in _descriptors(pid):
            with contextlib.suppress(OSError):
                status = os.stat(fd)
                if (status.st_dev, status.st_ino) in files:
                    yield pid, files[status.st_dev, status.st_ino]


def _descriptors(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def _blobs(folder: Path) -> Iterator[CachedBlob]:
    names = set(os.listdir(folder))
    stems = {name.removesuffix(STATE_SUFFIX) for name in names if name.endswith(STATE_SUFFIX)}
    stems |= {name.removesuffix(DATA_SUFFIX) for name in names if name.endswith(DATA_SUFFIX)}
    for stem in sorted(stems):
        blob = _blob(folder, stem)
        if blob is not None:
            yield blob


def files_of(stem: str) -> tuple[str, ...]:
    """Names that the files of a blob may have. The data file is not the first: it goes after its record."""
    return (stem + RECORD_SUFFIX, stem + META_SUFFIX, stem + DATA_SUFFIX, stem + STATE_SUFFIX)


def _blob(folder: Path, stem: str) -> CachedBlob | None:
    data = folder / (stem + DATA_SUFFIX)
    try:
        size = data.stat().st_size
    except OSError:
        size = 0
    states = _States.read(folder / (stem + STATE_SUFFIX))
    return CachedBlob(
        stem=stem,
        blob_id=stem if states is None else states.blob_id,
        map_digest="" if states is None else states.map_digest,
        n_chunks=0 if states is None else states.n_chunks,
        n_verified=0 if states is None else states.n_verified,
        n_present=0 if states is None else states.n_present,
        size=size if states is None else states.size,
        disk_bytes=sum(used(folder / name) for name in files_of(stem)),
        last_used=None if states is None else states.last_used,
        in_use=is_leased(data),
        nydusd=(folder / (stem + RECORD_SUFFIX)).exists(),
    )


@attrs.frozen
class _States:
    """What a state file says."""

    blob_id: str
    map_digest: str
    n_chunks: int
    n_verified: int
    n_present: int
    size: int
    last_used: float | None

    @classmethod
    def read(cls, path: Path) -> _States | None:
        """None for a file that is gone, damaged, or not made completely."""
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        if len(raw) < _HEADER_LEN:
            return None
        magic, version, count, _, digest, blob_id, size, _, sections = _HEADER.unpack_from(raw)
        used_at = _round_up(_HEADER_LEN + 4 * count)
        places_at = _round_up(used_at + 4 * count)
        if (magic, version) != (_MAGIC, 1) or len(raw) < _HEADER_LEN + 4 * count:
            return None
        words = array("I", raw[_HEADER_LEN : _HEADER_LEN + 4 * count])
        states = [word & 7 for word in words]
        n_chunks, last_used = count, None
        if sections == _SECTIONS and len(raw) >= places_at + 16 * count:
            times = array("I", raw[used_at : used_at + 4 * count])
            now = time.time()
            # A time that lies ahead is a hold: somebody waits for the chunk now.
            last_used = max((min(when, now) for when in times if 0 < when <= now + _MAX_HOLD_S), default=None)
            sizes = array("I", raw[places_at : places_at + 16 * count])[2::4]
            n_chunks = sum(1 for n in sizes if n)
        return cls(
            blob_id=blob_id.rstrip(b"\0").decode("ascii", "replace"),
            map_digest=digest.hex(),
            n_chunks=n_chunks,
            n_verified=states.count(_VERIFIED),
            n_present=states.count(_PRESENT),
            size=size,
            last_used=last_used,
        )


def _images(folder: Path) -> Iterator[CachedImage]:
    from virtiofsd_rafs.image.content import ContentStore

    store = ContentStore(folder)
    content = folder / "content" / "sha256"
    named = dict(store.names())
    inside: set[str] = set()
    found: list[CachedImage] = []
    for name, digest in named.items():
        image = _image(store, content, name, digest)
        inside.update(image.content)
        found.append(image)
    for file, blob_ids in store.files():
        there = os.path.isfile(file)
        found.append(CachedImage(file, "", tuple(sorted(blob_ids)), (), 0, complete=there))
    yield from sorted(found, key=lambda image: image.name)
    if content.is_dir():
        rest = []
        for path in sorted(content.iterdir()):
            if path.name not in inside:
                untagged = _untagged(store, content, path)
                rest += [untagged] if untagged is not None else []
        # Manifests of an index that is here themselves are parts of it.
        parts = {name for image in rest for name in image.content if name != image.manifest_digest[7:]}
        yield from (image for image in rest if image.manifest_digest[7:] not in parts)


def _untagged(store: Any, content: Path, path: Path) -> CachedImage | None:
    from virtiofsd_rafs.registry.manifest import MAX_MANIFEST_LEN

    try:
        with path.open("rb") as f:
            if os.fstat(f.fileno()).st_size > MAX_MANIFEST_LEN or f.read(1) != b"{":
                return None
    except OSError:
        return None
    image = _image(store, content, f"sha256:{path.name}", f"sha256:{path.name}")
    return image if len(image.content) > 1 or image.complete else None


def _image(store: Any, content: Path, name: str, digest: str) -> CachedImage:
    """What the cache knows of an image. Damage makes it incomplete, not an error."""
    files = [digest.partition(":")[2]]
    blob_ids: set[str] = set()
    complete = False
    for layers in _layers(store, digest, files):
        ids, whole = _bootstrap_blobs(store, layers.bootstrap, files)
        blob_ids.update(ids or layers.blob_sizes)
        complete |= whole
    here = tuple(file for file in files if (content / file).exists())
    return CachedImage(
        name=name,
        manifest_digest=digest,
        blob_ids=tuple(sorted(blob_ids)),
        content=here,
        disk_bytes=sum(used(content / file) for file in here),
        complete=complete,
    )


def _layers(store: Any, digest: str, files: list[str], depth: int = 0) -> Iterator[Any]:
    from virtiofsd_rafs.registry.manifest import MAX_MANIFEST_LEN, Index, nydus_layers, parse_manifest

    data = store.get(digest, limit=MAX_MANIFEST_LEN)
    if data is None:
        return
    try:
        parsed = parse_manifest(data)
        if isinstance(parsed, Index):
            for entry in parsed.manifests if depth < 2 else ():
                files.append(entry.hex)
                yield from _layers(store, entry.digest, files, depth + 1)
            return
        layers = nydus_layers(parsed)
    except VirtiofsdRafsError:
        return
    if layers is not None:
        yield layers


def _bootstrap_blobs(store: Any, descriptor: Any, files: list[str]) -> tuple[list[str], bool]:
    from virtiofsd_rafs.image.layer_store import stored_layer, uncompressed_digest
    from virtiofsd_rafs.native.store import Store

    files += [part.partition(":")[2] for part in (descriptor.digest, uncompressed_digest(descriptor)) if part]
    try:
        layer = stored_layer(store, descriptor)
        if layer is None:
            return [], False
        with Store(layer.bootstrap, cache_dir=None, spill_size=4096) as blobs:
            return [blob.blob_id for blob in blobs.blobs()], True
    except VirtiofsdRafsError:
        return [], False


def layers_of(store: Any, image: CachedImage) -> Iterator[LayerFiles | None]:
    """The bootstrap layers of *image* (several for an index); None for one that is not here."""
    from virtiofsd_rafs.image.layer_store import stored_layer

    for layers in _layers(store, image.manifest_digest, []):
        try:
            yield stored_layer(store, layers.bootstrap)
        except VirtiofsdRafsError:
            yield None


def as_json(inventory: Inventory) -> Mapping[str, Any]:
    """For programs: docs/scripting.md."""
    return {
        "dir": str(inventory.folder),
        "disk_bytes": inventory.disk_bytes,
        "blobs": [{**attrs.asdict(blob), "images": inventory.images_of(blob)} for blob in inventory.blobs],
        "images": [
            {
                **{k: v for k, v in attrs.asdict(image).items() if k != "content"},
                "last_used": last_used(inventory, image),
                "in_use": in_use(inventory, image),
            }
            for image in inventory.images
        ],
    }


def last_used(inventory: Inventory, image: CachedImage) -> float | None:
    """When a chunk of *image* was last used; without chunks, when its manifest (or record) was stored."""
    times = [blob.last_used for blob in inventory.blobs_of(image) if blob.last_used is not None]
    path: Path | None = inventory.folder / "content" / "sha256" / image.manifest_digest.partition(":")[2]
    if not image.manifest_digest:
        from virtiofsd_rafs.image.content import ContentStore

        path = ContentStore(inventory.folder).record_path_of(image.name)
    assert path is not None
    with contextlib.suppress(OSError):
        times.append(path.stat().st_mtime)
    return max(times, default=None)


def in_use(inventory: Inventory, image: CachedImage) -> bool:
    """Whether a running daemon may serve *image*: it uses one of its blobs."""
    return any(blob.in_use for blob in inventory.blobs_of(image))
