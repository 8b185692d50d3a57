"""The operations that are measured, on the tree as a side shows it."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.native.frontend import Load, Op, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtiofsd_rafs.native.frontend import Frontend, TreeEntry

MiB = 1 << 20
_MAX_FILES = 64


@attrs.frozen
class Case:
    """A load: an operation at a depth. ``by_latency``: compared by p50 instead of by rate."""

    name: str
    op: Callable[[Targets], Op]
    depth: int
    by_latency: bool = False


@attrs.frozen
class Targets:
    """What a side's nodes are: all of them, all names, and the large files (opened where that is needed)."""

    nodes: Sequence[Target]
    names: Sequence[Target]
    large: Sequence[Target]


def find_targets(fe: Frontend, tree: dict[bytes, TreeEntry]) -> Targets:
    """The targets in a tree that was read from *fe*."""
    nodes = [Target(entry.nodeid) for entry in tree.values()]
    names = []
    for path in tree:
        parent, _, name = path.rpartition(b"/")
        if name:
            names.append(Target(tree[parent or b"/"].nodeid, name=name))
    files = [e for e in tree.values() if stat.S_ISREG(e.attr.mode) and e.attr.size >= MiB]
    files = sorted(files, key=lambda e: -e.attr.size)[:_MAX_FILES]
    if not files:
        raise RuntimeError("the tree has no file of 1 MiB or more to read from")
    large = [Target(e.nodeid, size=e.attr.size, fh=fe.open(e.nodeid)) for e in files]
    return Targets(nodes, names, large)


CASES = [
    Case("getattr qd32", lambda t: Op("getattr", t.nodes), 32),
    Case("lookup qd32", lambda t: Op("lookup", t.names), 32),
    Case("read 4k random qd32", lambda t: Op("read", t.large, size=4096), 32),
    Case("read 4k random qd1", lambda t: Op("read", t.large, size=4096), 1, by_latency=True),
    Case("read 128k sequential qd8", lambda t: Op("read", t.large, size=128 * 1024, random=False), 8),
    Case("read 1m sequential qd8", lambda t: Op("read", t.large, size=MiB, random=False), 8),
]


def load_of(case: Case, targets: Targets, *, duration_s: float, wait: str, canaries: bool) -> Load:
    return Load(
        [case.op(targets)],
        depth=case.depth,
        duration_s=duration_s,
        wait="poll" if wait == "poll" else "sleep",
        canaries=canaries,
    )
