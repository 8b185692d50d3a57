"""The registry's name cannot be resolved for a while: at the start, and when control starts again.

A control that runs knows the address, and goes on with it; so each cell gets a new control, which knows none.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import Rig, rig
from tests.faults.driver import CELLS, Cell
from tests.faults.traffic import MEMORY_KIB, STORM, Traffic
from tests.faults.troubles import KINDS
from tests.integration.conftest import kill
from tests.sim.named import NAME, write_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.image import Image

# So many questions stay unanswered each time.
MISSES = 3
_GUARD_S = 30.0


def missed(folder: Path) -> int:
    """Questions that nobody answered so far."""
    failed = folder / "failed"
    return failed.stat().st_size if failed.exists() else 0


@contextmanager
def no_names(folder: Path) -> Iterator[None]:
    """The name server is away until it has missed some questions."""
    before = missed(folder)
    (folder / "down").touch()

    def come_back() -> None:
        end = time.monotonic() + _GUARD_S
        while missed(folder) < before + MISSES and time.monotonic() < end:
            time.sleep(0.005)
        (folder / "down").unlink()

    thread = threading.Thread(target=come_back)
    thread.start()
    yield
    thread.join()
    assert missed(folder) >= before + MISSES


def new_control(one: Rig) -> None:
    """Ends control; the keeper starts another one."""
    end = time.monotonic() + _GUARD_S
    while not (pid := one.session.status()["processes"]["control"]["pid"]):
        assert time.monotonic() < end, "control did not start"
        time.sleep(0.005)
    kill(pid)


@pytest.fixture(scope="module", params=KINDS)
def named(
    request: pytest.FixtureRequest,
    worlds: Callable[[str, bool], Any],
    fault_image: Image,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Rig, Path]]:
    """A daemon whose registry has a name, which could not be resolved when it started."""
    folder = tmp_path_factory.mktemp("resolver")
    with ExitStack() as stack:
        world = stack.enter_context(worlds(request.param, False))
        how = {"host": f"{NAME}:{world.port}", "program": write_program(folder)}
        with no_names(folder):
            # The played resolver keeps count there.
            one = stack.enter_context(rig(world, fault_image, "--sandbox-allow", str(folder), **how))
        yield one, folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_name_that_is_not_resolved_for_a_while_costs_nothing(named: tuple[Rig, Path], cell: Cell) -> None:
    one, folder = named
    start = len(one.world.log)
    with no_names(folder):
        new_control(one)
        done = one.run([cell])
    assert [d for d in done if not d.right] == []
    assert one.errors() == 0
    traffic = Traffic.of(one.world.log[start:])
    assert traffic.sent <= STORM * traffic.needed
    assert one.peak_kib < MEMORY_KIB
