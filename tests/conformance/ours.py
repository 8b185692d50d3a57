"""The daemon as a subject: an image of the tree in a simulated registry, and one daemon for all VMs."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from guest.daemon import Daemon
from tests.conformance.check import Violation
from tests.conformance.subject import Subject
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conformance.tree import Tree

CHUNK = 64 * 1024
SILENT = "the worker did not answer the keeper within 50 ms and was replaced"
"""A busy host does that, and a worker that hangs. Which of them is told by asking again."""


def build(tree: Tree, out: Path) -> None:
    """The image of the tree, one chunk for each cold file."""
    build_image(tree.root, out, chunk_size=CHUNK)


def _attach(pid: int) -> Session:
    """The session of a daemon whose socket is there, which may come a moment before its session."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return Session.attach(pid)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Ours(Subject):
    """``virtiofsd-rafs serve --keep`` on the image in *out*, with *work* for its sockets and cache."""

    name = "virtiofsd-rafs"

    def __init__(self, tree: Tree, out: Path, work: Path, *options: str) -> None:
        self.tree = tree
        with ExitStack() as stack:
            work.mkdir(parents=True, exist_ok=True)
            self.registry = stack.enter_context(RegistrySimulator())
            self.registry.store.add_build("app", "1", out)
            arguments = ["--plain-http", "--cache-dir", str(work / "cache"), "--keep", *options]
            image = f"{self.registry.host}/app:1"
            self.daemon = stack.enter_context(Daemon(image, work, work / "log", arguments))
            self.daemon.wait_ready(60)
            self._session = _attach(self.daemon.process.pid)
            self._crashes = self._count()
            self._log_read = 0
            # Nothing is left behind when it does not come so far.
            self._stack = stack.pop_all()

    def _count(self) -> int:
        return int(self._session.status()["processes"]["worker"]["crashes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connect(self, **options: Any) -> Frontend:
        return Frontend.connect(self.daemon.socket, **options)

    def check_alive(self) -> None:
        if self.daemon.process.poll() is not None:
            raise Violation(f"the daemon ended with exit code {self.daemon.process.returncode}")
        crashes = self._count()
        if crashes != self._crashes:
            died, self._crashes = crashes - self._crashes, crashes
            said, self._log_read = self.log[self._log_read :], len(self.log)
            if said.count("the worker hangs") >= died:
                raise Violation(SILENT)
            ended = re.findall(r"the worker ended \([^)]*\)", said)
            raise Violation(f"the worker died {died} times: {', '.join(ended)}")

    @contextmanager
    def stall(self) -> Iterator[Callable[[], None]]:
        fault = self.registry.fault("hold", where="blob")
        try:
            yield fault.release
        finally:
            fault.release()

    @property
    def log(self) -> str:
        return self.daemon.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.daemon.process.pid

    def is_running(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return self.daemon.process.poll() is None
