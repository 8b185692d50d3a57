"""Which reads a guest makes, in which order: (file, offset, size).

``BOOT`` is a boot in small: an init and its libraries are opened by their heads and their section tables,
then mapped piece by piece with read-around, many small files of ``/etc`` are read in between, some of them
twice, and at last a service reads its data in one go.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from tests.faults.image import BIG, BIG_SIZE, N_SMALL

if TYPE_CHECKING:
    from tests.faults.image import Folder

_K = 1024


class Read(NamedTuple):
    """A read; *size* may reach past the end of the file, as a guest's last read does."""

    file: str
    offset: int
    size: int


_END = BIG_SIZE - BIG_SIZE % (4 * _K)
BOOT = (
    Read("lib0", 0, 4 * _K),
    Read("lib0", _END, 4 * _K),
    Read("lib0", 16 * _K, 64 * _K),
    Read("etc03", 0, 16 * _K),
    Read("etc00", 0, 16 * _K),
    Read("lib1", 0, 4 * _K),
    Read("lib1", _END, 4 * _K),
    Read("lib0", 80 * _K, 16 * _K),
    Read("etc11", 0, 16 * _K),
    Read("etc12", 0, 16 * _K),
    Read("etc07", 0, 16 * _K),
    Read("lib1", 48 * _K, 32 * _K),
    Read("lib0", 4 * _K, 12 * _K),
    *(Read(f"etc{i:02}", 0, 16 * _K) for i in (1, 2, 9, 20, 21, 5, 16, 3, 18)),
    Read("lib0", 128 * _K, 64 * _K),
    Read("lib1", 16 * _K, 16 * _K),
    *(Read(f"etc{i:02}", 0, 16 * _K) for i in (4, 23, 10, 0, 13)),
    Read("lib1", 32 * _K, 128 * _K),
    Read("lib1", 160 * _K, 128 * _K),
    Read("lib0", 0, 128 * _K),
)


def sequential() -> list[Read]:
    """Every file from its beginning to its end."""
    names = [f"etc{i:02}" for i in range(N_SMALL)]
    reads = [Read(name, 0, 16 * _K) for name in names]
    return reads + [Read(name, offset, 64 * _K) for name in BIG for offset in range(0, BIG_SIZE, 64 * _K)]


def randomly(seed: int = 17) -> list[Read]:
    """Forty reads at random places; most of them in the big files, where chance puts most reads."""
    rng = random.Random(seed)
    reads = []
    for _ in range(40):
        if rng.random() < 0.3:
            reads.append(Read(f"etc{rng.randrange(N_SMALL):02}", 0, 4 * _K))
        else:
            page = rng.randrange(BIG_SIZE // (4 * _K) + 1)
            reads.append(Read(rng.choice(BIG), page * 4 * _K, rng.choice([4, 16, 32]) * _K))
    return reads


PATTERNS = {"sequential": sequential(), "random": randomly(), "boot": list(BOOT)}


def expected(folder: Folder, read: Read) -> bytes:
    """What a read has to bring."""
    return folder.files[read.file][read.offset : read.offset + read.size]
