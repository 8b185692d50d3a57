"""What is fetched while nobody waits. Time is a number, the link is what it was told to be."""

from __future__ import annotations

import pytest

from tests.unit.test_planner import KIB, TEN, WHO, Blob, post, ranges
from virtiofsd_rafs.runtime.background import (
    BACKGROUND_MAX,
    BACKGROUND_MIN,
    BACKGROUND_TRIES,
    FILL_QUIET_S,
    RETRY_CAP_S,
)
from virtiofsd_rafs.runtime.backlog import LOOK, MAX_SCAN, Run, Runs
from virtiofsd_rafs.runtime.link import Link
from virtiofsd_rafs.runtime.planner import Planner
from virtiofsd_rafs.runtime.wants import Fetch, Posted

MIB = 1024 * KIB


def planner(*blobs: Blob, connections: int = 4, rate: float | None = None, fill_rate: int = 0) -> Planner:
    """A planner whose link carries *rate* bytes per second, as far as it knows."""
    p = Planner(
        dict(enumerate(blobs)),
        amplify=MIB,
        connections=connections,
        io_deadline_s=90.0,
        retry_first_s=1.0,
        retry_cap_s=8.0,
        first_window=0,
        fill_rate=fill_rate,
        rng=lambda: 1.0,
    )
    if rate is not None:
        p.link.ended(-100.001, -100.0, 1)
        p.link.ended(-33.0, -1.0, int(rate * 32))
    return p


def store(p: Planner, blob: Blob, fetch: Fetch, now: float = 0.0) -> None:
    blob.ready_set.update(fetch.chunks)
    p.stored(fetch.fetch_id, [], now)


def drain(p: Planner, blob: Blob, now: float = 0.0) -> list[tuple[int, ...]]:
    """Stores everything that is fetched until nothing is; in the order in which it was asked for."""
    order = []
    while fetches := p.next_fetches(now):
        for fetch in fetches:
            order.append(fetch.chunks)
            store(p, blob, fetch, now)
    return order


def test_a_list_is_fetched_in_its_order_and_neighbours_together() -> None:
    blob = Blob(TEN)
    p = planner(blob)
    p.background.prefetch(Runs([Run(0, 7, 1), Run(0, 2, 2), Run(0, 5, 1), Run(0, 1, 1), Run(0, 8, 1)]))
    fetches = p.next_fetches(0.0)
    # 4 and 6 are not listed; a whole chunk between two listed ones is more than is fetched for nothing.
    assert [fetch.chunks for fetch in fetches] == [(7, 8), (1, 2, 3), (5,)]
    assert {fetch.reason for fetch in fetches} == {"prefetch"}
    assert fetches[0].reasons() == [(7, "prefetch"), (8, "prefetch")]
    assert p.counters.chunks_prefetched == 6
    for fetch in fetches:
        store(p, blob, fetch)
    assert p.next_fetches(0.0) == []
    assert not p.busy
    assert p.next_event() is None


def test_small_chunks_between_listed_ones_come_along() -> None:
    blob = Blob([10 * KIB, 100, 10 * KIB, 100], ready_set={3})
    p = planner(blob)
    p.background.prefetch(Runs([Run(0, 0, 1), Run(0, 2, 1)]))
    assert ranges(p) == [(0, 1, 2)]


def test_what_is_there_or_under_way_is_passed_over() -> None:
    blob = Blob(TEN, ready_set={0, 1}, unverified_set={2})
    p = planner(blob)
    post(p, 3)
    assert ranges(p) == [(3,)]
    p.background.prefetch(Runs([Run(0, 0, 6)]))
    assert ranges(p) == [(4, 5)]


def test_whoever_wants_what_is_being_prefetched_joins() -> None:
    blob = Blob(TEN)
    p = planner(blob)
    p.background.prefetch(Runs([Run(0, 0, 3)]))
    (fetch,) = p.next_fetches(0.0)
    assert post(p, 1) == [Posted.JOINED]
    assert p.next_fetches(0.0) == []
    assert (p.counters.prefetch_used, p.waiting, fetch.origin) == (1, 1, WHO)
    # It is promoted: a failure is tried again as soon as any other want, the others stay in the background.
    p.failed(fetch.fetch_id, 0.0)
    assert ranges(p, 1.0) == [(1,), (0,), (2,)]


def test_demand_goes_before_and_has_a_connection_at_any_time() -> None:
    blob = Blob([MIB] * 20)
    p = planner(blob, connections=3, rate=100 * MIB)
    p.background.prefetch(Runs([Run(0, 0, 20)]))
    first = p.next_fetches(0.0)
    assert len(first) == 2, "one of three stays free"
    post(p, 19, 17, 15)
    assert ranges(p) == [(19,)]
    # The next free connection is for those who wait as well.
    store(p, blob, first[0])
    assert ranges(p) == [(17,)]
    store(p, blob, first[1])
    assert ranges(p) == [(15,)]


@pytest.mark.parametrize(
    ("rate", "most"),
    [
        (16 * KIB, BACKGROUND_MIN),
        (4 * MIB, MIB),
        (1 << 40, 3 * BACKGROUND_MAX),
        (None, 256 * KIB),
    ],
)
def test_a_quarter_of_a_second_is_under_way(rate: float | None, most: int) -> None:
    blob = Blob([16 * KIB] * 4000)
    p = planner(blob, rate=rate)
    p.background.prefetch(Runs([Run(0, 0, 4000)]))
    under_way = sum(fetch.length for fetch in p.next_fetches(0.0))
    assert most / 2 <= under_way <= most


def test_beside_demand_only_as_much_as_keeps_the_link_from_standing_idle() -> None:
    blob = Blob([16 * KIB] * 4000)
    p = planner(blob, rate=8 * MIB)
    p.background.prefetch(Runs([Run(0, 0, 1000)]))
    post(p, 3999)
    demand, *beside = p.next_fetches(0.0)
    assert demand.reason == "demand"
    assert 0 < demand.length + sum(fetch.length for fetch in beside) < 8 * MIB * 0.05
    # A large fetch for somebody who waits has the link for itself.
    big = Blob([2 * MIB, 16 * KIB])
    p = planner(big, rate=8 * MIB)
    p.background.prefetch(Runs([Run(0, 1, 1)]))
    post(p, 0)
    (demand,) = p.next_fetches(0.0)
    store(p, big, demand, 1.0)
    assert ranges(p, 1.0) == [(1,)]


def test_fill_waits_for_lists_and_for_quiet() -> None:
    blob = Blob(TEN)
    p = planner(blob)
    p.background.fill()
    p.background.prefetch(Runs([Run(0, 9, 1)]))
    post(p, 0)
    first = p.next_fetches(0.0)
    assert [(fetch.reason, fetch.chunks) for fetch in first] == [("demand", (0,)), ("prefetch", (9,))]
    for fetch in first:
        store(p, blob, fetch, 1.0)
    assert p.next_fetches(1.0) == []
    assert p.next_event() == 1.0 + FILL_QUIET_S
    fetches = p.next_fetches(1.0 + FILL_QUIET_S)
    assert {fetch.reason for fetch in fetches} == {"fill"}
    for fetch in fetches:
        store(p, blob, fetch, 3.0)
    assert blob.ready_set == set(range(10))
    drain(p, blob, 10.0)
    assert not p.busy


def test_fill_pauses_while_somebody_waits() -> None:
    blob = Blob([64 * KIB] * 40)
    p = planner(blob)
    p.background.fill()
    fetches = p.next_fetches(0.0)
    post(p, 39)
    (demand,) = p.next_fetches(0.0)
    for fetch in fetches:
        store(p, blob, fetch, 1.0)
    assert p.next_fetches(1.0) == []
    assert p.background.filling
    store(p, blob, demand, 2.0)
    assert p.next_fetches(2.0 + FILL_QUIET_S / 2) == []
    drain(p, blob, 2.0 + FILL_QUIET_S)
    assert blob.ready_set == set(range(40))
    assert not p.background.filling


def test_fill_covers_all_blobs_and_passes_over_gaps() -> None:
    one, two = Blob(TEN, unknown={3}), Blob([10, 10, 10], offsets=[20, 0, 10])
    p = planner(one, two)
    p.background.fill()
    got = {(fetch.blob, chunk) for fetch in p.next_fetches(0.0) for chunk in fetch.chunks}
    assert got == {(0, chunk) for chunk in range(10) if chunk != 3} | {(1, 0), (1, 1), (1, 2)}


def test_the_rate_of_the_fill_is_kept() -> None:
    blob = Blob([64 * KIB] * 64)
    p = planner(blob, fill_rate=64 * KIB)
    p.background.fill()
    now, begun = 0.0, []
    for _ in range(5):
        for fetch in p.next_fetches(now):
            begun.append((now, fetch.length))
            store(p, blob, fetch, now)
        now = p.next_event() or now
    total = sum(length for _, length in begun[:-1])
    assert begun[-1][0] == pytest.approx(total / (64 * KIB))


def test_failures_pause_the_background_ever_longer_and_lose_nothing() -> None:
    blob = Blob(TEN)
    p = planner(blob)
    p.background.fill()
    now, pauses = 0.0, []
    for _ in range(9):
        (fetch,) = p.next_fetches(now)
        p.failed(fetch.fetch_id, now)
        assert p.next_fetches(now) == []
        event = p.next_event()
        assert event is not None
        pauses.append(event - now)
        now = event
    assert pauses == [1, 2, 4, 8, 16, 32, RETRY_CAP_S, RETRY_CAP_S, RETRY_CAP_S]
    # Demand has pauses of its own.
    post(p, 4, now=now - 1)
    assert (4,) in ranges(p, now - 1)
    drain(p, blob, now)
    (fetch,) = p._fetches.values()
    store(p, blob, fetch, now)
    drain(p, blob, now + 100)
    assert blob.ready_set == set(range(10))


def test_a_chunk_that_is_always_bad_is_fetched_alone_and_given_up() -> None:
    blob = Blob(TEN)
    p = planner(blob)
    p.background.prefetch(Runs([Run(0, 0, 3)]))
    (fetch,) = p.next_fetches(0.0)
    blob.ready_set |= {0, 2}
    p.stored(fetch.fetch_id, [1], 0.0)
    for _ in range(BACKGROUND_TRIES - 1):
        assert p.counters.given_up == 0
        (fetch,) = p.next_fetches(0.0)
        assert fetch.chunks == (1,)
        p.stored(fetch.fetch_id, [1], 0.0)
    assert p.counters.given_up == 1
    assert p.next_fetches(0.0) == []
    assert post(p, 1) == [Posted.QUEUED]


def test_a_server_that_asks_for_a_pause_gets_it() -> None:
    p = planner(Blob(TEN))
    p.background.prefetch(Runs([Run(0, 0, 1), Run(0, 5, 1)]))
    first, second = p.next_fetches(0.0)
    p.failed(first.fetch_id, 0.0, retry_after_s=7.0)
    p.failed(second.fetch_id, 0.0, retry_after_s=7.0)
    assert p.next_fetches(6.9) == []
    assert (p.next_event() or 0.0) >= 7.0


def test_long_lists_of_what_is_there_are_walked_in_pieces() -> None:
    n = 3 * MAX_SCAN
    blob = Blob([1] * n, ready_set=set(range(n - 1)))
    p = planner(blob)
    p.background.prefetch(Runs([Run(0, 0, n)]))
    p.background.fill()
    walks = 0
    while not (fetches := p.next_fetches(0.0)):
        assert p.next_event() is not None
        walks += 1
    assert fetches[0].chunks == (n - 1,)
    assert walks >= 2


def test_only_the_near_future_of_a_list_is_looked_at() -> None:
    blob = Blob([64] * (2 * LOOK))
    p = planner(blob)
    # Every second chunk, then the others.
    evens, odds = range(0, 2 * LOOK, 2), range(1, 2 * LOOK, 2)
    p.background.prefetch(Runs([Run(0, chunk, 1) for chunk in (*evens, *odds)]))
    chunks = p.next_fetches(0.0)[0].chunks
    # What lies between is smaller than the gap that may be fetched for nothing, and so is taken along.
    assert chunks == tuple(range(2 * LOOK - 1))


def test_nothing_is_fetched_in_advance_over_a_single_connection() -> None:
    p = planner(Blob(TEN), connections=1)
    p.background.fill()
    assert p.next_fetches(0.0) == []
    assert p.next_event() is None


def test_the_link_is_measured_over_what_was_under_way() -> None:
    link = Link()
    assert link.rate is None
    # Two at a time, each at half of 1 MB/s. How much of it is the round trip cannot be seen.
    for i in range(4):
        link.ended(i, i + 1.0, 500_000)
        link.ended(i, i + 1.0, 500_000)
    assert link.rate is not None
    assert 1e6 <= link.rate <= 2e6
    # Small fetches tell how long a request takes, not what the link carries.
    idle = Link()
    for i in range(32):
        idle.ended(i, i + 0.02, 1000)
    assert idle.rate is None
    assert idle.round_trip == pytest.approx(0.02)
    idle.ended(40.0, 39.0, 1 << 30)  # a clock that went back tells nothing
    assert idle.rate is None


def test_a_slow_link_with_long_round_trips_is_not_taken_for_a_slower_one() -> None:
    link = Link()
    rate, trip, now = 4e6, 0.2, 0.0
    for length in [4000, 400_000, 400_000, 400_000]:
        ended = now + trip + length / rate
        link.ended(now, ended, length)
        now = ended + 1
    assert link.rate == pytest.approx(rate, rel=0.05)
