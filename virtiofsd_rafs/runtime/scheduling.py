"""The event loop of control before what computes, where the kernel allows it.

See docs/adr/0013-event-loop-first.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

LOOP_NICE = -10
ANSWER_NICE = -20
# The loop keeps that for so long after the last question, until it sleeps. Who loses weight makes up for what
# he got above the new one: in the middle of something he would wait longer than without it all.
CALM_S = 0.03
# A thread that runs Python lets the event loop in after this long, not after 5 ms.
_SWITCH_S = 0.001


def loop_first() -> None:
    """Lets the calling thread, which becomes the event loop, run before what computes.

    Posts, plans and answers take tenths of a millisecond each and are waited for, by a guest or by a
    supervisor; on a host whose processors are all busy they would take their turn behind decoding, workers
    and VMs. Threads and processes that are started from here are as others again. A daemon that was
    started with another nice value keeps it.
    """
    sys.setswitchinterval(_SWITCH_S)
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        return
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, LOOP_NICE)


class AnswersFirst:
    """The calling thread, an event loop, runs before those of other daemons while somebody asks it.

    On a node with many daemons their loops are busy at the same moments, since all of them hear of the same
    chunk at once, and an answer of a few milliseconds would wait for each of them, again and again. Does
    nothing where :func:`loop_first` did nothing.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._may = os.getpriority(os.PRIO_PROCESS, 0) == LOOP_NICE

    def asked(self) -> None:
        """A question has come, or somebody who has one."""
        if not self._may:
            return
        self._until = self._loop.time() + CALM_S
        if self._timer is None:
            try:
                os.setpriority(os.PRIO_PROCESS, 0, ANSWER_NICE)
            except OSError:
                self._may = False
                return
            self._timer = self._loop.call_at(self._until, self._calm)

    def close(self) -> None:
        """Nobody asks any more."""
        self._until = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._calm()

    def _calm(self) -> None:
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._calm)
            return
        self._timer = None
        os.setpriority(os.PRIO_PROCESS, 0, LOOP_NICE)
