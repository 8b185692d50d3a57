"""What prefetching saves, from a real registry, by count: requests, and reads that had to wait."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import attrs
import pytest

from guest.registry import Registry
from tests.integration.conftest import CHUNK, MadeImage, Served, serving
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.image.push import push_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLAIN, LISTED = "plain:1", "listed:1"
N_FILES = 40


@attrs.frozen
class Shelf:
    """One source, built twice: in the order of the tree, and by a list that is in the image then."""

    registry: Registry
    image: MadeImage
    names: list[str]
    """What a start reads, in its order."""
    list_file: Path

    @property
    def wanted(self) -> int:
        """Bytes of the listed files; noise, so that they are as many in the blob."""
        return sum(len(self.image.files[name]) for name in self.names)


@pytest.fixture(scope="module")
def shelf(
    tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, made_image: MadeImage
) -> Iterator[Shelf]:
    tool("docker-registry")
    base = tmp_path_factory.mktemp("prefetch")
    small = [name for name, data in sorted(made_image.files.items()) if len(data) < CHUNK]
    names = random.Random(5).sample(small, N_FILES)
    list_file = base / "list"
    list_file.write_text("".join(f"/{name}\n" for name in names))
    entries = [(f"/{name}".encode(), 0, None) for name in names]
    listed = build_image(made_image.source, base / "listed", chunk_size=CHUNK, prefetch=entries)
    assert listed.n_prefetch == N_FILES
    with Registry(base / "registry") as registry:
        for folder, name in ((made_image.out, PLAIN), (base / "listed", LISTED)):
            asyncio.run(push_image(folder, f"{registry.host}/{name}", plain_http=True))
        yield Shelf(registry, made_image, names, list_file)


@attrs.frozen
class Start:
    """What a start cost."""

    requests: int
    n_bytes: int
    waited: int
    """Reads that were answered only when something had been fetched."""


def read(served: Served, names: list[str]) -> None:
    """One file after the other, as whoever starts does."""
    for name in names:
        size = len(served.image.files[name])
        for at in range(0, size, 1 << 17):
            served.collect([served.submit_read(name, at, 1 << 17)])


def start(shelf: Shelf, folder: Path, name: str, *options: str, at_once: bool = False) -> Start:
    """A guest that starts with an empty cache, when the lists are fetched, or while they are."""
    before = shelf.registry.traffic()
    with serving(shelf.registry, shelf.image, folder, *options, name=name) as served:

        def prefetched() -> bool:
            # The list is read in a thread, so that it is not being fetched yet at first.
            agent = served.daemon.status()["agent"]
            first, busy = agent["first_start"], agent["fetches_in_flight"]
            listed = bool(first["listed_chunks"]) or "all" in options or "none" in options
            return listed and not first["prefetching"] and not busy

        if not at_once:
            served.wait_for(prefetched)
        read(served, shelf.names)
        served.wait_for(prefetched)
        waited = len(served.daemon.trace()["stalls"])
        traffic = shelf.registry.traffic() - before
        served.check_ring()
    return Start(traffic.requests, traffic.bytes, waited)


@pytest.fixture(scope="module")
def lazy(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Nothing is known of the start."""
    return start(shelf, tmp_path_factory.mktemp("vr"), PLAIN, "--prefetch", "none")


def test_a_lazy_start_waits_for_each_file(lazy: Start) -> None:
    """What the others are compared with is what it is meant to be."""
    assert lazy.waited > N_FILES / 2
    assert lazy.requests >= lazy.waited


def test_a_table_in_the_image(shelf: Shelf, short_dir: Path, lazy: Start) -> None:
    """The image itself is told, and has the chunks side by side: few requests, and nobody waits."""
    got = start(shelf, short_dir, LISTED, "--prefetch", "table")
    assert got.waited == 0
    assert got.requests < lazy.requests
    assert got.n_bytes < 1.1 * shelf.wanted


def test_a_table_while_the_guest_starts(shelf: Shelf, short_dir: Path, lazy: Start) -> None:
    """Nothing is fetched twice, and fewer wait than without."""
    got = start(shelf, short_dir, LISTED, "--prefetch", "table", at_once=True)
    assert got.waited < lazy.waited
    assert got.requests < lazy.requests
    # Reads that came before the list was read are followed by read-ahead, which may go beyond the list.
    assert got.n_bytes < shelf.wanted + (1 << 20)
    # The order of the chunks alone helps: what is read next lies behind what was read.
    ordered = start(shelf, short_dir / "none", LISTED, "--prefetch", "none", at_once=True)
    assert ordered.waited < lazy.waited / 2
    assert ordered.requests < lazy.requests / 2


def test_a_list_of_the_user(shelf: Shelf, short_dir: Path, lazy: Start) -> None:
    """An image that knows nothing: nobody waits either, but the files lie where they lie."""
    got = start(shelf, short_dir, PLAIN, "--prefetch-files", str(shelf.list_file))
    assert got.waited == 0
    assert got.n_bytes < 1.1 * shelf.wanted


def test_all(shelf: Shelf, short_dir: Path) -> None:
    got = start(shelf, short_dir, PLAIN, "--prefetch", "all")
    assert got.waited == 0
    everything = sum(len(data) for data in shelf.image.files.values())
    assert got.n_bytes < 1.05 * everything
