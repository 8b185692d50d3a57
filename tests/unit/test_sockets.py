"""The sockets of ``serve``: when they appear, and that they go again."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from virtiofsd_rafs import sockets
from virtiofsd_rafs.errors import SocketSetupError

ROOT = Path(__file__).parents[2]
HANG_S = 60.0

# What Python needs for a socket and a signal mask, and we to say what is wrong. Not typing, pathlib, click.
ALLOWED = {
    *("virtiofsd_rafs", "virtiofsd_rafs.__main__", "virtiofsd_rafs.errors", "virtiofsd_rafs.sockets"),
    *("__future__", "collections", "collections.abc", "enum", "errno", "functools", "itertools", "keyword"),
    *("math", "operator", "reprlib", "types", "array", "select", "selectors", "signal", "socket"),
    *("fcntl", "time"),
    *("_collections", "_functools", "_operator", "_socket"),
}
# Tells what was imported when the first socket is bound, and ends.
AT_BIND = """
import os, sys
before = set(sys.modules)
def at_bind(event, _):
    if event == "socket.bind":
        print(*set(sys.modules) - before, flush=True)
        os._exit(0)
sys.addaudithook(at_bind)
from virtiofsd_rafs.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    sockets.drop()


@pytest.fixture
def unblocked() -> object:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    sockets.drop()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_little_is_imported_before_they_are_bound(tmp_path: Path) -> None:
    arguments = ("serve", "example.com/app:1", "--socket-path", str(tmp_path / "s"))
    command = [sys.executable, "-c", AT_BIND, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    loaded = set(done.stdout.split())
    assert "virtiofsd_rafs.sockets" in loaded, done.stderr
    assert loaded <= ALLOWED


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--no-such-option"], 2, "No such option"),
        (["--pull", "sometimes"], 2, "Invalid value for '--pull'"),
        (["--amplify"], 2, "requires an argument"),
        (["one", "too", "many"], 2, "unexpected extra argument"),
        (["--cache-size", "1KiB"], 2, "config.invalid"),
        (["--help"], 0, ""),
    ],
)
def test_nothing_stays_when_the_command_line_is_wrong(
    tmp_path: Path, arguments: list[str], code: int, reason: str
) -> None:
    command = [sys.executable, "-m", "virtiofsd_rafs", "serve", "x.boot", "--socket-path", "s", *arguments]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == code
    assert reason in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_stays_after_a_signal_that_comes_at_once(tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "virtiofsd_rafs", "serve", "no.boot", "--no-cache"]
    with subprocess.Popen(
        [*command, "--socket-path", path], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + HANG_S
        while not path.exists() and process.poll() is None:
            assert time.monotonic() < deadline
        process.send_signal(number)
        process.communicate(timeout=HANG_S)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unblocked")
def test_whoever_sees_the_first_may_use_both(tmp_path: Path) -> None:
    path = f"{tmp_path}//./s"
    sockets.bind_early(["x.boot", f"--socket-path={path}", "--api-socket", f"{tmp_path}/a"])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "s"]
    assert (tmp_path / "a").stat().st_mtime_ns <= (tmp_path / "s").stat().st_mtime_ns
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "s"))
    taken = sockets.take(Path(path))
    accepted, _ = taken.accept()
    client.sendall(b"x")
    assert accepted.recv(1) == b"x"
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    sockets.drop()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    for each in (client, accepted, taken):
        each.close()


@pytest.mark.usefixtures("unblocked")
def test_a_wrong_guess_is_not_in_the_way(tmp_path: Path) -> None:
    # An option that takes a value has one that looks like an option.
    sockets.bind_early(["--auth-file", "--socket-path", f"{tmp_path}/s", f"--socket-path={tmp_path}/t"])
    sockets.take(tmp_path / "s").close()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.usefixtures("unblocked")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--api-socket", "{}/s"],
        ["--socket-path"],
        ["--socket-path", "{}/s", "--help"],
        ["--socket-path", "{}/missing/../s"],
        ["--", "--socket-path", "{}/s"],
    ],
)
def test_nothing_is_bound_that_may_not_be_meant(tmp_path: Path, arguments: list[str]) -> None:
    sockets.bind_early([argument.format(tmp_path) for argument in arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unblocked")
def test_the_environment_names_them_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTIOFSD_RAFS_SERVE_SOCKET_PATH", f"{tmp_path}/s")
    monkeypatch.setenv("VIRTIOFSD_RAFS_SERVE_API_SOCKET", f"{tmp_path}/a")
    sockets.bind_early(["x.boot"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "s"]


@pytest.mark.usefixtures("unblocked")
def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    with sockets.bind_socket(tmp_path / "s", mode=0o600):
        sockets.bind_early(["--socket-path", f"{tmp_path}/s"])
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
        with pytest.raises(SocketSetupError, match="another process listens"):
            sockets.take(tmp_path / "s")
    # Nobody listens any more.
    sockets.take(tmp_path / "s").close()
    (tmp_path / "f").touch()
    with pytest.raises(SocketSetupError, match="is no socket"):
        sockets.bind_socket(tmp_path / "f", mode=0o600)
    (tmp_path / "l").symlink_to("nowhere")
    with pytest.raises(SocketSetupError, match="is no socket"):
        sockets.bind_socket(tmp_path / "l", mode=0o600)
    (tmp_path / "g.new").write_text("of the user")
    with pytest.raises(SocketSetupError, match=r"g\.new: is there and is no socket"):
        sockets.bind_socket(tmp_path / "g", mode=0o600)
    assert (tmp_path / "g.new").read_text() == "of the user"


def test_who_listens_and_does_not_accept_is_not_waited_for(tmp_path: Path) -> None:
    """Signals are blocked by then: nothing but SIGKILL would end the waiting."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(path)
        busy.listen(0)
        first.connect(path)
        command = [sys.executable, "-m", "virtiofsd_rafs", "serve", "no.boot", "--socket-path", path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == SocketSetupError.exit_code
    assert "another process listens there" in done.stderr
    assert os.listdir(tmp_path) == ["s"]


def test_nobody_who_was_quicker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")
    listen = socket.socket.listen
    with socket.socket(socket.AF_UNIX) as other:

        def late(self: socket.socket, backlog: int) -> None:
            other.bind(path)
            listen(other, 1)
            listen(self, backlog)

        monkeypatch.setattr(socket.socket, "listen", late)
        with pytest.raises(SocketSetupError, match="File exists"):
            sockets.bind_socket(path, mode=0o600)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            other.accept()[0].close()
    assert os.listdir(tmp_path) == ["s"]


def test_one_of_many_that_start_over_what_is_stale_wins(tmp_path: Path) -> None:
    """And it is the one who is reached."""
    path = str(tmp_path / "s")
    code = """
import sys
from virtiofsd_rafs import sockets
from virtiofsd_rafs.errors import SocketSetupError
sys.stdin.readline()
try:
    sock = sockets.bind_socket(sys.argv[1], mode=0o600)
except SocketSetupError:
    print("lost", flush=True)
else:
    print("won", flush=True)
    while True:
        try:
            sock.accept()[0].sendall(b"here")
        except OSError:
            pass  # one of the others who looked
"""
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        many = [
            subprocess.Popen(
                [sys.executable, "-c", code, path],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        for each in many:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        said = [each.stdout.readline() for each in many if each.stdout is not None]
        assert sorted(said) == ["lost\n", "lost\n", "lost\n", "won\n"]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(HANG_S)
            client.connect(path)
            assert client.recv(4) == b"here"
        for each in many:
            each.kill()
            each.communicate(timeout=HANG_S)
        os.unlink(path)
