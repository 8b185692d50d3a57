"""The tree that is served when none is given: always the same bytes, half of them compressible."""

from __future__ import annotations

import hashlib
import random
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.build import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N_SMALL = 3000
N_LARGE = 8
LARGE_SIZE = 24 << 20
REPOSITORY = "bench/image"


@attrs.frozen
class Material:
    """A tree and the image that was built from it."""

    tree: Path
    image: Path
    """The folder that ``build`` wrote: bootstrap and blob."""

    @property
    def bootstrap(self) -> Path:
        return self.image / "image.boot"

    @property
    def blob_id(self) -> str:
        """SHA-256 of its only blob, which is its name."""
        (blob,) = (path.name for path in self.image.iterdir() if len(path.name) == 64)
        return blob


def make_tree(root: Path, *, n_small: int = N_SMALL, n_large: int = N_LARGE) -> None:
    """*n_small* small files in 100 directories (median 4 KiB) and *n_large* of 24 MiB."""
    rng = random.Random(20)
    noise = rng.randbytes(1 << 20)

    def content(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            start = rng.randrange(len(noise) - 4096)
            data += noise[start : start + 4096]
            data += b"%08x " % rng.getrandbits(32) * 455
        return bytes(data[:size])

    for i in range(n_small):
        directory = root / f"dir{i % 100:02}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file{i:04}").write_bytes(content(int(rng.lognormvariate(8.3, 1.3))))
    for i in range(n_large):
        (root / f"large{i}").write_bytes(content(LARGE_SIZE))


def prepare(work: Path, tree: Path | None = None) -> Material:
    """The material below *work*: made when it is not there yet, the image built from the tree."""
    if tree is None:
        tree = made_tree(work / "tree")
    return Material(tree, built(tree, work / f"image-{hashlib.sha256(bytes(tree)).hexdigest()[:8]}"))


def made_tree(tree: Path, **sizes: int) -> Path:
    """The tree at *tree*, made when it is not there yet; *sizes* as for :func:`make_tree`."""
    if not (tree / "complete").exists():
        shutil.rmtree(tree, ignore_errors=True)
        make_tree(tree, **sizes)
        (tree / "complete").touch()
    return tree


def built(tree: Path, out: Path) -> Path:
    """The image of *tree* in the folder *out*, built if missing: a tree that changed needs another."""
    if not out.exists():
        making = out.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        build_image(tree, making)
        making.rename(out)
    return out


@contextmanager
def in_registry(material: Material) -> Iterator[RegistrySimulator]:
    """A simulated registry that holds the image as ``bench/image:1``."""
    with RegistrySimulator() as sim:
        sim.store.add_build(REPOSITORY, "1", material.image)
        yield sim


def reference(sim: RegistrySimulator) -> str:
    """What ``serve`` takes for the image in *sim*."""
    return f"{sim.host}/{REPOSITORY}:1"
