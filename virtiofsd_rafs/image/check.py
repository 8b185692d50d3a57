"""Verifies an image: every structure of the bootstrap and, with its blobs at hand, every promised digest.

Nothing stops at the first fault: each one is a finding, and the check goes on behind it where that is
possible.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.backends.retry import with_retries
from virtiofsd_rafs.blob import c_blob, codecs
from virtiofsd_rafs.blob.chunk_info import unpack_section
from virtiofsd_rafs.blob.chunk_map import ChunkInfo, ChunkMap
from virtiofsd_rafs.blob.digest import digest_of
from virtiofsd_rafs.blob.toc import Section, parse_toc
from virtiofsd_rafs.errors import BadImage, DigestMismatch, ImageError, NotFound
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.inode import inline_start
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from virtiofsd_rafs.backends.base import BlobSource
    from virtiofsd_rafs.backends.config import BackendConfig
    from virtiofsd_rafs.image.resolve import Pull
    from virtiofsd_rafs.rafs.superblock import BlobEntry
    from virtiofsd_rafs.rafs.v6 import Dirent, Inode

    Read = Callable[[int, int], Awaitable[bytes]]

_DEADLINE_S = 90.0  # for each read from a back-end, with its retries
# Chunks that lie side by side are read together, up to this many bytes.
_READ_SIZE = 8 << 20


@attrs.frozen
class Finding:
    """One fault: a path in the image or a structure, the stable id of the kind of error, and the text."""

    where: str
    msgid: str
    message: str


@attrs.define
class Report:
    """What a check has seen. ``n_chunks_verified`` counts chunks whose bytes had the promised digest."""

    findings: list[Finding] = attrs.field(factory=list)
    n_inodes: int = 0
    n_names: int = 0
    n_chunks: int = 0
    n_chunks_verified: int = 0
    blobs_read: list[str] = attrs.field(factory=list)
    blobs_missing: list[str] = attrs.field(factory=list)

    def add(self, where: str, error: ImageError) -> None:
        """Notes *error* about *where*."""
        self.findings.append(Finding(where, error.msgid, str(error)))

    def fault(self, where: str, message: str) -> None:
        """Notes that *where* breaks a rule."""
        self.findings.append(Finding(where, BadImage.msgid, message))


def check_bootstrap(image: bytes, report: Report) -> tuple[Tree, list[ChunkMap]] | None:
    """Checks all that the bootstrap *image* says; the tree and the chunk maps of its blobs when it opens."""
    try:
        tree = Tree.parse(image)
    except ImageError as e:
        report.add("bootstrap", e)
        return None
    ids = [blob.blob_id for blob in tree.blobs]
    for blob in tree.blobs:
        if ids.count(blob.blob_id) > 1:
            report.fault(f"blob {blob.index}", f"the id {blob.blob_id} is there twice")
        if blob.device.blocks << c.BLOCK_BITS < blob.uncompressed_size:
            report.fault(f"blob {blob.index}", "its device slot is smaller than its uncompressed size")
    try:
        maps = ChunkMap.from_chunk_table(tree)
    except ImageError as e:
        report.add("chunk table", e)
        maps = [ChunkMap(blob, {}) for blob in tree.blobs]
    report.n_chunks = sum(len(m.chunks) for m in maps)
    _TreeCheck(tree, maps, report).run()
    return tree, maps


class _TreeCheck:
    """Visits every name once. A directory whose entries break is read up to there."""

    def __init__(self, tree: Tree, maps: list[ChunkMap], report: Report) -> None:
        self.tree = tree
        self.maps = maps
        self.report = report
        self.names_of: dict[int, int] = {}
        self.has_xattrs = False

    def run(self) -> None:
        root = self.tree.inode(self.tree.root)
        self.names_of[root.nid] = 1
        self._inode("/", root)
        stack = [("/", root, root.nid)]
        while stack:
            path, inode, parent = stack.pop()
            stack.extend(reversed(self._directory(path, inode, parent)))
        self.report.n_inodes = len(self.names_of)
        self.report.n_names = sum(self.names_of.values())
        for nid in self.tree.prefetch_nids():
            if nid not in self.names_of:
                self.report.fault("prefetch table", f"no name leads to nid {nid}")
        if self.has_xattrs and not self.tree.superblock.has_xattr:
            self.report.fault("extended superblock.flags", "HAS_XATTR is not set, yet there are attributes")

    def _directory(self, path: str, inode: Inode, parent: int) -> list[tuple[str, Inode, int]]:
        """Checks the entries of a directory and what they name; returns its sub-directories."""
        directories = []
        dots: dict[bytes, int] = {}
        try:
            for entry in self.tree.entries(inode):
                if entry.name in (b".", b".."):
                    dots[entry.name] = entry.nid
                    continue
                name = entry.name.decode("ascii", "backslashreplace")
                child_path = f"{path.rstrip('/')}/{name}"
                child = self._child(child_path, entry)
                if child is not None:
                    directories.append((child_path, child, inode.nid))
        except ImageError as e:
            self.report.add(path, e)
        else:
            for dot, expected in ((b".", inode.nid), (b"..", parent)):
                if dots.get(dot) != expected:
                    found = dots.get(dot)
                    self.report.fault(path, f"{dot.decode()} is nid {found} instead of {expected}")
        return directories

    def _child(self, path: str, entry: Dirent) -> Inode | None:
        """Checks what *entry* names, once; returns it when it is a directory to go into."""
        try:
            inode = self.tree.inode(entry.nid)
        except ImageError as e:
            self.report.add(path, e)
            return None
        if entry.d_type not in (0, inode.mode >> 12):
            self.report.fault(path, f"the entry has type {entry.d_type}, the inode {inode.mode >> 12}")
        names = self.names_of[inode.nid] = self.names_of.get(inode.nid, 0) + 1
        if names > 1:
            if inode.is_dir:
                self.report.fault(path, f"directory nid {inode.nid} has another name")
            elif names == inode.nlink + 1:
                self.report.fault(path, f"nid {inode.nid} has more names than its link count {inode.nlink}")
            return None
        self._inode(path, inode)
        return inode if inode.is_dir else None

    def _inode(self, path: str, inode: Inode) -> None:
        if inode.nlink == 0:
            self.report.fault(path, "the link count is 0")
        if inode.layout == c.LAYOUT_FLAT_INLINE and inode.size:
            tail = inode.size - inline_start(inode)
            if inode.body_offset % c.BLOCK_SIZE + tail > c.BLOCK_SIZE:
                self.report.fault(path, "the inline data crosses a block, which the kernel refuses")
        try:
            for _ in self.tree.xattrs(inode):
                self.has_xattrs = True
            if inode.is_symlink:
                self.tree.readlink(inode)
            elif inode.is_reg and inode.layout == c.LAYOUT_CHUNK_BASED:
                for part in self.tree.chunks(inode):
                    self.maps[part.blob_index].resolve(part)
        except ImageError as e:
            self.report.add(path, e)


async def check_image(
    image: str,
    report: Report,
    *,
    blob_dir: Path | None = None,
    cache_dir: Path | None = None,
    pull: Pull = "missing",
    access: RegistryAccess | None = None,
    backend: BackendConfig | None = None,
    metadata_only: bool = False,
    deadline: float = _DEADLINE_S,
) -> None:
    """Checks the image that *image* names (see resolve_image), its blobs too unless *metadata_only*.

    *deadline* is how long a registry that is away is waited for, in seconds.

    Blobs are where *backend* says, else where the image is. Those of a bootstrap file are looked for beside
    it unless *backend* or *blob_dir* is given; only then it is an error when one is missing. Raises what
    resolve_image and the back-ends raise; faults of the image go to *report*.
    """
    from virtiofsd_rafs.backends import open_source
    from virtiofsd_rafs.image.resolve import resolve_image

    resolved = await resolve_image(
        image,
        cache_dir=cache_dir,
        blob_dir=blob_dir,
        pull=pull,
        access=access,
        deadline=deadline,
    )
    opened = check_bootstrap(resolved.bootstrap, report)
    if opened is None or metadata_only:
        return
    source = open_source(resolved, _SourceOptions(access=access or RegistryAccess()), backend)
    try:
        for chunk_map in opened[1]:
            blob_id = chunk_map.blob.blob_id
            try:
                size = await with_retries(
                    partial(source.blob_size, blob_id), deadline_s=_DEADLINE_S, what=f"blob {blob_id}"
                )
            except NotFound:
                if resolved.reference is None and blob_dir is None and backend is None:
                    report.blobs_missing.append(blob_id)
                    continue
                raise
            await check_blob(chunk_map, size, _reader(source, blob_id), report)
    finally:
        await source.close()


def _reader(source: BlobSource, blob_id: str) -> Read:
    async def read(offset: int, length: int) -> bytes:
        return await with_retries(
            lambda: source.read_range(blob_id, offset, length),
            deadline_s=_DEADLINE_S,
            what=f"blob {blob_id}, {length} bytes at {offset}",
        )

    return read


@attrs.frozen
class _SourceOptions:
    access: RegistryAccess
    connections: int = 2
    io_deadline_s: float = _DEADLINE_S


async def check_blob(chunk_map: ChunkMap, size: int, read: Read, report: Report) -> None:
    """Checks the blob of *chunk_map*: table of contents, chunk information and digests against the bootstrap,
    then the bytes of every chunk.

    *size* is the length of the stored blob, ``read(offset, length)`` delivers bytes of it.
    """
    blob = chunk_map.blob
    where = f"blob {blob.blob_id}"
    report.blobs_read.append(blob.blob_id)
    sections: dict[bytes, Section] = {}
    if blob.record.features & c.BlobFeatures.HAS_TOC:
        try:
            tail = min(size, 4096)
            sections = parse_toc(
                await read(size - tail, tail),
                size,
                size=blob.record.blob_toc_size,
                digest=blob.toc_digest or bytes(32),
            )
        except ImageError as e:
            report.add(where, e)
    for section in sections.values():
        # The digest of the data section is over stored bytes that are verified chunk by chunk below.
        if section.name != c_blob.NAME_BLOB:
            await _check_section(where, section, read, report)
    if blob.has_chunk_info:
        await _check_chunk_info(chunk_map, size, sections, read, report)
    for group in _groups(chunk_map):
        start = group[0].compressed_offset
        end = group[-1].compressed_offset + group[-1].compressed_size
        if end > size:
            report.fault(where, f"chunk {group[-1].chunk_index} ends beyond the {size} bytes of the blob")
            continue
        data = memoryview(await read(start, end - start))
        for chunk in group:
            at = chunk.compressed_offset - start
            _check_chunk(blob, chunk, data[at : at + chunk.compressed_size], report)


async def _check_section(where: str, section: Section, read: Read, report: Report) -> None:
    stored = await read(section.offset, section.compressed_size) if section.compressed_size else b""
    name = section.name.decode("ascii", "backslashreplace")
    try:
        content = codecs.decompress(stored, section.compressor, section.uncompressed_size)
        if hashlib.sha256(content).digest() != section.digest:
            raise DigestMismatch(f"section {name} does not have the digest of the table of contents")
    except ImageError as e:
        report.add(where, e)


async def _check_chunk_info(
    chunk_map: ChunkMap, size: int, sections: dict[bytes, Section], read: Read, report: Report
) -> None:
    """The chunk information must say the same as the chunk table."""
    blob = chunk_map.blob
    where = f"blob {blob.blob_id}"
    length = blob.record.ci_compressed_size + c_blob.CI_HEADER_SIZE
    if blob.record.ci_offset + length > size:
        report.fault(where, f"the chunk information ends beyond the {size} bytes of the blob")
        return
    digests = None
    if section := sections.get(c_blob.NAME_DIGEST):
        digests = await read(section.offset, section.compressed_size)
    try:
        array = unpack_section(blob, await read(blob.record.ci_offset, length))
        stored = ChunkMap.from_chunk_info(blob, array, digests)
    except ImageError as e:
        report.add(where, e)
        return
    for chunk in chunk_map:
        # The chunk table may add what the array has no room for: a crc32, and digests without that section.
        other = stored.chunks[chunk.chunk_index]._replace(crc32=chunk.crc32)
        other = other._replace(flags=other.flags | chunk.flags & c.ChunkFlags.HAS_CRC32)
        if digests is None:
            other = other._replace(digest=chunk.digest)
        if other != chunk:
            report.fault(where, f"chunk {chunk.chunk_index}: chunk information and chunk table differ")


def _groups(chunk_map: ChunkMap) -> list[list[ChunkInfo]]:
    """The chunks in the order of the blob, those to be read at once together."""
    groups: list[list[ChunkInfo]] = []
    for chunk in sorted(chunk_map, key=lambda chunk: chunk.compressed_offset):
        end = chunk.compressed_offset + chunk.compressed_size
        if groups and end - groups[-1][0].compressed_offset <= _READ_SIZE:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _check_chunk(blob: BlobEntry, chunk: ChunkInfo, stored: memoryview, report: Report) -> None:
    where = f"blob {blob.blob_id}, chunk {chunk.chunk_index}"
    compressor = blob.compressor if chunk.compressed else c.Compressor.NONE
    try:
        data = codecs.decompress(stored, compressor, chunk.uncompressed_size)
        if chunk.digest is None:
            report.findings.append(Finding(where, "image.unverified", "the image promises no digest"))
            return
        if (found := digest_of(data, blob.digester)) != chunk.digest:
            raise DigestMismatch(f"digest {found.hex()} instead of {chunk.digest.hex()}")
        report.n_chunks_verified += 1
    except ImageError as e:
        report.add(where, e)
