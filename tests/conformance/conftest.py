"""The daemon that the checks are run against, and one in its place when a check needs it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conformance.ours import Ours, build
from tests.conformance.tree import Tree, make_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 30.0
"""Generous: what hangs, hangs for ever; what is slow is slow because the machine is busy."""


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return make_tree(tmp_path_factory.mktemp("conformance") / "tree")


@pytest.fixture(scope="session")
def start_ours(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Ours]]:
    """``start_ours()`` is a new daemon with an empty cache."""
    out = tmp_path_factory.mktemp("image") / "out"
    build(tree, out)
    n = 0
    # A path short enough for sockets.
    with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as work:

        def start() -> Ours:
            nonlocal n
            n += 1
            ours = Ours(tree, out, Path(work) / str(n))
            ours.timeout_s = TIMEOUT_S
            return ours

        yield start


@pytest.fixture(scope="session")
def shared(start_ours: Callable[[], Ours]) -> Iterator[Ours]:
    """The daemon of all checks that do not need their own: it is kept, so each check is another VM of it."""
    with start_ours() as ours:
        yield ours
