"""Threads for calls that may hang: each call has a deadline, and a hung one holds nobody else up.

A read from a NAS that is away cannot be cancelled, only left behind. asyncio's own executor is no place for
that: a few hung reads would fill it, everything else that control does in threads would wait behind them, and
ending the process would wait for ever. The threads here are daemons, their number is bounded, and whoever
waits longer than the deadline gets BackendTimeout.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from virtiofsd_rafs.errors import BackendTimeout, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

# More than a planner asks at once (8), so that some hang while others go on; each idle one costs 8 KiB.
MAX_THREADS = 24
# Idle for this long, a thread ends.
_IDLE_S = 5.0


class Readers:
    """Runs calls in threads.

    Args:
        timeout_s: for waiting and running together.
        what: names the place in errors.
    """

    def __init__(self, *, timeout_s: float, what: str) -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0  # waiting or running
        self._closed = False

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of *call*. Raises BackendTimeout when it hangs, and what *call* raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return  # nobody waits any more
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # no error: there is a result

        def job() -> None:
            if future.done():
                return
            try:
                outcome: tuple[T | None, BaseException | None] = (call(*args, **kwargs), None)
            except BaseException as e:
                outcome = (None, e)
            try:
                loop.call_soon_threadsafe(settle, *outcome)
            except RuntimeError:
                return  # the loop has ended meanwhile

        self._submit(job)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError as e:
            if isinstance(e, BackendTimeout):
                raise
            raise BackendTimeout(
                f"{self._what}: no answer within {self._timeout_s:g} s", remedy="does its server run?"
            ) from None

    def close(self) -> None:
        """Ends idle threads; hung ones end when their call returns."""
        with self._lock:
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._jobs.put(None)

    def _submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise Unreachable(f"{self._what}: the source was closed")
            self._pending += 1
            start = self._pending > self._threads and self._threads < MAX_THREADS
            if start:
                self._threads += 1
        self._jobs.put(job)
        if start:
            threading.Thread(target=self._work, name="blob-reader", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._pending < self._threads:
                        self._threads -= 1
                        return
                continue  # every thread has its job, and ours is on its way
            if job is None:
                with self._lock:
                    self._threads -= 1
                return
            try:
                job()
            finally:
                with self._lock:
                    self._pending -= 1
