"""The native builder: reads a tree, fills a blob, writes a bootstrap. One object per image.

The calls come in the order ``prefetch``, ``run``, then what is appended to the blob, ``layout``, ``write``.
``run`` may be watched and interrupted; the object belongs to one thread apart from that.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from virtiofsd_rafs.blob.chunk_info import CiSection
from virtiofsd_rafs.errors import BuildError, ImageError, OutputError
from virtiofsd_rafs.native._lib import ffi, last_error, lib, raise_for
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_U64_MAX = (1 << 64) - 1


class Progress(NamedTuple):
    """Inodes found, bytes of content read (holes included), bytes stored."""

    inodes: int
    read: int
    stored: int


class Totals(NamedTuple):
    """What was found and stored; sizes in bytes. ``n_prefetch`` counts entries of the prefetch table."""

    blob_size: int
    uncompressed_size: int
    n_chunks: int
    n_duplicates: int
    n_inodes: int
    content_size: int
    has_xattr: bool
    n_prefetch: int


class Plan(NamedTuple):
    """Where the bootstrap's parts lie; sizes and offsets in bytes."""

    size: int
    chunk_table_offset: int
    root_nid: int


def printable(path: bytes) -> str:
    """*path* for a message: one line, whatever bytes it has; the root is "."."""
    text = os.fsdecode(path) or "."
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def _buffer(data: bytes) -> Any:
    return ffi.from_buffer("uint8_t[]", data)


class Builder:
    """Builds an image of the tree *source*. Temporary files, without names, go to *folder*.

    *jobs* threads read and compress; the result does not depend on their number.

    Raises BuildError (with the path and the reason), OutputError for what cannot be written, ImageError for
    what no image can hold.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        *,
        chunk_size: int,
        compressor: c.Compressor,
        digester: c.Digester,
        jobs: int,
    ) -> None:
        self._folder = folder
        limits = (c.CHUNKS_MAX, c.UNCOMPRESSED_BLOB_MAX, c.COMPRESSED_BLOB_MAX)
        options = ffi.new("uint64_t[]", [chunk_size, compressor, digester, jobs, *limits])
        assert len(options) == lib.VR_BUILDER_OPTIONS_LEN
        top, work, handle = os.fsencode(source), os.fsencode(folder), ffi.new("void **")
        code = lib.vr_builder_new(_buffer(top), len(top), _buffer(work), len(work), options, handle)
        if code == lib.VR_E_SOURCE:
            raise BuildError(str(source), last_error())
        raise_for(code)
        self._handle = ffi.gc(handle[0], lib.vr_builder_free)

    def close(self) -> None:
        """Frees memory and temporary files."""
        ffi.release(self._handle)

    def prefetch(self, path: bytes, offset: int = 0, length: int | None = None) -> bool:
        """Lists a range of a file, or a directory with all files in it: their chunks come first in the blob.

        False when the tree has no such file or directory.
        """
        rest = _U64_MAX if length is None else min(length, _U64_MAX)
        return bool(
            self._call(lib.vr_builder_prefetch, _buffer(path), len(path), min(offset, _U64_MAX), rest)
        )

    def run(
        self, blob: int, watch: Callable[[Progress], None] | None = None, *, interval_s: float = 0.2
    ) -> Totals:
        """Reads the tree and writes its chunks to the empty file *blob*; *watch* is called meanwhile.

        An exception here, such as KeyboardInterrupt, ends the build and is raised again.
        """
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._call(lib.vr_builder_run, blob)
            except BaseException as e:
                failures.append(e)

        # In a thread of its own: the interpreter handles signals between the looks at the progress.
        thread = threading.Thread(target=work, name="build")
        thread.start()
        try:
            while True:
                thread.join(interval_s)
                if not thread.is_alive():
                    break
                if watch is not None:
                    watch(self.progress())
        except BaseException:
            lib.vr_builder_cancel(self._handle)
            thread.join()
            raise
        if failures:
            raise failures[0]
        return self.totals()

    def progress(self) -> Progress:
        return Progress._make(self._values(lib.vr_builder_progress, lib.VR_BUILDER_PROGRESS_LEN))

    def totals(self) -> Totals:
        v: list[Any] = self._values(lib.vr_builder_totals, lib.VR_BUILDER_TOTALS_LEN)
        v[6] = bool(v[6])
        return Totals._make(v)

    @property
    def size(self) -> int:
        """Bytes of the blob so far."""
        return self.totals().blob_size

    @property
    def uncompressed_size(self) -> int:
        """The end of the blob's uncompressed address space."""
        return self.totals().uncompressed_size

    @property
    def n_chunks(self) -> int:
        return self.totals().n_chunks

    def append(self, data: bytes) -> None:
        """Appends *data* to the blob."""
        self._call(lib.vr_builder_append, _buffer(data), len(data))

    def sha256(self) -> bytes:
        """Of the blob so far."""
        return self._digest(lib.vr_builder_sha256)

    def append_chunk_info(self, compressor: c.Compressor) -> CiSection:
        """Appends the chunk information, compressed if that is shorter."""
        out, digest = ffi.new("uint64_t[]", 3), ffi.new("uint8_t[]", 32)
        self._call(lib.vr_builder_append_chunk_info, compressor, out, digest)
        return CiSection(out[0], out[1], bool(out[2]), bytes(digest))

    def append_digests(self) -> bytes:
        """Appends the digests of all chunks; returns their SHA-256."""
        return self._digest(lib.vr_builder_append_digests)

    def layout(self, metadata_offset: int) -> Plan:
        """Gives every inode its place behind *metadata_offset*, a multiple of 4096."""
        return Plan._make(self._values(lib.vr_builder_layout, 3, metadata_offset))

    def prefetch_nids(self) -> list[int]:
        """The prefetch table, in the order of the list; after :meth:`layout`."""
        n = self.totals().n_prefetch
        out = ffi.new("uint32_t[]", n)
        self._call(lib.vr_builder_prefetch_nids, out, n)
        return list(out)

    def write(self, head: bytes, bootstrap: int) -> None:
        """Writes the bootstrap, which begins with *head*, to the empty file; after :meth:`layout`."""
        self._call(lib.vr_builder_write, _buffer(head), len(head), bootstrap)

    def _values(self, function: Any, count: int, *args: Any) -> list[int]:
        out = ffi.new("uint64_t[]", count)
        self._call(function, *args, out)
        return list(out)

    def _digest(self, function: Any) -> bytes:
        out = ffi.new("uint8_t[]", 32)
        self._call(function, out)
        return bytes(out)

    def _call(self, function: Any, *args: Any) -> int:
        code: int = function(self._handle, *args)
        if code < 0:
            self._fail(code)
        return code

    def _fail(self, code: int) -> NoReturn:
        if code == lib.VR_E_SOURCE:
            reason, _, remedy = last_error().partition("\0")
            n = lib.vr_builder_error_path(self._handle, ffi.NULL, 0)
            path = ffi.new("uint8_t[]", n)
            lib.vr_builder_error_path(self._handle, path, n)
            raise BuildError(printable(bytes(path)), reason, remedy=remedy)
        if code == lib.VR_E_OS:
            raise OutputError(self._folder, last_error())
        if code == lib.VR_E_LIMIT:
            raise ImageError(last_error())
        raise_for(code)
        raise AssertionError(code)
