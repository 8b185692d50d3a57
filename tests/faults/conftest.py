"""Registries with faults, and a daemon for each fault."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from guest.registry import Registry
from tests.bench.processes import memory
from tests.faults.driver import CELLS, Done, drive, resolve
from tests.faults.image import AMPLIFY, Image, make_image
from tests.integration.conftest import run_daemon
from tests.sim.faulty_proxy import FaultyProxy
from tests.sim.gate import Auth
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest.daemon import Daemon
    from tests.faults.driver import Cell

World = RegistrySimulator | FaultyProxy


@pytest.fixture(scope="session")
def fault_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """A folder for each cell."""
    return make_image(tmp_path_factory.mktemp("faults"), [cell.name for cell in CELLS])


@pytest.fixture(scope="session")
def pushed(
    tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, fault_image: Image
) -> Iterator[Registry]:
    """Debian's docker-registry, with the image as ``app:1``."""

    tool("docker-registry")
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        asyncio.run(push_image(fault_image.out, f"127.0.0.1:{registry.port}/app:1", plain_http=True))
        yield registry


@pytest.fixture(scope="session")
def worlds(pushed: Registry, fault_image: Image) -> Callable[[str, bool], Any]:
    """``with worlds(kind, auth) as world``: a registry of that kind with the image, without any fault."""

    @contextmanager
    def make(kind: str, auth: bool) -> Iterator[World]:
        if kind == "registry":
            with FaultyProxy(pushed.port, auth=auth) as proxy:
                yield proxy
        else:
            with RegistrySimulator(auth=Auth("bearer") if auth else None) as sim:
                sim.store.add_build("app", "1", fault_image.out)
                yield sim

    return make


@attrs.define
class Rig:
    """A daemon on the image in *world*, with its VM."""

    world: World
    image: Image
    daemon: Daemon
    session: Session
    fe: Frontend
    nodes: dict[tuple[str, str], int]
    peak_kib: int = 0
    """The most memory that all its processes together were seen with, shared memory apart."""

    def look(self) -> None:
        """Notes how much memory the daemon uses."""
        own = sum(process.own for process in memory(self.daemon.process.pid))
        self.peak_kib = max(self.peak_kib, own)

    def run(self, cells: list[Cell], most: int | None = None) -> list[Done]:
        """Lets all readers of *cells* read; *most* as for ``drive``."""
        done = drive(self.fe, self.nodes, self.image.folders, cells, self.look, most)
        self.look()
        return done

    def errors(self) -> int:
        """Requests that the daemon says it answered with an error."""
        count: int = self.session.status()["counters"]["errors"]
        return count


@contextmanager
def rig(world: World, image: Image, *options: str, folder: Path | None = None, **how: Any) -> Iterator[Rig]:
    """A daemon with an empty cache, or the one in *folder*; *how* as for ``run_daemon``."""
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp")))
        arguments = ["--amplify", str(AMPLIFY), *options]
        daemon = stack.enter_context(run_daemon(world, folder, *arguments, **how))
        fe = stack.enter_context(Frontend.connect(daemon.socket))
        fe.start()
        fe.init()
        session = Session.attach(daemon.process.pid)
        one = Rig(world, image, daemon, session, fe, resolve(fe, image.folders))
        yield one
        assert fe.check() == {}, fe.fault_texts()
