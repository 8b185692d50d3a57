"""How far is read ahead, by what was wanted and read before."""

from __future__ import annotations

import random

from tests.unit.test_planner import KIB, Blob
from virtiofsd_rafs.runtime.layout import Layout
from virtiofsd_rafs.runtime.link import Link
from virtiofsd_rafs.runtime.readahead import (
    JUDGED_AFTER,
    LEVELS,
    STREAM_FACTOR,
    THROUGHOUT,
    THROUGHOUT_WANTS,
    ReadAhead,
    Window,
)

MIB = 1024 * KIB
FIRST = MIB // 8


def link(rate: float, trip: float) -> Link:
    made = Link()
    made.ended(0.0, trip, 1)
    made.ended(1.0, 1.0 + trip + 4.0, int(4 * rate))
    return made


class Reader:
    """Asks for windows as the planner does."""

    def __init__(self, n: int = 100_000, carried: Link | None = None, amplify: int = MIB) -> None:
        self.layout = Layout(Blob([16 * KIB] * n))
        self.touched = bytearray(n)
        self.ahead = ReadAhead(amplify=amplify, link=carried or link(4e6, 0.025), touched={0: self.touched})

    def want(self, chunk: int, *, use: bool = False) -> Window:
        offset = chunk * 16 * KIB
        window = self.ahead.window(self.layout, 0, offset)
        chunks = range(chunk + 1, chunk + 1 + window.ahead // (16 * KIB))
        self.touched[chunk] = 1
        if use:
            for each in chunks:
                self.touched[each] = 1
        end = offset + 16 * KIB * (len(chunks) + 1)
        self.ahead.planned(self.layout, 0, end, window, chunks)
        return window


def test_a_slow_link_keeps_the_first_window_small() -> None:
    assert Reader().want(0) == Window(FIRST)


def test_long_round_trips_make_it_larger_as_far_as_amplify() -> None:
    assert Reader(carried=link(12.5e6, 0.04)).want(0) == Window(MIB // 2)
    assert Reader(carried=link(100e6, 0.1)).want(0) == Window(MIB)
    # Over a short trip bytes are not spent, however fast the link is.
    assert Reader(carried=link(1e9, 0.001)).want(0) == Window(FIRST)


def test_who_reads_on_gets_more_and_on_a_fast_link_beyond_amplify() -> None:
    for rate, most in ((4e6, MIB), (1e9, STREAM_FACTOR * MIB)):
        reader = Reader(carried=link(rate, 0.001))
        at, windows = 0, []
        for _ in range(7):
            windows.append(reader.want(at, use=True).ahead)
            at += 1 + windows[-1] // (16 * KIB)
        assert windows[:4] == [FIRST, 2 * FIRST, 4 * FIRST, MIB]
        assert windows[-1] == most


def test_nothing_is_read_ahead_without_amplify() -> None:
    reader = Reader(amplify=0)
    assert [reader.want(chunk) for chunk in (0, 1, 2, 50)] == [Window(0)] * 4


def test_wasted_windows_shrink_to_nothing_and_come_back() -> None:
    # So large that a random reader comes to few of its regions.
    reader = Reader(n=2_000_000)
    places = random.Random(1)
    windows = [reader.want(places.randrange(2_000_000)).ahead for _ in range(200)]
    assert windows[:JUDGED_AFTER] == [FIRST] * JUDGED_AFTER
    assert sorted(set(windows), reverse=True) == [FIRST >> level for level in range(LEVELS)] + [0]
    assert windows[-1] == 0
    assert reader.ahead.level == LEVELS
    # A reader who goes on is recognised all the same; many of them bring the first window back.
    for start in range(0, 1_000_000, 1000):
        for chunk in range(start, start + 4):
            if not reader.touched[chunk]:
                reader.want(chunk, use=True)
    assert reader.ahead.level == 0


def test_windows_that_are_used_stay() -> None:
    reader = Reader(n=2_000_000)
    places = random.Random(1)
    for _ in range(300):
        reader.want(places.randrange(2_000_000), use=True)
    assert reader.ahead.level == 0


def test_a_blob_that_is_read_throughout_brings_whole_surroundings() -> None:
    n = 64 * 50  # 50 regions of 1 MiB
    reader = Reader(n=n)
    windows = [reader.want(region * 64 + 32) for region in range(49, 0, -2)]
    assert len(windows) == THROUGHOUT_WANTS
    assert windows[:-1] == [Window(FIRST)] * (len(windows) - 1)
    assert windows[-1] == Window(MIB, MIB)
    assert len(windows) >= THROUGHOUT * 50


def test_many_wants_in_one_place_do_not() -> None:
    reader = Reader(n=64 * 50)
    for chunk in range(0, 400, 10):
        assert reader.want(400 - chunk).behind == 0


def test_beside_others_who_fill_the_link_only_who_reads_on_gets_more() -> None:
    reader = Reader()
    layout = reader.layout
    assert reader.ahead.window(layout, 0, 0, FIRST - 1) == Window(FIRST)
    assert reader.ahead.window(layout, 0, 50 * MIB, FIRST) == Window(0)
    end = 100 * MIB
    reader.ahead.planned(layout, 0, end, Window(FIRST), [])
    assert reader.ahead.window(layout, 0, end, 8 * MIB) == Window(2 * FIRST)


def test_each_blob_is_judged_by_its_own_chunks() -> None:
    many, one = Layout(Blob([16 * KIB] * 1000)), Layout(Blob([16 * KIB]))
    ahead = ReadAhead(amplify=MIB, link=link(4e6, 0.025), touched={0: bytes(1000), 1: bytes(1)})
    for i in range(2 * JUDGED_AFTER):
        ahead.planned(many, 0, i * 16 * KIB, Window(FIRST), [999])
        ahead.planned(one, 1, 16 * KIB, Window(0), [])
    assert ahead.level == 0
