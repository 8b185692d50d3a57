"""The preference of the event loop, as the kernel knows it. Where it may not be had, nothing may change."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.preference import may_be_preferred
from virtiofsd_rafs.runtime.scheduling import ANSWER_NICE, CALM_S, LOOP_NICE, AnswersFirst, loop_first

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> T:
    """The result of *work* in a thread of its own: nice values are a thread's."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result.result()


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


class Clock:
    """Time of an event loop that passes when it is told."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._now = loop.time()
        loop.time = lambda: self._now  # type: ignore[method-assign]

    async def after(self, seconds: float) -> int:
        """The nice value then, once timers that are due have run."""
        self._now += seconds
        for _ in range(3):
            await asyncio.sleep(0)
        return nice()


def loop_with(work: Callable[[AnswersFirst, Clock], Coroutine[None, None, T]], *, preferred: bool) -> T:
    async def run() -> T:
        loop = asyncio.get_running_loop()
        if preferred:
            loop_first()
        return await work(AnswersFirst(loop), Clock(loop))

    return in_thread(lambda: asyncio.run(run()))


def test_who_is_asked_comes_first_until_a_moment_after_the_last_question() -> None:
    async def work(answers: AnswersFirst, clock: Clock) -> list[int]:
        found = [nice()]
        answers.asked()
        found.append(await clock.after(0.6 * CALM_S))
        answers.asked()
        found.append(await clock.after(0.6 * CALM_S))
        found.append(await clock.after(0.6 * CALM_S))
        found.append(await clock.after(9.0))
        answers.asked()
        return [*found, nice()]

    base, most = (LOOP_NICE, ANSWER_NICE) if may_be_preferred() else (0, 0)
    assert loop_with(work, preferred=True) == [base, most, most, base, base, most]


def test_threads_that_are_started_for_an_answer_are_as_others() -> None:
    async def work(answers: AnswersFirst, _: Clock) -> int:
        answers.asked()
        return await asyncio.to_thread(nice)

    assert loop_with(work, preferred=True) == 0


def test_the_end_takes_it_back() -> None:
    async def work(answers: AnswersFirst, clock: Clock) -> list[int]:
        answers.asked()
        answers.close()
        return [nice(), await clock.after(9.0)]

    base = LOOP_NICE if may_be_preferred() else 0
    assert loop_with(work, preferred=True) == [base, base]


def test_a_loop_without_preference_gets_none() -> None:
    async def work(answers: AnswersFirst, clock: Clock) -> list[int]:
        answers.asked()
        return [nice(), await clock.after(9.0)]

    assert loop_with(work, preferred=False) == [0, 0]


def test_a_preference_that_is_refused_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: int) -> None:
        asked.append(1)
        raise PermissionError(1, "refused")

    async def work(answers: AnswersFirst, clock: Clock) -> int:
        monkeypatch.setattr(os, "setpriority", refuse)
        answers.asked()
        answers.asked()
        await clock.after(9.0)
        answers.close()
        return len(asked)

    n = int(may_be_preferred())
    assert loop_with(work, preferred=True) == n
