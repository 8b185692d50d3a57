"""A real daemon, a source in trouble: what a retry can cure costs the guest no error and no wrong byte."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.conftest import CHUNK, MadeImage, Served, kill
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.rafs.v6 import Tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read_everything(served: Served, *, chunk: int = 131072) -> None:
    """Reads each file from its beginning to its end, 32 requests at a time."""
    names = [
        (name, offset) for name, data in served.image.files.items() for offset in range(0, len(data), chunk)
    ]
    random.Random(8).shuffle(names)
    for i in range(0, len(names), 32):
        served.collect([served.submit_read(name, offset, chunk) for name, offset in names[i : i + 32]])


def damage(served: Served, at: int) -> None:
    """Flips a bit of the blob in the registry; once more, and it is right again."""
    (blob,) = served.daemon.status()["image"]["blobs"]
    digest = f"sha256:{blob['id']}"
    data = bytearray(served.sim.store.blobs[digest])
    data[at] ^= 0x40
    served.sim.store.blobs[digest] = bytes(data)


def control_pid(served: Served) -> int:
    pid: int = served.session.status()["processes"]["control"]["pid"]
    return pid


@pytest.mark.parametrize(
    ("fault", "params"),
    [
        ("corrupt", {}),
        ("cut", {}),
        ("short-body", {}),
        ("reset", {}),
        ("server-error", {}),
        ("throttle", {"retry_after": 1}),
        ("ignore-range", {}),
        ("wrong-range", {}),
        ("no-content-range", {}),
        ("status", {"code": 500}),
        ("not-found", {}),
    ],
)
def test_bursts_of_errors_cost_nothing(
    start: Callable[..., Served], fault: str, params: dict[str, int]
) -> None:
    served = start("--amplify", "262144")
    served.sim.fault(fault, where="blob", times=3, **params)
    served.sim.fault(fault, where="blob", skip=6, times=3, **params)
    read_everything(served)
    served.check_ring()
    log = served.daemon.status()["fetch_log"]
    # After one whole answer instead of a range the blob is asked for as a whole, once.
    assert all(f.hits == 3 for f in served.sim.faults) or fault == "ignore-range"
    # A whole answer needs no second try; aiohttp itself asks again when a kept connection ended before any.
    assert any(entry["attempt"] > 1 for entry in log) or fault in ("ignore-range", "reset")
    assert served.session.status()["counters"]["errors"] == 0


def test_a_registry_that_goes_away_and_comes_back_costs_nothing(start: Callable[..., Served]) -> None:
    served = start("--amplify", "131072")
    served.collect([served.submit_read("f001", 0, 4096)])
    served.sim.refuse()
    waiting = served.random_reads(random.Random(2))
    waiting += [served.submit_read("big", offset, CHUNK) for offset in range(0, 4 << 20, CHUNK)]
    served.wait_for(lambda: served.parked() > 0)
    failures = served.daemon.status()["agent"]["fetches"].get("backend.unreachable", 0)
    served.wait_for(
        lambda: served.daemon.status()["agent"]["fetches"].get("backend.unreachable", 0) > failures + 3
    )
    served.collect([served.submit_read("f001", 0, 4096)])  # what is here is served all the while
    served.sim.accept()
    served.collect(waiting)
    served.check_ring()


def test_one_rotten_chunk_fails_alone(start: Callable[..., Served], made_image: MadeImage) -> None:
    tree = Tree.parse((made_image.out / BOOTSTRAP_NAME).read_bytes())
    (chunk_map,) = ChunkMap.from_chunk_table(tree)
    found = tree.lookup(tree.inode(tree.root), b"big")
    assert found is not None
    parts = list(tree.chunks(tree.inode(found[0])))
    rotten = chunk_map.chunks[parts[5].chunk_index]
    served = start("--io-deadline", "2", "--amplify", "1048576")
    damage(served, rotten.compressed_offset)
    good = [served.submit_read("big", n * CHUNK, CHUNK) for n in range(10) if n != 5]
    token, _ = served.submit_read("big", 5 * CHUNK, 4096)
    served.collect(good)
    assert served.fe.wait(token, 30).error == errno.EIO
    status = served.daemon.status()
    assert status["agent"]["chunks"].get("digest-mismatch", 0) + status["agent"]["chunks"].get(
        "decode-error", 0
    )
    # The chunk is absent again; the next read tries anew.
    damage(served, rotten.compressed_offset)
    served.collect([served.submit_read("big", 5 * CHUNK, 4096)])
    served.check_ring()


def test_control_killed_again_and_again(start: Callable[..., Served]) -> None:
    served = start("--amplify", "131072", queue_size=64)
    served.sim.latency_s = 0.005
    rng = random.Random(3)
    killed = 0
    for _ in range(12):
        reads = served.random_reads(rng)
        time.sleep(rng.random() * 0.05)
        pid = control_pid(served)
        if pid:
            kill(pid, signal.SIGKILL)
            killed += 1
        served.collect(reads)
    assert killed > 3
    assert served.worker()["crashes"] == 0
    read_everything(served)
    served.check_ring()


def test_a_second_daemon_fetches_nothing_that_the_first_one_has(
    start: Callable[..., Served], short_dir: Path
) -> None:
    first = start()
    read_everything(first)
    fetched = len(first.sim.requests("blob"))
    first.fe.close()
    first.daemon.stop()
    second = start()
    read_everything(second)
    assert len(second.sim.requests("blob")) == fetched
    assert list((short_dir / "cache").glob("*.blob.data"))


def test_memory_stands_in_without_a_cache(start: Callable[..., Served]) -> None:
    served = start("--no-cache", "--spill-size", str(32 << 20))
    read_everything(served)
    read_everything(served)
    cache = served.daemon.status()["agent"]["cache"]
    assert cache["dir"] is None
    assert 0 < cache["spill_used"] <= cache["spill_capacity"] == 32 << 20
    served.check_ring()


@pytest.fixture
def small_disk(short_dir: Path, missing: Callable[[str], None]) -> Path:
    """A file system of 8 MiB where the cache is."""
    if os.geteuid() != 0:
        missing("root")
    cache = short_dir / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", cache], check=True)
    return cache


def test_memory_stands_in_when_the_disk_is_full(start: Callable[..., Served], small_disk: Path) -> None:
    try:
        served = start()
        read_everything(served)
        read_everything(served)
        status = served.daemon.status()
        assert status["agent"]["cache"]["last_disk_errno"] == errno.ENOSPC
        assert status["agent"]["cache"]["spill_chunks"] > 0
        assert status["image"]["blobs"][0]["states"]["verified"] > 0
        served.check_ring()
        served.fe.close()
        served.daemon.stop()
        assert served.daemon.log.read_text().count("the cache disk refuses (No space left on device)") == 1
    finally:
        subprocess.run(["umount", "-l", small_disk], check=True)


@pytest.mark.soak
def test_a_registry_that_is_away_for_a_minute_costs_no_error(start: Callable[..., Served]) -> None:
    """The outage that the default deadline is made for, in full length."""
    served = start()
    served.collect([served.submit_read("f001", 0, 4096)])
    served.sim.refuse()
    waiting = served.random_reads(random.Random(60))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        served.collect([served.submit_read("f001", 0, 4096)])
        time.sleep(0.5)
    assert served.parked() > 0
    served.sim.accept()
    served.collect(waiting)
    assert served.session.status()["counters"]["errors"] == 0
    assert served.session.status()["counters"]["deadline_errors"] == 0
    served.check_ring()


def test_a_read_fails_when_its_time_is_over_and_the_next_one_tries_anew(start: Callable[..., Served]) -> None:
    served = start("--io-deadline", "2")
    served.collect([served.submit_read("f001", 0, 4096)])
    served.sim.refuse()
    token, _ = served.submit_read("big", 3 << 20, 4096)
    assert served.fe.wait(token, 30).error == errno.EIO
    served.sim.accept()
    served.collect([served.submit_read("big", 3 << 20, 4096)])
    served.check_ring()
