"""The planner's decisions, case by case. Time is a number, randomness is fixed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from virtiofsd_rafs.runtime.planner import MAX_RETRY_AFTER_S, Planner
from virtiofsd_rafs.runtime.wants import Origin, Posted

WHO = Origin(7, 0)
KIB = 1024


@dataclass
class Blob:
    """A blob whose chunks stand behind each other, *gaps* bytes apart."""

    lengths: list[int]
    gaps: dict[int, int] = field(default_factory=dict)
    sizes: list[int] | None = None
    ready_set: set[int] = field(default_factory=set)
    unverified_set: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    hinted_set: set[int] = field(default_factory=set)
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.offsets:
            at = 0
            for i, length in enumerate(self.lengths):
                at += self.gaps.get(i, 0)
                self.offsets.append(at)
                at += length

    def size(self, chunk: int) -> int:
        return (self.sizes or self.lengths)[chunk]

    def promised(self, chunk: int) -> bool:
        return 0 <= chunk < len(self.lengths) and chunk not in self.unknown

    def ready(self, chunk: int) -> bool:
        return chunk in self.ready_set

    def unverified(self, chunk: int) -> bool:
        return chunk in self.unverified_set

    def hinted(self, chunk: int) -> bool:
        return chunk in self.hinted_set


def planner(
    *blobs: Blob,
    amplify: int = 64 * KIB,
    connections: int = 8,
    first_window: int | None = None,
    **options: float,
) -> Planner:
    """A planner that reads ahead as far as it may from the start, unless *first_window* says otherwise."""
    settings: dict[str, float] = {"io_deadline_s": 90.0, "retry_first_s": 1.0, "retry_cap_s": 8.0} | options
    return Planner(
        dict(enumerate(blobs)),
        amplify=amplify,
        connections=connections,
        io_deadline_s=settings["io_deadline_s"],
        retry_first_s=settings["retry_first_s"],
        retry_cap_s=settings["retry_cap_s"],
        first_window=amplify if first_window is None else first_window,
        rng=lambda: 0.999999,  # pauses are (nearly) their upper bounds
    )


def post(p: Planner, *chunks: int, blob: int = 0, now: float = 0.0) -> list[Posted]:
    return [p.post((blob, chunk), now, WHO) for chunk in chunks]


def ranges(p: Planner, now: float = 0.0) -> list[tuple[int, ...]]:
    """Chunks of each fetch that starts now."""
    return [fetch.chunks for fetch in p.next_fetches(now)]


TEN = [10 * KIB] * 10


@pytest.mark.parametrize(
    ("blob", "posts", "amplify", "expected"),
    [
        # read-ahead: up to `amplify` compressed bytes behind the wanted chunk
        (Blob(TEN), [2], 30 * KIB, [(2, 3, 4)]),
        (Blob(TEN), [2], 39 * KIB, [(2, 3, 4)]),
        (Blob(TEN), [2], 40 * KIB, [(2, 3, 4, 5)]),
        (Blob(TEN), [8], 100 * KIB, [(8, 9)]),
        # a chunk that is larger than that is fetched all the same, alone
        (Blob(TEN), [2], 1 * KIB, [(2,)]),
        (Blob(TEN), [2], 0, [(2,)]),
        # neighbours that are wanted too go along, also those in front
        (Blob(TEN), [5, 4, 6], 30 * KIB, [(4, 5, 6)]),
        (Blob(TEN), [9, 8, 7], 30 * KIB, [(7, 8, 9)]),
        # what is there already ends the range, unless it is no larger than the gap
        (Blob(TEN, ready_set={4}), [2], 90 * KIB, [(2, 3)]),
        (Blob([10 * KIB, 200, 10 * KIB], ready_set={1}), [0], 64 * KIB, [(0, 2)]),
        (Blob([10 * KIB, 200, 10 * KIB], unverified_set={1}), [0], 64 * KIB, [(0, 2)]),
        (Blob([10 * KIB, 600, 10 * KIB], ready_set={1}), [0], 64 * KIB, [(0,)]),
        # holes of the blob: amplify >> 7 is the most that is fetched for nothing
        (Blob(TEN, gaps={3: 512}), [2], 64 * KIB, [(2, 3, 4, 5, 6, 7)]),
        (Blob(TEN, gaps={3: 513}), [2], 64 * KIB, [(2,)]),
        # wants that are too far apart are two fetches
        (Blob(TEN), [0, 9], 20 * KIB, [(0, 1), (9,)]),
        # numbers that the image does not describe are passed over
        (Blob([10 * KIB, 1, 10 * KIB], unknown={1}), [0], 64 * KIB, [(0, 2)]),
        # chunks whose numbers are not in the order of their places
        (Blob([10, 10, 10], offsets=[20, 0, 10]), [1], 64 * KIB, [(1, 2, 0)]),
        (Blob([10, 10, 10], offsets=[20, 0, 10]), [0, 2], 64 * KIB, [(2, 0)]),
        # what a fetch decodes to is bounded
        (Blob([100] * 10, sizes=[KIB] * 10), [0], 512, [(0, 1, 2, 3)]),
    ],
)
def test_ranges(blob: Blob, posts: list[int], amplify: int, expected: list[tuple[int, ...]]) -> None:
    p = planner(blob, amplify=amplify)
    post(p, *posts)
    assert ranges(p) == expected


def finish(p: Planner, blob: Blob, now: float = 0.0) -> list[tuple[int, ...]]:
    """Starts what can be started, and stores all of it."""
    fetches = p.next_fetches(now)
    for fetch in fetches:
        blob.ready_set.update(fetch.chunks)
        p.stored(fetch.fetch_id, [], now)
    return [fetch.chunks for fetch in fetches]


def test_the_window_of_a_reader_grows_and_others_start_small() -> None:
    blob = Blob([10] * 1000)
    p = planner(blob, amplify=800, first_window=100)
    lengths = []
    for _ in range(6):
        post(p, min(set(range(1000)) - blob.ready_set))
        lengths.append(len(finish(p, blob)[0]))
    assert lengths == [10, 20, 40, 80, 80, 80]
    # Somebody who reads elsewhere starts from the beginning, and does not disturb the first one.
    post(p, 700)
    assert finish(p, blob) == [tuple(range(700, 710))]
    post(p, 310)
    assert len(finish(p, blob)[0]) == 80
    # Passing over what was read ahead in vain is reading on, jumping farther is not.
    post(p, 715)
    assert len(finish(p, blob)[0]) == 20
    post(p, 760)
    assert len(finish(p, blob)[0]) == 10
    # Going back is not.
    post(p, 600)
    assert len(finish(p, blob)[0]) == 10


def test_the_first_window_is_an_eighth() -> None:
    blob = Blob([10] * 1000)
    p = Planner({0: blob}, amplify=800, connections=8, io_deadline_s=90, retry_first_s=1, retry_cap_s=1)
    post(p, 0)
    assert len(finish(p, blob)[0]) == 10


def test_wanted_neighbours_are_taken_beyond_the_window() -> None:
    blob = Blob([10] * 100)
    p = planner(blob, amplify=1280, first_window=0)
    post(p, 3, 4, 5, 20)
    assert finish(p, blob) == [(3, 4, 5), (20,)]


def test_a_fetch_spans_exactly_its_chunks() -> None:
    p = planner(Blob(TEN, gaps={3: 512}))
    post(p, 2)
    (fetch,) = p.next_fetches(0.0)
    assert (fetch.offset, fetch.length) == (20 * KIB, 60 * KIB + 512)
    assert fetch.attempt == 1
    assert list(fetch.wants) == [2]
    assert fetch.origin == WHO


def test_many_posts_make_one_fetch() -> None:
    blob = Blob(TEN)
    p = planner(blob, amplify=20 * KIB)
    assert post(p, 2, 2) == [Posted.QUEUED, Posted.JOINED]
    (fetch,) = p.next_fetches(0.0)
    assert post(p, 2, 3) == [Posted.JOINED, Posted.JOINED]
    assert p.next_fetches(0.0) == []
    assert p.waiting == 2
    blob.ready_set |= {2, 3}
    p.stored(fetch.fetch_id, [], 1.0)
    assert post(p, 2) == [Posted.READY]
    assert (p.waiting, p.in_flight, p.counters.fetches) == (0, 0, 1)
    assert p.counters.read_ahead_used == 1


def test_posts_for_what_is_not_there_change_nothing() -> None:
    p = planner(Blob(TEN, unknown={3}))
    assert post(p, 3, 10, -1) == [Posted.INVALID] * 3
    assert post(p, 0, blob=1) == [Posted.INVALID]
    assert p.waiting == 0
    assert p.next_event() is None


def test_connections_bound_the_fetches_and_demand_comes_before_read_ahead() -> None:
    blobs = [Blob(TEN) for _ in range(5)]
    p = planner(*blobs, connections=2)
    for index in range(5):
        post(p, 0, blob=index)
    first = p.next_fetches(0.0)
    # More wants than connections: nobody reads ahead.
    assert [(f.blob, f.chunks) for f in first] == [(0, (0,)), (1, (0,))]
    assert p.next_fetches(0.0) == []
    p.stored(first[0].fetch_id, [], 1.0)
    assert [(f.blob, f.chunks) for f in p.next_fetches(1.0)] == [(2, (0,))]
    p.stored(first[1].fetch_id, [], 1.0)
    assert [f.blob for f in p.next_fetches(1.0)] == [3]


def test_what_is_under_way_is_not_read_ahead_again() -> None:
    p = planner(Blob(TEN), amplify=30 * KIB)
    post(p, 4)
    assert ranges(p) == [(4, 5, 6)]
    post(p, 2)
    assert ranges(p) == [(2, 3)]


def test_failures_back_off_and_double() -> None:
    p = planner(Blob([10]), io_deadline_s=1000.0)
    post(p, 0)
    now, pauses = 0.0, []
    for _ in range(6):
        (fetch,) = p.next_fetches(now)
        p.failed(fetch.fetch_id, now)
        event = p.next_event()
        assert event is not None
        assert p.next_fetches(event - 0.001) == []
        pauses.append(round(event - now, 3))
        now = event
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert p.counters.retries == 6
    (fetch,) = p.next_fetches(now)
    assert fetch.attempt == 7


def test_pauses_are_jittered() -> None:
    draws = iter([0.0, 0.5])
    p = Planner(
        {0: Blob([10])},
        amplify=0,
        connections=1,
        io_deadline_s=90,
        retry_first_s=1.0,
        retry_cap_s=1.0,
        rng=lambda: next(draws),
    )
    post(p, 0)
    for expected in (0.5, 0.75):
        now = p.next_event() or 0.0
        (fetch,) = p.next_fetches(now)
        p.failed(fetch.fetch_id, now)
        event = p.next_event()
        assert event is not None
        assert event - now == pytest.approx(expected)


def test_hopeless_errors_are_tried_again_more_slowly() -> None:
    p = planner(Blob([10]))
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.0, hopeless=True)
    assert p.next_event() == pytest.approx(4.0, abs=0.001)


def test_a_server_that_asks_for_a_pause_gets_it_from_everybody() -> None:
    p = planner(Blob([10]), Blob([10]))
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.0, retry_after_s=5.0)
    assert post(p, 0, blob=1, now=1.0) == [Posted.QUEUED]
    assert p.next_fetches(4.9) == []
    assert p.next_event() == 5.0
    assert sorted(f.blob for f in p.next_fetches(5.0)) == [0, 1]


def test_an_absurd_pause_is_cut() -> None:
    p = planner(Blob([10]))
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.0, retry_after_s=1e9)
    assert len(p.next_fetches(MAX_RETRY_AFTER_S)) == 1


def test_retries_end_at_the_deadline_and_a_new_post_starts_anew() -> None:
    p = planner(Blob([10]), io_deadline_s=3.5)
    post(p, 0)
    now = 0.0
    tries = []
    for _ in range(4):
        tries.append(now)
        (fetch,) = p.next_fetches(now)
        p.failed(fetch.fetch_id, now)
        now = p.next_event() or now
    # Pauses of 1 and 2 s; the next one would reach past the deadline, and is cut short for a last try.
    assert tries == pytest.approx([0.0, 1.0, 3.0, 3.5 * 11 / 12], abs=1e-3)
    assert (p.next_event(), p.waiting, p.counters.expired) == (None, 0, 1)
    assert p.next_fetches(100.0) == []
    assert post(p, 0, now=100.0) == [Posted.QUEUED]
    (fetch,) = p.next_fetches(100.0)
    assert fetch.attempt == 1


def test_a_repeated_post_keeps_the_want_alive() -> None:
    p = planner(Blob([10]), io_deadline_s=4.5)
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.0)
    assert post(p, 0, now=0.5) == [Posted.JOINED]
    (fetch,) = p.next_fetches(1.0)
    p.failed(fetch.fetch_id, 1.0)
    assert post(p, 0, now=2.9) == [Posted.JOINED]
    (fetch,) = p.next_fetches(3.0)
    p.failed(fetch.fetch_id, 3.0)
    assert p.waiting == 1


def test_a_want_that_waited_too_long_for_a_connection_is_dropped() -> None:
    p = planner(Blob([10]), Blob([10]), connections=1, io_deadline_s=5.0)
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    post(p, 0, blob=1)
    p.stored(fetch.fetch_id, [], 6.0)
    assert p.next_fetches(6.0) == []
    assert p.counters.expired == 1


def test_a_retry_reads_nothing_ahead_but_takes_wanted_neighbours_along() -> None:
    p = planner(Blob(TEN), amplify=90 * KIB)
    post(p, 2, 3)
    (fetch,) = p.next_fetches(0.0)
    assert fetch.chunks == (2, 3, 4, 5, 6, 7, 8, 9)
    p.failed(fetch.fetch_id, 0.0)
    assert ranges(p, 1.0) == [(2, 3)]
    assert p.waiting == 2


def test_a_bad_chunk_is_fetched_alone_and_others_are_not_harmed() -> None:
    blob = Blob(TEN)
    p = planner(blob, amplify=90 * KIB)
    post(p, 2, 3, 4)
    (fetch,) = p.next_fetches(0.0)
    blob.ready_set |= {2, 4, 5, 6, 8, 9}
    p.stored(fetch.fetch_id, [3, 7], 0.0)
    post(p, 1)
    assert p.waiting == 2
    # 7 was only read ahead and is forgotten; 1 does not take 3 along.
    assert ranges(p, 0.0) == [(1,)]
    assert ranges(p, 1.0) == [(3,)]
    # A post for the forgotten one starts from the beginning, and now reads ahead past nothing that is there.
    assert post(p, 7) == [Posted.QUEUED]


def test_read_ahead_that_somebody_came_to_want_is_retried() -> None:
    p = planner(Blob(TEN), amplify=20 * KIB)
    post(p, 2)
    (fetch,) = p.next_fetches(0.0)
    post(p, 3, now=0.5)
    p.failed(fetch.fetch_id, 1.0)
    assert p.waiting == 2
    assert ranges(p, 2.0) == [(2, 3)]


def test_stored_bytes_are_verified_before_they_are_fetched() -> None:
    blob = Blob(TEN, unverified_set={2, 3})
    p = planner(blob, amplify=20 * KIB)
    assert post(p, 2, 3, 2) == [Posted.VERIFY, Posted.VERIFY, Posted.JOINED]
    assert p.next_verifications() == [(0, 2), (0, 3)]
    assert p.next_verifications() == []
    assert p.next_fetches(0.0) == []
    blob.ready_set.add(2)
    p.verified((0, 2), True)
    blob.unverified_set.clear()
    p.verified((0, 3), False)
    assert ranges(p) == [(3, 4)]
    p.verified((0, 9), False)  # nobody asked
    assert p.waiting == 1


def test_what_another_daemon_stored_is_not_fetched_and_waiters_are_woken() -> None:
    blob = Blob(TEN)
    p = planner(blob, connections=1)
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    post(p, 9)
    blob.ready_set.add(9)
    assert not p.take_found_ready()
    p.stored(fetch.fetch_id, [], 0.0)
    assert p.next_fetches(0.0) == []
    assert p.take_found_ready()
    assert not p.take_found_ready()
    assert p.waiting == 0


def test_any_number_of_chunks_at_one_place_is_bounded() -> None:
    n = 200_000
    blob = Blob([1] * n, offsets=[0] * n, sizes=[1] * n)
    p = planner(blob, amplify=1 << 20)
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    assert len(fetch.chunks) < 10_000


def test_what_is_waited_for_is_told_longest_first() -> None:
    blob = Blob([KIB] * 40, unverified_set={30})
    p = planner(blob, amplify=0, connections=2)
    post(p, 10, now=3.0)
    post(p, 20, now=2.0)
    (first, second) = p.next_fetches(4.0)
    p.failed(second.fetch_id, 5.0)
    post(p, 30, now=6.0)
    post(p, 35, now=7.0)
    assert [(w.key[1], w.since, w.attempts, w.doing) for w in p.waits(10)] == [
        (20, 2.0, 1, "backing off"),
        (10, 3.0, 0, "fetching"),
        (30, 6.0, 0, "verifying"),
        (35, 7.0, 0, "queued"),
    ]
    assert [w.key[1] for w in p.waits(1)] == [20]
    p.stored(first.fetch_id, (), 8.0)
    assert len(p.waits(10)) == p.waiting == 3


def test_pauses_end_when_their_reason_may_be_gone() -> None:
    p = planner(Blob(TEN), amplify=0)
    post(p, 1, 2)
    for fetch in p.next_fetches(0.0):
        p.failed(fetch.fetch_id, 0.0, retry_after_s=20.0, hopeless=True)
    assert ranges(p, 1.0) == []
    p.retry_now()
    assert ranges(p, 1.0) == [(1,), (2,)]
    assert p.next_event() is None


def test_each_request_gets_a_last_try_before_its_end() -> None:
    """Requests of one chunk end at 12 and at 20; a reminder of the first one prolongs nothing."""
    p = planner(Blob([10]), io_deadline_s=12.0, retry_first_s=100.0, retry_cap_s=100.0)
    post(p, 0)
    assert p.post((0, 0), 2.0, WHO, 0.0) is Posted.JOINED
    assert p.post((0, 0), 9.0, WHO, 8.0) is Posted.JOINED
    tries = []
    now: float | None = 0.0
    while now is not None:
        for fetch in p.next_fetches(now):
            tries.append(now)
            p.failed(fetch.fetch_id, now)
        now = p.next_event()
    assert tries == [0.0, 11.0, 19.0]
    assert (p.waiting, p.counters.expired) == (0, 1)


def away(p: Planner, until: float) -> list[float]:
    """When fetches started that all failed at once, until then."""
    tries: list[float] = []
    now: float | None = 0.0
    while now is not None and now < until:
        for fetch in p.next_fetches(now):
            tries.append(now)
            p.failed(fetch.fetch_id, now)
        now = p.next_event()
    return tries


def test_a_source_that_is_away_is_asked_once_a_second_however_many_wait() -> None:
    """64 requests would ask it a dozen times a second."""
    p = planner(Blob([10] * 64), amplify=0, io_deadline_s=90.0, retry_first_s=0.2, retry_cap_s=5.0)
    post(p, *range(64))
    tries = away(p, 60.0)
    assert tries.count(0.0) == 8  # as many as there are connections: nothing was known yet
    late = [at for at in tries if at > 10.0]
    assert 45 <= len(late) <= 51
    assert p.waiting == 64


def test_when_the_source_is_back_nobody_pauses_any_more() -> None:
    p = planner(Blob([10] * 64), amplify=0, io_deadline_s=90.0, retry_first_s=0.2, retry_cap_s=5.0)
    post(p, *range(64))
    away(p, 30.0)
    now = p.next_event() or 0.0
    assert now >= 30.0
    (fetch,) = p.next_fetches(now)
    p.stored(fetch.fetch_id, [], now)
    done = set(fetch.chunks)
    while fetches := p.next_fetches(now):
        for fetch in fetches:
            p.stored(fetch.fetch_id, [], now)
            done |= set(fetch.chunks)
    assert done == set(range(64))
    assert p.counters.expired == 0


def test_each_request_has_a_last_try_also_when_many_wait() -> None:
    """Each second somebody asks: who waits until 12.5 is answered if the source is back at 11.4."""
    p = planner(Blob([10] * 64), amplify=0, io_deadline_s=12.5, retry_first_s=5.0, retry_cap_s=5.0)
    post(p, *range(64))
    tries = away(p, 12.5)
    assert any(11.4 <= at < 12.5 for at in tries)
    assert max(b - a for a, b in itertools.pairwise(tries) if b > 6.0) <= 1.001


def test_who_comes_during_an_outage_does_not_wait_for_those_that_fail() -> None:
    """One blob is broken, another is not: its first reads are tried at once, and cost the others no turn."""
    p = planner(Blob([10] * 64), Blob([10] * 4), amplify=0, retry_first_s=0.2, retry_cap_s=5.0)
    post(p, *range(64))
    away(p, 20.0)
    turn = p.outage.next_try
    now = turn - 0.001
    post(p, 3, blob=1, now=now)
    (fetch,) = p.next_fetches(now)
    assert (fetch.blob, fetch.chunks) == (1, (3,))
    assert p.outage.next_try == turn
    p.failed(fetch.fetch_id, now)
    assert p.next_fetches(now) == []  # the next try is one among others
    assert p.outage.since is not None
    post(p, 2, blob=1, now=now)
    (fetch,) = p.next_fetches(now)
    p.stored(fetch.fetch_id, [], now)
    assert p.outage.since is None


def test_what_another_try_can_hardly_cure_is_no_outage() -> None:
    p = planner(Blob([10] * 64), amplify=0)
    post(p, *range(64))
    for _ in range(8):
        for fetch in p.next_fetches(0.0):
            p.failed(fetch.fetch_id, 0.0, hopeless=True)
    assert p.outage.since is None


def test_a_fill_asks_a_source_that_is_away_as_seldom() -> None:
    p = planner(Blob([100 * KIB] * 64), amplify=0, retry_first_s=0.2, retry_cap_s=5.0)
    p.background.fill()
    late = [at for at in away(p, 60.0) if at > 10.0]
    assert 0 < len(late) <= 51


def test_a_server_that_asks_for_a_pause_is_not_asked_earlier() -> None:
    p = planner(Blob([10]), io_deadline_s=12.0)
    post(p, 0)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.0, retry_after_s=11.5)
    assert p.next_event() == 11.5


def test_bad_bytes_are_not_asked_for_at_the_end_of_each_request() -> None:
    p = planner(Blob([10]), io_deadline_s=12.0, retry_first_s=100.0, retry_cap_s=100.0)
    post(p, 0)
    p.post((0, 0), 4.0, WHO, 4.0)
    (fetch,) = p.next_fetches(0.0)
    p.stored(fetch.fetch_id, [0], 5.0)
    assert p.next_event() == 15.0


# -- chunks that other daemons fetch ------------------------------------------------------------------------


def test_what_another_daemon_fetches_is_left_to_it() -> None:
    blob = Blob(TEN, hinted_set={2, 3})
    p = planner(blob)
    assert post(p, 2, 5, 2) == [Posted.LEFT, Posted.QUEUED, Posted.LEFT]
    assert ranges(p, 0.0) == [(5, 6, 7, 8, 9)]
    assert p.next_event() == pytest.approx(0.25)
    assert ranges(p, 0.01) == []
    blob.ready_set |= {2, 3}
    assert p.waiting == 1  # it has come, whether or not that was noted
    assert ranges(p, 0.02) == []
    assert p.take_found_ready()
    assert (p.waiting, p.counters.left_to_others, p.counters.retries) == (1, 1, 0)


def test_who_reads_on_behind_others_has_a_window_that_has_grown() -> None:
    blob = Blob([10 * KIB] * 20, hinted_set={0})
    p = planner(blob, amplify=100 * KIB, first_window=10 * KIB)
    now = 0.0
    for chunk in (0, 1, 2, 3):
        post(p, chunk, now=now)
        assert ranges(p, now) == []
        blob.ready_set.add(chunk)
        blob.hinted_set.add(chunk + 1)
        now += 0.1
    blob.hinted_set.clear()
    post(p, 4, now=now)
    assert ranges(p, now) == [tuple(range(4, 14))]


def test_what_is_left_to_others_costs_little_and_what_has_come_is_noted_soon() -> None:
    blob = Blob(TEN, hinted_set={1, 2, 3})
    p = planner(blob, amplify=0)
    versions = [p.left.version]
    for i, chunk in enumerate((1, 2)):
        post(p, chunk, now=i / 10)
        assert ranges(p, i / 10) == []
        versions.append(p.left.version)
    assert list(p.left.keys) == [(0, 1), (0, 2)]
    assert ranges(p, 0.2) == []
    versions.append(p.left.version)
    event = p.next_event()
    assert event is not None
    assert 0.4 < event <= 0.45
    blob.ready_set.add(2)
    assert [wait.key for wait in p.waits(9)] == [(0, 1)]
    assert ranges(p, event) == []
    assert p.take_found_ready()
    assert (p.waiting, [wait.doing for wait in p.waits(9)]) == (1, ["left to another daemon"])
    versions.append(p.left.version)
    assert versions == [0, 1, 2, 2, 3]


def test_neither_read_ahead_nor_neighbours_take_what_another_daemon_fetches() -> None:
    p = planner(Blob(TEN, hinted_set={4, 7}))
    post(p, 3, 4, 6)
    assert ranges(p) == [(3,), (6,)]


def test_another_daemon_that_gives_up_is_succeeded() -> None:
    blob = Blob(TEN, hinted_set={2})
    p = planner(blob)
    post(p, 2)
    assert ranges(p, 0.0) == []
    blob.hinted_set.clear()
    assert ranges(p, 0.02) == [(2, 3, 4, 5, 6, 7)]


def test_a_stale_hint_delays_for_a_second_and_only_once() -> None:
    p = planner(Blob(TEN, hinted_set=set(range(10))), amplify=10 * KIB)
    post(p, 2)
    now, looks = 0.0, 0
    while not (fetched := ranges(p, now)):
        event = p.next_event()
        assert event is not None
        assert now < event <= 1.1
        now, looks = event, looks + 1
    assert fetched == [(2,)]
    assert 1.0 <= now < 1.1
    assert looks <= 5
    # Others that are hinted as well are not waited for now.
    post(p, 5, now=now)
    assert ranges(p, now) == [(5,)]
    # Later hints count again.
    post(p, 7, now=now + 31)
    assert ranges(p, now + 31) == []


def test_a_try_that_failed_is_not_left_to_others() -> None:
    blob = Blob(TEN)
    p = planner(blob, amplify=10 * KIB)
    post(p, 2)
    (fetch,) = p.next_fetches(0.0)
    p.failed(fetch.fetch_id, 0.1)
    blob.hinted_set.add(2)
    assert ranges(p, p.next_event() or 0.0) == [(2,)]
