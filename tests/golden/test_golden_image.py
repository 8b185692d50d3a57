"""The bytes of an image change only on purpose: its dump is compared with the one in the repository.

After a wanted change, ``scripts/regen-golden`` writes it anew and shows the difference.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.golden.small_image import build, dump_text

GOLDEN = Path(__file__).with_name("small_image.dump")
HEAD = "sha256 of bootstrap {} and blob {}\n"


def test_small_image() -> None:
    head, _, dump = GOLDEN.read_text().partition("\n")
    assert dump_text() == dump
    # The dump shows every field; this also holds what is between them.
    assert head + "\n" == HEAD.format(*(hashlib.sha256(part).hexdigest() for part in build()))
