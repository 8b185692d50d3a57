"""The tree that is served when none is given: always the same bytes, half of them compressible."""

from __future__ import annotations

import random
import subprocess
from typing import TYPE_CHECKING

from tests.bench.sides import OWN_PROGRAM, Material

if TYPE_CHECKING:
    from pathlib import Path

N_SMALL = 3000
N_LARGE = 8
LARGE_SIZE = 24 << 20


def make_tree(root: Path) -> None:
    """3 000 small files in 100 directories (median 4 KiB) and 8 of 24 MiB."""
    rng = random.Random(20)
    noise = rng.randbytes(1 << 20)

    def content(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            start = rng.randrange(len(noise) - 4096)
            data += noise[start : start + 4096]
            data += b"%08x " % rng.getrandbits(32) * 455
        return bytes(data[:size])

    for i in range(N_SMALL):
        directory = root / f"dir{i % 100:02}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file{i:04}").write_bytes(content(int(rng.lognormvariate(8.3, 1.3))))
    for i in range(N_LARGE):
        (root / f"large{i}").write_bytes(content(LARGE_SIZE))


def prepare(work: Path, tree: Path | None) -> Material:
    """The material in *work*: made when it is not there yet, the image built from the tree."""
    if tree is None:
        tree = work / "tree"
        if not (tree / "complete").exists():
            make_tree(tree)
            (tree / "complete").touch()
    image = work / "image"
    if not (image / "image.boot").exists():
        subprocess.run([OWN_PROGRAM, "build", str(tree), "-o", str(image)], check=True)
    return Material(tree, image / "image.boot", image)
