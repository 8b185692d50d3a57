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


def prefer_next_child() -> bool:
    """Gives this process the preference that control is to inherit; whether it has got it.

    For the keeper, which is about to give up the privilege for good, and takes the preference back with
    :func:`as_others` when control has been forked.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        return False
    try:
        os.setpriority(os.PRIO_PROCESS, 0, LOOP_NICE)
    except OSError:  # without CAP_SYS_NICE or RLIMIT_NICE there is no preference
        return False
    return True


def as_others() -> None:
    """Ends the preference of this process. Needs no privilege."""
    os.setpriority(os.PRIO_PROCESS, 0, 0)


def loop_first() -> None:
    """Lets the calling thread, which becomes the event loop, run before what computes.

    Posts, plans and answers take tenths of a millisecond each and are waited for, by a guest or by a
    supervisor; on a host whose processors are all busy they would take their turn behind decoding, workers
    and VMs. Threads and processes that are started from here are as others again. A daemon that was
    started with another nice value keeps it.
    """
    sys.setswitchinterval(_SWITCH_S)
    if os.getpriority(os.PRIO_PROCESS, 0) not in (0, LOOP_NICE):
        return
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, LOOP_NICE)
