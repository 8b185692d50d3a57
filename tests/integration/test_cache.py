"""Real daemons and their cache directory: eviction under load, two daemons on one, interrupted downloads."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from guest.daemon import Daemon
from tests.integration.conftest import Served, children, kill, run_daemon
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.cache import inventory
from virtiofsd_rafs.cache.gc import collect
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.conftest import MadeImage
    from tests.sim.registry import RegistrySimulator

MIB = 1 << 20


@pytest.fixture
def start_on(
    made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path
) -> Iterator[Callable[..., Served]]:
    """``start_on(name, *options)``: a daemon called *name* on the one cache directory, and its VM."""
    registry_sim.store.add_build("app", "1", made_image.out)
    with ExitStack() as stack:

        def start_one(name: str, *options: str) -> Served:
            folder = short_dir / name
            folder.mkdir()
            options = ("--cache-dir", str(short_dir / "cache"), *options)
            daemon = stack.enter_context(run_daemon(registry_sim, folder, *options))
            fe = stack.enter_context(Frontend.connect(daemon.socket, queue_size=128))
            fe.start()
            fe.init()
            return Served(daemon, Session.attach(daemon.process.pid), made_image, registry_sim, fe)

        yield start_one


def parts(served: Served, seed: int, size: int = 131072) -> list[tuple[str, int]]:
    """All of the image, in pieces and in some order."""
    names = [
        (name, offset) for name, data in served.image.files.items() for offset in range(0, len(data), size)
    ]
    random.Random(seed).shuffle(names)
    return names


def read_all(*daemons: Served, seed: int, size: int = 131072) -> None:
    """Every daemon reads everything, all at the same time, 32 requests each; each in an order of its own."""
    orders = [parts(served, seed + i, size) for i, served in enumerate(daemons)]
    for i in range(0, len(orders[0]), 32):
        reads = [
            (served, [served.submit_read(name, at, size) for name, at in order[i : i + 32]])
            for served, order in zip(daemons, orders, strict=True)
        ]
        for served, waiting in reads:
            served.collect(waiting)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.glob("*.blob.data")) * 512


def downloaded(served: Served) -> int:
    """Bytes of chunks that the registry has sent."""
    return int(served.daemon.status()["agent"]["bytes_fetched"])


def test_a_limit_below_what_is_used_costs_time_and_nothing_else(start_on: Callable[..., Served]) -> None:
    one = start_on("one", "--cache-size", "16MiB")
    two = start_on("two", "--cache-size", "16MiB")
    peak = 0
    for seed in range(2):
        read_all(one, two, seed=seed)
        peak = max(peak, on_disk(one.daemon.socket.parents[1] / "cache"))
    for served in (one, two):
        served.check_ring()
        counters = served.session.status()["counters"]
        assert (counters["errors"], counters["deadline_errors"]) == (0, 0)
    caches = [served.daemon.status()["agent"]["cache"] for served in (one, two)]
    assert sum(cache["evicted_bytes"] for cache in caches) > 34 * MIB
    assert all(cache["spill_used"] < 16 * MIB for cache in caches)
    # What has been stored since the last look, and what requests waited for when it happened, come on top.
    assert peak < 24 * MIB


EVICT = """
import sys
from pathlib import Path
from virtiofsd_rafs.native.store import Store
with Store(Path(sys.argv[1]).read_bytes(), cache_dir=Path(sys.argv[2]), spill_size=4096) as store:
    while True:
        if store.sweep(1, recover=True).n_chunks:
            print(flush=True)
"""


def test_everything_is_evicted_at_once_by_somebody_who_dies(start_on: Callable[..., Served]) -> None:
    """Only what requests wait for stays; the evicting process is killed again and again, wherever it is."""
    one, two = start_on("one"), start_on("two")
    cache = one.daemon.socket.parents[1] / "cache"
    argv = [sys.executable, "-c", EVICT, str(one.image.out / BOOTSTRAP_NAME), str(cache)]
    done = threading.Event()
    killed = []

    def evict() -> None:
        rng = random.Random(9)
        while not done.is_set():
            with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                for _ in range(rng.randrange(1, 4)):
                    process.stdout.readline()
                    if done.is_set():
                        break
                process.kill()
                killed.append(process.pid)

    evictor = threading.Thread(target=evict)
    evictor.start()
    try:
        for seed in range(2):
            read_all(one, two, seed=seed, size=1 << 18)
    finally:
        done.set()
        # Something has to be evicted for the last line to come.
        while evictor.is_alive():
            one.collect([one.submit_read("f001", 0, 4096)])
            evictor.join(0.05)
    assert len(killed) > 3
    for served in (one, two):
        served.check_ring()
        counters = served.session.status()["counters"]
        assert (counters["errors"], counters["deadline_errors"]) == (0, 0)
    read_all(one, two, seed=5)
    one.sim.refuse()
    read_all(one, two, seed=6)


def test_what_one_daemon_has_stored_the_other_uses(start_on: Callable[..., Served]) -> None:
    one, two = start_on("one"), start_on("two")
    read_all(one, seed=3)
    one.sim.refuse()
    read_all(two, seed=4)
    assert downloaded(two) == 0
    for served in (one, two):
        served.check_ring()


def test_two_daemons_that_fetch_the_same_at_once(start_on: Callable[..., Served]) -> None:
    one, two = start_on("one"), start_on("two")
    read_all(one, two, seed=5)
    (blob,) = one.daemon.status()["image"]["blobs"]
    # Nobody waits for another daemon's fetch; most of what the other has stored is found all the same.
    assert downloaded(one) + downloaded(two) <= 1.8 * blob["stored_size"]
    one.sim.refuse()
    read_all(one, two, seed=6)
    for served in (one, two):
        served.check_ring()
        assert served.session.status()["counters"]["errors"] == 0


def pid_of(served: Served, role: str) -> int:
    pid: int = served.session.status()["processes"][role]["pid"]
    return pid


def stored_chunks(cache: Path, blob_id: str) -> set[int]:
    raw = (cache / f"{blob_id}.chunk_state").read_bytes()
    count = struct.unpack_from("<I", raw, 12)[0]
    return {i for i, word in enumerate(struct.unpack_from(f"<{count}I", raw, 4096)) if word & 7 == 3}


@pytest.mark.parametrize("what", ["control", "daemon"])
def test_an_interrupted_download_goes_on_where_it_was(start_on: Callable[..., Served], what: str) -> None:
    served = start_on("one")
    fault = served.sim.fault("hold", where="blob", skip=12)
    order = parts(served, 7)
    reads = [served.submit_read(name, at, 131072) for name, at in order[:60]]
    served.wait_for(lambda: fault.hits >= 4)
    (blob,) = served.daemon.status()["image"]["blobs"]
    digest = f"sha256:{blob['id']}"
    pids = {role: pid_of(served, role) for role in ("keeper", "control")}
    if what == "control":
        kill(pids["control"])
        served.wait_for(lambda: pid_of(served, "control") not in (0, pids["control"]))
    else:
        rest = children(pids["keeper"])
        kill(pids["keeper"])
        served.daemon.process.wait()
        for pid in rest:
            kill(pid)
    before = stored_chunks(served.daemon.socket.parents[1] / "cache", blob["id"])
    assert before
    asked = len(served.sim.ranges(digest))
    fault.release()
    served.sim.clear_faults()
    if what == "control":
        served.collect(reads)
    else:
        served = start_on("two")
    read_all(served, seed=8)
    bootstrap = (served.image.out / BOOTSTRAP_NAME).read_bytes()
    (chunk_map,) = ChunkMap.from_chunk_table(Tree.parse(bootstrap))
    again = {
        chunk.chunk_index
        for span in served.sim.ranges(digest)[asked:]
        if span is not None
        for chunk in chunk_map
        if span[0] <= chunk.compressed_offset
        and chunk.compressed_offset + chunk.compressed_size - 1 <= span[1]
    }
    assert again
    assert not again & before
    # Nobody reads run.sh.
    assert len({chunk.chunk_index for chunk in chunk_map} - again - before) <= 1
    served.check_ring()


def test_gc_keeps_what_a_bootstrap_file_was_served_with(made_image: MadeImage, short_dir: Path) -> None:
    """Also when the daemon has ended; what no image has goes."""
    cache = short_dir / "cache"
    arguments = ["--cache-dir", str(cache)]
    with Daemon(str(made_image.out / BOOTSTRAP_NAME), short_dir, short_dir / "log", arguments) as daemon:
        daemon.wait_ready()
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            fe.init()
            fe.read(fe.resolve("big").nodeid, 0, 1 << 20)
        daemon.wait_end()
    before = on_disk(cache)
    assert before >= 1 << 20
    (found,) = inventory.scan(cache).images
    assert (found.name, found.complete) == (str(made_image.out / BOOTSTRAP_NAME), True)
    assert collect(cache).blobs == []
    assert on_disk(cache) == before
