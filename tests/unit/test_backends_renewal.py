"""Tokens and passwords that end while readers read."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.sim.gate import Auth
from tests.sim.sources import Clock, nobody
from virtiofsd_rafs.backends import client as client_module
from virtiofsd_rafs.backends.base import CredentialUpdate
from virtiofsd_rafs.backends.config import RegistryBackend
from virtiofsd_rafs.backends.oci import OciSource
from virtiofsd_rafs.errors import AuthError, ConfigError, Unreachable
from virtiofsd_rafs.registry.auth import REFUSED_PAUSE_S
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.sim.registry import RegistrySimulator

BLOB = random.Random(2).randbytes(200_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock.of(monkeypatch, client_module)


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker's config.json, which is not there yet."""
    return nobody(monkeypatch, tmp_path)


@pytest.fixture
def sim(registry_sim: RegistrySimulator) -> RegistrySimulator:
    registry_sim.store.add_blob(BLOB)
    return registry_sim


@pytest.fixture
def blob_id(sim: RegistrySimulator) -> str:
    return next(iter(sim.store.blobs)).removeprefix("sha256:")


@pytest.fixture
async def read(sim: RegistrySimulator, blob_id: str) -> AsyncIterator[Callable[..., Any]]:
    """``read(offset)``: ten bytes, checked. ``read.open(...)`` opens the source, else the first read does."""
    opened: list[OciSource] = []

    def open_one(**options: Any) -> OciSource:
        opened.append(OciSource(RegistryBackend(host=sim.host, repository="a/b", scheme="http", **options)))
        return opened[0]

    async def read(offset: int = 0) -> None:
        source = opened[0] if opened else open_one()
        assert await source.read_range(blob_id, offset, 10) == BLOB[offset : offset + 10]

    read.open = open_one  # type: ignore[attr-defined]
    read.source = lambda: opened[0]  # type: ignore[attr-defined]
    yield read
    for source in opened:
        await source.close()


def login(path: Path, host: str, user: str, password: str) -> None:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def pair(user: str, password: str) -> Secret:
    return Secret(base64.b64encode(f"{user}:{password}".encode()).decode())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (the simulator is in another thread)
            await asyncio.sleep(0.005)


# -- tokens ------------------------------------------------------------------------------------------------


async def test_a_token_is_renewed_while_the_old_one_is_used(
    sim: RegistrySimulator, clock: Clock, read: Callable[..., Any]
) -> None:
    sim.gate.auth = Auth("bearer", token_ttl_s=300)
    held = sim.fault("hold", where="token", skip=1)
    await read()
    clock.now += 250  # of 300
    # One renewal for all, and none of these waits for it.
    await asyncio.gather(*(read(n) for n in range(20)))
    await until(lambda: held.hits == 1)
    await asyncio.gather(*(read(n) for n in range(20)))
    assert held.hits == 1
    clock.now += 49  # now the old one is at its end, and there is nothing else to do than wait
    waiting = [asyncio.ensure_future(read(n)) for n in range(20)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    held.release()
    await asyncio.gather(*waiting)
    assert len(sim.requests("token")) == 2
    assert {r.status for r in sim.requests("blob")} == {401, 206}
    assert len([r for r in sim.requests("blob") if r.status == 401]) == 1  # the very first


async def test_an_early_renewal_that_fails_hurts_nobody(
    sim: RegistrySimulator, clock: Clock, read: Callable[..., Any]
) -> None:
    sim.gate.auth = Auth("bearer", token_ttl_s=300)
    await read()
    away = sim.fault("server-error", where="token")
    clock.now += 250
    for n in range(20):
        await read(n)
    await until(lambda: away.hits == 1)
    for n in range(20):
        await read(n)
    assert away.hits == 1  # not each request tries
    clock.now += 3
    await read()
    await until(lambda: away.hits == 2)
    clock.now += 47
    with pytest.raises(Unreachable, match="token service"):
        await read()
    away.release()
    await read()


async def test_many_readers_with_tokens_that_end_soon(
    sim: RegistrySimulator, read: Callable[..., Any]
) -> None:
    """Real clocks, tokens of a second, all of them revoked now and then: no error, and few token requests."""
    sim.gate.auth = Auth("bearer", token_ttl_s=1.0)
    sim.fault("delay", where="token", seconds=0.05)
    began = time.monotonic()
    n_reads, n_revoked = 0, 0

    async def reader(seed: int) -> None:
        nonlocal n_reads
        rng = random.Random(seed)
        while time.monotonic() < began + 4:
            await read(rng.randrange(len(BLOB) - 10))
            n_reads += 1

    async def revoker() -> None:
        nonlocal n_revoked
        while time.monotonic() < began + 4:
            await asyncio.sleep(1.3)
            sim.revoke_tokens()
            n_revoked += 1

    await asyncio.gather(*(reader(n) for n in range(32)), revoker())
    elapsed = time.monotonic() - began
    # A token serves for two thirds of its second at least; each revocation costs one more.
    assert len(sim.requests("token")) <= elapsed / 0.6 + n_revoked + 2
    assert n_reads > 100


async def test_a_token_that_is_given_is_sent_as_it_is(
    sim: RegistrySimulator, read: Callable[..., Any]
) -> None:
    sim.gate.auth = Auth("bearer", "me", "pw")
    sim.gate.tokens["given"] = sim.gate.tokens["fresh"] = time.monotonic() + 1000
    source = read.open(registry_token=Secret("given"))  # type: ignore[attr-defined]
    await read()
    assert [r.status for r in sim.requests("blob")] == [206]
    del sim.gate.tokens["given"]
    with pytest.raises(AuthError):
        await read()
    source.renew(CredentialUpdate(registry_token=Secret("fresh")))
    await read()


# -- passwords ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_a_password_that_changes(
    sim: RegistrySimulator, config: Path, read: Callable[..., Any], clock: Clock, kind: str
) -> None:
    """By the file, and by an update, with the requests that it takes and no more."""
    sim.gate.auth = Auth(kind, "me", "one")
    login(config, sim.host, "me", "one")
    await read()
    sim.gate.auth = Auth(kind, "me", "two")
    sim.revoke_tokens()
    with pytest.raises(AuthError, match=r"config\.json"):
        await read()
    asked = len(sim.log)
    for _ in range(20):
        with pytest.raises(AuthError):
            await read()
    assert len(sim.log) == asked  # a directory would have locked the account by now
    login(config, sim.host, "me", "two")
    await asyncio.gather(*(read(n) for n in range(20)))

    sim.gate.auth = Auth(kind, "me", "three")
    sim.revoke_tokens()
    with pytest.raises(AuthError):
        await read()
    source = read.source()  # type: ignore[attr-defined]
    source.renew(CredentialUpdate(registry_auth=pair("me", "three")))
    await asyncio.gather(*(read(n) for n in range(20)))

    # The registry took the wrong side for a moment: after a pause the same password is tried again.
    sim.gate.auth = Auth(kind, "me", "other")
    sim.revoke_tokens()
    with pytest.raises(AuthError):
        await read()
    sim.gate.auth = Auth(kind, "me", "three")
    with pytest.raises(AuthError):
        await read()
    clock.now += REFUSED_PAUSE_S + 1
    await read()


async def test_updates_that_are_malformed_change_nothing(
    sim: RegistrySimulator, config: Path, read: Callable[..., Any]
) -> None:
    sim.gate.auth = Auth("basic", "me", "one")
    login(config, sim.host, "me", "one")
    await read()
    source = read.source()  # type: ignore[attr-defined]
    for update in (
        CredentialUpdate(registry_auth=Secret("hunter2")),
        CredentialUpdate(registry_auth=pair("me", "two"), proxy_url=Secret("http://me:hunter2@[")),
    ):
        with pytest.raises(ConfigError) as e:
            source.renew(update)
        assert "hunter2" not in str(e.value)
    await read()


@pytest.mark.parametrize("code", [401, 403])
async def test_a_helper_is_asked_again_when_its_password_ends(
    sim: RegistrySimulator,
    config: Path,
    read: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    """ECR's passwords live for 12 hours, and are refused with 403 then."""
    (tmp_path / "password").write_text("one")
    program = tmp_path / "docker-credential-ecr-login"
    program.write_text(
        "#!/bin/sh\n"
        f"cat >> {tmp_path}/asked\n"
        f"""printf '{{"Username":"AWS","Secret":"%s"}}' "$(cat {tmp_path}/password)"\n"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with config.open("w") as f:
        json.dump({"credHelpers": {sim.host: "ecr-login"}}, f)
    sim.gate.auth = Auth("basic", "AWS", "one")
    for n in range(5):
        await read(n)
    (tmp_path / "password").write_text("two")
    sim.gate.auth = Auth("basic", "AWS", "two")
    sim.gate.refusal_status = code
    source = read.source()  # type: ignore[attr-defined]
    source._registry._store._helper_pause_s = 0.0
    await asyncio.gather(*(read(n) for n in range(20)))
    assert (tmp_path / "asked").read_text() == f"{sim.host}\n" * 2
