"""Back-off and deadlines."""

from __future__ import annotations

import pytest

from virtiofsd_rafs.backends.retry import MAX_MISMATCHES, Backoff, with_retries
from virtiofsd_rafs.errors import DigestMismatch, NotFound, Throttled, Unreachable


def test_delays_double_to_a_cap_and_are_jittered() -> None:
    low = Backoff(first_s=1, cap_s=5, rng=lambda: 0.0)
    high = Backoff(first_s=1, cap_s=5, rng=lambda: 1.0)
    error = Unreachable("x")
    assert [low.delay(error) for _ in range(5)] == [0.5, 1, 2, 2.5, 2.5]
    assert [high.delay(error) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_the_server_may_ask_for_more() -> None:
    assert Backoff(first_s=1).delay(Throttled("x", retry_after_s=30)) == 30
    assert Backoff(first_s=8, cap_s=8, rng=lambda: 1.0).delay(Throttled("x", retry_after_s=1)) == 8


class Attempt:
    def __init__(self, *results: Exception | str) -> None:
        self.results = list(results)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        result = self.results[min(self.calls, len(self.results)) - 1]
        if isinstance(result, Exception):
            raise result
        return result


def quick() -> Backoff:
    return Backoff(first_s=0.001, cap_s=0.001)


async def test_it_tries_again() -> None:
    attempt = Attempt(Unreachable("a"), DigestMismatch("b"), "done")
    assert await with_retries(attempt, deadline_s=60, what="it", backoff=quick()) == "done"


async def test_what_cannot_be_cured_ends_at_once() -> None:
    attempt = Attempt(NotFound("gone"), "done")
    with pytest.raises(NotFound):
        await with_retries(attempt, deadline_s=60, what="it", backoff=quick())
    assert attempt.calls == 1


async def test_the_deadline_ends_it_with_the_last_error() -> None:
    attempt = Attempt(Unreachable("away"))
    with pytest.raises(Unreachable, match="away"):
        await with_retries(attempt, deadline_s=0.1, what="it", backoff=quick())
    assert attempt.calls > 1


async def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    attempt = Attempt(Throttled("busy", retry_after_s=3600))
    with pytest.raises(Throttled):
        await with_retries(attempt, deadline_s=60, what="it", backoff=quick())
    assert attempt.calls == 1


async def test_wrong_content_is_not_asked_for_for_ever() -> None:
    attempt = Attempt(DigestMismatch("bad"))
    with pytest.raises(DigestMismatch):
        await with_retries(attempt, deadline_s=60, what="it", backoff=quick())
    assert attempt.calls == MAX_MISMATCHES
