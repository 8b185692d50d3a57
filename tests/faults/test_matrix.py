"""Every trouble with every pattern, with one reader and with 64, from a simulated and from a real registry.

Each cell reads files that nobody has read before, through a daemon of its trouble (or of its own, where a
daemon learns from the trouble). In each of them:

* Every byte is right, and no read fails: all of this can be cured by trying again.
* No storm. *Needed* is what the daemon had to ask for: the stored bytes of the chunks that were read, and
  what it read ahead on purpose, each byte once, however often it was sent. What the registry sent in replies
  that the trouble left whole is at most 1.2 times that. The damaged replies are counted apart: no more of
  them than the trouble has damaged.
* The daemon's memory stays below a bound: all processes together, without the guest's memory.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import Rig, World, rig
from tests.faults.driver import CELLS, Cell
from tests.faults.traffic import MEMORY_KIB, STORM, Traffic
from tests.faults.troubles import KINDS, TROUBLES, Trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.faults.image import Image

Stage = tuple["Callable[[], AbstractContextManager[Rig]]", Trouble]


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest, worlds: Callable[[str, bool], Any], fault_image: Image
) -> Iterator[Stage]:
    """Where a cell's daemon comes from, and the trouble that it is in."""
    kind, trouble = request.param
    with ExitStack() as stack:
        world: World = stack.enter_context(worlds(kind, trouble.auth))
        trouble.begin(world)
        if trouble.habit:
            yield lambda: rig(world, fault_image, *trouble.options), trouble
        else:
            one = stack.enter_context(rig(world, fault_image, *trouble.options))
            yield lambda: nullcontext(one), trouble


STAGES = [
    pytest.param((kind, trouble), id=f"{kind}-{trouble.name}") for kind in KINDS for trouble in TROUBLES
]


@pytest.mark.parametrize("stage", STAGES, indirect=True)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_trouble_that_passes_costs_nothing(stage: Stage, cell: Cell) -> None:
    daemon, trouble = stage
    with daemon() as one:
        log = one.world.log
        start = len(log)
        faults = trouble.meet(one.world, one.image.folders[cell.name])
        done = one.run([cell])
        assert [d for d in done if d.error] == []
        assert [d for d in done if not d.right] == []
        assert one.errors() == 0
        assert [f.name for f in faults if f.hits < (f.times or 1)] == []
        for fault in faults:
            fault.release()
        traffic = Traffic.of(log[start:])
        assert len(traffic.bent) == sum(f.hits for f in faults)
        assert traffic.sent <= STORM * traffic.needed
        assert one.peak_kib < MEMORY_KIB
