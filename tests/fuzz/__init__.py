"""Fuzz targets in Python: what a registry, a configuration file or a client of the API can send to us.

Each ``target_*.py`` has ``run(data)``, which lets no exception out but where the invariant of its first line
is broken, and ``seeds()``. ``scripts/fuzz`` runs them under Atheris, ``tests/unit/test_fuzz_targets.py`` over
their seeds. See docs/adr/0012-fuzzing.md.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem.removeprefix("target_") for path in FOLDER.glob("target_*.py")))


class Target(Protocol):
    """A module with an invariant in its first line."""

    def run(self, data: bytes) -> None:
        """Raises when *data* breaks the invariant."""

    def seeds(self) -> list[bytes]:
        """Inputs that reach deep."""


def target(name: str) -> Target:
    """The target *name*."""
    return cast("Target", importlib.import_module(f"tests.fuzz.target_{name}"))
