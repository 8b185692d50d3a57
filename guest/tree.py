"""Descriptions of trees by ``hash-tree``: of the source here, of what a guest saw, and the difference."""

from __future__ import annotations

import itertools
import subprocess
from typing import TYPE_CHECKING

import attrs

from guest.kit import hash_tree_program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@attrs.frozen
class Pass:
    """One walk through the tree by :file:`guest/jobs/hash`; without ``code`` when the guest was cut off."""

    lines: list[str]
    code: int | None


def describe_source(root: Path) -> list[str]:
    """The description of *root* on the host, as an image of it should look in a guest.

    Raises:
        RuntimeError: something in it cannot be read.
    """
    done = subprocess.run([hash_tree_program(), "-l", root], capture_output=True, text=True, check=False)
    if done.returncode:
        bad = [line for line in done.stdout.splitlines() if "\t! " in line]
        raise RuntimeError(f"{root} cannot be described: {done.stderr}{bad[:5]}")
    return done.stdout.splitlines()


def passes(report: str) -> list[Pass]:
    """The walks in a report, in order. A guest that was reset in the middle leaves a pass without code."""
    found: list[Pass] = []
    lines: list[str] | None = None
    for line in report.splitlines():
        if line.startswith("# pass"):
            if lines is not None:
                found.append(Pass(lines, None))
            lines = []
        elif line.startswith("# end"):
            found.append(Pass(lines or [], int(line.split()[2])))
            lines = None
        elif lines is not None:
            lines.append(line)
    if lines is not None:
        found.append(Pass(lines, None))
    return found


def difference(expected: Sequence[str], seen: Sequence[str], limit: int = 10) -> str:
    """The first lines that differ, for people; empty when the trees are equal."""
    wanted = {line.split("\t", 1)[0]: line for line in expected}
    got = {line.split("\t", 1)[0]: line for line in seen}
    none = "(not there)"
    parts = [
        f"  path   {path}\n  source {wanted.get(path, none)}\n  guest  {got.get(path, none)}"
        for path in dict.fromkeys(itertools.chain(wanted, got))
        if wanted.get(path) != got.get(path)
    ]
    if not parts and list(expected) != list(seen):
        return "the same lines in another order, or some twice"
    more = f"\n... and {len(parts) - limit} more" if len(parts) > limit else ""
    return "\n".join(parts[:limit]) + more
