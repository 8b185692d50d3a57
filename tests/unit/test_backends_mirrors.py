"""Mirrors in their order, the registry last: who is asked, who rests, and what nobody is told."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.sim.gate import Auth
from tests.sim.images import make_image
from tests.sim.registry import RegistrySimulator
from tests.sim.sources import Clock, nobody
from virtiofsd_rafs.backends import mirrors as mirrors_module
from virtiofsd_rafs.backends.base import ANSWERED_BY, Distrustful, Renewable, Reporting
from virtiofsd_rafs.backends.config import HttpOptions, Mirror, RegistryAccess, RegistryBackend
from virtiofsd_rafs.backends.health import REST_CAP_S, REST_FIRST_S, Health, State
from virtiofsd_rafs.backends.oci import OciSource
from virtiofsd_rafs.errors import AuthError, ConfigError, DigestMismatch, NotFound, Unreachable
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.image.resolve import resolve_image
from virtiofsd_rafs.registry.protocol import Endpoint
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOB = random.Random(3).randbytes(300_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock.of(monkeypatch, mirrors_module)


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return nobody(monkeypatch, tmp_path)


class Places:
    """Two mirrors and the registry, all with the same blob."""

    def __init__(self, stack: ExitStack, n_mirrors: int = 2) -> None:
        sims = [stack.enter_context(RegistrySimulator()) for _ in range(n_mirrors + 1)]
        (digest,) = {sim.store.add_blob(BLOB) for sim in sims}
        self.blob_id = digest.removeprefix("sha256:")
        *self.mirrors, self.origin = sims
        self.access = RegistryAccess(
            plain_http=True,
            mirrors=tuple(Mirror.of(sim.url) for sim in self.mirrors),
            http=HttpOptions(timeout_s=10.0),
        )

    def source(self, **changes: Any) -> OciSource:
        backend = RegistryBackend(host=self.origin.host, repository="a/b").plus(self.access)
        return OciSource(attrs.evolve(backend, **changes))

    def asked(self) -> list[int]:
        """Requests for the blob since the last call, by place."""
        sims = [*self.mirrors, self.origin]
        numbers = [len(sim.requests("blob")) for sim in sims]
        for sim in sims:
            sim.log.clear()
        return numbers


@pytest.fixture
def places() -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(stack)


def login(path: Path, host: str, pair: str) -> None:
    path.write_text(json.dumps({"auths": {host: {"auth": pair}}}))


async def read(source: OciSource, places: Places, offset: int = 0, length: int = 1000) -> str:
    """Reads and checks a range; who answered."""
    ANSWERED_BY.set("")
    assert await source.read_range(places.blob_id, offset, length) == BLOB[offset : offset + length]
    return ANSWERED_BY.get()


# -- health ------------------------------------------------------------------------------------------------


def test_a_place_rests_longer_each_time_and_is_probed_by_one() -> None:
    health = Health()
    assert health.state(0) is State.WELL
    now = 0.0
    for expected in (2, 4, 8, 16, 32, 60, 60):
        health.failed(now)
        assert health.state(now) is State.RESTING
        assert health.rests_for(now) == expected
        now += expected
        assert health.state(now) is State.DUE
        health.probe()
        assert health.state(now) is State.RESTING  # for everybody else
        health.probed()
    assert (REST_FIRST_S, REST_CAP_S) == (2, 60)
    health.succeeded()
    assert health.state(now) is State.WELL
    health.failed(now)
    assert health.rests_for(now) == 2


def test_failures_that_come_together_are_one() -> None:
    health = Health()
    for _ in range(8):
        health.failed(0.0)
    assert health.rests_for(0.0) == 2


def test_an_answer_to_an_older_request_proves_nothing() -> None:
    health = Health()
    health.failed(10.0)
    health.succeeded(9.0)
    assert health.state(10.0) is State.RESTING
    health.succeeded(11.0)
    assert health.state(11.0) is State.WELL


def test_some_failures_may_be_forgiven() -> None:
    health = Health(failure_limit=3)
    health.failed(0)
    health.failed(0)
    assert health.state(0) is State.WELL
    health.failed(0)
    assert health.state(0) is State.RESTING
    health = Health(failure_limit=3)
    health.failed(0, at_least_s=9)
    assert health.rests_for(0) == 9


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://m.example", "http://m.example"),
        ("https://m.example:5000/", "https://m.example:5000"),
        ("m.example/cache/hub", "https://m.example/cache/hub"),
        ("https://m.example/cache/v2/", "https://m.example/cache"),
        ("https://m.example/v2", "https://m.example"),
    ],
)
def test_how_mirrors_are_written(text: str, url: str) -> None:
    assert Mirror.of(text).url == url


@pytest.mark.parametrize(
    "text",
    ["", "ftp://m.example", "http://me:hunter2@m.example", "http://m:hunter2/", "https://m.example?x=1"],
)
def test_mirrors_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        Mirror.of(text)
    assert "hunter2" not in str(e.value)
    assert e.value.__cause__ is None


def test_a_mirror_is_told_whom_it_stands_for() -> None:
    endpoint = Endpoint("m.example", "a/b", prefix="/hub", namespace="docker.io")
    assert endpoint.blob_url("sha256:x") == "https://m.example/hub/v2/a/b/blobs/sha256:x?ns=docker.io"
    assert endpoint.manifest_url("1") == "https://m.example/hub/v2/a/b/manifests/1?ns=docker.io"


# -- order -------------------------------------------------------------------------------------------------


async def test_the_first_mirror_answers(places: Places) -> None:
    source = places.source()
    assert isinstance(source, Renewable)
    assert isinstance(source, Distrustful)
    assert isinstance(source, Reporting)
    assert await read(source, places) == places.mirrors[0].host
    assert places.mirrors[0].log[0].path.endswith(f"?ns={places.origin.host.replace(':', '%3A')}")
    assert places.asked() == [1, 0, 0]
    (first, second, origin) = source.report()
    assert (first.source, first.requests, first.errors, first.bytes) == (places.mirrors[0].host, 1, 0, 1000)
    assert (second.requests, origin.requests, origin.source) == (0, 0, "registry")
    await source.close()


async def test_a_mirror_that_fails_rests_and_comes_back(places: Places, clock: Clock) -> None:
    first, second = places.mirrors
    source = places.source()
    first.refuse()
    assert await read(source, places) == second.host
    for n in range(10):
        assert await read(source, places, n) == second.host
    assert [r.errors for r in source.report()] == [1, 0, 0]  # it was left alone
    assert source.report()[0].state == "resting"
    clock.now += 3
    # One of many finds out that it is still away; nobody fails.
    answers = await asyncio.gather(*(read(source, places, n) for n in range(10)))
    assert set(answers) == {second.host}
    assert [r.errors for r in source.report()] == [2, 0, 0]
    first.accept()
    clock.now += 3
    assert await read(source, places) == second.host  # it rests for 4 s now
    clock.now += 2
    assert await read(source, places) == first.host
    assert source.report()[0].state == "well"
    await source.close()


async def test_a_probe_that_hangs_keeps_nobody_waiting(
    places: Places, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors_module, "PROBE_PATIENCE_S", 0.05)
    first, second = places.mirrors
    source = places.source()
    first.refuse()
    assert await read(source, places) == second.host
    first.accept()
    hold = first.fault("hold", where="blob")
    clock.now += 3
    answers = await asyncio.gather(*(read(source, places, n) for n in range(20)))
    assert set(answers) == {second.host}
    assert hold.hits == 1
    hold.release()
    async with asyncio.timeout(30):
        while source.report()[0].state != "well":  # noqa: ASYNC110  (told by nothing)
            await asyncio.sleep(0.01)
    assert await read(source, places) == first.host
    await source.close()


async def test_everything_is_tried_before_giving_up(places: Places, clock: Clock) -> None:
    first, second = places.mirrors
    source = places.source()
    for sim in (first, second, places.origin):
        sim.refuse()
    with pytest.raises(Unreachable, match=places.origin.host):
        await read(source, places)
    # Both mirrors rest. The registry is away, so they are asked all the same.
    second.accept()
    assert await read(source, places) == second.host
    await source.close()


async def test_a_mirror_without_the_blob_is_not_asked_for_it_again(places: Places, clock: Clock) -> None:
    first, second = places.mirrors
    other = second.store.add_blob(b"other" * 1000).removeprefix("sha256:")
    source = places.source()
    for n in range(5):
        assert await source.read_range(other, n, 10) == (b"other" * 3)[n : n + 10]
    assert places.asked() == [1, 5, 0]
    assert await read(source, places) == first.host  # it is well, and has the others
    clock.now += mirrors_module.MISSING_S + 1
    await source.read_range(other, 0, 10)
    assert places.asked() == [2, 1, 0]
    with pytest.raises(NotFound, match=places.origin.host):
        await source.read_range("ab" * 32, 0, 10)
    await source.close()


async def test_wrong_bytes_are_asked_from_another_place(places: Places, clock: Clock) -> None:
    first, second = places.mirrors
    first.fault("corrupt", where="blob")
    source = places.source()
    data = await source.read_range(places.blob_id, 5000, 1000)
    assert data != BLOB[5000:6000]
    assert ANSWERED_BY.get() == first.host
    source.wrong_bytes(places.blob_id, 5000, 1000, ANSWERED_BY.get())
    assert source.report()[0].errors == 1
    clock.now += 1000  # it may be asked again, but not for these bytes
    assert await read(source, places, 5999, 10) == second.host
    assert await read(source, places, 4991, 10) == second.host
    assert (await source.read_range(places.blob_id, 6000, 10)) is not None
    assert ANSWERED_BY.get() == first.host
    # Wrong everywhere: better another try than none.
    for label in (second.host, "registry"):
        source.wrong_bytes(places.blob_id, 5000, 1000, label)
    await source.read_range(places.blob_id, 5000, 1000)
    await source.close()


async def test_a_mirror_that_lies_is_left_alone_ever_longer(places: Places, clock: Clock) -> None:
    source = places.source()
    rests = []
    for n in range(10):
        source.wrong_bytes(places.blob_id, n, 1, places.mirrors[0].host)
        rests.append(source.report()[0].rests_for_s)
        clock.now += 1000
        await source.read_range(places.blob_id, 100_000, 10)  # right again, in between
    assert rests == sorted(rests)
    assert rests[-1] == mirrors_module.WRONG_REST_CAP_S
    await source.close()


# -- credentials -------------------------------------------------------------------------------------------


async def test_a_mirror_gets_no_credentials_that_are_not_its_own(places: Places, docker_config: Path) -> None:
    first, second = places.mirrors
    pair = base64.b64encode(b"me:hunter2").decode()
    login(docker_config, places.origin.host, pair)
    for sim in (first, second, places.origin):
        sim.gate.auth = Auth("basic", "me", "hunter2")
    source = places.source(auth=Secret(pair), registry_token=Secret("t0ken"))
    assert await read(source, places) == "registry"
    for sim in (first, second):
        assert sim.requests("blob")
        assert all("Authorization" not in r.headers for r in sim.log)
    await source.close()


async def test_a_mirror_gets_its_own_credentials(places: Places, docker_config: Path) -> None:
    first, second = places.mirrors
    pair = base64.b64encode(b"mirror:pw").decode()
    login(docker_config, first.host, pair)
    first.gate.auth = Auth("bearer", "mirror", "pw")
    second.gate.auth = Auth("basic", "second", "pw2")
    mirrors = (
        Mirror.of(first.url),
        Mirror(url=second.url, auth=Secret("second:pw2"), headers=(("X-Key", Secret("k")),)),
    )
    source = places.source(mirrors=mirrors)
    assert await read(source, places) == first.host
    first.refuse()
    second.fault("redirect", where="blob", skip=1)
    assert await read(source, places) == second.host
    assert all(r.headers["X-Key"] == "k" for r in second.requests("blob"))
    assert all("X-Key" not in r.headers for r in second.requests("storage"))
    await source.close()


async def test_the_error_of_the_registry_counts_unless_a_mirror_may_recover(places: Places) -> None:
    places.origin.gate.auth = Auth("basic", "me", "pw")
    for sim in places.mirrors:
        sim.fault("not-found", where="blob")
    source = places.source()
    with pytest.raises(AuthError):
        await read(source, places)
    await source.close()
    places.mirrors[0].clear_faults()
    places.mirrors[0].fault("server-error", where="blob")
    source = places.source()
    with pytest.raises(Unreachable, match=places.mirrors[0].host):
        await read(source, places)
    await source.close()


# -- images ------------------------------------------------------------------------------------------------


async def test_an_image_from_a_mirror_while_the_registry_is_away(places: Places, tmp_path: Path) -> None:
    image = make_image(tmp_path / "made")
    first, _ = places.mirrors
    await push_image(image.folder, f"{first.host}/a/b:1", plain_http=True)
    places.origin.refuse()
    resolved = await resolve_image(
        f"{places.origin.host}/a/b:1", cache_dir=None, blob_dir=None, access=places.access
    )
    assert resolved.bootstrap == image.bootstrap


async def test_a_bootstrap_that_a_mirror_damages_comes_from_the_registry(
    places: Places, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "made")
    first, second = places.mirrors
    for sim in (first, second, places.origin):
        await push_image(image.folder, f"{sim.host}/a/b:1", plain_http=True)
    for sim in (first, second):
        sim.fault("corrupt", where="blob")
        sim.fault("corrupt", where="manifest")
    resolved = await resolve_image(
        f"{places.origin.host}/a/b:1", cache_dir=None, blob_dir=None, access=places.access, deadline=20
    )
    assert resolved.bootstrap == image.bootstrap
    places.origin.fault("corrupt", where="manifest")
    with pytest.raises(DigestMismatch):
        await resolve_image(
            f"{places.origin.host}/a/b:1", cache_dir=None, blob_dir=None, access=places.access, deadline=20
        )
