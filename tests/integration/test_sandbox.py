"""The sandbox of a daemon that serves: what each process may do, and what becomes of one that does more.

Every single door is tried in native/crates/sandbox/tests, by children that are confined as workers and
control are.
"""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest.daemon import PROGRAM, Daemon
from tests.integration.conftest import run_daemon
from tests.sim import lesser_kernel
from tests.sim.gate import Auth
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.sandbox import available, landlock_abi
from virtiofsd_rafs.native.session import BREAK_OUT, Session
from virtiofsd_rafs.runtime import sandbox
from virtiofsd_rafs.runtime.scheduling import ANSWER_NICE, LOOP_NICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import MadeImage, Served
    from tests.sim.registry import RegistrySimulator

# System calls as numbers: the same on all architectures for those that are younger than 2011.
LANDLOCK = (444, 445, 446)
SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
ABI = landlock_abi(available())
LOGGED = 2  # session/src/failpoint.rs: Point::Logged is passed by every request


def proc_status(pid: int) -> dict[str, str]:
    """``/proc/<pid>/status`` by field."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def pids(served: Served) -> dict[str, int]:
    """Pids of the daemon's processes by role."""
    return {role: p["pid"] for role, p in served.session.status()["processes"].items()}


def preference_while_asked(served: Served) -> int:
    """The nice value of control's event loop just after it has answered."""
    served.daemon.status()
    return os.getpriority(os.PRIO_PROCESS, pids(served)["control"])


def test_all_processes_are_confined(start: Callable[..., Served]) -> None:
    served = start()
    served.collect([served.submit_read("f001", 0, 4096)])
    for role, pid in pids(served).items():
        status = proc_status(pid)
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1"), role
        capabilities = {name: int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")}
        # Of the daemon: to reach files, and to let its event loop come first.
        allowed = 0 if role == "worker" else 0b1110 | 1 << 23
        assert all(not mask & ~allowed for mask in capabilities.values()), (role, capabilities)
    if os.geteuid() == 0:
        control = pids(served)["control"]
        served.wait_for(lambda: os.getpriority(os.PRIO_PROCESS, control) == LOOP_NICE)
    status = served.daemon.status()
    if os.geteuid() == 0:
        # While it is asked it may be preferred still more; a moment later that has ended.
        served.wait_for(lambda: preference_while_asked(served) == ANSWER_NICE)
        served.wait_for(lambda: os.getpriority(os.PRIO_PROCESS, control) == LOOP_NICE)
    assert status["sandbox"] == {
        "mode": "auto",
        "no_new_privileges": True,
        "capabilities_dropped": True,
        "seccomp": True,
        "landlock_abi": ABI,
        "complete": True,
    }


def test_a_worker_holds_no_descriptor_that_harms_others(start: Callable[..., Served]) -> None:
    served = start()
    served.collect([served.submit_read("big", 0, 65536)])
    worker = pids(served)["worker"]
    files, sockets = [], 0
    for link in Path(f"/proc/{worker}/fd").iterdir():
        info = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{worker}/fdinfo/{link.name}").read_text().splitlines()
            if ":" in line
        )
        mode = link.stat().st_mode
        sockets += stat.S_ISSOCK(mode)
        name = str(link.readlink())
        if stat.S_ISREG(mode) and not name.startswith("/memfd:"):
            files.append((name, int(info["flags"], 8) & 3))
    assert files, "the cache's files are among its descriptors"
    # States and data are read only; the log is written.
    assert [name for name, access in files if access] == [str(served.daemon.log)], files
    # One command channel for each ring thread: neither the front-end's socket, nor the API's, nor control's.
    assert sockets == len(
        [t for t in Path(f"/proc/{worker}/task").iterdir() if "pool" not in (t / "comm").read_text()]
    )
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert any(
        line.split()[:5] in (["Max", "core", "file", "size", "1"], ["Max", "core", "file", "size", "0"])
        for line in limits.splitlines()
    )


def test_a_worker_that_does_more_is_ended_and_replaced(start: Callable[..., Served]) -> None:
    served = start()
    served.collect([served.submit_read("f002", 0, 4096)])
    before = served.worker()
    served.session.arm_failpoint(LOGGED, action=BREAK_OUT)
    served.collect([served.submit_read("f002", 0, 4096)])
    served.wait_for(lambda: served.worker()["pid"] not in (0, before["pid"]))
    assert served.worker()["crashes"] == before["crashes"] + 1
    log = served.daemon.log.read_text()
    assert "break-out: file: Operation not permitted" in log
    assert "break-out: socket" not in log
    assert "made a system call that its sandbox forbids" in log
    served.check_ring()


def as_on_a_lesser_kernel(folder: Path, *missing: int) -> Path:
    """A program that is the daemon on a kernel without the system calls *missing*."""
    program = folder / "daemon"
    numbers = ",".join(map(str, missing))
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} {lesser_kernel.__file__} {numbers} {PROGRAM} "$@"\n'
    )
    program.chmod(0o755)
    return program


def read_one(session: Session, fe: Frontend, image: MadeImage) -> None:
    """Reads a file through the worker."""
    from virtiofsd_rafs.fuse import Opcode

    node = fe.resolve("f003").nodeid
    args = bytes(8) + (0).to_bytes(8, "little") + (4096).to_bytes(4, "little") + bytes(20)
    reply = fe.wait(fe.request(Opcode.READ, node, args, 4096), 30)
    assert (reply.error, reply.data) == (0, image.files["f003"][:4096])


@pytest.mark.parametrize(("missing", "part"), [(LANDLOCK, "Landlock"), ((SECCOMP,), "seccomp")])
def test_auto_takes_what_there_is(
    made_image: MadeImage,
    registry_sim: RegistrySimulator,
    short_dir: Path,
    missing: tuple[int, ...],
    part: str,
) -> None:
    registry_sim.store.add_build("app", "1", made_image.out)
    program = as_on_a_lesser_kernel(short_dir, *missing)
    with (
        run_daemon(registry_sim, short_dir, program=program) as daemon,
        Frontend.connect(daemon.socket) as fe,
    ):
        fe.start()
        fe.init()
        session = Session.attach(daemon.process.pid)
        read_one(session, fe, made_image)
        status: dict[str, Any] = daemon.status()["sandbox"]
        assert status["complete"] is False
        assert (status["seccomp"], status["landlock_abi"]) == (
            (True, 0) if part == "Landlock" else (False, ABI)
        )
        log = daemon.log.read_text()
        assert "the sandbox is not complete: the kernel lacks" in log
        if part == "seccomp":
            # What remains is seen from inside.
            session.arm_failpoint(LOGGED, action=BREAK_OUT)
            read_one(session, fe, made_image)
            log = daemon.log.read_text()
            assert "break-out: file: Permission denied" in log
            assert "break-out: socket: open" in log
            # TCP is confined since Linux 6.7.
            assert ABI < 4 or "break-out: connect: Permission denied" in log


@pytest.mark.parametrize("missing", [LANDLOCK, (SECCOMP,)])
def test_strict_refuses_to_be_less(short_dir: Path, missing: tuple[int, ...]) -> None:
    program = as_on_a_lesser_kernel(short_dir, *missing)
    options = ["serve", "host/app:1", "--socket-path", str(short_dir / "s"), "--sandbox", "strict"]
    result = subprocess.run([program, *options], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 7
    assert "sandbox.unavailable: --sandbox strict: the kernel lacks" in result.stderr
    assert list(short_dir.glob("s*")) == []


def test_strict_starts_where_all_is_there(start: Callable[..., Served]) -> None:
    strict = start("--sandbox", "strict")
    assert strict.daemon.status()["sandbox"]["mode"] == "strict"
    assert {proc_status(pid)["Seccomp"] for pid in pids(strict).values()} == {"2"}


def test_none_is_none(start: Callable[..., Served]) -> None:
    served = start("--sandbox", "none")
    served.collect([served.submit_read("f001", 0, 4096)])
    assert served.daemon.status()["sandbox"] == {"mode": "none"}
    ours = proc_status(os.getpid())
    assert {proc_status(pid)["Seccomp"] for pid in pids(served).values()} == {ours["Seccomp"]}


def test_control_cannot_read_what_it_was_not_told(
    start: Callable[..., Served],
    registry_sim: RegistrySimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A helper is started, and may look where helpers look; not into a foreign folder."""
    secret = tmp_path / "foreign" / "secret"
    secret.parent.mkdir()
    secret.write_text("hidden")
    told = tmp_path / "told"
    told.mkdir()
    programs = tmp_path / "programs"
    programs.mkdir()
    helper = programs / "docker-credential-curious"
    helper.write_text(
        f"#!/bin/sh\ncat {secret} >{told}/copy 2>{told}/error\n"
        """printf '{"Username":"me","Secret":"hunter2"}'\n"""
    )
    helper.chmod(0o755)
    docker = tmp_path / "docker"
    docker.mkdir()
    (docker / "config.json").write_text('{"credsStore": "curious"}')
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    registry_sim.gate.auth = Auth("basic", "me", "hunter2")
    served = start("--sandbox-allow", str(told))
    served.collect([served.submit_read("f001", 0, 4096)])
    assert (told / "copy").read_text() == ""
    assert "Permission denied" in (told / "error").read_text()


def test_homes_and_sockets_folders_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from virtiofsd_rafs.config import ServeConfig

    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "auth.json").write_text("{}")
    (home / "sub" / "image.boot").write_bytes(b"")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sys, "path", [str(home), f"{home}/", *sys.path])  # python -m from a home
    config = ServeConfig(
        image=str(home / "sub" / "image.boot"),
        blob_dir=home / "sub",
        config_file=home / "auth.json",
        socket_path=tmp_path / "run" / "s",
        api_socket=tmp_path / "run" / "a",
        cache_dir=tmp_path / "cache",
    )
    allowed = {path: access for access, path in sandbox.allowed(config)}
    assert not {str(home), f"{home}/"} & set(allowed)
    assert not {"/", "/home", "/root", "/tmp", "/run", "/var"} & set(allowed)
    assert allowed[str(home / "auth.json")] == b"r"
    assert allowed[str(home / "sub")] == b"r"
    assert allowed[str(tmp_path / "run")] == b"d"
    assert [
        path
        for path, access in allowed.items()
        if access == b"w" and str(tmp_path) in path and str(home) not in path
    ] == [str(tmp_path / "cache")]


def test_blobs_may_be_links_to_another_folder(made_image: MadeImage, short_dir: Path) -> None:
    """As stores make them that share blobs between images."""
    folder, store = short_dir / "blobs", short_dir / "store"
    folder.mkdir()
    store.mkdir()
    for path in made_image.out.iterdir():
        if path.name != BOOTSTRAP_NAME:
            (store / path.name).write_bytes(path.read_bytes())
            (folder / path.name).symlink_to(store / path.name)
    bootstrap = short_dir / "image" / "image.boot"
    bootstrap.parent.mkdir()
    bootstrap.write_bytes((made_image.out / BOOTSTRAP_NAME).read_bytes())
    options = ["--blob-dir", str(folder), "--cache-dir", str(short_dir / "cache"), "--io-deadline", "10"]
    with Daemon(str(bootstrap), short_dir, short_dir / "log", options) as daemon:
        daemon.wait_ready()
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            fe.init()
            assert fe.read(fe.resolve("f003").nodeid, 0, 4096) == made_image.files["f003"][:4096]
