"""The chunk store: states, data and verification of one image's blobs (crate ``chunk-store``).

A :class:`Store` is made from a bootstrap, then each blob is opened (or adopted from a predecessor). After
that all methods may be called from any thread; the calls that work on bytes release the GIL.
"""

from __future__ import annotations

import math
import os
import sys
from array import array
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from virtiofsd_rafs.native._lib import ffi, lib, raise_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from mmap import mmap
    from pathlib import Path

# Outcomes of :meth:`Store.ingest`, one per chunk.
OK = 0
DIGEST_MISMATCH = 1
DECODE_ERROR = 2
OUT_OF_RANGE = 3
NO_SPACE = 4
INVALID = 5

OUTCOME_NAMES = ("ok", "digest-mismatch", "decode-error", "out-of-range", "no-space", "invalid")

# State words: generation << 3 | state.
_FETCHING = 1
_PRESENT = 2
_VERIFIED = 3
_EXTENT_WORDS = 4  # u64 words of an extent: data offset, size and flags, spill, reserved
_SPILL_WORD = 2
_VALID = 1 << 32  # flag bit in the second word


class BlobInfo(NamedTuple):
    """What the image says about a blob. Sizes and offsets in bytes."""

    blob_index: int
    blob_id: str
    uncompressed_size: int
    n_known: int
    """Chunks that the image describes."""
    n_without_digest: int
    needs_chunk_info: bool
    """The chunk table lacks chunks that files use: :meth:`Store.set_chunk_info` must come first."""
    compressor: int
    digester: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    ci_compressor: int
    toc_size: int
    """Bytes at the end of the blob that hold its table of contents; 0 when nothing authenticates it."""
    toc_digest: bytes
    n_chunks: int


class StateCounts(NamedTuple):
    """Chunks of a blob by state."""

    absent: int
    fetching: int
    present: int
    verified: int
    spilled: int


class TouchedCounts(NamedTuple):
    """Chunks of a blob from which reads were answered; stored bytes are what a back-end delivers."""

    n_chunks: int
    stored_bytes: int
    plain_bytes: int


class Sweep(NamedTuple):
    """What an eviction has done. Sizes are bytes on the disk, of all blobs in the directory."""

    before: int
    after: int
    n_chunks: int
    held: int
    """Bytes that may not go: requests wait for them, or nydusd may use them."""
    errno: int
    """Why the file system gives nothing back; 0: it does."""
    busy: bool
    """Another process was at it."""


class StoreStats(NamedTuple):
    """Use of the memory that stands in for the cache disk, and refusals of that disk."""

    spill_capacity: int
    spill_used: int
    spill_chunks: int
    spill_evicted: int
    disk_errors: int
    last_disk_errno: int


class ChunkView:
    """Places and states of a blob's chunks, read in place: nothing is copied, states are of this moment."""

    __slots__ = ("_extents", "_states", "has_data", "lengths", "offsets")

    def __init__(
        self,
        offsets: memoryview,
        lengths: memoryview,
        states: memoryview,
        extents: memoryview,
        has_data: bool,
    ) -> None:
        self.offsets = offsets
        self.lengths = lengths
        self._states = states
        self._extents = extents
        self.has_data = has_data

    def __len__(self) -> int:
        return len(self.offsets)

    def promised(self, chunk: int) -> bool:
        """Whether the image describes *chunk*."""
        return 0 <= chunk < len(self.offsets) and bool(self._extents[chunk * _EXTENT_WORDS + 1] & _VALID)

    def size(self, chunk: int) -> int:
        """Uncompressed bytes of *chunk*."""
        return self._extents[chunk * _EXTENT_WORDS + 1] & 0xFFFF_FFFF

    def ready(self, chunk: int) -> bool:
        """Whether a worker may serve *chunk* now."""
        if self.has_data and self._states[chunk] & 7 == _VERIFIED:
            return True
        return bool(self._extents[chunk * _EXTENT_WORDS + _SPILL_WORD])

    def unverified(self, chunk: int) -> bool:
        """Whether bytes of *chunk* are stored that were not verified under this boot."""
        return self.has_data and self._states[chunk] & 7 == _PRESENT

    def hinted(self, chunk: int) -> bool:
        """Whether some daemon says that it is fetching *chunk*; it may have died since."""
        return self.has_data and self._states[chunk] & 7 == _FETCHING

    def stored(self, chunk: int) -> bool:
        """Whether the data file has bytes of *chunk*, verified or not."""
        return self.has_data and self._states[chunk] & 7 in (_PRESENT, _VERIFIED)

    def release(self) -> None:
        """Gives the views up; any later use raises ValueError."""
        for view in (self.offsets, self.lengths, self._states, self._extents):
            view.release()


class Store:
    """The blobs of the bootstrap *image*, cached in *cache_dir*.

    At most *spill_size* bytes of memory stand in without a directory, or when its disk is full.

    Raises BadImage, UnsupportedFeature, CacheError. *boot_id* (16 bytes) replaces the kernel's in tests. With
    *for_nydusd*, a record of what is stored is kept for nydusd.
    """

    def __init__(
        self,
        image: bytes | memoryview | mmap,
        *,
        cache_dir: Path | None,
        spill_size: int,
        boot_id: bytes | None = None,
        for_nydusd: bool = False,
    ) -> None:
        self._handle = ffi.NULL  # which every call answers with an error
        self._views: dict[int, ChunkView] = {}
        self._touched: dict[int, memoryview] = {}
        self._on_disk: dict[int, bool] = {}
        if boot_id is not None and len(boot_id) != 16:
            raise ValueError("a boot id has 16 bytes")
        cache = os.fsencode(cache_dir) if cache_dir is not None else b""
        out = ffi.new("void **")
        with ffi.from_buffer(image) as buf:
            boot = ffi.from_buffer(boot_id) if boot_id is not None else ffi.NULL
            n_blobs = raise_for(
                lib.vr_store_new(buf, len(buf), cache, len(cache), spill_size, boot, int(for_nydusd), out)
            )
        self._handle = out[0]
        self.n_blobs = n_blobs

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Frees the store and invalidates its views. No other thread may be in a call."""
        for view in self._views.values():
            view.release()
        for touched in self._touched.values():
            touched.release()
        self._views.clear()
        self._touched.clear()
        handle, self._handle = self._handle, ffi.NULL
        lib.vr_store_free(handle)

    @property
    def handle(self) -> Any:
        """For other facades of the core; NULL after :meth:`close`."""
        return self._handle

    def blob(self, index: int) -> BlobInfo:
        """What the image says about blob *index*."""
        info = ffi.new("uint64_t[]", lib.VR_STORE_INFO_LEN)
        toc = ffi.new("uint8_t[]", 32)
        name = ffi.new("uint8_t[]", 64)
        n = raise_for(lib.vr_store_blob_info(self._handle, index, info, toc, name))
        return BlobInfo(
            blob_index=index,
            blob_id=bytes(ffi.buffer(name, n)).decode("ascii"),
            uncompressed_size=info[1],
            n_known=info[2],
            n_without_digest=info[3],
            needs_chunk_info=bool(info[4]),
            compressor=info[5],
            digester=info[6],
            ci_offset=info[7],
            ci_compressed_size=info[8],
            ci_uncompressed_size=info[9],
            ci_compressor=info[10],
            toc_size=info[11],
            toc_digest=bytes(ffi.buffer(toc)),
            n_chunks=info[12],
        )

    def blobs(self) -> list[BlobInfo]:
        """:meth:`blob` of each, in the order of the blob table."""
        return [self.blob(index) for index in range(self.n_blobs)]

    def set_chunk_info(
        self, index: int, data: bytes, *, meta_file: bool = False, digests: bytes | None = None
    ) -> None:
        """Fills in what the chunk table lacks.

        *data* is the uncompressed chunk-info array, or a ``blob.meta`` file. *digests* (32 bytes per chunk)
        only from an authenticated source.

        Raises BadImage when it does not fit the blob table.
        """
        raise_for(
            lib.vr_store_set_chunk_info(
                self._handle, index, data, len(data), int(meta_file), digests or b"", len(digests or b"")
            )
        )

    def open_blob(self, index: int) -> bool:
        """Opens or makes the cache files of a blob; True with a data file, False when memory stands in."""
        self._on_disk[index] = bool(raise_for(lib.vr_store_open_blob(self._handle, index)))
        return self._on_disk[index]

    def adopt_blob(self, index: int, state: int, extents: int, touched: int, data: int | None) -> bool:
        """Takes over the tables behind a predecessor's descriptors, which stay the caller's."""
        fd = -1 if data is None else data
        self._on_disk[index] = bool(
            raise_for(lib.vr_store_adopt_blob(self._handle, index, state, extents, touched, fd))
        )
        return self._on_disk[index]

    def adopt_spill(self, fd: int) -> None:
        """Takes over a predecessor's spill, after all its blobs."""
        raise_for(lib.vr_store_adopt_spill(self._handle, fd))

    def share(self, index: int) -> tuple[int, int, int, int | None]:
        """Descriptors (states, extents, touched, data file) for a worker; the caller closes them.

        All are read-only but that of the touched table.
        """
        out = ffi.new("int32_t[]", 4)
        raise_for(lib.vr_store_share(self._handle, index, out))
        return out[0], out[1], out[2], out[3] if out[3] >= 0 else None

    def share_spill(self) -> int:
        """A read-only descriptor of the spill; the caller closes it."""
        return raise_for(lib.vr_store_share_spill(self._handle))

    def _array(self, index: int, which: int, fmt: Literal["B", "I", "Q"]) -> memoryview:
        out = ffi.new("void **")
        n = raise_for(lib.vr_store_array(self._handle, index, which, out))
        raw: memoryview = memoryview(ffi.buffer(out[0], n)) if n else memoryview(b"")
        return raw.cast("B").cast(fmt)

    def chunks(self, index: int) -> ChunkView:
        """Places and states of an open blob's chunks; valid until :meth:`close`."""
        view = self._views.get(index)
        if view is None:
            view = self._views[index] = ChunkView(
                self._array(index, lib.VR_STORE_COMPRESSED_OFFSET, "Q"),
                self._array(index, lib.VR_STORE_COMPRESSED_SIZE, "I"),
                self._array(index, lib.VR_STORE_STATE_WORDS, "I"),
                self._array(index, lib.VR_STORE_EXTENTS, "Q"),
                self._on_disk.get(index, False),
            )
        return view

    def touched(self, index: int) -> memoryview:
        """One byte per chunk of an open blob: not 0 when a read was answered from it. Valid until close.

        Read in place. 1: since the last look of the eviction, 2: before that.
        """
        view = self._touched.get(index)
        if view is None:
            view = self._touched[index] = self._array(index, lib.VR_STORE_TOUCHED, "B").toreadonly()
        return view

    def n_touched(self, index: int) -> int:
        """How many chunks reads were answered from. Quick, also for millions of them."""
        touched = bytes(self.touched(index))
        return len(touched) - touched.count(0)

    def touched_counts(self, index: int) -> TouchedCounts:
        """How many chunks, and how many of their bytes, reads were answered from."""
        touched, view = self.touched(index), self.chunks(index)
        chunks = [chunk for chunk, byte in enumerate(touched) if byte]
        return TouchedCounts(
            n_chunks=len(chunks),
            stored_bytes=sum(view.lengths[chunk] for chunk in chunks),
            plain_bytes=sum(view.size(chunk) for chunk in chunks),
        )

    def ingest(self, index: int, base: int, data: bytes, chunks: Sequence[int]) -> bytes:
        """Decodes, verifies and publishes *chunks* out of *data*, which starts at byte *base* of the blob.

        Returns one outcome per chunk. Blocking (CPU and disk): an event loop uses ``native.ingest``.
        """
        wanted = array("I", chunks)
        outcomes = bytearray(len(wanted))
        raise_for(
            lib.vr_store_ingest(
                self._handle,
                index,
                base,
                ffi.from_buffer(data),
                len(data),
                ffi.from_buffer("uint32_t[]", wanted),
                len(wanted),
                ffi.from_buffer(outcomes),
            )
        )
        return bytes(outcomes)

    def verify_present(self, index: int, chunk: int, *, force: bool = False) -> bool:
        """Reads a stored chunk back: a present one (by *force*, a verified one) becomes verified or absent.

        Returns whether it may be served. Blocking: an event loop uses ``native.ingest``.
        """
        return bool(raise_for(lib.vr_store_verify(self._handle, index, chunk, int(force))))

    def hint_fetching(self, index: int, chunks: Iterable[int], on: bool) -> None:
        """Shows (or stops showing) in the shared states that *chunks* are being fetched."""
        wanted = array("I", chunks)
        raise_for(
            lib.vr_store_hint_fetching(
                self._handle, index, ffi.from_buffer("uint32_t[]", wanted), len(wanted), int(on)
            )
        )

    def hold(self, index: int, chunks: Iterable[int], seconds: float) -> None:
        """Protects chunks from eviction for *seconds*, or until a read was answered from them."""
        wanted = array("I", chunks)
        raise_for(
            lib.vr_cache_hold(
                self._handle, index, ffi.from_buffer("uint32_t[]", wanted), len(wanted), math.ceil(seconds)
            )
        )

    def harvest(self) -> int:
        """Notes in the directory which chunks were used since the last call; their number."""
        return raise_for(lib.vr_cache_harvest(self._handle))

    def growth(self) -> tuple[int, bool]:
        """Bytes stored in the directory so far, and whether an eviction stood in the way of a chunk."""
        out = ffi.new("uint64_t[]", 2)
        raise_for(lib.vr_cache_growth(self._handle, out))
        return out[0], bool(out[1])

    def sweep(self, limit: int, *, recover: bool = False) -> Sweep | None:
        """Brings the directory below *limit* bytes (0: no limit); None without a directory.

        *recover* also gives back what an interrupted eviction left. Blocking: call it from an executor.
        """
        out = ffi.new("uint64_t[]", lib.VR_CACHE_SWEEP_LEN)
        if raise_for(lib.vr_cache_sweep(self._handle, limit, int(recover), out)) == 0:
            return None
        before, after, n_chunks, held, errno, busy = out
        return Sweep(before, after, n_chunks, held, errno, bool(busy))

    def stop_sweep(self) -> None:
        """Ends a sweep that runs in another thread, and those to come."""
        raise_for(lib.vr_cache_stop_sweep(self._handle))

    def states(self, index: int) -> StateCounts:
        """Counts of the described chunks by state."""
        out = ffi.new("uint64_t[]", lib.VR_STORE_STATES_LEN)
        raise_for(lib.vr_store_states(self._handle, index, out))
        return StateCounts(*out)

    def map_digest(self, index: int) -> bytes:
        """sha256 over all that the image promises about the blob, which need not be open."""
        out = ffi.new("uint8_t[]", 32)
        raise_for(lib.vr_store_map_digest(self._handle, index, out))
        return bytes(ffi.buffer(out))

    def stats(self) -> StoreStats:
        """Use of the spill, refusals of the disk."""
        out = ffi.new("uint64_t[]", lib.VR_STORE_STATS_LEN)
        raise_for(lib.vr_store_stats(self._handle, out))
        return StoreStats(*out)


def paths(image: bytes | memoryview | mmap, nodeids: Sequence[int]) -> dict[int, str]:
    """:func:`raw_paths` as text; what is no UTF-8 is escaped."""
    found = raw_paths(image, nodeids)
    return {nodeid: path.decode("utf-8", "backslashreplace") for nodeid, path in found.items()}


def raw_paths(image: bytes | memoryview | mmap, nodeids: Sequence[int]) -> dict[int, bytes]:
    """Paths of nodes, named by the ids that a guest uses; a node without a name is left out.

    Blocking: walks the tree of the bootstrap *image*. Raises BadImage.
    """
    ids = array("Q", nodeids)
    with ffi.from_buffer(image) as buf, ffi.from_buffer("uint64_t[]", ids) as wanted:
        size = 256 * len(ids) + 1  # most names are shorter; longer ones need a second call
        while True:
            out = ffi.new("uint8_t[]", size)
            n = raise_for(lib.vr_store_paths(buf, len(buf), wanted, len(ids), out, size))
            if n <= size:
                break
            size = n
    names = bytes(ffi.buffer(out, n)).split(b"\0")
    return {i: name for i, name in zip(ids, names, strict=False) if name}


def reclaim(cache_dir: Path, stem: str) -> int | None:
    """Gives back what absent chunks of the files *stem* still use; their number.

    None when another process evicts, or the files are not to be changed. Blocking.
    """
    folder, name = os.fsencode(cache_dir), stem.encode()
    n = raise_for(lib.vr_cache_reclaim(folder, len(folder), name, len(name)))
    return n - 1 if n else None


def trim() -> None:
    """Gives the calling thread's scratch memory, and what the allocator holds free, back to the system."""
    lib.vr_store_trim()


assert sys.byteorder == "little", "shared tables are little endian"
