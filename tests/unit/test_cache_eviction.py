"""Eviction from a cache directory, as the store does it: what goes, what stays, who waits for whom."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.native.store import OK, Store, reclaim

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1024
CHUNK = 64 * KIB
N = 24
_USED_AT = (4096 + 4 * N + 7) // 8 * 8


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    """24 chunks of 64 KiB, the last one of each four shorter."""
    return make_image(tmp_path / "made", chunk_size=CHUNK)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def open_store(image: MadeImage, cache: Path, **options: object) -> Store:
    store = Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20, **options)  # type: ignore[arg-type]
    assert store.open_blob(0)
    return store


def fill(store: Store, image: MadeImage, chunks: list[int] | None = None) -> None:
    wanted = list(range(N)) if chunks is None else chunks
    assert store.ingest(0, 0, image.blob, wanted) == bytes([OK]) * len(wanted)


def set_used(cache: Path, image: MadeImage, used: dict[int, int]) -> None:
    """As if chunks had last been used then."""
    with (cache / f"{image.blob_id}.chunk_state").open("r+b") as f:
        for chunk, when in used.items():
            os.pwrite(f.fileno(), struct.pack("<I", when), _USED_AT + 4 * chunk)


def on_disk(cache: Path) -> int:
    return sum(path.stat().st_blocks for path in cache.iterdir()) * 512


def ready(store: Store) -> set[int]:
    view = store.chunks(0)
    return {chunk for chunk in range(N) if view.ready(chunk)}


def served(store: Store, chunk: int) -> bytes:
    state, extents, touched, data = store.share(0)
    assert data is not None
    offset, size = struct.unpack("<QI", os.pread(extents, 12, 64 + 32 * chunk))
    try:
        return os.pread(data, size, offset)
    finally:
        for fd in (state, extents, touched, data):
            os.close(fd)


def test_what_was_used_longest_ago_goes(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        fill(store, image)
        order = random.Random(5).sample(range(N), N)
        set_used(cache, image, {chunk: 1000 + age for age, chunk in enumerate(order)})
        before = on_disk(cache)
        limit = before - before // 8
        sweep = store.sweep(limit)
        assert sweep is not None
        assert (sweep.before, sweep.after, sweep.errno, sweep.busy) == (before, on_disk(cache), 0, False)
        assert sweep.after <= limit - limit // 8
        left = ready(store)
        assert left == set(order[sweep.n_chunks :])
        assert all(served(store, chunk) == image.plain[chunk] for chunk in left)
        # Far enough below: nothing more, until it has grown again.
        assert store.sweep(limit) == (sweep.after, sweep.after, 0, 0, 0, False)
        fill(store, image)
        assert ready(store) == set(range(N))
        assert all(served(store, chunk) == image.plain[chunk] for chunk in range(N))


def test_a_touch_and_a_hold_protect(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        store.hold(0, [0, 1], 60)
        fill(store, image)
        set_used(cache, image, dict.fromkeys(range(2, N), 1000))
        touched = store.share(0)[2]
        os.pwrite(touched, b"\1", 1)  # the read that waited for it was answered
        os.pwrite(touched, b"\1", 7)
        sweep = store.sweep(1)
        assert sweep is not None
        assert ready(store) == {0}
        assert sweep.held == image.chunks[0].uncompressed_size
        fill(store, image)
        set_used(cache, image, dict.fromkeys(range(1, N), 1000))
        os.pwrite(touched, b"\3", 9)
        assert store.harvest() == 1
        assert store.touched(0)[9] == 2
        limit = on_disk(cache)
        store.sweep(limit)
        assert {0, 9} <= ready(store)
        os.close(touched)


def test_a_clock_that_was_wrong_protects_nothing(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        fill(store, image)
        set_used(cache, image, dict.fromkeys(range(N), 2**32 - 1))
        sweep = store.sweep(1)
        assert sweep is not None
        assert sweep.held == 0
        assert ready(store) == set()


def test_blobs_of_others_take_part(image: MadeImage, cache: Path, tmp_path: Path) -> None:
    other = make_image(tmp_path / "other", seed=2, chunk_size=CHUNK)
    with open_store(image, cache) as ours, open_store(other, cache) as theirs:
        fill(ours, image)
        fill(theirs, other)
        set_used(cache, other, dict.fromkeys(range(N), 1000))
        touched = theirs.share(0)[2]
        os.pwrite(touched, b"\1", 3)
        os.close(touched)
        theirs.harvest()  # as their daemon does from time to time
        used = on_disk(cache)
        sweep = ours.sweep(used - 4 * CHUNK)
        assert sweep is not None
        assert sweep.n_chunks > 3
        assert ready(ours) == set(range(N))
        assert 3 in ready(theirs)
        assert len(ready(theirs)) == N - sweep.n_chunks


def test_blobs_that_nobody_has_opened_since_the_boot_take_part(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache, boot_id=b"A" * 16) as store:
        fill(store, image)
    with Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20) as store:
        sweep = store.sweep(1)
        assert sweep is not None
        assert sweep.n_chunks == N
        store.open_blob(0)
        assert store.states(0).present == store.states(0).verified == 0


def test_files_of_an_earlier_version_are_completed(image: MadeImage, cache: Path) -> None:
    """They end behind the words."""
    with open_store(image, cache) as store:
        fill(store, image, [1, 5])
    with (cache / f"{image.blob_id}.chunk_state").open("r+b") as f:
        f.truncate(4096 + 4 * N)
        os.pwrite(f.fileno(), bytes(4), 144)
    with Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20) as store:
        sweep = store.sweep(1)  # nothing is known of its chunks
        assert sweep is not None
        assert (sweep.n_chunks, sweep.held > 0) == (0, True)
        store.open_blob(0)
        assert ready(store) == {1, 5}
        store.sweep(1)
        assert ready(store) == set()


def test_one_process_at_a_time(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store, (cache / ".eviction.lock").open("w") as lock:
        fill(store, image)
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep = store.sweep(1)
        assert sweep is not None
        assert sweep.busy
        assert ready(store) == set(range(N))
        fcntl.flock(lock, fcntl.LOCK_UN)
        store.sweep(1)
        assert ready(store) == set()


def test_a_store_in_memory_has_nothing_to_evict(image: MadeImage) -> None:
    with Store(image.bootstrap, cache_dir=None, spill_size=1 << 20) as store:
        store.open_blob(0)
        assert store.sweep(1) is None


def test_chunks_that_share_bytes_stay(tmp_path: Path, cache: Path) -> None:
    image = make_image(tmp_path / "made", chunk_size=CHUNK)
    with open_store(image, cache) as store:
        fill(store, image)
        places = _USED_AT + (4 * N + 7) // 8 * 8
        with (cache / f"{image.blob_id}.chunk_state").open("r+b") as f:
            os.pwrite(f.fileno(), bytes(4), places + 16 * 5 + 12)  # not alone
            os.pwrite(f.fileno(), struct.pack("<Q", 1 << 40), places + 16 * 6)  # beyond the file
        store.sweep(1)
        assert ready(store) == {5, 6}
    with open_store(image, cache) as store:  # places are put right when the blob is opened
        store.sweep(1)
        assert ready(store) == set()


def test_an_interrupted_eviction_is_finished(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        fill(store, image)
        path = cache / f"{image.blob_id}.chunk_state"
        with path.open("r+b") as f:
            os.pwrite(f.fileno(), struct.pack("<I", 5 << 3 | 4), 4096 + 4 * 2)
        # What must be stored meanwhile goes to memory.
        assert store.growth()[1] is False
        assert store.ingest(0, 0, image.blob, [2]) == bytes([OK])
        assert store.states(0).spilled == 1
        assert store.growth()[1] is True
        assert ready(store) == set(range(N))
        sweep = store.sweep(0, recover=True)
        assert sweep is not None
        assert sweep.n_chunks == 1
        assert store.growth()[1] is False
        assert struct.unpack("<I", path.read_bytes()[4096 + 8 : 4096 + 12])[0] & 7 == 0


def test_bytes_that_nobody_speaks_of_are_given_back(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        fill(store, image)
        before = on_disk(cache)
        with (cache / f"{image.blob_id}.blob.data").open("r+b") as f:
            os.pwrite(f.fileno(), b"x", image.chunks[4].uncompressed_offset)
        assert not store.verify_present(0, 4, force=True)
        assert on_disk(cache) == before
        assert reclaim(cache, image.blob_id) == 1
        assert on_disk(cache) == before - CHUNK
        assert ready(store) == set(range(N)) - {4}
        assert reclaim(cache, image.blob_id) == 0
        assert reclaim(cache, "no-such-blob") is None


@pytest.mark.parametrize(
    ("n_chunks", "chunk_size", "n_reads", "pause_s"), [(24, CHUNK, 1500, 0.0), (2, 64 * CHUNK, 100, 0.02)]
)
def test_readers_and_writers_in_spite_of_constant_eviction(
    tmp_path: Path, cache: Path, n_chunks: int, chunk_size: int, n_reads: int, pause_s: float
) -> None:
    """Three daemons fetch and read at random while another evicts everything, again and again."""
    image = make_image(
        tmp_path / "made", n_files=1, chunks_each=n_chunks, chunk_size=chunk_size, compressor="none"
    )
    stop = threading.Event()
    wrong: list[str] = []
    read = [0, 0, 0]

    def use(number: int) -> None:
        rng = random.Random(number)
        with open_store(image, cache) as store:
            state, extents, touched, data = store.share(0)
            assert data is not None
            places = [struct.unpack("<QI", os.pread(extents, 12, 64 + 32 * c)) for c in range(n_chunks)]
            while read[number] < n_reads and not wrong:
                chunk = rng.randrange(n_chunks)
                word = os.pread(state, 4, 4096 + 4 * chunk)
                if word[0] & 7 != 3:
                    store.ingest(0, 0, image.blob, [chunk])
                    continue
                got = os.pread(data, places[chunk][1], places[chunk][0])
                if os.pread(state, 4, 4096 + 4 * chunk) == word:
                    read[number] += 1
                    if got != image.plain[chunk]:
                        wrong.append(f"chunk {chunk} in state {word.hex()}")
            for fd in (state, extents, touched, data):
                os.close(fd)

    def evict() -> None:
        rng = random.Random(-1)
        with open_store(image, cache) as store:
            while not stop.wait(
                rng.random() * pause_s
            ):  # so that mistakes are there for long enough to be read
                store.sweep(1)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    evictor = threading.Thread(target=evict)
    for thread in (*threads, evictor):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    evictor.join()
    assert wrong == []
    assert read == [n_reads] * 3
