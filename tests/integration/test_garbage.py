"""Invariant: a daemon lives whatever is said on its sockets or written into its rings, and others are served.

Structured garbage against a real daemon, keeper and worker: messages, memory, rings, FUSE requests and HTTP,
right but for some of their parts. ``scripts/fuzz socket`` does it for long (GARBAGE_SECONDS, GARBAGE_SEED).
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.integration.conftest import MadeImage, run_daemon
from virtiofsd_rafs.errors import PeerError
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session
from virtiofsd_rafs.native.vhost_user import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guest.daemon import Daemon
    from tests.sim.registry import RegistrySimulator

SECONDS = float(os.environ.get("GARBAGE_SECONDS", "1"))
SEED = int(os.environ.get("GARBAGE_SEED", "1"))
WAIT_S = 20.0
QUEUE_SIZE = 64
SECRET = b"a-secret-that-nobody-shows"
# Nobody waits for an answer to these, so that there is none.
SILENT = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
NUMBERS = (0, 1, 2, 7, 64, 255, 1024, 0x1000, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1)


def dial(s: socket.socket, path: Path) -> None:
    """Connects. Those who have gone stand in the queue before us until the daemon has seen them all."""
    s.settimeout(WAIT_S)
    end = time.monotonic() + WAIT_S
    while True:
        try:
            s.connect(str(path))
        except BlockingIOError:
            assert time.monotonic() < end, "the queue does not move"
            time.sleep(0.01)
        else:
            return


@attrs.define
class Victim:
    """A daemon that goes on listening, and what it is asked for in between."""

    daemon: Daemon
    session: Session
    image: MadeImage
    rng: random.Random

    def number(self) -> int:
        """Any number, often one that is at some edge."""
        rng = self.rng
        return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(rng.randrange(1, 65))

    def connect(self, **options: Any) -> Frontend:
        """A front-end that has done everything right up to here."""
        fe = Frontend.connect(self.daemon.socket, queue_size=QUEUE_SIZE, **options)
        fe.start()
        fe.init()
        return fe

    def crashes(self) -> int:
        return int(self.session.status()["processes"]["worker"]["crashes"])

    def look(self) -> None:
        """The daemon lives, nothing of it was replaced, and a new VM is served."""
        assert self.daemon.process.poll() is None
        assert self.http(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )
        with self.connect() as fe:
            node = fe.resolve("f001").nodeid
            assert fe.read(node, 0, 1 << 20) == self.image.files["f001"]
            assert fe.check() == {}, fe.fault_texts()
        assert self.session.status()["processes"]["control"]["generation"] == 1

    def http(self, data: bytes) -> bytes:
        """What the API answers to *data* until it closes the connection or is silent."""
        answer = b""
        with socket.socket(socket.AF_UNIX) as s, suppress(ConnectionError, BrokenPipeError):
            dial(s, self.daemon.api_socket)
            s.sendall(data)
            while select.select([s], [], [], WAIT_S if not answer else 0.02)[0]:
                piece = s.recv(65536)
                if not piece:
                    break
                answer += piece
        return answer


@pytest.fixture
def victim(made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path) -> Iterator[Victim]:
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep", "--log-level", "info") as daemon:
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
        pid = daemon.process.pid
        victim = Victim(daemon, Session.attach(pid), made_image, random.Random(SEED))
        victim.look()
        yield victim
        victim.look()
        log = daemon.log.read_text(errors="replace")
        assert "panicked" not in log
        assert "Traceback" not in log, log[log.index("Traceback") :][:4000]


def again(victim: Victim, body: Callable[[], None]) -> None:
    """Calls *body* until the time is over, five times at least, with a look now and then."""
    end = time.monotonic() + SECONDS
    for n in range(1 << 30):
        if n >= 5 and time.monotonic() > end:
            return
        body()
        if n % 20 == 19:
            victim.look()


def test_messages(victim: Victim) -> None:
    crashes = victim.crashes()
    with ExitStack() as stack:
        files = [os.memfd_create("garbage") for _ in range(2)]
        os.truncate(files[0], 1 << 20)
        files += [os.eventfd(0), os.open("/dev/null", os.O_RDWR)]
        for fd in files:
            stack.callback(os.close, fd)
        again(victim, lambda: _messages(victim, files))
    assert victim.crashes() == crashes


def _messages(victim: Victim, files: list[int]) -> None:
    rng = victim.rng
    with socket.socket(socket.AF_UNIX) as s, suppress(ConnectionError, TimeoutError):
        dial(s, victim.daemon.socket)
        for _ in range(rng.randrange(1, 60)):
            request = rng.choice(list(Request)) if rng.random() < 0.9 else victim.number() & 0xFFFFFFFF
            words = [victim.number() for _ in range(rng.randrange(9))]
            if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG) and rng.random() < 0.7:
                words = [rng.choice((0, 1, 2)), *(rng.choice((0, 0x1000, 1 << 20)) for _ in range(8))]
            if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
                words = [rng.choice((0, 1, 1, 70)) | rng.choice((0, 1, 2, 64, 1000)) << 32]
            payload = struct.pack(f"<{len(words)}Q", *words)[: rng.choice((8, 12, 40, 72, 72))]
            size = len(payload) if rng.random() < 0.95 else victim.number() & 0xFFFFFFFF
            flags = 1 | rng.choice((0, 8)) if rng.random() < 0.95 else victim.number() & 0xFFFFFFFF
            data = struct.pack("<III", request, flags, size) + payload
            fds = rng.choices(files, k=rng.choice((0, 0, 1, 1, 2, 3)))
            socket.send_fds(s, [data[: rng.randrange(1, len(data))] if rng.random() < 0.01 else data], fds)
            while select.select([s], [], [], 0)[0]:
                if not s.recv(65536):
                    return


def test_rings(victim: Victim) -> None:
    crashes = victim.crashes()
    again(victim, lambda: _rings(victim))
    assert victim.crashes() == crashes


def _rings(victim: Victim) -> None:
    rng = victim.rng
    with victim.connect() as fe:
        fe.resolve("f002")
        desc, avail, used = fe.queue_info(1).gpas
        end = max(r.gpa + r.size for r in fe.regions)
        for _ in range(rng.randrange(1, 40)):
            match rng.randrange(6):
                case 0 | 1 | 2:
                    addr = rng.choice((rng.randrange(end), desc, avail, used, end - 8, victim.number()))
                    length = rng.choice((0, 16, 40, 4096, 160, victim.number() & 0xFFFFFFFF))
                    flags, following = rng.randrange(8), rng.randrange(QUEUE_SIZE + 2)
                    index = rng.randrange(QUEUE_SIZE)
                    raw = struct.pack("<QIHH", addr & (1 << 64) - 1, length, flags, following)
                    fe.write_memory(desc + 16 * index, raw)
                case 3:
                    slot, head = rng.randrange(QUEUE_SIZE), victim.number() & 0xFFFF
                    head = head if rng.random() < 0.2 else head % QUEUE_SIZE
                    fe.write_memory(avail + 4 + 2 * slot, struct.pack("<H", head))
                case 4:
                    index = int.from_bytes(fe.read_memory(avail + 2, 2), "little") + rng.randrange(1, 5)
                    index = victim.number() if rng.random() < 0.1 else index
                    fe.write_memory(avail + 2, struct.pack("<H", index & 0xFFFF))
                    fe.kick(1)
                case _:
                    fe.write_memory(used + 2, struct.pack("<H", victim.number() & 0xFFFF))
        fe.kick(1)
        # hiprio has a ring of its own, and its driver keeps the rules.
        fe.call(Opcode.STATFS, 1, b"", 80, queue=0)


def test_a_broken_ring_rests_until_it_is_reset(victim: Victim) -> None:
    with victim.connect() as fe:
        avail = fe.queue_info(1).gpas[1]
        index = int.from_bytes(fe.read_memory(avail + 2, 2), "little")
        fe.write_memory(avail + 2, struct.pack("<H", index + QUEUE_SIZE + 1 & 0xFFFF))
        fe.kick(1)
        end = time.monotonic() + WAIT_S
        while not (broken := victim.session.status()["queues"][1]["broken"]) and time.monotonic() < end:
            time.sleep(0.002)
        assert broken
        fe.call(Opcode.STATFS, 1, b"", 80, queue=0)
        fe.reset()
        fe.start()
        fe.init()
        assert fe.read(fe.resolve("f003").nodeid, 0, 100) == victim.image.files["f003"][:100]
        assert not victim.session.status()["queues"][1]["broken"]


def test_requests(victim: Victim) -> None:
    crashes = victim.crashes()
    with ExitStack() as stack:
        fe = stack.enter_context(victim.connect())
        nodes = [
            1,
            0,
            (1 << 64) - 1,
            *(fe.resolve(name).nodeid for name in ("f001", "big", "link", "run.sh")),
        ]

        def some() -> None:
            rng, tokens = victim.rng, []
            for _ in range(rng.randrange(1, 12)):
                opcode = rng.choice(list(Opcode)) if rng.random() < 0.9 else victim.number() & 0xFFFFFFFF
                words = [victim.number() for _ in range(rng.randrange(9))]
                body = rng.choice(
                    (struct.pack(f"<{len(words)}Q", *words), b"f001\0", b"run.sh", rng.randbytes(700))
                )
                if opcode == Opcode.READ and rng.random() < 0.7:
                    # Chunks that nobody has, but never so many that the registry is all that is measured.
                    body = struct.pack(
                        "<QQIIQII", 0, rng.randrange(300_000), rng.randrange(1 << 17), 0, 0, 0, 0
                    )
                header = struct.pack(
                    "<IIQQIIIHH", 40 + len(body), opcode, fe.next_unique(), rng.choice(nodes), 0, 0, 1, 0, 0
                )
                data = bytearray(header + body)
                if rng.random() < 0.2:
                    # Not in `unique`: by it answers are told apart.
                    data[rng.choice((0, 1, 2, 4, 5, 16, 17, 39))] ^= 1 << rng.randrange(8)
                room = rng.choice((None, 0, 1, 100, 4096, 1 << 17))
                if int.from_bytes(data[4:8], "little") in SILENT:
                    room = None
                tokens.append(fe.submit(bytes(data), room))
            for token in tokens:
                with suppress(PeerError):
                    fe.wait(token, WAIT_S)
            assert fe.check() == {}, fe.fault_texts()

        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            some()
    assert victim.crashes() == crashes


def test_memory_that_is_cut(victim: Victim) -> None:
    """A VMM that takes bytes away under a mapping: SIGBUS ends the worker, not the daemon."""
    for _ in range(2):
        with victim.connect() as fe:
            for region in fe.regions:
                os.ftruncate(region.fd, 0)
            fe.kick_fd(1)
            os.eventfd_write(fe.kick_fd(1), 1)
            time.sleep(0.05)
        victim.look()


def test_http(victim: Victim) -> None:
    rng = victim.rng
    paths = [
        "/api/v1/daemon",
        "/api/v1/status?full=1",
        "/api/v1/trace",
        "/api/v1/config?id=/",
        "/metrics",
        "/",
        "*",
    ]

    def one() -> None:
        method = rng.choice(("GET", "PUT", "POST", "HEAD", "OPTIONS", "TRACE", "x", "\0"))
        path = rng.choice(paths) if rng.random() < 0.8 else "/" + rng.randbytes(rng.randrange(2000)).hex()
        body = rng.choice(
            (b"", b"{}", b'{"registry_auth": 5}', b"[" * 5000, rng.randbytes(3000), b'{"\xff": ""}')
        )
        length = len(body) if rng.random() < 0.8 else victim.number()
        fields = [f"Content-Length: {length}", "Host: x", "Connection: close"]
        if rng.random() < 0.2:
            fields.append(f"{rng.randbytes(3).hex()}: {rng.randbytes(rng.randrange(9000)).hex()}")
        if rng.random() < 0.1:
            fields.append("Transfer-Encoding: chunked")
        data = bytearray("\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode() + body)
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        if length > len(body):
            # Nothing more comes, and nobody has to wait for it.
            with socket.socket(socket.AF_UNIX) as s:
                dial(s, victim.daemon.api_socket)
                with suppress(BrokenPipeError, ConnectionError):
                    s.sendall(data)
            return
        answer = victim.http(bytes(data))
        assert not answer or answer.startswith(b"HTTP/"), answer[:100]
        assert b" 500 " not in answer.split(b"\r\n", 1)[0], (bytes(data), answer[:300])

    secret = b"PUT /api/v1/config?id=/ HTTP/1.1\r\nX: " + SECRET + b"\0\r\n\r\n" + SECRET
    victim.http(secret)
    for fields in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):
        # A body that ends too early, and one that is none.
        with socket.socket(socket.AF_UNIX) as s:
            dial(s, victim.daemon.api_socket)
            s.sendall(b"PUT /api/v1/config?id=/ HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\nzz\r\n")
    again(victim, one)
    assert SECRET.decode() not in victim.daemon.log.read_text(errors="replace")
