"""Manifests and bootstrap layers in the cache directory, each under the digest that it was promised by.

``<cache>/content/sha256/<hex>`` holds content, ``<cache>/images/<sha256 of "host/repo:tag">.json`` remembers
which manifest a tag named; the same for the path of a bootstrap file, which blobs it has. Files appear by
rename only, complete and synced; what is read is hashed again, and a file that is wrong counts as absent (and
is removed, so that it is fetched again). A cache that cannot be written costs a warning, not the start.

Nothing here may import aiohttp or asyncio: a known image starts from here within milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING, BinaryIO

from virtiofsd_rafs.registry.reference import Reference, is_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)
_RECORD_VERSION = 1
_MAX_RECORD_LEN = 16 << 10
# A path, and the ids of 255 blobs.
_MAX_FILE_RECORD_LEN = 64 << 10


class ContentStore:
    """The content below *cache_dir*; None keeps nothing."""

    def __init__(self, cache_dir: Path | None) -> None:
        self._root = cache_dir

    def get(self, digest: str, *, limit: int) -> bytes | None:
        """The content called *digest*, verified; None when it is absent, longer than *limit*, or damaged."""
        path = self._content_path(digest)
        data = None if path is None else _read(path, limit)
        if path is None or data is None:
            return None
        if "sha256:" + hashlib.sha256(data).hexdigest() == digest:
            return data
        _log.warning("%s is damaged and will be fetched again", path)
        path.unlink(missing_ok=True)
        return None

    def put(self, digest: str, data: bytes) -> None:
        """Keeps *data*, which the caller has verified to be *digest*."""
        path = self._content_path(digest)
        if path is not None:
            _write(path, data)

    def manifest_of(self, reference: Reference) -> str | None:
        """The digest of the manifest (or index) that *reference*'s tag named when it was last asked for."""
        path = self.record_path_of(reference.key)
        data = None if path is None else _read(path, _MAX_RECORD_LEN)
        record = _parse_record(data)
        # The name is stored as well, so that a moved or copied file speaks for no other image.
        if record is None or record[0] != reference.key:
            return None
        return record[1]

    def remember(self, reference: Reference, manifest_digest: str) -> None:
        """Notes that *reference*'s tag names *manifest_digest*."""
        path = self.record_path_of(reference.key)
        if path is not None:
            record = {"version": _RECORD_VERSION, "name": reference.key, "manifest": manifest_digest}
            _write(path, json.dumps(record).encode() + b"\n")

    def names(self) -> Iterator[tuple[str, str]]:
        """All tags that are known, as (``host/repo:tag``, digest of manifest or index)."""
        if self._root is None:
            return
        for path in sorted((self._root / "images").glob("*.json")):
            record = _parse_record(_read(path, _MAX_RECORD_LEN))
            # A record speaks for the name that its own name was made of.
            if record is not None and path == self.record_path_of(record[0]):
                yield record

    def remember_file(self, file: str, blob_ids: list[str]) -> None:
        """Notes that the bootstrap *file*, an absolute path, was served and has these blobs."""
        path = self.record_path_of(file)
        if path is None:
            return
        record = {"version": _RECORD_VERSION, "file": file, "blobs": blob_ids}
        data = json.dumps(record).encode() + b"\n"
        if _read(path, _MAX_FILE_RECORD_LEN) != data:
            _write(path, data)

    def files(self) -> Iterator[tuple[str, list[str]]]:
        """All bootstrap files that were served, and their blobs."""
        if self._root is None:
            return
        for path in sorted((self._root / "images").glob("*.json")):
            record = _parse_file_record(_read(path, _MAX_FILE_RECORD_LEN))
            if record is not None and path == self.record_path_of(record[0]):
                yield record

    def record_path_of(self, name: str) -> Path | None:
        """Where the record of the tag ``host/repo:tag``, or of a bootstrap file, is kept."""
        if self._root is None:
            return None
        key = os.fsencode(name)
        return self._root / "images" / f"{hashlib.sha256(key).hexdigest()}.json"

    def _content_path(self, digest: str) -> Path | None:
        if self._root is None or not is_sha256(digest):
            return None
        return self._root / "content" / "sha256" / digest.partition(":")[2]


def _parse(data: bytes | None) -> dict[str, object]:
    """What a record says; nothing when it is none."""
    if data is None:
        return {}
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or record.get("version") != _RECORD_VERSION:
        return {}
    return record


def _parse_file_record(data: bytes | None) -> tuple[str, list[str]] | None:
    """Path and blob ids in a bootstrap file's record; None when it is no such thing."""
    record = _parse(data)
    file, blobs = record.get("file"), record.get("blobs")
    if not isinstance(file, str) or not file.startswith("/") or not isinstance(blobs, list):
        return None
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return None  # JSON can say what no name of a file can
    return file, [blob for blob in blobs if isinstance(blob, str)]


def _parse_record(data: bytes | None) -> tuple[str, str] | None:
    """Name and digest in a tag's record; None when it is no such thing."""
    record = _parse(data)
    name, digest = record.get("name"), record.get("manifest")
    if (
        not isinstance(name, str)
        or not name.isascii()
        or not isinstance(digest, str)
        or not is_sha256(digest)
    ):
        return None
    return name, digest


def _read(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as f:
            if os.fstat(f.fileno()).st_size > limit:
                return None
            return f.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        _log.warning("%s cannot be read: %s", path, e.strerror)
        return None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as f:
                _write_synced(f, data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as e:
        _log.warning("%s cannot be kept: %s", path, e.strerror)


def _write_synced(f: BinaryIO, data: bytes) -> None:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
