"""Back-ends that are judged from the command line: how they are started, and started again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from guest.daemon import BackEnd
from tests.bench.peers import Nydusd, registry
from tests.conformance.ours import Ours
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.tree import Tree
    from tests.sim.faults import Fault

_SETTLE_S = 0.2
"""From a socket's appearance to the first connection: races of a start are not what is judged here."""
_PANIC = re.compile(r"panicked at [^\n]*?([^/\n]+/src/[^:\n]+:\d+)")


class Judged:
    """A back-end that runs, or can be started. *version* is what reports call it by.

    Args:
        start: starts it in a new directory. None: it runs already, at *socket*, and is not ours to end.
    """

    def __init__(
        self,
        name: str,
        version: str = "",
        *,
        start: Callable[[Path], BackEnd] | None = None,
        socket: Path | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self._start = start
        self._socket = socket
        self._running: BackEnd | None = None
        self._n = 0

    can_stall = False

    def __enter__(self) -> Judged:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def socket(self, work: Path, *, fresh: bool) -> Path:
        """Where it listens now; started, or started again, if need be."""
        if self._start is None:
            assert self._socket is not None
            return self._socket
        self.stop()
        self._n += 1
        folder = work / str(self._n)
        folder.mkdir()
        self._running = self._start(folder)
        self._running.wait_ready(30)
        time.sleep(_SETTLE_S)
        return self._running.socket

    def stall(self, on: bool) -> None:
        """Holds its data back, or lets them go."""

    def death(self) -> str:
        """How it has died; empty if it lives, or ended in peace when its VM had gone."""
        if self._running is None:
            return ""
        log = self._running.log.read_text(errors="replace")
        panic = _PANIC.search(log)
        code = self._running.process.poll()
        if code or panic:
            return f"panicked at {panic.group(1)}" if panic else f"exit code {code}{_last_words(log)}"
        return ""

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop(3)
            self._running = None


class JudgedOurs(Judged):
    """The daemon. It is kept for the next check, unless that needs it fresh."""

    can_stall = True

    def __init__(self, tree: Tree, out: Path) -> None:
        super().__init__("virtiofsd-rafs", __version__)
        self._tree = tree
        self._out = out
        self._ours: Ours | None = None
        self._hold: Fault | None = None
        self._used = 0

    def socket(self, work: Path, *, fresh: bool) -> Path:
        if self._ours is None or fresh or not self._ours.is_running():
            self.stop()
            self._used += 1
            self._ours = Ours(self._tree, self._out, work / str(self._used))
        return self._ours.daemon.socket

    def stall(self, on: bool) -> None:
        assert self._ours is not None
        if self._hold is not None:
            self._hold.release()
        self._hold = self._ours.registry.fault("hold", where="blob") if on else None

    def death(self) -> str:
        assert self._ours is not None
        try:
            self._ours.check_alive()
        except AssertionError as e:
            return str(e)
        return ""

    def stop(self) -> None:
        if self._ours is not None:
            self._ours.__exit__(None, None, None)
            self._ours = self._hold = None


class JudgedNydusd(Judged):
    """nydusd on the same image in a simulated registry."""

    can_stall = True

    def __init__(self, program: str, out: Path) -> None:
        super().__init__("nydusd", _version(program), start=self._launch)
        self._program = program
        self._out = out
        self._stack = ExitStack()
        self._registry: RegistrySimulator | None = None
        self._hold: Fault | None = None

    def _launch(self, folder: Path) -> BackEnd:
        if self._registry is None:
            self._registry = self._stack.enter_context(RegistrySimulator())
            self._registry.store.add_build("app", "1", self._out)
        back_end = registry(self._registry.host, "app")
        return Nydusd(self._program, self._out / "image.boot", back_end, folder, folder / "cache")

    def stall(self, on: bool) -> None:
        assert self._registry is not None
        if self._hold is not None:
            self._hold.release()
        self._hold = self._registry.fault("hold", where="blob") if on else None

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._stack.close()


def virtiofsd(program: str, tree: Tree) -> Judged:
    """virtiofsd on the tree, read-only as an image is."""
    options = f"--sandbox none --seccomp none --readonly --shared-dir {shlex.quote(str(tree.root))}"
    template = f"{shlex.quote(program)} {options} --socket-path {{socket}}"
    return command("virtiofsd", template, tree, _version(program))


def command(name: str, template: str, tree: Tree, version: str = "", image: Path | None = None) -> Judged:
    """Any back-end by a command line with ``{socket}``, ``{dir}``, ``{image}``, ``{work}`` in it."""

    def start(folder: Path) -> BackEnd:
        socket = folder / "s"
        places = {"socket": socket, "dir": tree.root, "image": image or "", "work": folder}
        argv = [part.format(**places) for part in shlex.split(template)]
        return BackEnd(argv, socket, folder / "log")

    return Judged(name, version, start=start)


def attached(name: str, socket: Path) -> Judged:
    """A back-end that runs already and serves the tree; it must listen again after each VM."""
    return Judged(name, socket=socket)


def _last_words(log: str) -> str:
    """The log's last line without its time and places."""
    lines = [line for line in log.splitlines() if line.strip()]
    said = re.sub(r"^\[[^\]]*\]\s*", "", lines[-1]).strip() if lines else ""
    return f" ({said[:80]})" if said else ""


def _version(program: str) -> str:
    if shutil.which(program) is None:
        raise FileNotFoundError(f"there is no program {program}")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    found = re.search(r"\d+\.\d+(\.\d+)*", said)
    return found.group() if found else ""
