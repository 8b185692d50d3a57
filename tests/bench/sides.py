"""The back-ends that are compared: how each is started on the same tree, and what its processes cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.native.frontend import Frontend

if TYPE_CHECKING:
    from collections.abc import Sequence

_START_TIMEOUT_S = 60.0


@attrs.frozen
class Material:
    """What the sides serve: a tree, and the image that was built from it."""

    tree: Path
    bootstrap: Path
    blob_dir: Path


@attrs.frozen
class Usage:
    """What a back-end's processes have used so far."""

    cpu_ns: int
    wakeups: int
    """Voluntary context switches: how often a thread went to sleep."""

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu_ns - other.cpu_ns, self.wakeups - other.wakeups)


@attrs.define
class Side:
    """A running back-end with a front-end on it."""

    name: str
    pid: int
    fe: Frontend
    process: subprocess.Popen[bytes] | None = None

    def pids(self) -> list[int]:
        """The back-end's processes: the one that was started and all its descendants."""
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    stat = Path("/proc", entry, "stat").read_text()
                    parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
        found, queue = [], [self.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            queue += parents.get(pid, [])
        return found

    def usage(self) -> Usage:
        """Processor time and sleeps of all threads of all processes (Linux: task/*/schedstat and status)."""
        cpu_ns = wakeups = 0
        for pid in self.pids():
            for task in Path(f"/proc/{pid}/task").glob("*"):
                with contextlib.suppress(OSError):
                    cpu_ns += int((task / "schedstat").read_text().split()[0])
                    status = (task / "status").read_text()
                    wakeups += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return Usage(cpu_ns, wakeups)

    def pss_kib(self) -> int:
        """Proportional set size of all processes."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total

    def close(self) -> None:
        self.fe.close()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()


def start(name: str, kind: str, program: str, material: Material, work: Path) -> Side:
    """Starts a back-end of *kind* (``rafs``, ``virtiofsd``, ``nydusd``) on *material* and connects to it.

    Raises:
        RuntimeError: it ended, or did not bind its socket.
    """
    work.mkdir(parents=True, exist_ok=True)
    socket = work / "vhost.sock"
    socket.unlink(missing_ok=True)
    command = _COMMANDS[kind](program, material, work, socket)
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise RuntimeError(f"{name} did not start:\n{(work / 'log').read_text(errors='replace')[-2000:]}")
        time.sleep(0.01)
    return _connect(name, socket, process.pid, process)


def attach(name: str, socket: Path, pid: int) -> Side:
    """Connects to a back-end that runs already; *pid* is its main process."""
    return _connect(name, socket, pid, None)


def _connect(name: str, socket: Path, pid: int, process: subprocess.Popen[bytes] | None) -> Side:
    fe = Frontend.connect(socket, timeout_s=120)
    side = Side(name, pid, fe, process)
    try:
        fe.start()
        fe.init()
    except BaseException:
        side.close()
        raise
    return side


def _rafs(program: str, material: Material, work: Path, socket: Path) -> Sequence[str]:
    cache = work / "cache"
    options = ["--blob-dir", str(material.blob_dir), "--socket-path", str(socket), "--cache-dir", str(cache)]
    return [program, "serve", str(material.bootstrap), *options, "--log-level", "warning"]


def _virtiofsd(program: str, material: Material, work: Path, socket: Path) -> Sequence[str]:
    del work
    options = [
        "--sandbox",
        "none",
        "--seccomp",
        "none",
        "--cache",
        "always",
        "--xattr",
        "--log-level",
        "error",
    ]
    return [program, f"--socket-path={socket}", f"--shared-dir={material.tree}", *options]


def _nydusd(program: str, material: Material, work: Path, socket: Path) -> Sequence[str]:
    cache = work / "cache"
    cache.mkdir(exist_ok=True)
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(material.blob_dir)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "digest_validate": False,
        "iostats_files": False,
        "enable_xattr": True,
        "fs_prefetch": {"enable": False},
    }
    (work / "config.json").write_text(json.dumps(config))
    options = ["--bootstrap", str(material.bootstrap), "--config", str(work / "config.json")]
    limits = ["--log-level", "error", "--rlimit-nofile", "10000"]
    return [program, "virtiofs", "--sock", str(socket), *options, *limits]


_COMMANDS = {"rafs": _rafs, "virtiofsd": _virtiofsd, "nydusd": _nydusd}

OWN_PROGRAM = str(Path(sys.executable).with_name("virtiofsd-rafs"))
