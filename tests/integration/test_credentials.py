"""A running daemon whose credentials end and are renewed, and all the places where they must not be seen."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

import pytest

from guest.daemon import PROGRAM, Daemon
from tests.integration.conftest import MadeImage, Served, children, kill
from tests.sim.forward_proxy import ForwardProxy
from tests.sim.gate import Auth
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.cli._api import UnixConnection
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker's config.json, which is not there yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none"))
    return tmp_path / "config.json"


def pair(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(path: Path, config: dict[str, Any]) -> None:
    """As docker does it: by a new file."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(config))
    new.rename(path)


def login(path: Path, host: str, user: str, password: str) -> None:
    write(path, {"auths": {host: {"auth": pair(user, password)}}})


def ask(daemon: Daemon, path: str, body: dict[str, str] | str | None = None) -> tuple[int, str]:
    """Status and body of GET, or of PUT with *body*, to the daemon's API."""
    connection = UnixConnection(daemon.api_socket, 30.0)
    if body is None:
        connection.request("GET", path)
    else:
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("PUT", path, body=text.encode())
    try:
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def refusals(served: Served) -> int:
    """Fetches that ended with a refusal."""
    return sum(entry["result"] == "backend.auth" for entry in served.daemon.status()["fetch_log"])


def change_password(served: Served, kind: str, password: str) -> None:
    """The registry wants *password* from now on, and no token is good any more."""
    served.sim.gate.auth = Auth(kind, "me", password)
    served.sim.revoke_tokens()


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_a_password_changes_under_a_running_guest(
    start: Callable[..., Served], registry_sim: RegistrySimulator, docker_config: Path, kind: str
) -> None:
    """Reads wait while the registry refuses, and are answered as soon as the new password is known."""
    registry_sim.gate.auth = Auth(kind, "me", "one")
    login(docker_config, registry_sim.host, "me", "one")
    served = start("--amplify", "0")
    rng = random.Random(5)
    served.collect(served.random_reads(rng, 16))

    def refused(password: str) -> list[Any]:
        """Reads that wait, of chunks that nobody has read so far."""
        change_password(served, kind, password)
        before = refusals(served)
        reads = served.random_reads(rng, 32)
        served.wait_for(lambda: served.parked() > 0 and refusals(served) > before)
        return reads

    reads = refused("two")
    login(docker_config, registry_sim.host, "me", "two")
    served.collect(reads)

    reads = refused("three")
    body = {"registry_auth": pair("me", "three")}
    assert ask(served.daemon, "/api/v1/config?id=/", body) == (204, "")
    served.collect(reads)

    # What came by the API is known to the next control process, and never was in any file.
    control = served.session.status()["processes"]["control"]["pid"]
    kill(control)
    served.wait_for(lambda: served.session.status()["processes"]["control"]["pid"] not in (0, control))
    served.sim.revoke_tokens()
    served.collect(served.random_reads(rng, 64))

    served.check_ring()
    assert served.session.status()["counters"]["errors"] == 0


def test_a_helpers_password_ends_under_a_running_guest(
    start: Callable[..., Served],
    registry_sim: RegistrySimulator,
    docker_config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No read even fails once: the helper is asked again within the request that was refused."""
    folder = docker_config.parent
    (folder / "password").write_text("one")
    helper = folder / "docker-credential-ecr-login"
    helper.write_text(
        f"#!/bin/sh\necho $PPID >> {folder}/asked\n"
        f"""printf '{{"Username":"AWS","Secret":"%s"}}' "$(cat {folder}/password)"\n"""
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    write(docker_config, {"credHelpers": {registry_sim.host: "ecr-login"}})
    registry_sim.gate.auth = Auth("basic", "AWS", "one")
    # This one keeps a record, which the sandbox of the daemon would not let it write.
    served = start("--amplify", "0", "--sandbox-allow", str(folder))
    rng = random.Random(6)
    served.collect(served.random_reads(rng))
    asked = (folder / "asked").read_text().split()
    time.sleep(5.1)  # it is not asked again sooner than that: see credentials.HELPER_PAUSE_S
    (folder / "password").write_text("two")
    registry_sim.gate.auth = Auth("basic", "AWS", "two")
    served.collect(served.random_reads(rng))
    assert refusals(served) == 0
    pids = (folder / "asked").read_text().split()
    assert len(pids) == len(asked) + 1
    # Control alone runs helpers.
    assert set(pids) == {str(served.session.status()["processes"]["control"]["pid"])}
    assert served.session.status()["counters"]["errors"] == 0


def test_a_mirror_that_damages_everything_is_survived(
    start: Callable[..., Served], registry_sim: RegistrySimulator, made_image: MadeImage
) -> None:
    with RegistrySimulator() as mirror:
        mirror.store.add_build("app", "1", made_image.out)
        served = start("--amplify", "0", "--mirror", mirror.url)
        served.collect(served.random_reads(random.Random(7)))
        assert len(registry_sim.requests("blob", "GET")) == 0
        mirror.fault("corrupt", where="blob")
        before = len(mirror.requests("blob"))
        served.collect(served.random_reads(random.Random(8), 64))
        sources = served.daemon.status()["agent"]["sources"]
        assert [place["source"] for place in sources] == [mirror.host, "registry"]
        assert sources[0]["errors"] > 0
        assert sources[0]["state"] != "well"
        # What was under way, and a probe; then it was left alone.
        assert len(mirror.requests("blob")) - before <= 2 * 8
        assert served.session.status()["counters"]["errors"] == 0
        text = ask(served.daemon, "/metrics")[1]
        assert f'virtiofsd_rafs_source_errors_total{{source="{mirror.host}"}}' in text
        served.check_ring()


# -- what must not be seen ---------------------------------------------------------------------------------

CANARIES = {
    name: f"c4nary-{name}/+&é%"
    for name in ("file", "put", "wrong", "helper", "stderr", "proxy", "token", "mirror", "mistake")
}


API = (
    *("/api/v1/daemon", "/api/v1/status", "/api/v1/trace", "/api/v1/config?id=/"),
    *("/metrics", "/readyz", "/healthz", "/nowhere"),
)


def spellings(secret: str) -> set[str]:
    """*secret* as it could turn up: plain, quoted for a URL, in JSON, in base64 alone or behind a user."""
    found = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    for data in (secret, f"me:{secret}"):
        encoded = base64.b64encode(data.encode()).decode()
        found |= {encoded, encoded.rstrip("="), quote(encoded, safe="")}
    return found


def seen(text: str) -> list[str]:
    """The canaries in *text*, in any spelling."""
    return [name for name, secret in CANARIES.items() if any(s in text for s in spellings(secret))]


def in_memory(pid: int) -> list[str]:
    """The canaries in a process's own memory; what it shares with the VM is left out."""
    found = set()
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, *rest = line.split()
            if mode[0] != "r" or "s" in mode or rest[-1].startswith("[v"):
                continue
            first, end = (int(number, 16) for number in span.split("-"))
            memory.seek(first)
            data = memory.read(end - first)
            found |= {name for name, secret in CANARIES.items() if any(s in data for s in _bytes(secret))}
    return sorted(found)


def _bytes(secret: str) -> list[bytes]:
    return [s.encode() for s in (secret, pair("me", secret), quote(secret, safe=""))]


def processes(daemon: Daemon) -> list[int]:
    """Keeper, worker and control, and what they started."""
    found = [daemon.process.pid]
    for pid in found:
        found += children(pid)
    return found


def shown(daemon: Daemon) -> list[str]:
    """The canaries in what the API answers and the kernel tells of the daemon."""
    texts = {path: ask(daemon, path)[1] for path in API}
    for pid in processes(daemon):
        for file in ("cmdline", "environ"):
            texts[f"{file} of {pid}"] = Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace")
    return [f"{canary} in {where}" for where, text in texts.items() for canary in seen(text)]


def test_the_test_finds_canaries() -> None:
    for name, secret in CANARIES.items():
        for text in (secret, quote(secret, safe=""), pair("me", secret), json.dumps({"x": secret})):
            assert seen(f"...{text}...") == [name]


def test_secrets_are_nowhere_to_be_seen(
    made_image: MadeImage,
    registry_sim: RegistrySimulator,
    short_dir: Path,
    docker_config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every way in, every kind of refusal, at debug level; then everything that can be looked at."""
    folder = docker_config.parent
    seen_now: list[str] = []
    with ExitStack() as stack:
        mirror = stack.enter_context(RegistrySimulator(auth=Auth("basic", "me", CANARIES["mirror"])))
        proxy = stack.enter_context(ForwardProxy(auth=f"me:{CANARIES['proxy']}"))
        sim = registry_sim
        for registry in (sim, mirror):
            registry.store.add_build("app", "1", made_image.out)
        name = f"registry.test:{sim.port}"
        monkeypatch.setenv("HTTP_PROXY", f"http://me:{quote(CANARIES['proxy'], safe='')}@{proxy.host}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARIES["token"])
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        helper = folder / "docker-credential-canary"
        helper.write_text(
            f"#!/bin/sh\necho '{CANARIES['stderr']}' >&2\n[ -e {folder}/fail ] && echo '{CANARIES['stderr']}'"
            f" && exit 1\nprintf '%s' '{json.dumps({'Username': 'me', 'Secret': CANARIES['mirror']})}'\n"
        )
        helper.chmod(0o755)
        auths = {name: {"auth": pair("me", CANARIES["file"])}}
        write(docker_config, {"auths": auths, "credHelpers": {mirror.host: "canary"}})
        sim.gate.auth = Auth("bearer", "me", CANARIES["file"])

        options = ["--plain-http", "--cache-dir", str(short_dir / "cache"), "--log-level", "debug"]
        options += ["--mirror", mirror.url, "--amplify", "0"]
        daemon = stack.enter_context(Daemon(f"{name}/app:1", short_dir, short_dir / "log", options))
        daemon.wait_ready()
        fe = stack.enter_context(Frontend.connect(daemon.socket))
        fe.start()
        fe.init()
        served = Served(daemon, Session.attach(daemon.process.pid), made_image, sim, fe)
        rng = random.Random(9)

        def look() -> None:
            seen_now.extend(shown(daemon))

        # Neither those who hold the VM's memory nor those who read what it says have a secret anywhere.
        control = served.session.status()["processes"]["control"]["pid"]
        for pid in processes(daemon):
            assert in_memory(pid) == [] or pid == control
        served.collect(served.random_reads(rng))  # the mirror, by its helper
        assert mirror.requests("blob")
        look()
        mirror.fault("corrupt", where="blob", times=2)
        served.collect(served.random_reads(rng))  # the registry, by the file and the proxy
        assert sim.requests("token")
        assert proxy.log
        (folder / "fail").touch()
        mirror.gate.auth = Auth("basic", "me", "other")
        change_password(served, "bearer", CANARIES["put"])
        reads = served.random_reads(rng)
        served.wait_for(lambda: served.parked() > 0 and refusals(served) > 0)
        look()
        for body in (
            {"registry_auth": pair("me", CANARIES["wrong"])},
            {"registry_auth": CANARIES["mistake"]},
            {"registry_token": CANARIES["token"]},
            {"proxy_url": f"socks5://me:{CANARIES['mistake']}@x"},
            {"proxy_url": CANARIES["mistake"]},
            {"access_key_secret": CANARIES["token"]},
            CANARIES["mistake"],
        ):
            seen_now += seen(ask(daemon, "/api/v1/config?id=/", body)[1])
        look()
        assert ask(daemon, "/api/v1/config?id=/", {"registry_auth": pair("me", CANARIES["put"])})[0] == 204
        served.collect(reads)
        control = served.session.status()["processes"]["control"]["pid"]
        kill(control)
        served.wait_for(lambda: served.session.status()["processes"]["control"]["pid"] not in (0, control))
        kill(served.worker()["pid"])
        served.collect(served.random_reads(rng))
        look()
        assert in_memory(served.worker()["pid"]) == []
        # Commands that fail, with the same credentials around.
        socket = str(daemon.socket)
        by_proxy = f"http://me:{quote(CANARIES['mistake'])}@x"
        for command in (
            ["status", "--socket-path", socket],
            ["status", "--json", "--socket-path", socket],
            ["inspect", "--plain-http", "--mirror", f"http://me:{CANARIES['mistake']}@x", f"{name}/app:1"],
            ["inspect", "--plain-http", "--proxy", by_proxy, f"{name}/app:1"],
            ["inspect", "--plain-http", f"me:{CANARIES['mistake']}@{name}/app:1"],
            ["inspect", "--plain-http", "--pull", "always", f"{name}/none:1"],
            ["inspect", "--plain-http", "--mirror", mirror.url, f"{name}/none:2"],
        ):
            result = subprocess.run(
                [PROGRAM, *command], capture_output=True, text=True, timeout=60, check=False
            )
            assert "Traceback" not in result.stderr
            seen_now += [f"{s} by {command}" for s in seen(result.stdout + result.stderr)]
    log = (short_dir / "log").read_text()
    assert "renewed by the API" in log
    assert "docker-credential-canary" in log
    assert seen_now == []
    assert seen(log) == []


@pytest.mark.parametrize("kind", ["registry", "s3", "oss", "http-proxy"])
def test_secrets_of_a_configuration_file_are_nowhere_to_be_seen(
    made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path, kind: str
) -> None:
    """All kinds of back-ends that are refused, through a proxy with a password."""
    keys = {"access_key_id": "id", "access_key_secret": CANARIES["file"], "bucket_name": "bucket"}
    settings: dict[str, dict[str, Any]] = {
        "registry": {"host": registry_sim.host, "repo": "app", "auth": pair("me", CANARIES["file"])},
        "s3": {"endpoint": registry_sim.host, "region": "x", **keys},
        "oss": {"endpoint": registry_sim.host, **keys},
        "http-proxy": {"addr": registry_sim.url, "path": "/blobs"},
    }
    registry_sim.gate.auth = Auth("basic", "me", "other")
    with ForwardProxy(auth=f"me:{CANARIES['proxy']}") as proxy:
        by_proxy = {"url": f"http://me:{quote(CANARIES['proxy'], safe='')}@{proxy.host}", "fallback": False}
        backend = {"type": kind, "config": {"scheme": "http", "proxy": by_proxy, **settings[kind]}}
        config = short_dir / "config.json"
        config.write_text(json.dumps({"device": {"backend": backend}, "mode": "direct"}))
        options = ["--config", str(config), "--cache-dir", str(short_dir / "cache"), "--log-level", "debug"]
        with Daemon(str(made_image.out / BOOTSTRAP_NAME), short_dir, short_dir / "log", options) as daemon:
            daemon.wait_ready()
            with Frontend.connect(daemon.socket) as fe:
                fe.start()
                fe.init()
                session = Session.attach(daemon.process.pid)
                served = Served(daemon, session, made_image, registry_sim, fe)
                served.random_reads(random.Random(1), 4)
                served.wait_for(lambda: daemon.status()["fetch_log"])
                assert shown(daemon) == []
                control = session.status()["processes"]["control"]["pid"]
                assert [pid for pid in processes(daemon) if in_memory(pid)] == [control]
                assert {entry["result"] for entry in daemon.status()["fetch_log"]} <= {
                    "backend.auth",
                    "backend.not-found",
                }
        assert proxy.log
    assert seen((short_dir / "log").read_text()) == []
