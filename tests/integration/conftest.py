"""A real daemon that serves a made image from a registry with faults, and a front-end that plays its VM."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from guest.daemon import PROGRAM, Daemon
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest.registry import Registry
    from tests.sim.faulty_proxy import FaultyProxy
    from tests.sim.registry import RegistrySimulator
    from virtiofsd_rafs.native.frontend_device import Token

CHUNK = 64 * 1024
TIMEOUT_S = 30.0


@attrs.frozen
class MadeImage:
    """A source tree and the image that was built from it."""

    source: Path
    out: Path
    files: dict[str, bytes]
    """Content by name, all in the root directory."""


@pytest.fixture(scope="session")
def made_image(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    """200 files of up to 300 KB of noise (and one of 4 MiB), chunks of 64 KiB."""
    base = tmp_path_factory.mktemp("image")
    source = base / "source"
    source.mkdir()
    rng = random.Random(4711)
    files = {f"f{i:03}": rng.randbytes(rng.randrange(1, 300_000)) for i in range(200)}
    files["big"] = rng.randbytes(4 << 20)
    for name, data in files.items():
        (source / name).write_bytes(data)
    (source / "run.sh").write_bytes(b"#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("big")
    build_image(source, base / "out", chunk_size=CHUNK)
    return MadeImage(source, base / "out", files)


@attrs.define
class Served:
    """A daemon, the session memory of it, and its VM."""

    daemon: Daemon
    session: Session
    image: MadeImage
    sim: RegistrySimulator
    fe: Frontend
    nodes: dict[str, int] = attrs.Factory(dict)

    def node(self, name: str) -> int:
        """Node id of a file in the root."""
        if name not in self.nodes:
            self.nodes[name] = self.fe.resolve(name).nodeid
        return self.nodes[name]

    def submit_read(self, name: str, offset: int, size: int, *, queue: int = 1) -> tuple[Token, bytes]:
        """A READ on its way, and the bytes that it has to bring."""
        args = struct.pack("<QQIIQII", 0, offset, size, 0, 0, 0, 0)
        token = self.fe.request(Opcode.READ, self.node(name), args, size, queue=queue)
        return token, self.image.files[name][offset : offset + size]

    def collect(self, reads: list[tuple[Token, bytes]]) -> None:
        """Waits for all *reads*: each answered once, without an error, with the right bytes."""
        for token, want in reads:
            reply = self.fe.wait(token, TIMEOUT_S)
            assert reply.error == 0
            assert reply.data == want

    def random_reads(self, rng: random.Random, n: int = 32, queue: int = 1) -> list[tuple[Token, bytes]]:
        """*n* READs at random places."""
        reads = []
        for _ in range(n):
            name = rng.choice(sorted(self.image.files))
            offset = rng.randrange(len(self.image.files[name]))
            reads.append(self.submit_read(name, offset, rng.choice([4096, 65536, 131072]), queue=queue))
        return reads

    def worker(self) -> dict[str, Any]:
        """The worker's part of the status."""
        worker: dict[str, Any] = self.session.status()["processes"]["worker"]
        return worker

    def parked(self) -> int:
        """Requests that wait for data."""
        return sum(q["parked"] for q in self.session.status()["queues"])

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Polls until *what* is true; a time-out fails the test."""
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)

    def check_ring(self) -> None:
        """No request was answered twice or by a wrong length, no buffer was written after its completion."""
        assert self.fe.check() == {}, self.fe.fault_texts()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def start(
    made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path
) -> Iterator[Callable[..., Served]]:
    """``start(*serve_options, **front_end_options)``: a daemon with an empty cache, and a started VM."""
    registry_sim.store.add_build("app", "1", made_image.out)
    with ExitStack() as stack:

        def start_one(*options: str, **front_end: Any) -> Served:
            daemon = stack.enter_context(run_daemon(registry_sim, short_dir, *options))
            fe = stack.enter_context(Frontend.connect(daemon.socket, **front_end))
            fe.start()
            fe.init()
            return Served(daemon, Session.attach(daemon.process.pid), made_image, registry_sim, fe)

        yield start_one


def attach(daemon: Daemon) -> Session:
    """Its session, once it has made the memory of it: that is after its sockets are bound."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return Session.attach(daemon.process.pid)
        except ProcessLookupError:
            assert time.monotonic() < deadline, "no session"
            time.sleep(0.002)


@contextmanager
def run_daemon(
    sim: RegistrySimulator | FaultyProxy | Registry,
    folder: Path,
    *options: str,
    host: str | None = None,
    program: Path = PROGRAM,
    name: str = "app:1",
) -> Iterator[Daemon]:
    """A daemon of the image *name* in *sim*; fails when it leaves a process behind.

    *host* is another name of *sim*, *program* what to run instead of the daemon itself.
    """
    arguments = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "debug", *options]
    image = f"{host or sim.host}/{name}"
    with Daemon(image, folder, folder / "log", arguments, program=program) as daemon:
        daemon.wait_ready()
        yield daemon
        pids = children(daemon.process.pid)
        daemon.stop()
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]


@contextmanager
def serving(
    registry: Registry, image: MadeImage, folder: Path, *options: str, name: str = "app:1"
) -> Iterator[Served]:
    """A daemon on *image*, called *name* in a real registry, and a VM that has read nothing yet."""
    folder.mkdir(exist_ok=True)
    with (
        run_daemon(registry, folder, *options, name=name) as daemon,
        Frontend.connect(daemon.socket) as fe,
    ):
        fe.start()
        fe.init()
        yield Served(daemon, Session.attach(daemon.process.pid), image, registry, fe)


def children(pid: int) -> list[int]:
    """Pids of the children of *pid*."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def is_zombie(pid: int) -> bool:
    """Whether *pid* has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill(pid: int, signal: int = 9) -> None:
    """Sends a signal; a process that is gone already is fine."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal)
