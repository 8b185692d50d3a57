"""Every fuzz target over its seeds, over seeds with damage, and over what was found earlier."""

from __future__ import annotations

import random
import re

import pytest

from tests.fuzz import FOLDER, NAMES, target

DAMAGE = 8


def variants(seed: bytes, rng: random.Random) -> list[bytes]:
    """*seed* with bytes changed, and cut."""
    out = []
    for _ in range(DAMAGE):
        other = bytearray(seed)
        for _ in range(rng.randrange(1, 4)):
            if other:
                other[rng.randrange(len(other))] = rng.choice(b'\x00\xff"{[:0x') or rng.randrange(256)
        out.append(bytes(other))
    return [*out, seed[: len(seed) // 2]]


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    chosen, rng = target(name), random.Random(name)
    seeds = chosen.seeds()
    assert seeds
    for seed in seeds:
        chosen.run(seed)
    if name != "readers":  # its variants are tests/property/test_parity_rafs.py
        for seed in seeds:
            for other in variants(seed, rng):
                chosen.run(other)
    chosen.run(b"")


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_states_the_invariant(name: str) -> None:
    first = (FOLDER / f"target_{name}.py").read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r'"""Invariant: .+', first)


def test_what_was_found_earlier() -> None:
    for folder in (FOLDER / "regressions").iterdir():
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                target(folder.name).run(path.read_bytes())
