"""A mirror in front of the registry goes wrong; the registry is well. Nothing fails, and nobody is flooded.

The matrix, with two places. What was read is taken from whichever place sent it rightly: *sent* and *needed*
are counted over both. Once a mirror is known to be bad it rests, longer each time, and gets one request to
prove itself after each rest. So what it damages is bounded: at most one reply for each connection, and one
for each rest.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.faults.conftest import Rig, World, rig
from tests.faults.driver import CELLS, Cell
from tests.faults.traffic import MEMORY_KIB, STORM, Traffic
from tests.faults.troubles import KINDS
from virtiofsd_rafs.config import DEFAULT_CONNECTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.image import Image

# The shortest rest of a mirror that sent wrong bytes.
REST_S = 2.0
# Damaged before the daemon has a connection for content: the layer with the bootstrap.
AT_START = 1


@attrs.frozen
class Stage:
    """A daemon with a bad mirror, and when it started."""

    one: Rig
    mirror: World
    started: float


@pytest.fixture(scope="module", params=[f"{kind}-{fault}" for kind in KINDS for fault in ("corrupt", "cut")])
def stage(
    request: pytest.FixtureRequest, worlds: Callable[[str, bool], Any], fault_image: Image
) -> Iterator[Stage]:
    """A mirror that damages every reply with content, from the start on."""
    kind, fault = request.param.split("-")
    with ExitStack() as stack:
        mirror: World = stack.enter_context(worlds(kind, False))
        registry: World = stack.enter_context(worlds(kind, False))
        mirror.fault(fault, where="blob")
        started = time.monotonic()
        one = stack.enter_context(rig(registry, fault_image, "--mirror", f"http://{mirror.host}"))
        yield Stage(one, mirror, started)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_mirror_that_damages_everything_costs_nothing(stage: Stage, cell: Cell) -> None:
    one, mirror = stage.one, stage.mirror
    start = len(one.world.log)
    done = one.run([cell])
    assert [d for d in done if not d.right] == []
    assert one.errors() == 0
    traffic = Traffic.of(one.world.log[start:])
    assert traffic.sent <= STORM * traffic.needed
    assert traffic.bent == []
    damaged = [r for r in mirror.requests("blob", "GET") if r.faults]
    rests = (time.monotonic() - stage.started) / REST_S
    assert 0 < len(damaged) <= AT_START + DEFAULT_CONNECTIONS + rests
    assert one.peak_kib < MEMORY_KIB
