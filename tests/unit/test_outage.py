"""How a source that is away is asked: seldom, and by whoever waits."""

from __future__ import annotations

from virtiofsd_rafs.runtime.outage import FAILURES, Outage


def outage(first_s: float = 0.25, cap_s: float = 60.0) -> Outage:
    return Outage(first_s=first_s, cap_s=cap_s, rng=lambda: 1.0)


def test_few_failures_are_no_outage() -> None:
    o = outage()
    for n in range(FAILURES - 1):
        o.tried(float(n))
        o.failed(float(n))
    assert o.since is None
    assert o.next_try < 0
    assert not o.ended()


def test_a_success_between_failures_makes_them_few() -> None:
    o = outage()
    for n in range(3 * FAILURES):
        if n % 3 == 0:
            o.ended()
        o.failed(float(n))
    assert o.since is None


def test_tries_are_spaced_ever_more_up_to_a_second() -> None:
    o = outage()
    for _ in range(FAILURES):
        o.failed(5.0)
    assert o.since == 5.0
    now, pauses = 5.0, []
    for _ in range(5):
        pauses.append(o.next_try - now)
        now = o.next_try
        o.tried(now)
        o.failed(now)
    assert pauses == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert o.since == 5.0


def test_tries_that_hang_do_not_keep_others_from_finding_out() -> None:
    o = outage()
    for _ in range(FAILURES):
        o.failed(0.0)
    for n in range(5):
        assert o.next_try == (n + 1) * 0.25
        o.tried(o.next_try)


def test_pauses_are_jittered_and_never_longer_than_those_of_a_want() -> None:
    o = Outage(first_s=1.0, cap_s=0.1, rng=lambda: 0.0)
    for _ in range(FAILURES):
        o.failed(0.0)
    assert o.next_try == 0.05


def test_its_end_is_told_once_and_the_next_one_begins_anew() -> None:
    o = outage()
    for now in range(2 * FAILURES):
        o.failed(float(now))
    assert o.ended()
    assert not o.ended()
    assert o.since is None
    for _ in range(FAILURES):
        o.failed(100.0)
    assert (o.since, o.next_try) == (100.0, 100.25)
