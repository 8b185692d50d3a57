"""The list of chunks is not in the bootstrap, and what brings it from the blob fails at first.

A daemon needs that list before it can serve anything. Whatever came in its place is never kept: neither does
a failure that passes cost anything, nor does one that ends the daemon spoil the cache for the next one.
"""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest.daemon import Daemon
from guest.registry import Registry
from tests.faults.conftest import World, rig
from tests.faults.driver import CELLS
from tests.faults.troubles import KINDS
from tests.sim.faulty_proxy import FaultyProxy
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.native.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.image import Image

# Size of the chunk table in the extended superblock, which begins at 1152.
_CHUNK_TABLE_SIZE = 1152 + 32


@pytest.fixture(scope="module")
def without_table(fault_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, with a bootstrap that names its blob's table of contents and no chunk."""
    out = tmp_path_factory.mktemp("bare")
    for path in fault_image.out.iterdir():
        os.link(path, out / path.name)
    bootstrap = bytearray((fault_image.out / BOOTSTRAP_NAME).read_bytes())
    struct.pack_into("<Q", bootstrap, _CHUNK_TABLE_SIZE, 0)
    (out / BOOTSTRAP_NAME).unlink()
    (out / BOOTSTRAP_NAME).write_bytes(bootstrap)
    with Store(bytes(bootstrap), cache_dir=None, spill_size=1 << 20) as store:
        assert store.blob(0).needs_chunk_info
    return out


@pytest.fixture(scope="module", params=KINDS)
def world(
    request: pytest.FixtureRequest,
    tool: Callable[[str], str],
    without_table: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A registry with that image as ``app:1``."""
    if request.param == "simulator":
        with RegistrySimulator() as sim:
            sim.store.add_build("app", "1", without_table)
            yield sim
        return
    tool("docker-registry")
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        asyncio.run(push_image(without_table, f"127.0.0.1:{registry.port}/app:1", plain_http=True))
        with FaultyProxy(registry.port) as proxy:
            yield proxy


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as path:
        yield Path(path)


def metadata(image: Image) -> tuple[int, int]:
    """First and last byte of what lies behind the chunks in the blob."""
    return max(folder.span[1] for folder in image.folders.values()) + 1, image.blob_size - 1


def check_reads(world: World, image: Image, folder: Path) -> None:
    """A daemon with the cache in *folder* serves what the image has."""
    with rig(world, image, folder=folder) as one:
        done = one.run(CELLS[:1])
        assert [d for d in done if not d.right] == []
        assert one.errors() == 0


FAILURES: dict[str, dict[str, Any]] = {
    "cut": {"after_bytes": 100},
    "corrupt": {},
    "short-body": {},
    "server-error": {},
    "reset": {},
    "416": {},
    "wrong-range": {"by": -1},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_list_of_chunks_that_comes_at_a_later_try_is_fine(
    world: World, fault_image: Image, folder: Path, failure: str
) -> None:
    with ExitStack() as stack:
        stack.callback(world.clear_faults)
        fault = world.fault(failure, span=metadata(fault_image), times=2, **FAILURES[failure])
        check_reads(world, fault_image, folder)
        assert fault.hits == 2


@pytest.mark.parametrize("failure", ["corrupt", "server-error", "not-found"])
def test_a_list_of_chunks_that_does_not_come_spoils_nothing(
    world: World, fault_image: Image, folder: Path, failure: str
) -> None:
    with ExitStack() as stack:
        stack.callback(world.clear_faults)
        fault = world.fault(failure, span=metadata(fault_image))
        options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--io-deadline", "2"]
        with Daemon(f"{world.host}/app:1", folder, folder / "log", options) as daemon:
            assert daemon.wait_end() in (3, 4), daemon.log.read_text()
        assert fault.hits > 0
    check_reads(world, fault_image, folder)
