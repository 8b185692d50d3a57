"""The Rust reader of bootstraps, with the surface of its readable twin ``virtiofsd_rafs.rafs.v6.Tree``.

Names, arguments and results are the same, so that a tool or a test takes either; only the records that the
twin keeps as they are on disk (``SuperBlock``, ``BlobEntry``) show fewer fields here. Calls go by node id:
an inode that is passed in counts for its ``nid`` alone and is read and checked again.

Any number of threads may use one tree. Every method raises BadImage or UnsupportedFeature on a bad image.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from virtiofsd_rafs.blob.chunk_map import ChunkInfo
from virtiofsd_rafs.native._lib import ffi, lib, raise_for
from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor, Digester
from virtiofsd_rafs.rafs.v6 import ChunkRef, Dirent, Xattr

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

__all__ = ["BlobEntry", "ChunkInfo", "ChunkRef", "Dirent", "Inode", "NativeTree", "SuperBlock", "Xattr"]

_ENTRY = struct.Struct("<QQII")
_ENTRIES_BUFFER = 64 << 10
_ATTRIBUTE = struct.Struct("<II")
_SYMLINK_MAX = 4096
_XATTR_VALUE_MAX = 65535
_PARTS_PER_CALL = 256
_CHUNKS_PER_CALL = 1024
_RUNS_FIRST = 64
_U64_MAX = (1 << 64) - 1


class SuperBlock(NamedTuple):
    """What the superblocks say; offsets and sizes in bytes, times in seconds since the epoch."""

    flags: int
    chunk_size: int
    root_nid: int
    inos: int
    build_time: int
    build_time_nsec: int
    meta_offset: int
    blocks: int
    blob_count: int
    compressor: Compressor
    digester: Digester
    chunk_table_offset: int
    chunk_table_size: int
    prefetch_table_offset: int
    prefetch_table_size: int


class Inode(NamedTuple):
    """An inode; the fields are those of the twin, without what describes its place in the image."""

    nid: int
    disk_ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    mtime_nsec: int
    rdev: int
    layout: int
    has_xattr: bool

    @property
    def ino(self) -> int:
        return self.nid

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_reg(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


class BlobEntry(NamedTuple):
    """An entry of the blob table; sizes in bytes. ``toc_digest`` is None when the image promises none."""

    blob_id: str
    chunk_size: int
    chunk_count: int
    compressor: Compressor
    digester: Digester
    features: int
    compressed_size: int
    uncompressed_size: int
    data_size: int
    toc_size: int
    ci_compressor: Compressor
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    chunk_info_size: int
    toc_digest: bytes | None


RUN_WORDS: int = lib.VR_RAFS_RUN_LEN


class FileRun(NamedTuple):
    """Chunks with consecutive numbers that follow each other in a file."""

    nid: int
    offset: int
    """Where the first chunk starts in the file; the others follow at the distance of the chunk size."""
    blob_index: int
    first: int
    n_chunks: int


def _signed(value: int) -> int:
    """The signed number that a u64 stands for."""
    return value - (1 << 64) if value >> 63 else value


def _buffer(data: bytes | mmap) -> Any:
    return ffi.from_buffer("uint8_t[]", data)


class NativeTree:
    """A bootstrap that the Rust reader accepted. It keeps a copy of the bytes.

    Raises BadImage or UnsupportedFeature.
    """

    def __init__(self, image: bytes | mmap) -> None:
        handle = ffi.new("void **")
        raise_for(lib.vr_rafs_open(_buffer(image), len(image), handle))
        self._handle = ffi.gc(handle[0], lib.vr_rafs_close, len(image))
        v = self._values(lib.vr_rafs_superblock, lib.VR_RAFS_SUPERBLOCK_LEN)
        v[4] = _signed(v[4])
        v[9], v[10] = Compressor(v[9]), Digester(v[10])
        self.superblock = SuperBlock._make(v[:15])

    @classmethod
    def parse(cls, image: bytes) -> NativeTree:
        """The same as the constructor, under the name that the twin has for it."""
        return cls(image)

    def _values(self, function: Any, count: int, *args: Any) -> list[Any]:
        out = ffi.new("uint64_t[]", count)
        raise_for(function(self._handle, *args, out))
        return list(out)

    @property
    def root(self) -> int:
        """Node id of the root directory."""
        return self.superblock.root_nid

    @property
    def blobs(self) -> tuple[BlobEntry, ...]:
        return tuple(self._blob(index) for index in range(self.superblock.blob_count))

    def _blob(self, index: int) -> BlobEntry:
        out = ffi.new("uint64_t[]", lib.VR_RAFS_BLOB_LEN)
        blob_id = ffi.new("uint8_t[]", lib.VR_RAFS_BLOB_ID_LEN)
        digest = ffi.new("uint8_t[]", 32)
        raise_for(lib.vr_rafs_blob(self._handle, index, out, blob_id, digest))
        v: list[Any] = list(out)
        trusted = v[8]
        v[2], v[3], v[9] = Compressor(v[2]), Digester(v[3]), Compressor(v[9])
        name = bytes(blob_id).rstrip(b"\0").decode()
        return BlobEntry._make([name, *v[:14], bytes(digest) if trusted else None])

    def inode(self, nid: int) -> Inode:
        v = self._values(lib.vr_rafs_inode, lib.VR_RAFS_INODE_LEN, nid)
        v[7], v[11] = _signed(v[7]), bool(v[11])
        return Inode._make(v[:12])

    def lookup(self, parent: Inode, name: bytes) -> tuple[int, int] | None:
        """Nid and DT_* type of *name* in directory *parent*, or None."""
        out = ffi.new("uint64_t[]", 2)
        found = raise_for(lib.vr_rafs_lookup(self._handle, parent.nid, _buffer(name), len(name), out))
        return (out[0], out[1]) if found else None

    def entries(self, parent: Inode, cookie: int = 0) -> Iterator[Dirent]:
        """The entries of directory *parent* in order, "." and ".." included, from *cookie* on."""
        buf = ffi.new("uint8_t[]", _ENTRIES_BUFFER)
        while used := raise_for(lib.vr_rafs_entries(self._handle, parent.nid, cookie, buf, _ENTRIES_BUFFER)):
            packed = bytes(ffi.buffer(buf, used))
            at = 0
            while at < used:
                nid, cookie, d_type, length = _ENTRY.unpack_from(packed, at)
                at += _ENTRY.size + length
                yield Dirent(packed[at - length : at], nid, d_type, cookie)

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        buf = ffi.new("uint8_t[]", _SYMLINK_MAX)
        length = raise_for(lib.vr_rafs_readlink(self._handle, inode.nid, buf, _SYMLINK_MAX))
        return bytes(ffi.buffer(buf, length))

    def xattrs(self, inode: Inode) -> Iterator[Xattr]:
        size = raise_for(lib.vr_rafs_xattrs(self._handle, inode.nid, ffi.NULL, 0))
        buf = ffi.new("uint8_t[]", size)
        raise_for(lib.vr_rafs_xattrs(self._handle, inode.nid, buf, size))
        packed = bytes(buf)
        at = 0
        while at < size:
            name_length, value_length = _ATTRIBUTE.unpack_from(packed, at)
            at += _ATTRIBUTE.size
            name = packed[at : at + name_length]
            at += name_length + value_length
            # The ACL names are prefixes without a suffix, every other prefix ends with its dot.
            cut = name_length if name.startswith(b"system.") else name.index(b".") + 1
            yield Xattr(name[:cut], name[cut:], packed[at - value_length : at])

    def xattr_get(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of the attribute with the full name *name* ("user.x"), or None."""
        buf = ffi.new("uint8_t[]", _XATTR_VALUE_MAX)
        found = ffi.new("uint64_t[]", 1)
        length = raise_for(
            lib.vr_rafs_xattr_get(
                self._handle, inode.nid, _buffer(name), len(name), buf, _XATTR_VALUE_MAX, found
            )
        )
        return bytes(ffi.buffer(buf, length)) if found[0] else None

    def chunks(self, inode: Inode, offset: int = 0, length: int | None = None) -> Iterator[ChunkRef]:
        """Where bytes ``[offset, offset + length)`` of a chunk-based file are, clipped to its size."""
        end = _U64_MAX if length is None else min(offset + length, _U64_MAX)
        out = ffi.new("uint64_t[]", _PARTS_PER_CALL * lib.VR_RAFS_PART_LEN)
        while count := raise_for(
            lib.vr_rafs_chunks(
                self._handle, inode.nid, min(offset, _U64_MAX), max(end - offset, 0), out, _PARTS_PER_CALL
            )
        ):
            values = list(out)
            for at in range(0, count * lib.VR_RAFS_PART_LEN, lib.VR_RAFS_PART_LEN):
                part = ChunkRef(*values[at : at + lib.VR_RAFS_PART_LEN])
                offset += part.length
                yield part

    def runs(self, nid: int, offset: int = 0, length: int | None = None) -> list[FileRun]:
        """The chunks behind a part of file *nid*, or behind all files below directory *nid*.

        Whole chunks, each file once; what lies in the bootstrap has none.
        """
        words = self.run_words(nid, offset, length)
        return [FileRun(*words[at : at + RUN_WORDS]) for at in range(0, len(words), RUN_WORDS)]

    def run_words(self, nid: int, offset: int = 0, length: int | None = None) -> memoryview:
        """:meth:`runs` without an object for each: RUN_WORDS numbers per run, in the order of FileRun."""
        wanted = _U64_MAX if length is None else length
        size = _RUNS_FIRST
        while True:
            out = ffi.new("uint64_t[]", size * RUN_WORDS)
            n = raise_for(
                lib.vr_rafs_runs(self._handle, nid, min(offset, _U64_MAX), min(wanted, _U64_MAX), out, size)
            )
            if n <= size:
                words: memoryview = memoryview(ffi.buffer(out)).cast("B").cast("Q")
                return words[: n * RUN_WORDS]
            size = n

    def inline_data(self, inode: Inode, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[offset, offset + length)``, clipped to the size, of a file that lies in the bootstrap."""
        left = max(inode.size - offset, 0) if length is None else min(length, max(inode.size - offset, 0))
        parts: list[bytes] = []
        while True:
            buf = ffi.new("uint8_t[]", left)
            n = raise_for(lib.vr_rafs_inline_data(self._handle, inode.nid, min(offset, _U64_MAX), buf, left))
            if n == 0:
                return b"".join(parts)
            # A file may lie in two pieces, and a call returns what is left of one of them.
            parts.append(bytes(ffi.buffer(buf, n)))
            offset += n
            left -= n

    def chunk_map(self, blob_index: int) -> dict[int, ChunkInfo]:
        """The chunks of a blob by number, by the chunk table. A chunk that no file uses may be missing."""
        out = ffi.new("uint64_t[]", _CHUNKS_PER_CALL * lib.VR_RAFS_CHUNK_LEN)
        chunks: dict[int, ChunkInfo] = {}
        while count := raise_for(
            lib.vr_rafs_chunk_map(self._handle, blob_index, len(chunks), out, _CHUNKS_PER_CALL)
        ):
            values = list(out)
            for at in range(0, count * lib.VR_RAFS_CHUNK_LEN, lib.VR_RAFS_CHUNK_LEN):
                v = values[at : at + lib.VR_RAFS_CHUNK_LEN]
                digest = struct.pack("<4Q", *v[8:]) if v[7] else None
                chunks[v[0]] = ChunkInfo._make([*v[:7], digest])
        return chunks

    def prefetch_nids(self) -> list[int]:
        """The nids of the prefetch table."""
        size = self.superblock.prefetch_table_size // 4
        out = ffi.new("uint64_t[]", size)
        count = raise_for(lib.vr_rafs_prefetch(self._handle, out, size))
        return list(out)[:count]
