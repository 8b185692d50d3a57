"""Invariant: of any image the readable reader and the native one say the same, or both refuse it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests.property.test_parity_rafs import assert_same_verdict, fill
from virtiofsd_rafs.image.build import build_image

# Changes of one input.
CHANGES = 16


@functools.cache
def _image() -> bytes:
    with tempfile.TemporaryDirectory(prefix="rafs-fuzz-") as folder:
        source = Path(folder) / "source"
        source.mkdir()
        fill(source)
        return build_image(source, Path(folder) / "image").bootstrap.read_bytes()


def run(data: bytes) -> None:
    """Changes to a built image: three bytes for the place, one for the length, the bytes."""
    image = bytearray(_image())
    for _ in range(CHANGES):
        if len(data) < 5:
            break
        at = int.from_bytes(data[:3], "little") % len(image)
        length = min(1 + data[3] % 8, len(image) - at)
        piece = data[4 : 4 + length]
        image[at : at + len(piece)] = piece
        data = data[4 + length :]
    assert_same_verdict(bytes(image))


def seeds() -> list[bytes]:
    """Fields of both superblocks, one by one; the image as it is."""
    places = [*range(1024, 1024 + 128, 4), *range(1152, 1152 + 56, 4)]
    return [b"", *(at.to_bytes(3, "little") + b"\x03\x01\x00\x00\x10" for at in places[::4])]
