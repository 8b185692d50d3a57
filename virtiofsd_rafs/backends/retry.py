"""Trying again: jittered back-off until a deadline, only for what another try can cure."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, TypeVar

from virtiofsd_rafs.errors import BackendError, DigestMismatch, Throttled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
_log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.2
# Below the patience of somebody who watches a boot, well above what a struggling registry minds.
MAX_DELAY_S = 5.0
# Content that is wrong this many times in a row is wrong at its source.
MAX_MISMATCHES = 3


class Backoff:
    """Delays that double from *first_s* to *cap_s*, each drawn from its upper half, so that clients spread
    out.

    *rng* returns numbers in [0, 1).
    """

    def __init__(
        self,
        *,
        first_s: float = FIRST_DELAY_S,
        cap_s: float = MAX_DELAY_S,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._next_s = first_s
        self._cap_s = cap_s
        self._rng = rng

    def delay(self, error: BaseException) -> float:
        """Seconds to wait after *error*; never less than the server asked for."""
        base = self._next_s
        self._next_s = min(self._cap_s, base * 2)
        jittered = base * (0.5 + self._rng() / 2)
        return max(jittered, error.retry_after_s) if isinstance(error, Throttled) else jittered


async def with_retries(
    attempt: Callable[[], Awaitable[T]], *, deadline_s: float, what: str, backoff: Backoff | None = None
) -> T:
    """The result of *attempt*, called until it succeeds or *deadline_s* seconds have gone.

    Raises the last error: at once when it is not retryable, and when the pause would reach past the deadline.
    """
    from asyncio import sleep  # the warm path comes here never, and does without asyncio

    pause = backoff or Backoff()
    end = time.monotonic() + deadline_s
    mismatches = 0
    while True:
        try:
            return await attempt()
        except DigestMismatch as e:
            mismatches += 1
            if mismatches >= MAX_MISMATCHES:
                raise
            error: Exception = e
        except BackendError as e:
            if not e.retryable:
                raise
            error = e
        wait = pause.delay(error)
        if time.monotonic() + wait >= end:
            raise error
        _log.warning("%s: %s; trying again in %.1f s", what, error, wait)
        await sleep(wait)
