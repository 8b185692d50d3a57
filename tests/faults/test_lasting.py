"""Trouble that lasts: a chunk that is damaged for good, and a registry that is away.

All cells of a trouble read at once, for the waiting takes most of the time; all troubles wait at once, too.
What fails is known in advance, read by read:

* A damaged chunk fails exactly the reads that touch it, each with EIO. It is fetched again by itself and with
  growing pauses: see ``MOST_TRIES``.
* An outage that is shorter than the deadline fails nothing.
* An outage that is longer fails exactly the reads that were posted more than the deadline before its end.
  Everything that is posted later succeeds.
* Memory and traffic have the bounds of the matrix.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.faults.conftest import World, rig
from tests.faults.driver import CELLS, Cell, Done
from tests.faults.image import CHUNK, Chunk, Folder
from tests.faults.patterns import PATTERNS
from tests.faults.traffic import MEMORY_KIB, STORM, Traffic, covered
from tests.faults.troubles import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.image import Image

# Pauses of at least 0.1, 0.2, 0.4, 0.8, 1.6 s lie between the tries of one deadline of 2 s; one try more
# comes with the first fetch, one is the last.
MOST_TRIES = 7
ROT_DEADLINE_S = 2.0
# Of each of 64 readers during an outage: four deadlines' worth, and some more. Eight outages end at once, and
# this process plays all readers and the registries.
MOST_READS = 8


@attrs.frozen
class Outage:
    """How long the registry is away, and how long a read may wait.

    ``silent``: it accepts connections and says nothing.
    """

    name: str
    away_s: float
    deadline_s: float
    silent: bool = False


OUTAGES = (
    Outage("away-shorter", 4, 12),
    Outage("silent-shorter", 4, 12, silent=True),
    Outage("away-longer", 20, 6),
    Outage("silent-longer", 20, 6, silent=True),
)
SOAKS = (Outage("away-60s", 60, 90), Outage("away-10min", 600, 90))


@attrs.frozen
class Result:
    """What came of a trouble."""

    done: list[Done]
    errors: int
    traffic: dict[Cell, Traffic]
    peak_kib: int
    seconds: float
    back: float = 0.0
    """When the registry was back."""

    def of(self, cell: Cell) -> list[Done]:
        return [d for d in self.done if d.cell == cell]


def rotten(folder: Folder) -> Chunk:
    """The chunk of *folder* that is damaged: one that every pattern reads, with not many reads."""
    folder_chunks = folder.chunks["lib1"]

    def reads(chunk: Chunk) -> list[int]:
        return [
            sum(chunk in folder.touched(read.file, read.offset, read.size) for read in pattern)
            for pattern in PATTERNS.values()
        ]

    candidates = [chunk for chunk in folder_chunks if min(reads(chunk)) > 0]
    return min(candidates, key=lambda chunk: sum(reads(chunk)))


def run_rot(world: World, image: Image) -> Result:
    """All cells at once, with a damaged chunk in the folder of each."""
    for folder in image.folders.values():
        chunk = rotten(folder)
        world.fault("corrupt", where="blob", span=chunk.span, blob_at=chunk.at + chunk.stored // 2)
    with rig(world, image, "--io-deadline", f"{ROT_DEADLINE_S:g}") as one:
        start = time.monotonic()
        done = one.run(CELLS)
        seconds = time.monotonic() - start
        return Result(done, one.errors(), traffic_of(world, image), one.peak_kib, seconds)


def run_outage(outage: Outage, world: World, image: Image) -> Result:
    """All cells at once, from the moment on when the registry goes away."""
    with rig(world, image, "--io-deadline", f"{outage.deadline_s:g}") as one:
        hold = None
        if outage.silent:
            hold = world.fault("hold", where="blob")
        else:
            world.refuse()
        back: list[float] = []

        def come_back() -> None:
            if hold is not None:
                hold.release()
            else:
                world.accept()
            back.append(time.monotonic())

        start = time.monotonic()
        timer = threading.Timer(outage.away_s, come_back)
        timer.start()
        done = one.run(CELLS, MOST_READS)
        timer.join()
        seconds = time.monotonic() - start
        return Result(done, one.errors(), traffic_of(world, image), one.peak_kib, seconds, back[0])


def traffic_of(world: World, image: Image) -> dict[Cell, Traffic]:
    """What was sent for each cell: its folder is a part of the blob of its own."""
    return {cell: Traffic.of(world.log, image.folders[cell.name].span) for cell in CELLS}


@pytest.fixture(scope="module")
def results(worlds: Callable[[str, bool], Any], fault_image: Image) -> Iterator[Callable[..., Result]]:
    """``results(kind, trouble)``: what came of it. The first call starts all troubles of its sort."""
    started: dict[tuple[str, str], Future[Result]] = {}
    sorts: list[dict[str, Callable[[World, Image], Result]]] = [{"rot": run_rot}]
    sorts += [{outage.name: partial(run_outage, outage) for outage in some} for some in (OUTAGES, SOAKS)]

    def run(kind: str, act: Callable[[World, Image], Result]) -> Result:
        with worlds(kind, False) as world:
            return act(world, fault_image)

    with ThreadPoolExecutor(len(KINDS) * max(map(len, sorts))) as pool:

        def get(kind: str, name: str) -> Result:
            if (kind, name) not in started:
                (sort,) = (sort for sort in sorts if name in sort)
                started.update({(k, n): pool.submit(run, k, act) for k in KINDS for n, act in sort.items()})
            return started[kind, name].result()

        yield get


def check_bounds(result: Result, cell: Cell) -> None:
    traffic = result.traffic[cell]
    assert traffic.sent <= STORM * traffic.needed
    assert result.peak_kib < MEMORY_KIB
    assert result.errors == sum(1 for d in result.done if d.error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_damaged_chunk_fails_exactly_its_reads(
    results: Callable[..., Result], fault_image: Image, kind: str, cell: Cell
) -> None:
    result = results(kind, "rot")
    folder = fault_image.folders[cell.name]
    chunk = rotten(folder)
    done = result.of(cell)
    bad = [d for d in done if chunk in folder.touched(d.read.file, d.read.offset, d.read.size)]
    assert len(bad) >= cell.readers
    assert {d.error for d in bad} == {errno.EIO}
    assert [d for d in done if d not in bad and not d.right] == []
    bent = result.traffic[cell].bent
    rounds = math.ceil(result.seconds / ROT_DEADLINE_S)
    assert 1 < len(bent) <= MOST_TRIES * rounds
    # Its neighbours in a fetch were kept; each further try brought nothing but the chunk.
    assert sum(r.sent for r in bent) <= covered(bent) + CHUNK * len(bent)
    check_bounds(result, cell)


def check_outage(result: Result, outage: Outage, cell: Cell) -> None:
    """Whether exactly those reads failed whose time was over before the registry was back."""
    for d in result.of(cell):
        spare = d.posted + outage.deadline_s - result.back
        if spare < 0:
            assert d.error == errno.EIO, d
        else:
            assert d.right, f"{d}: {spare:.1f} s were left"
    if outage.away_s > outage.deadline_s:
        assert any(d.error for d in result.of(cell))
    check_bounds(result, cell)


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda outage: outage.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_an_outage_fails_only_what_cannot_wait(
    results: Callable[..., Result], outage: Outage, kind: str, cell: Cell
) -> None:
    check_outage(results(kind, outage.name), outage, cell)


@pytest.mark.soak
@pytest.mark.parametrize("outage", SOAKS, ids=lambda outage: outage.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_an_outage_in_full_length(
    results: Callable[..., Result], outage: Outage, kind: str, cell: Cell
) -> None:
    """With the default deadline of 90 s."""
    check_outage(results(kind, outage.name), outage, cell)
