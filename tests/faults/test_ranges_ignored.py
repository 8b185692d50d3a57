"""A registry that answers every range with the whole blob: it comes over the link about once, not n times."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from guest.registry import Registry
from tests.faults.conftest import Rig, rig
from tests.faults.driver import CELLS
from tests.faults.image import Image, make_image
from tests.faults.traffic import MEMORY_KIB
from tests.faults.troubles import KINDS
from tests.sim.faulty_proxy import FaultyProxy
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.push import push_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.sim.replies import Record

MORE = 1.2
# A reply that is given up when it is seen what it is has left the server as far as its buffer goes: the
# proxy's is small, the simulator's is what the kernel allows.
GIVEN_UP = {FaultyProxy: 256 << 10, RegistrySimulator: 4 << 20}


@pytest.fixture(scope="module")
def big_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The folders of the cells lie behind 40 others in the blob."""
    names = [f"a{number:02}" for number in range(40)]
    return make_image(tmp_path_factory.mktemp("whole"), [*names, *(cell.name for cell in CELLS)])


@pytest.fixture(scope="module", params=KINDS)
def world(
    request: pytest.FixtureRequest,
    tool: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
    big_image: Image,
) -> Iterator[RegistrySimulator | FaultyProxy]:
    """A registry that never honours a range of the blob."""
    if request.param == "simulator":
        with RegistrySimulator() as sim:
            sim.store.add_build("app", "1", big_image.out)
            yield sim
        return
    tool("docker-registry")
    with Registry(tmp_path_factory.mktemp("registry")) as registry, FaultyProxy(registry.port) as proxy:
        asyncio.run(push_image(big_image.out, f"{registry.host}/app:1", plain_http=True))
        yield proxy


@contextmanager
def ignoring(world: RegistrySimulator | FaultyProxy, image: Image) -> Iterator[tuple[Rig, list[Record]]]:
    """A daemon with an empty cache; the replies for the blob, which are looked at in the end."""
    start = len(world.log)
    with rig(world, image) as one:
        world.fault("ignore-range", where="blob", digest=image.digest)
        replies: list[Record] = []
        yield one, replies
        assert one.errors() == 0
        assert one.peak_kib < MEMORY_KIB
        world.clear_faults()
        replies += [r for r in world.log[start:] if r.where == "blob" and r.digest == image.digest]
        assert {r.status for r in replies} == {200}


def test_all_of_it_read_in_order_comes_once(world: RegistrySimulator | FaultyProxy, big_image: Image) -> None:
    with ignoring(world, big_image) as (one, replies):
        for name, folder in sorted(big_image.folders.items()):
            for file, data in folder.files.items():
                node = one.nodes[name, file]
                steps = range(0, len(data), 128 << 10)
                got = b"".join(one.fe.read(node, at, min(128 << 10, len(data) - at)) for at in steps)
                assert got == data, (name, file)
            one.look()
    given_up = len(replies) - 1
    assert sum(r.sent for r in replies) <= MORE * big_image.blob_size + given_up * GIVEN_UP[type(world)]
    assert given_up <= 1


def test_many_readers_of_its_end_get_it_once(
    world: RegistrySimulator | FaultyProxy, big_image: Image
) -> None:
    """All cells at the same time: 3 patterns with one reader and 3 with 64."""
    with ignoring(world, big_image) as (one, replies):
        done = one.run(CELLS)
        assert [d for d in done if d.error or not d.right] == []
    given_up = len(replies) - 1
    assert sum(r.sent for r in replies) <= MORE * big_image.blob_size + given_up * GIVEN_UP[type(world)]
    assert given_up <= 16
