"""A bootstrap as text: byte offset, field and value of everything in it, for people and for golden files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.inode import chunk_index_offset, data_block
from virtiofsd_rafs.rafs.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.rafs.inode import Inode
    from virtiofsd_rafs.rafs.records import Layout
    from virtiofsd_rafs.rafs.v6 import Tree


def dump(tree: Tree) -> Iterator[str]:
    """The lines of the dump: superblocks, device slots, blob table, then every inode in walk order with its
    xattrs and content or chunk indexes, then the chunk table. Raises BadImage where the tree breaks.
    """
    image, sb = tree.image, tree.superblock
    yield from record("superblock", c.SUPER_BLOCK, sb.erofs, c.SUPER_OFFSET)
    yield from record("extended superblock", c.EXT_SUPER_BLOCK, sb.ext, c.EXT_SUPER_OFFSET)
    for blob in tree.blobs:
        at = c.DEVICE_TABLE_OFFSET + blob.index * c.DEVICE_SLOT_SIZE
        yield from record(f"device slot {blob.index}", c.DEVICE_SLOT, blob.device, at)
    for blob in tree.blobs:
        at = sb.ext.blob_table_offset + blob.index * c.BLOB_RECORD_SIZE
        yield from record(f"blob {blob.index}", c.BLOB_RECORD, blob.record, at)
    seen: set[int] = set()
    for path, inode in walk(tree):
        if inode.nid in seen:
            yield f"# {path.decode('ascii', 'backslashreplace')}: nid {inode.nid} again"
            continue
        seen.add(inode.nid)
        yield from _inode(tree, path, inode)
    for number, at in enumerate(range(0, sb.ext.chunk_table_size, c.CHUNK_RECORD.size)):
        at += sb.ext.chunk_table_offset
        yield from record(f"chunk {number}", c.CHUNK_RECORD, c.CHUNK_RECORD.parse(image, at), at)


def _inode(tree: Tree, path: bytes, inode: Inode) -> Iterator[str]:
    layout: Layout[Any] = c.EXTENDED_INODE if inode.extended else c.COMPACT_INODE
    title = f"{path.decode('ascii', 'backslashreplace')}: nid {inode.nid}"
    yield from record(title, layout, layout.parse(tree.image, inode.offset), inode.offset)
    for prefix, suffix, value in tree.xattrs(inode):
        yield f"{inode.xattr_offset:8}  xattr {prefix + suffix!r} = {value!r}"
    if inode.is_dir:
        for number in range(inode.n_blocks):
            at, length = data_block(inode, number)
            yield f"{at:8}  directory block {number}, {length} bytes"
        for entry in tree.entries(inode):
            yield f"          {entry.name!r} nid {entry.nid} type {entry.d_type}"
    elif inode.is_symlink:
        yield f"{data_block(inode, 0)[0]:8}  target {tree.readlink(inode)!r}"
    elif inode.is_reg and inode.layout == c.LAYOUT_CHUNK_BASED:
        at = chunk_index_offset(inode)
        for number, part in enumerate(tree.chunks(inode)):
            yield (
                f"{at + number * c.CHUNK_INDEX.size:8}  chunk index {number}: blob {part.blob_index}"
                f" chunk {part.chunk_index} at {part.data_offset}"
            )


def record(title: str, layout: Layout[Any], values: Any, base: int) -> Iterator[str]:
    """A title and one line per field of a record at byte *base*."""
    yield f"# {title}"
    for (name, offset), value in zip(layout.offsets.items(), values, strict=True):
        yield f"{base + offset:8}  {name} = {_value(name, value)}"


def _value(name: str, value: int | bytes) -> str:
    if isinstance(value, bytes):
        text = value.rstrip(b"\0")
        return repr(text.decode()) if text.isalnum() else value.hex()
    # Times, counts and sizes read well in decimal, bit fields do not.
    bits = {"magic", "flags", "features", "feature_compat", "feature_incompat", "i_format", "i_u"}
    if name == "i_mode":
        return f"{value:#o}"
    return f"{value:#x}" if name in bits else str(value)
