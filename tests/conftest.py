"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.sim.registry import RegistrySimulator

_LEFT_OUT = pytest.StashKey[int]()
# Debian keeps some tools where an ordinary user's PATH does not look.
_TOOL_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-missing",
        action="append",
        default=[],
        metavar="NAME",
        help="skip tests that need the tool NAME if it is not installed (else they fail); may be repeated",
    )
    parser.addoption(
        "--soak", action="store_true", help="run the tests marked soak too, which take 11 minutes of waiting"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves soak tests out unless they were asked for, also those that were named."""
    if config.getoption("soak"):
        return
    left_out = [item for item in items if item.get_closest_marker("soak")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    config.stash[_LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what was left out."""
    if n := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{n} soak tests were left out; --soak runs them too")


@pytest.fixture(scope="session")
def missing(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """``missing(name)`` ends the test for want of *name*: it fails, or is skipped if that was allowed."""
    allowed = pytestconfig.getoption("allow_missing")

    def end(name: str) -> None:
        if name in allowed:
            pytest.skip(f"{name} is missing, as allowed by --allow-missing={name}")
        pytest.fail(
            f"{name} is missing: run scripts/lib/install build guest, or give --allow-missing={name}",
            pytrace=False,
        )

    return end


@pytest.fixture(scope="session")
def tool(missing: Callable[[str], None]) -> Callable[[str], str]:
    """``tool(name)`` is the path of the program *name*; without it the test ends as ``missing`` says."""

    def find(name: str) -> str:
        path = shutil.which(name, path=_TOOL_PATH)
        if path is None:
            missing(name)
        assert path is not None
        return path

    return find


@pytest.fixture
def registry_sim() -> Iterator[RegistrySimulator]:
    """A registry with faults by name (tests/sim/registry.py), http on loopback, empty, open to everybody."""
    from tests.sim.registry import RegistrySimulator

    with RegistrySimulator() as sim:
        yield sim
