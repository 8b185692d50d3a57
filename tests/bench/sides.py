"""A back-end under measurement with the front-end that plays its VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tests.bench import processes
from virtiofsd_rafs.native.frontend import Frontend

if TYPE_CHECKING:
    from pathlib import Path

    from guest.daemon import BackEnd


@attrs.define
class Side:
    """A running back-end with a front-end on it. A context manager: leaving it ends both."""

    name: str
    pid: int
    fe: Frontend
    back_end: BackEnd | None = None

    def usage(self) -> processes.Usage:
        """What its processes have used so far."""
        return processes.usage(self.pid)

    def pids(self) -> list[int]:
        return processes.family(self.pid)

    def pss_kib(self) -> int | None:
        """Proportional set size of all its processes; ``None`` where that may not be seen."""
        try:
            return processes.pss_kib(self.pid)
        except OSError:
            return None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.fe.close()
        if self.back_end is not None:
            self.back_end.stop()


def start(name: str, back_end: BackEnd, *, queues: int = 1) -> Side:
    """Waits for *back_end* and starts a VM with so many request queues on it; ends it when that fails.

    Raises:
        DaemonError: it did not start.
        PeerError: it has fewer queues.
    """
    try:
        back_end.wait_ready(60)
        return attach(name, back_end.socket, back_end.process.pid, back_end, queues=queues)
    except BaseException:
        back_end.stop()
        raise


def attach(name: str, socket: Path, pid: int, back_end: BackEnd | None = None, *, queues: int = 1) -> Side:
    """Connects to a back-end that runs already; *pid* is its main process."""
    fe = Frontend.connect(socket, timeout_s=120, queues=queues)
    try:
        fe.start()
        fe.init()
    except BaseException:
        fe.close()
        raise
    return Side(name, pid, fe, back_end)
