"""Whether threads may be preferred here: root may do that, if its capabilities were not taken away."""

from __future__ import annotations

import os

from virtiofsd_rafs.runtime.scheduling import ANSWER_NICE


def may_be_preferred() -> bool:
    """Asks the kernel, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, ANSWER_NICE)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0
