"""Jobs for the decoding threads: results, errors and the end, as the event loop sees them."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native.ingest import IngestThreads
from virtiofsd_rafs.native.store import DIGEST_MISMATCH, OK, Store
from virtiofsd_rafs.runtime.ingest import INGEST_THREADS, Ingest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made", compressor="none")


@pytest.fixture
def store(image: MadeImage, tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "cache").mkdir()
    with Store(image.bootstrap, cache_dir=tmp_path / "cache", spill_size=MIB) as store:
        store.open_blob(0)
        yield store


def damaged(image: MadeImage, chunk: int) -> bytes:
    data = bytearray(image.blob)
    data[image.chunks[chunk].compressed_offset] ^= 0x55
    return bytes(data)


async def test_results_find_who_waits_for_them(image: MadeImage, store: Store) -> None:
    ingest = Ingest(store)
    wrong = damaged(image, 2)
    chunks = range(len(image.chunks))
    one_by_one = (ingest.ingest(0, 0, wrong if c == 2 else image.blob, [c]) for c in chunks)
    outcomes = await asyncio.gather(*one_by_one)
    assert [o[0] for o in outcomes] == [DIGEST_MISMATCH if c == 2 else OK for c in chunks]
    good = await asyncio.gather(*(ingest.verify_present(0, c, force=True) for c in chunks))
    assert good == [c != 2 for c in chunks]
    assert await ingest.ingest(0, 0, wrong, [2, 3]) == bytes([DIGEST_MISMATCH, OK])
    ingest.close()
    assert not ingest.has_threads
    assert await ingest.ingest(0, 0, image.blob, [2]) == bytes([OK])  # with new threads
    ingest.close()


async def test_an_error_comes_to_who_waits_with_its_text(image: MadeImage, store: Store) -> None:
    ingest = Ingest(store)
    works = ingest.ingest(0, 0, image.blob, [0])
    fails = [ingest.ingest(7, 0, image.blob, [0]), ingest.verify_present(0, 1 << 20)]
    results = await asyncio.gather(works, *fails, return_exceptions=True)
    assert results[0] == bytes([OK])
    with pytest.raises(VirtiofsdRafsError) as expected:
        store.ingest(7, 0, image.blob, [0])
    assert [str(results[1]), type(results[1])] == [str(expected.value), type(expected.value)]
    with pytest.raises(VirtiofsdRafsError, match="no such chunk"):
        raise results[2]  # type: ignore[misc]
    ingest.close()


async def test_the_bytes_stay_until_a_job_ends_that_nobody_waits_for(image: MadeImage, store: Store) -> None:
    ingest = Ingest(store)
    n = len(image.chunks)
    tasks = [asyncio.create_task(ingest.ingest(0, 0, bytes(bytearray(image.blob)), [c])) for c in range(n)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gc.collect()
    # Where the bytes were, had they gone.
    rubbish = [bytes([i % 251]) * len(image.blob) for i in range(2 * n)]
    await ingest.verify_present(0, 0)  # the jobs before it have begun by then
    ingest.close()
    assert len(rubbish) == 2 * n
    assert store.states(0).verified == n


async def test_the_end_leaves_nobody_waiting(image: MadeImage, store: Store) -> None:
    ingest = Ingest(store)
    n_jobs = 50 * INGEST_THREADS
    wrong = damaged(image, 0)
    tasks = [asyncio.create_task(ingest.ingest(0, 0, wrong, [0])) for _ in range(n_jobs)]
    await asyncio.sleep(0)
    ingest.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(r) for r in results} <= {asyncio.CancelledError, bytes}
    assert asyncio.CancelledError in {type(r) for r in results}
    ingest.close()


def test_closed_threads_take_no_jobs(image: MadeImage, store: Store) -> None:
    threads = IngestThreads(store, 1)
    threads.close()
    threads.close()
    with pytest.raises(VirtiofsdRafsError, match="no ingest threads"):
        threads.ingest(0, 0, image.blob, [0])
    with pytest.raises(VirtiofsdRafsError, match="no ingest threads"):
        list(threads.take())


def test_threads_for_a_closed_store_are_refused(image: MadeImage) -> None:
    store = Store(image.bootstrap, cache_dir=None, spill_size=MIB)
    store.close()
    with pytest.raises(VirtiofsdRafsError, match="null store"):
        IngestThreads(store, 1)
