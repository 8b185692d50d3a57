"""Runs one target under Atheris: ``python -m tests.fuzz NAME [libFuzzer's arguments]``.

Started by scripts/fuzz. With FUZZ_SEEDS the seeds are written to that folder, and nothing is run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris  # scripts/fuzz installs it, outside of the project's environment

from tests.fuzz import NAMES, target


def main() -> None:
    """Instruments the package while the target is imported, then hands over to libFuzzer."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in NAMES:
        sys.exit(f"the first argument is one of: {' '.join(NAMES)}")
    with atheris.instrument_imports(include=["virtiofsd_rafs"], enable_loader_override=False):
        chosen = target(name)
    if folder := os.environ.get("FUZZ_SEEDS"):
        for i, seed in enumerate(chosen.seeds()):
            (Path(folder) / f"seed-{i:03}").write_bytes(seed)
        return
    atheris.Setup(sys.argv, chosen.run)
    atheris.Fuzz()


main()
