"""Walks a tree, from the root down, each name once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtiofsd_rafs.errors import BadImage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.rafs.v6 import Inode, Tree


class Node(NamedTuple):
    """``path`` begins with "/" and has no slash at its end; the root is "/"."""

    path: bytes
    inode: Inode


def walk(tree: Tree, path: bytes = b"/") -> Iterator[Node]:
    """Everything below *path* (itself included), directories before their children, names in order.

    Raises BadImage where the tree breaks, also for a directory that is met twice, so that a loop ends.
    """
    start = resolve(tree, path)
    if start is None:
        return
    # A stack of subtrees still to visit, the next one last: recursion would limit the depth.
    stack = [Node(b"/" + b"/".join(_parts(path)), start)]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        yield node
        if not node.inode.is_dir:
            continue
        if node.inode.nid in seen:
            raise BadImage(f"directory (nid {node.inode.nid})", f"is met again at {node.path!r}")
        seen.add(node.inode.nid)
        prefix = node.path if node.path.endswith(b"/") else node.path + b"/"
        children = [
            Node(prefix + entry.name, tree.inode(entry.nid))
            for entry in tree.entries(node.inode)
            if entry.name not in (b".", b"..")
        ]
        stack.extend(reversed(children))


def resolve(tree: Tree, path: bytes) -> Inode | None:
    """The inode at *path* (links are not followed), or None."""
    inode = tree.inode(tree.root)
    for part in _parts(path):
        found = tree.lookup(inode, part) if inode.is_dir else None
        if found is None:
            return None
        inode = tree.inode(found[0])
    return inode


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part]
