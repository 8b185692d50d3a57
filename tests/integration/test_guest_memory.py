"""Guest memory in the shapes in which VMMs hand it over."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtiofsd_rafs.native.frontend_link import Region, pc_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Served

MIB = 1 << 20
_POOL = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def huge_pages(missing: Callable[[str], None]) -> Iterator[None]:
    """A pool of huge pages; making one needs root."""
    before = _POOL.read_text()
    try:
        _POOL.write_text("40")
    except PermissionError:
        missing("root")
    yield
    _POOL.write_text(before)


def serve_some(served: Served) -> None:
    """Reads, cold and warm, then a look at the rings."""
    for _ in range(4):
        served.collect(served.random_reads(random.Random(1)))
    served.check_ring()


def test_huge_pages(start: Callable[..., Served], huge_pages: None) -> None:
    serve_some(start(regions=pc_layout(64 * MIB, huge=True), queue_size=64))


def test_a_hole_and_a_second_file(start: Callable[..., Served]) -> None:
    """Memory below and above 4 GiB, the parts out of order in one file, and a region of its own."""
    regions = [
        Region(0, 16 * MIB, file=0, file_offset=32 * MIB),
        Region(4 << 30, 32 * MIB, file=0),
        Region(6 << 30, 16 * MIB),
    ]
    serve_some(start(regions=regions, queue_size=64))


def test_many_regions(start: Callable[..., Served]) -> None:
    """More regions than one SET_MEM_TABLE could carry."""
    regions = [Region(i * 8 * MIB, 4 * MIB) for i in range(40)]
    serve_some(start(regions=regions, queue_size=64))
