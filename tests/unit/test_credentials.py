"""Files with credentials, and credential helpers: real little programs on the PATH."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.backends.credentials import CredentialStore, Found, config_paths, run_helper
from virtiofsd_rafs.errors import AuthError, BackendTimeout
from virtiofsd_rafs.registry.auth import Credentials, credentials_of
from virtiofsd_rafs.registry.docker_config import parse_docker_config
from virtiofsd_rafs.registry.helper import helper_program, helper_question, parse_helper_reply
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who is logged in nowhere, with a PATH of their own in front."""
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def helper(home: Path) -> Callable[[str, str], Path]:
    """``helper(name, script)`` puts docker-credential-NAME on the PATH; returns the log of its questions."""

    def install(name: str, script: str) -> Path:
        log = home / f"{name}.log"
        program = home / "bin" / f"docker-credential-{name}"
        program.write_text(f'#!/bin/sh\nread -r host\necho "$1 $host" >> {log}\n{script}\n')
        program.chmod(0o755)
        log.touch()
        return log

    return install


def write(path: Path, **config: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def answers(user: str, secret: str) -> str:
    return f"""echo '{{"ServerURL":"x","Username":"{user}","Secret":"{secret}"}}'"""


def user_of(found: Found) -> str | None:
    return found.credentials.username if found.credentials is not None else None


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (another process)
            await asyncio.sleep(0.01)


# -- pure --------------------------------------------------------------------------------------------------


def test_the_longest_key_that_fits_decides() -> None:
    config = parse_docker_config(
        json.dumps(
            {
                "auths": {
                    "quay.io": auth("host", "p"),
                    "quay.io/team": auth("team", "p"),
                    "quay.io/team/app": auth("app", "p"),
                    "old.example/v2/": auth("old", "p"),
                    "https://index.docker.io/v1/": auth("hub", "p"),
                    "docker.io/library": auth("library", "p"),
                    "only.example/team": auth("only", "p"),
                }
            }
        ).encode()
    )

    def user(host: str, repository: str = "") -> str | None:
        found = config.lookup(host, repository)
        return found.username if found else None

    assert user("quay.io") == "host"
    assert user("quay.io", "team") == "team"
    assert user("quay.io", "team/app") == "app"
    assert user("quay.io", "team/app/deep") == "app"
    assert user("quay.io", "team/application") == "team"
    assert user("quay.io", "teams/app") == "host"
    assert user("old.example", "a/b") == "old"
    assert user("docker.io", "library/nginx") == "library"
    assert user("registry-1.docker.io", "me/app") == "hub"
    assert user("only.example", "other/app") is None


@pytest.mark.parametrize("name", ["", "../evil", "a/b", "-x", ".x", "a b", "x\n", "a" * 65, "$(id)"])
def test_names_that_no_helper_has(name: str) -> None:
    with pytest.raises(AuthError, match="impossible name"):
        helper_program(name)


def test_helpers_are_asked_as_docker_asks() -> None:
    assert helper_program("ecr-login") == "docker-credential-ecr-login"
    assert helper_question("docker.io") == b"https://index.docker.io/v1/\n"
    assert helper_question("reg.example:5000") == b"reg.example:5000\n"


def test_what_helpers_answer() -> None:
    def reply(user: str, secret: str) -> bytes:
        return json.dumps({"ServerURL": "x", "Username": user, "Secret": secret}).encode()

    assert parse_helper_reply("h", 0, reply("me", "pw")) == Credentials("me", Secret("pw"))
    assert parse_helper_reply("h", 0, reply("<token>", "idt")) == Credentials("", Secret(""), Secret("idt"))
    assert parse_helper_reply("h", 0, reply("me", "")) is None
    assert parse_helper_reply("h", 1, b"credentials not found in native keychain\n") is None


@given(status=st.sampled_from([0, 1, 127, -9]), output=st.binary(max_size=60))
def test_nonsense_from_a_helper_is_not_shown(status: int, output: bytes) -> None:
    canary = b"hunter2"
    with pytest.raises(AuthError, match="docker-credential-h") as e:
        parse_helper_reply("h", status, canary + output + canary)
    assert "hunter2" not in str(e.value)
    assert e.value.__cause__ is None


@pytest.mark.parametrize("value", ["hunter2", "aHVudGVyMg==", "\xff"])
def test_auth_that_is_none_is_not_shown(value: str) -> None:
    from virtiofsd_rafs.errors import ConfigError

    with pytest.raises(ConfigError) as e:
        credentials_of(Secret(value), "registry_auth")
    assert value not in str(e.value)
    assert e.value.__cause__ is None


# -- files -------------------------------------------------------------------------------------------------


def test_the_usual_files() -> None:
    everything = {
        "HOME": "/h",
        "DOCKER_CONFIG": "/d",
        "REGISTRY_AUTH_FILE": "/r.json",
        "XDG_RUNTIME_DIR": "/x",
        "XDG_CONFIG_HOME": "/c",
    }
    assert config_paths(everything) == [Path("/d/config.json"), Path("/r.json")]
    del everything["REGISTRY_AUTH_FILE"]
    assert config_paths(everything) == [
        Path("/d/config.json"),
        Path("/x/containers/auth.json"),
        Path("/c/containers/auth.json"),
    ]
    assert config_paths({"HOME": "/h"}) == [
        Path("/h/.docker/config.json"),
        Path(f"/run/containers/{os.getuid()}/auth.json"),
        Path("/h/.config/containers/auth.json"),
    ]


async def test_dockers_file_comes_before_podmans(home: Path) -> None:
    write(home / ".docker/config.json", auths={"one.example": auth("docker", "p")})
    write(
        home / "run/containers/auth.json",
        auths={"one.example": auth("podman", "p"), "two.example/ns": auth("scoped", "p")},
    )
    store = CredentialStore()
    assert user_of(await store.find("one.example", "a/b")) == "docker"
    assert user_of(await store.find("two.example", "ns/app")) == "scoped"
    assert user_of(await store.find("two.example", "other/app")) is None
    assert (await store.find("two.example", "ns/app")).origin.endswith("run/containers/auth.json")


async def test_an_auth_file_is_the_only_one(home: Path) -> None:
    write(home / ".docker/config.json", auths={"one.example": auth("docker", "p")})
    write(home / "mine.json", auths={"two.example": auth("mine", "p")})
    store = CredentialStore(home / "mine.json")
    assert user_of(await store.find("one.example")) is None
    assert user_of(await store.find("two.example")) == "mine"
    with pytest.raises(AuthError, match="--auth-file"):
        CredentialStore(home / "missing.json")


async def test_a_file_is_read_again_when_it_changed(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = home / ".docker/config.json"
    store = CredentialStore()
    assert await store.find("reg.example") == Found()
    write(path, auths={"reg.example": auth("first", "p")})
    assert user_of(await store.find("reg.example")) == "first"
    # As docker and podman write it: a new file is renamed over the old one.
    write(home / "new", auths={"reg.example": auth("other", "p")})
    (home / "new").rename(path)
    assert user_of(await store.find("reg.example")) == "other"
    path.write_text('{"auths": {"reg.example": {"auth": "hunter2"}}}')
    assert user_of(await store.find("reg.example")) == "other"
    assert "going on with what it held" in caplog.text
    assert "hunter2" not in caplog.text
    path.unlink()
    assert user_of(await store.find("reg.example")) is None


# -- helpers -----------------------------------------------------------------------------------------------


async def test_a_helper_is_asked(home: Path, helper: Callable[[str, str], Path]) -> None:
    log = helper("mine", answers("me", "pw"))
    write(home / ".docker/config.json", credHelpers={"reg.example:5000": "mine"})
    store = CredentialStore()
    found = await store.find("reg.example:5000", "a/b")
    assert found == Found(Credentials("me", Secret("pw")), "the credential helper mine")
    assert await store.find("other.example") == Found()
    assert log.read_text() == "get reg.example:5000\n"


async def test_helpers_come_before_entries(home: Path, helper: Callable[[str, str], Path]) -> None:
    helper("own", answers("own", "p"))
    helper(
        "all",
        'case "$host" in b.*) ' + answers("all", "p") + ";; *) echo credentials not found; exit 1;; esac",
    )
    hosts = {f"{name}.example": auth("entry", "p") for name in "abc"}
    write(home / ".docker/config.json", auths=hosts, credsStore="all", credHelpers={"a.example": "own"})
    store = CredentialStore()
    assert [user_of(await store.find(host)) for host in hosts] == ["own", "all", "entry"]


async def test_a_helper_is_asked_once_until_it_was_wrong(
    home: Path, helper: Callable[[str, str], Path]
) -> None:
    """As with ECR: what it said is good for hours, and then not any more."""
    script = f"""printf '{{"Username":"AWS","Secret":"pw%s"}}' "$(wc -l < {home}/ecr.log)\""""
    log = helper("ecr", script)
    write(home / ".docker/config.json", credHelpers={"reg.example": "ecr"})
    store = CredentialStore(helper_pause_s=0.0)
    first = await asyncio.gather(*(store.find("reg.example") for _ in range(20)))
    assert {found.credentials for found in first} == {first[0].credentials}
    again = await store.find("reg.example")
    assert again == first[0]
    assert len(log.read_text().splitlines()) == 1
    renewed = await asyncio.gather(
        *(store.find("reg.example", refused=first[0].credentials) for _ in range(20))
    )
    assert renewed[0].credentials != first[0].credentials
    assert len({found.credentials for found in renewed}) == 1
    assert len(log.read_text().splitlines()) == 2


async def test_a_helper_that_repeats_itself_is_left_alone(
    home: Path, helper: Callable[[str, str], Path]
) -> None:
    log = helper("stale", answers("me", "old"))
    write(home / ".docker/config.json", credHelpers={"reg.example": "stale"})
    store = CredentialStore(helper_pause_s=60.0)
    found = await store.find("reg.example")
    for _ in range(10):
        assert await store.find("reg.example", refused=found.credentials) == found
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo hunter2; exit 1", "code 1"),
        ("echo hunter2 >&2; exit 3", "code 3"),
        ("echo hunter2", "no JSON"),
        ('echo \'{"Secret": "hunter2"}\'', "no Username"),
        ("kill -9 $$", "signal 9"),
        ("head -c 2000000 /dev/zero", "more than"),
    ],
)
async def test_helpers_that_fail(
    home: Path, helper: Callable[[str, str], Path], script: str, error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    helper("bad", script)
    with pytest.raises(AuthError, match=error) as e:
        await run_helper("bad", "reg.example", timeout_s=30)
    assert "docker-credential-bad" in str(e.value)
    assert e.value.remedy
    assert "hunter2" not in str(e.value) + capfd.readouterr().err


async def test_a_helper_that_is_not_there(home: Path) -> None:
    write(home / ".docker/config.json", credHelpers={"reg.example": "nowhere"})
    with pytest.raises(AuthError, match="docker-credential-nowhere is not installed"):
        await CredentialStore().find("reg.example")
    # One for everything is no reason to give up: most registries let anybody in.
    write(home / ".docker/config.json", credsStore="nowhere")
    found = await CredentialStore().find("reg.example")
    assert found.credentials is None
    assert isinstance(found.trouble, AuthError)


async def test_a_helper_that_hangs_is_ended_with_its_children(
    home: Path, helper: Callable[[str, str], Path]
) -> None:
    """And the event loop goes on meanwhile."""
    helper("slow", f"sleep 1000 & echo $! > {home}/child; wait")
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(BackendTimeout, match="docker-credential-slow did not answer"):
        await run_helper("slow", "reg.example", timeout_s=0.5)
    ticking.cancel()
    assert ticks > 5
    await until(lambda: not running(int((home / "child").read_text())))


async def test_who_gives_up_leaves_the_helper_to_the_others(
    home: Path, helper: Callable[[str, str], Path]
) -> None:
    log = helper("calm", f"while [ ! -e {home}/go ]; do sleep 0.01; done\n{answers('me', 'pw')}")
    write(home / ".docker/config.json", credHelpers={"reg.example": "calm"})
    store = CredentialStore()
    tasks = [asyncio.create_task(store.find("reg.example")) for _ in range(3)]
    await until(log.read_text)
    tasks[0].cancel()
    (home / "go").touch()
    assert [user_of(found) for found in await asyncio.gather(*tasks[1:])] == ["me", "me"]
    assert len(log.read_text().splitlines()) == 1


async def test_closing_ends_a_helper(home: Path, helper: Callable[[str, str], Path]) -> None:
    log = helper("slow", "exec sleep 1000")
    write(home / ".docker/config.json", credHelpers={"reg.example": "slow"})
    store = CredentialStore()
    task = asyncio.create_task(store.find("reg.example"))
    await until(log.read_text)
    await store.close()
    with pytest.raises(asyncio.CancelledError):
        await task
