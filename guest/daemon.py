"""A vhost-user back-end as a child process: started, waited for, asked for its status, ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from virtiofsd_rafs.cli._api import FULL_STATUS, fetch_json
from virtiofsd_rafs.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

# The console script beside the interpreter that runs us: the build under test, not another one from PATH.
PROGRAM = Path(sys.executable).with_name("virtiofsd-rafs")


class DaemonError(Exception):
    """The daemon did not start, ended, or does not answer. The text has the end of its log."""


class BackEnd:
    """A running back-end. A context manager: leaving it ends the process.

    Args:
        argv: program and arguments; they make it listen on *socket*.
        socket: where a VMM finds it (at most 107 bytes long, as all sockets' paths).
        log: file that gets its output.
    """

    def __init__(self, argv: Sequence[str | Path], socket: Path, log: Path) -> None:
        self.name = Path(argv[0]).name
        self.socket = socket
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def failure(self, message: str) -> DaemonError:
        """An error that says *message* and how the daemon's log ends."""
        tail = "".join(f"    | {line}\n" for line in self.log.read_text(errors="replace").splitlines()[-15:])
        return DaemonError(f"{message}; its log ends:\n{tail}")

    def wait_ready(self, timeout: float = 30) -> float:
        """Waits until the vhost-user socket is there; the time of that (``time.monotonic()``).

        Raises:
            DaemonError: it ended or took longer than *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.socket.exists():
            if self.process.poll() is not None:
                raise self.failure(f"{self.name} ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self.failure(f"{self.name} did not bind its socket within {timeout:g} s")
            time.sleep(0.002)
        return time.monotonic()

    def status(self) -> dict[str, Any]:
        """What it tells about itself; nothing, unless a kind of back-end knows better."""
        return {}

    def trace(self) -> dict[str, Any]:
        """What it fetched and who waited; nothing, unless a kind of back-end knows."""
        return {}

    def wait_end(self, timeout: float = 30) -> int:
        """Waits until it has ended by itself, as its VM has gone; its exit code.

        Raises:
            DaemonError: it goes on.
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.failure(f"{self.name} still runs {timeout:g} s after the VM has gone") from None

    def stop(self, timeout: float = 10) -> None:
        """Ends it, by SIGKILL if SIGTERM does not help within *timeout* seconds."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Daemon(BackEnd):
    """``virtiofsd-rafs serve``.

    Args:
        image: what to serve.
        work_dir: its sockets go here (keep the path short).
        log: file that gets its output.
        options: further arguments of ``serve``.
        program: another build of it.
    """

    def __init__(
        self, image: str, work_dir: Path, log: Path, options: Sequence[str] = (), *, program: Path = PROGRAM
    ) -> None:
        self.api_socket = work_dir / "api.sock"
        socket = work_dir / "rafs.sock"
        argv = [
            *(str(program), "serve", image),
            *("--socket-path", str(socket), "--api-socket", str(self.api_socket)),
            *options,
        ]
        super().__init__(argv, socket, log)

    def status(self) -> dict[str, Any]:
        """The daemon's status, as ``virtiofsd-rafs status --json`` prints it.

        Raises:
            DaemonError: the daemon does not answer.
        """
        return self._ask(FULL_STATUS)

    def trace(self) -> dict[str, Any]:
        """What it fetched and who waited, as ``GET /api/v1/trace`` answers it.

        Raises:
            DaemonError: the daemon does not answer.
        """
        return self._ask("/api/v1/trace")

    def _ask(self, path: str) -> dict[str, Any]:
        try:
            return fetch_json(self.api_socket, path)
        except BackendError as error:
            raise self.failure(str(error)) from error
