"""Control as the keeper sees it: the test plays keeper and worker, control runs as a process of its own."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.preference import may_be_preferred
from tests.sim.images import MadeImage, make_image
from tests.sim.registry import Auth, RegistrySimulator
from virtiofsd_rafs.cli._api import UnixConnection, fetch_json
from virtiofsd_rafs.runtime.mount import FATAL, FRONTEND, MOUNT_BEGIN, MOUNT_BLOB, MOUNT_COMMIT, SHUTDOWN
from virtiofsd_rafs.runtime.scheduling import LOOP_NICE

ROOT = Path(__file__).parents[2]
HANG_S = 60.0
_MESSAGE = struct.Struct("<4I")


class Mount(NamedTuple):
    """What control handed over."""

    bootstrap: int
    spill: int
    blobs: list[tuple[int, int, int, int | None]]

    def states(self, blob: int = 0) -> list[int]:
        """The state of each chunk, as a worker sees it."""
        fd = self.blobs[blob][0]
        count = int.from_bytes(os.pread(fd, 4, 12), "little")
        raw = os.pread(fd, 4 * count, 4096)
        return [word & 7 for (word,) in struct.iter_unpack("<I", raw)]

    def spilled(self, blob: int = 0) -> list[bool]:
        """Which chunks are in the spill."""
        fd = self.blobs[blob][1]
        raw = os.pread(fd, os.fstat(fd).st_size - 64, 64)
        return [bool(spill) for _, _, spill, _ in struct.iter_unpack("<QQQQ", raw)]


class Control:
    """A control process, and the keeper's and the worker's side of it."""

    def __init__(self, folder: Path, predecessor: Mount | None = None, **config: Any) -> None:
        self.folder = folder
        self.keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper.settimeout(HANG_S)
        self.api_path = Path(tempfile.mkdtemp(dir=folder)) / "api"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.api_path))
        listener.listen()
        self.post_event = os.eventfd(0, os.EFD_NONBLOCK)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        read, self.post_pipe = os.pipe()
        fds: dict[str, Any] = {
            "keeper": theirs.fileno(),
            "api": listener.fileno(),
            "post_event": self.post_event,
            "post_pipe": read,
            "wake": self.wake,
            "mount": predecessor,
        }
        inherited = [fds[name] for name in ("keeper", "api", "post_event", "post_pipe", "wake")]
        if predecessor is not None:
            inherited += [predecessor.bootstrap, predecessor.spill]
            inherited += [fd for blob in predecessor.blobs for fd in blob if fd is not None]
        settings = {"api_socket": str(self.api_path), "retry_first_s": 0.01, "amplify": 0} | config
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sim.control_child", json.dumps({"config": settings, "fds": fds})],
            cwd=ROOT,
            pass_fds=inherited,
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        listener.close()
        os.close(read)

    def receive(self) -> tuple[tuple[int, ...], list[int]]:
        data, fds, _, _ = socket.recv_fds(self.keeper, 64, 8)
        assert data, f"control has ended: {self.errors()}"
        words: tuple[int, ...] = _MESSAGE.unpack(data)
        return words, list(fds)

    def mounted(self) -> Mount:
        """Waits for the whole mount."""
        words, (bootstrap, spill) = self.receive()
        assert words[:2] == (MOUNT_BEGIN, 0)
        blobs = []
        for index in range(words[2]):
            got, fds = self.receive()
            assert got[:3] == (MOUNT_BLOB, 0, index)
            state, extents, touched, *data = fds
            blobs.append((state, extents, touched, data[0] if data else None))
        assert self.receive() == ((MOUNT_COMMIT, 0, 0, 0), [])
        return Mount(bootstrap, spill, blobs)

    def post(self, *chunks: int, blob: int = 0) -> None:
        os.write(self.post_pipe, b"".join(struct.pack("<II", blob, chunk) for chunk in chunks))
        os.eventfd_write(self.post_event, 1)

    def woken(self) -> None:
        """Waits for a wake-up."""
        assert select.select([self.wake], [], [], HANG_S)[0], "never woken"
        os.eventfd_read(self.wake)

    def errors(self) -> str:
        self.process.kill()
        return self.process.communicate(timeout=HANG_S)[1]

    def end(self) -> tuple[int, str]:
        """Tells control to go; exit code and stderr."""
        self.keeper.send(_MESSAGE.pack(SHUTDOWN, 0, 0, 0))
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=HANG_S)
        return self.process.returncode, errors

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=HANG_S)


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


def start(made: MadeImage, tmp_path: Path, predecessor: Mount | None = None, **config: Any) -> Control:
    defaults = {"image": str(made.folder / "image.boot"), "cache_dir": str(tmp_path / "cache")}
    return Control(tmp_path, predecessor, **(defaults | config))


def test_a_warm_image_is_mounted_and_served(image: MadeImage, tmp_path: Path) -> None:
    c = start(image, tmp_path)
    mount = c.mounted()
    assert os.pread(mount.bootstrap, 1 << 20, 0) == image.bootstrap
    seals = fcntl.fcntl(mount.bootstrap, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    state, extents, touched, data = mount.blobs[0]
    assert fcntl.fcntl(touched, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    for fd in (mount.bootstrap, mount.spill, state, extents, data):
        assert fd is not None
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    c.keeper.send(_MESSAGE.pack(FRONTEND, 1, 0, 0))
    c.post(2, 4)
    while mount.states().count(3) < 2:
        c.woken()
    assert [chunk for chunk, state in enumerate(mount.states()) if state == 3] == [2, 4]
    info = image.chunks[4]
    assert os.pread(data, info.uncompressed_size, info.uncompressed_offset) == image.plain[4]
    status = fetch_json(c.api_path)
    assert status["state"] == "RUNNING"
    assert status["agent"]["chunks"]["ok"] == 2
    code, errors = c.end()
    assert code == 0
    assert "the VMM has connected" in errors
    assert "Traceback" not in errors


def test_the_warm_path_is_lean(image: MadeImage, tmp_path: Path) -> None:
    code = """
import socket, sys
from pathlib import Path
from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.runtime import control
from virtiofsd_rafs.runtime.mount import Mounter
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
config = ServeConfig(image=sys.argv[1], api_socket=Path("x"), cache_dir=Path(sys.argv[2]))
assert Mounter(theirs, config).warm() is not None
heavy = ("asyncio", "aiohttp", "zstandard", "lz4", "ssl", "concurrent.futures", "click")
print([name for name in heavy if name in sys.modules])
"""
    args = [sys.executable, "-c", code, image.folder / "image.boot", tmp_path / "cache"]
    out = subprocess.run(args, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out == "[]\n"


def test_the_event_loop_runs_before_what_computes(image: MadeImage, tmp_path: Path) -> None:
    c = start(image, tmp_path)
    mount = c.mounted()
    c.post(2, 4)
    while mount.states().count(3) < 2:
        c.woken()
    nice = {}
    for task in Path(f"/proc/{c.process.pid}/task").iterdir():
        nice[int(task.name)] = os.getpriority(os.PRIO_PROCESS, int(task.name))
    c.end()
    assert nice.pop(c.process.pid) == (LOOP_NICE if may_be_preferred() else 0)
    assert nice
    assert set(nice.values()) == {0}, "threads that decode"


def test_who_started_it_nicely_meant_it() -> None:
    code = """
import os, sys
from virtiofsd_rafs.runtime.scheduling import loop_first
os.nice(3)
loop_first()
print(os.nice(0))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout == "3\n"


def test_a_source_is_opened_at_once_only_when_nothing_is_cached(image: MadeImage, tmp_path: Path) -> None:
    def opened(c: Control) -> bool:
        c.mounted()
        # The question comes behind what the start has set off.
        return "virtiofsd_rafs.backends.localdir" in fetch_json(c.api_path)["modules"]

    first = start(image, tmp_path)
    assert opened(first)
    first.post(2)
    first.woken()
    assert first.end()[0] == 0
    second = start(image, tmp_path)
    assert not opened(second)
    second.post(3)
    second.woken()
    assert "virtiofsd_rafs.backends.localdir" in fetch_json(second.api_path)["modules"]
    assert second.end()[0] == 0


def test_control_ends_with_its_keeper(image: MadeImage, tmp_path: Path) -> None:
    c = start(image, tmp_path)
    c.mounted()
    c.keeper.close()
    assert c.wait()[0] == 0


def test_sigterm_ends_control(image: MadeImage, tmp_path: Path) -> None:
    c = start(image, tmp_path)
    c.mounted()
    fetch_json(c.api_path)  # the loop runs
    c.process.terminate()
    assert c.wait()[0] == 0


@pytest.mark.parametrize(
    ("spoil", "options", "code", "msgid"),
    [
        (lambda path: path.write_bytes(b"not an image" * 1000), {}, 3, "image.malformed"),
        (lambda path: path.write_bytes(path.read_bytes()[:8192]), {}, 3, "image.malformed"),
        (lambda path: path.unlink(), {}, 4, "backend.not-found"),
        (lambda path: None, {"image": "registry.invalid/app:1", "pull": "never"}, 4, "backend.not-found"),
        (lambda path: None, {"image": "no image", "blob_dir": None}, 2, "config.invalid"),
    ],
    ids=["no-image", "cut", "missing", "not-cached", "no-reference"],
)
def test_an_image_that_cannot_be_served_ends_the_daemon(
    image: MadeImage, tmp_path: Path, spoil: Any, options: dict[str, Any], code: int, msgid: str
) -> None:
    spoil(image.folder / "image.boot")
    c = start(image, tmp_path, **options)
    words, _ = c.receive()
    assert words[:2] == (FATAL, code)
    exit_code, errors = c.wait()
    assert exit_code == code
    assert f"virtiofsd-rafs: {msgid}: " in errors
    assert "Traceback" not in errors


def test_a_registry_that_is_away_ends_the_daemon_after_the_deadline(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        c = Control(tmp_path, image=f"{host}/app:1", cache_dir=None, plain_http=True, io_deadline_s=1.0)
        assert fetch_json(c.api_path)["state"] == "INIT"
        words, _ = c.receive()
        assert words[:2] == (FATAL, 4)
        assert "backend.unreachable" in c.wait()[1]


def test_an_image_is_asked_for_with_credentials_that_came_by_the_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    made = make_image(tmp_path / "made")
    with RegistrySimulator(auth=Auth("basic", "me", "pw")) as sim:
        sim.store.add_build("app", "1", made.folder)
        sim.refuse()
        c = Control(tmp_path, image=f"{sim.host}/app:1", cache_dir=None, plain_http=True)
        peer = UnixConnection(c.api_path)
        body = json.dumps({"registry_auth": base64.b64encode(b"me:pw").decode()})
        peer.request("PUT", "/api/v1/config?id=/", body=body)
        assert peer.getresponse().status == 204
        peer.close()
        while not (sources := fetch_json(c.api_path)["agent"]["sources"]) or not sources[0]["errors"]:
            time.sleep(0.05)
        assert sources[0]["source"] == "registry"
        sim.accept()
        c.mounted()
        assert c.end()[0] == 0


def test_a_cache_folder_that_cannot_be_made_is_no_reason_to_fail(image: MadeImage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    c = start(image, tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    mount = c.mounted()
    assert mount.blobs[0][3] is None
    c.post(1)
    c.woken()
    assert mount.spilled()[:3] == [False, True, False]
    assert re.search(r"WARNING .*memory stands in", c.end()[1])


def test_a_blob_that_is_not_there_is_told_at_the_start(image: MadeImage, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    c = start(image, tmp_path, blob_dir=str(tmp_path / "elsewhere"))
    c.mounted()
    assert re.search(r"WARNING .*blob [0-9a-f]{64} is not in .*elsewhere \(check --blob-dir\)", c.end()[1])


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_killed_control_is_succeeded(image: MadeImage, tmp_path: Path, on_disk: bool) -> None:
    options = {} if on_disk else {"cache_dir": None}
    first = start(image, tmp_path, **options)
    mount = first.mounted()
    first.post(0)
    first.woken()
    first.kill()

    second = start(image, tmp_path, predecessor=mount, **options)
    second.post(3)
    second.woken()
    # The worker's own tables show both, and nothing was mounted anew.
    ready = [state == 3 for state in mount.states()] if on_disk else mount.spilled()
    assert [chunk for chunk, there in enumerate(ready) if there] == [0, 3]
    code, errors = second.end()
    assert code == 0
    assert "took over" in errors
    assert second.keeper.recv(64) == b""


def test_a_successor_needs_neither_image_nor_tag(image: MadeImage, tmp_path: Path) -> None:
    first = start(image, tmp_path)
    mount = first.mounted()
    first.kill()
    (image.folder / "image.boot").unlink()
    second = start(image, tmp_path, predecessor=mount, blob_dir=str(image.folder))
    second.post(3)
    second.woken()
    assert mount.states()[3] == 3
    assert second.end()[0] == 0


def test_tables_that_do_not_fit_are_mounted_anew(image: MadeImage, tmp_path: Path) -> None:
    other = make_image(tmp_path / "other", seed=5)
    first = start(other, tmp_path)
    mount = first.mounted()
    first.kill()
    wrong = Mount(os.memfd_create("bootstrap"), mount.spill, mount.blobs)
    os.write(wrong.bootstrap, image.bootstrap)
    second = start(image, tmp_path, predecessor=wrong)
    anew = second.mounted()
    second.post(1)
    second.woken()
    assert anew.states()[1] == 3
    assert "mounting anew" in second.end()[1]


def test_a_successor_that_fails_leaves_the_worker_alone(image: MadeImage, tmp_path: Path) -> None:
    broken = Mount(os.memfd_create("bootstrap"), os.memfd_create("spill"), [])
    os.write(broken.bootstrap, b"x" * 4096)
    c = start(image, tmp_path, predecessor=broken)
    code, errors = c.wait()
    assert (code, c.keeper.recv(64)) == (3, b"")
    assert "image.malformed" in errors
