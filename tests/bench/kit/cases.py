"""What is measured: a list of cases, each one operation under one set of circumstances."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Literal

import attrs

from virtiofsd_rafs.native.frontend import Load, Op, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtiofsd_rafs.native.frontend import Frontend, TreeEntry
    from virtiofsd_rafs.native.frontend_load import Kind

KiB = 1 << 10
MiB = 1 << 20
_MAX_FILES = 64
_MAX_TARGETS = 4096

What = Literal["load", "walk", "forget", "disk", "remote", "stalled"]
"""``load``: an operation again and again. ``walk``: the tree is listed. ``forget``: names are looked up, then
all lookups are forgotten at once, which alone is measured. ``disk``: page cache dropped before.
``remote``: empty cache, registry behind a slow link. ``stalled``: beside reads whose chunks do not come."""
By = Literal["rate", "p50"]


@attrs.frozen
class Case:
    """One row of the comparison.

    ``by``: whether sides are compared by operations per second or by median latency. ``count``: requests of a
    run, where a run is not bounded by time. ``quick``: part of a quick comparison.
    """

    name: str
    kind: Kind | Literal["walk"]
    depth: int
    what: What = "load"
    size: int = 4 * KiB
    random: bool = True
    queues: int = 1
    wait: Literal["sleep", "poll"] | None = None
    by: By = "rate"
    count: int = 0
    quick: bool = False


def _read(
    name: str, size: int, depth: int, *, random: bool = True, quick: bool = False, by: By = "rate"
) -> Case:
    return Case(name, "read", depth, size=size, random=random, quick=quick, by=by)


CASES = [
    Case("getattr qd32", "getattr", 32, quick=True),
    Case("lookup qd32", "lookup", 32, quick=True),
    Case("negative lookup qd32", "absent", 32, quick=True),
    Case("open and release qd32", "open", 32, quick=True),
    Case("walk of the tree qd1", "walk", 1, "walk", quick=True),
    _read("read 4k random qd32", 4 * KiB, 32, quick=True),
    _read("read 4k random qd1", 4 * KiB, 1, quick=True, by="p50"),
    _read("read 128k sequential qd8", 128 * KiB, 8, random=False, quick=True),
    _read("read 1m sequential qd8", MiB, 8, random=False, quick=True),
    Case("forget storm qd128", "forget", 128, "forget", count=30_000, quick=True),
    # Depths and ways of waiting.
    Case("getattr qd1", "getattr", 1, by="p50"),
    Case("getattr qd128", "getattr", 128),
    Case("walk of the tree qd8", "walk", 8, "walk"),
    _read("read 4k random qd8", 4 * KiB, 8),
    _read("read 4k random qd128", 4 * KiB, 128),
    Case("getattr qd32, polling", "getattr", 32, wait="poll"),
    Case("read 4k random qd1, polling", "read", 1, wait="poll", by="p50"),
    Case("read 4k random qd32, polling", "read", 32, wait="poll"),
    # What has to come from the disk, or over a link.
    Case("disk, read 4k random qd32", "read", 32, "disk", count=4000, quick=True),
    Case("disk, read 128k sequential qd8", "read", 8, "disk", size=128 * KiB, random=False, count=1200),
    # Request queues.
    Case("getattr qd32 x 2 queues", "getattr", 32, queues=2),
    Case("read 4k random qd32 x 2 queues", "read", 32, queues=2),
    Case("getattr qd32 x 4 queues", "getattr", 32, queues=4),
    Case("read 4k random qd32 x 4 queues", "read", 32, queues=4),
    Case(
        "slow link, read 128k sequential qd8",
        *("read", 8, "remote"),
        size=128 * KiB,
        random=False,
        count=64,
        quick=True,
    ),
    Case("slow link, read 4k random qd32", "read", 32, "remote", count=32),
    Case("stalled remote, read 4k random qd32", "read", 32, "stalled", quick=True),
]


def chosen(only: Sequence[str], *, quick: bool) -> list[Case]:
    """The cases whose name contains one of *only*; without any, all, or those of a quick comparison."""
    if only:
        return [case for case in CASES if any(part in case.name for part in only)]
    return [case for case in CASES if case.quick or not quick]


@attrs.frozen
class Targets:
    """What a side's nodes are."""

    nodes: Sequence[Target]
    """All."""
    names: Sequence[Target]
    """All but the root, by name."""
    named: Sequence[Target]
    """The nodes that ``names`` lead to, in the same order."""
    absent: Sequence[Target]
    """Names that are not there, one in each directory."""
    files: Sequence[Target]
    """Regular files."""
    large: Sequence[Target]
    """Files of 1 MiB and more, opened where that is needed."""


def find_targets(fe: Frontend, tree: dict[bytes, TreeEntry]) -> Targets:
    """The targets in a tree that was read from *fe*.

    Raises:
        RuntimeError: there is no file to read from.
    """
    nodes = [Target(entry.nodeid) for entry in tree.values()]
    names, named = [], []
    for path, entry in tree.items():
        parent, _, name = path.rpartition(b"/")
        if name:
            names.append(Target(tree[parent or b"/"].nodeid, name=name))
            named.append(Target(entry.nodeid))
    directories = [entry for entry in tree.values() if stat.S_ISDIR(entry.attr.mode)]
    absent = [Target(entry.nodeid, name=b"absent-%d" % i) for i, entry in enumerate(directories)]
    files = [entry for entry in tree.values() if stat.S_ISREG(entry.attr.mode)]
    large = sorted((e for e in files if e.attr.size >= MiB), key=lambda e: -e.attr.size)[:_MAX_FILES]
    if not large:
        raise RuntimeError("the tree has no file of 1 MiB or more to read from")
    return Targets(
        nodes,
        names,
        named,
        absent[:_MAX_TARGETS],
        [Target(entry.nodeid) for entry in files[:_MAX_TARGETS]],
        [Target(e.nodeid, size=e.attr.size, fh=fe.open(e.nodeid)) for e in large],
    )


def op_of(case: Case, targets: Targets) -> Op:
    """The operation of a case that is no walk."""
    by_kind = {
        "getattr": targets.nodes,
        "lookup": targets.names,
        "absent": targets.absent,
        "open": targets.files,
        "forget": targets.named,
        "read": targets.large,
    }
    assert case.kind != "walk"
    return Op(case.kind, by_kind[case.kind], size=case.size, random=case.random)


def load_of(case: Case, targets: Targets, *, duration_s: float, wait: str, canaries: bool) -> Load:
    """A run of a case that is a load."""
    return Load(
        [op_of(case, targets)],
        depth=case.depth,
        duration_s=None if case.count else duration_s,
        count=case.count,
        queues=range(1, case.queues + 1),
        wait="poll" if (case.wait or wait) == "poll" else "sleep",
        canaries=canaries,
    )
