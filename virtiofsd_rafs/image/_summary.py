"""What an image contains, as plain data: of the whole, of a directory, of a file."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.walk import walk

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.superblock import BlobEntry
    from virtiofsd_rafs.rafs.v6 import Inode, Tree

_KINDS = {
    stat.S_IFREG: "files",
    stat.S_IFDIR: "directories",
    stat.S_IFLNK: "symlinks",
    stat.S_IFCHR: "devices",
    stat.S_IFBLK: "devices",
    stat.S_IFIFO: "fifos",
    stat.S_IFSOCK: "sockets",
}


def summarize(tree: Tree) -> dict[str, Any]:
    """Superblock, blobs, counts and sizes of the whole image.

    ``content`` counts the bytes of each file once, ``chunks`` each chunk of the table once. ``prefetch`` has
    the entries of the prefetch table in their order. Raises BadImage.
    """
    sb = tree.superblock
    counts = dict.fromkeys(dict.fromkeys(_KINDS.values()), 0)
    content, names, seen = 0, 0, set()
    # nid -> path of what the prefetch table names
    prefetch: dict[int, str | None] = dict.fromkeys(tree.prefetch_nids())
    for path, inode in walk(tree):
        if inode.nid in prefetch and prefetch[inode.nid] is None:
            prefetch[inode.nid] = _text(path)
        names += 1
        if inode.nid not in seen:
            seen.add(inode.nid)
            counts[_KINDS[stat.S_IFMT(inode.mode)]] += 1
            content += inode.size if inode.is_reg else 0
    chunks = [chunk for chunk_map in ChunkMap.from_chunk_table(tree) for chunk in chunk_map]
    stored = sum(chunk.compressed_size for chunk in chunks)
    return {
        "format": "rafs-v6",
        "bootstrap_size": len(tree.image),
        "compressor": sb.compressor.name.lower(),
        "digester": sb.digester.name.lower(),
        "chunk_size": sb.chunk_size,
        "flags": flag_names(sb.flags),
        "build_time": sb.build_time,
        "root_nid": sb.root_nid,
        "names": names,
        "inodes": len(seen),
        **counts,
        "content_size": content,
        "chunks": len(chunks),
        "chunk_bytes": sum(chunk.uncompressed_size for chunk in chunks),
        "stored_bytes": stored,
        "compression_ratio": round(content / stored, 3) if stored else None,
        "prefetch": [{"nid": nid, "path": path} for nid, path in prefetch.items()],
        "blobs": [_blob(blob) for blob in tree.blobs],
    }


def _blob(blob: BlobEntry) -> dict[str, Any]:
    r = blob.record
    toc_digest = blob.toc_digest
    return {
        "index": blob.index,
        "id": blob.blob_id,
        "features": flag_names(blob.features),
        "compressor": blob.compressor.name.lower(),
        "digester": blob.digester.name.lower(),
        "chunks": blob.chunk_count,
        "compressed_size": r.compressed_size,
        "data_size": blob.data_size,
        "uncompressed_size": r.uncompressed_size,
        "ci_offset": r.ci_offset,
        "ci_compressed_size": r.ci_compressed_size,
        "ci_uncompressed_size": r.ci_uncompressed_size,
        "toc_digest": toc_digest.hex() if toc_digest else None,
    }


def flag_names(flags: c.SuperFlags | c.BlobFeatures) -> list[str]:
    """The names of the set bits, in their order."""
    return [flag.name.lower() for flag in type(flags) if flag & flags and flag.name]


def describe(tree: Tree, path: bytes, inode: Inode) -> dict[str, Any]:
    """Everything about the inode at *path* but its content; for a file, where its chunks are. Raises
    BadImage.

    Names that are no UTF-8 have their odd bytes as surrogates (PEP 383).
    """
    found: dict[str, Any] = {
        "path": _text(path),
        **_attributes(inode),
        "layout": {0: "flat_plain", 2: "flat_inline", 4: "chunk_based"}[inode.layout],
        "extended": inode.extended,
        "xattrs": {_text(prefix + suffix): value.hex() for prefix, suffix, value in tree.xattrs(inode)},
    }
    if inode.is_symlink:
        found["target"] = _text(tree.readlink(inode))
    if inode.is_reg and inode.layout == c.LAYOUT_CHUNK_BASED:
        maps = ChunkMap.from_chunk_table(tree)
        found["chunks"] = []
        for part in tree.chunks(inode):
            known = maps[part.blob_index].chunks.get(part.chunk_index)
            found["chunks"].append(
                {
                    "blob": part.blob_index,
                    "chunk": part.chunk_index,
                    "length": part.length,
                    "uncompressed_offset": part.data_offset,
                    "compressed_offset": known.compressed_offset if known else None,
                    "compressed_size": known.compressed_size if known else None,
                    "digest": known.digest.hex() if known and known.digest else None,
                }
            )
    return found


def list_directory(tree: Tree, inode: Inode) -> list[dict[str, Any]]:
    """The entries of a directory without "." and "..", each with its attributes. Raises BadImage."""
    listed = []
    for entry in tree.entries(inode):
        if entry.name in (b".", b".."):
            continue
        child = tree.inode(entry.nid)
        found = {"name": _text(entry.name), **_attributes(child)}
        if child.is_symlink:
            found["target"] = _text(tree.readlink(child))
        listed.append(found)
    return listed


def _attributes(inode: Inode) -> dict[str, Any]:
    found: dict[str, Any] = {
        "nid": inode.nid,
        "mode": inode.mode,
        "mode_text": stat.filemode(inode.mode),
        "nlink": inode.nlink,
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": inode.mtime,
        "mtime_nsec": inode.mtime_nsec,
    }
    if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
        found["device"] = list(inode.device)
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
