"""The event loop of control before what computes, where the kernel allows it.

See docs/adr/0013-event-loop-first.md.
"""

from __future__ import annotations

import contextlib
import os
import sys

LOOP_NICE = -10
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
