"""The tree that back-ends serve while they are judged, made by the kit, so that every answer is known."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pathlib import Path

MiB = 1 << 20
N_COLD = 128
COLD_SIZE = 64 * 1024


@attrs.frozen
class Tree:
    """Files by their name in the root, with content.

    ``big`` has 2 MiB. ``cold000`` and so on have 64 KiB each and are read only by checks that need data which
    the back-end has not cached. ``empty`` is empty; ``link`` leads to ``big``; ``many`` is a directory of 200
    empty files; ``run.sh`` may be executed.
    """

    root: Path
    files: dict[str, bytes]

    @property
    def cold(self) -> list[str]:
        return [name for name in self.files if name.startswith("cold")]

    @property
    def small(self) -> list[str]:
        """Files of up to 40 000 bytes that any check may read."""
        return [name for name in self.files if name.startswith("f")]


def load_tree(root: Path) -> Tree:
    """The tree that ``make_tree`` wrote into *root*. It follows from a seed, so nothing is read."""
    rng = random.Random(65)
    files = {f"f{i:02}": rng.randbytes(rng.randrange(1, 40_000)) for i in range(24)}
    files |= {f"cold{i:03}": rng.randbytes(COLD_SIZE) for i in range(N_COLD)}
    files |= {"big": rng.randbytes(2 * MiB), "empty": b"", "run.sh": b"#!/bin/sh\n"}
    return Tree(root, files)


def make_tree(root: Path) -> Tree:
    """Writes the tree into *root*, a new directory; the same bytes each time."""
    tree = load_tree(root)
    root.mkdir(parents=True)
    for name, data in tree.files.items():
        (root / name).write_bytes(data)
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("big")
    (root / "many").mkdir()
    for i in range(200):
        (root / "many" / f"n{i:03}").touch()
    return tree
