"""The registry back-end against a registry with faults: each call is one attempt with a typed end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.sim.gate import Auth
from tests.sim.registry import RegistrySimulator
from tests.sim.sources import Config, nobody
from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.config import HttpOptions, RegistryAccess
from virtiofsd_rafs.backends.oci import OciSource
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BackendTimeout,
    BadReply,
    ConfigError,
    NotFound,
    RangeIgnored,
    Throttled,
    Unreachable,
    UntrustedServer,
)
from virtiofsd_rafs.image.resolve import ResolvedImage
from virtiofsd_rafs.registry.protocol import DEFAULT_MAX_SKIP
from virtiofsd_rafs.registry.reference import parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.sim.faults import Fault
    from virtiofsd_rafs.backends.base import BlobSource

BLOB = random.Random(1).randbytes(300_000)
BLOB_ID = hashlib.sha256(BLOB).hexdigest()
DIGEST = f"sha256:{BLOB_ID}"
PLAIN = Config(RegistryAccess(plain_http=True))


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """A ``docker login``."""
    config = nobody(monkeypatch, tmp_path)

    def login(host: str, entry: dict[str, str]) -> None:
        config.write_text(json.dumps({"auths": {host: entry}}))

    return login


@pytest.fixture
def sim(registry_sim: RegistrySimulator) -> RegistrySimulator:
    registry_sim.store.add_blob(BLOB)
    return registry_sim


def source_for(sim: RegistrySimulator, config: Config | None = None) -> BlobSource:
    image = ResolvedImage("x", b"", reference=parse_reference(f"{sim.host}/a/b:1"))
    return open_source(image, config or PLAIN)


async def met(fault: Fault, times: int = 1) -> None:
    """Until *fault* has met *times* requests."""
    while fault.hits < times:  # noqa: ASYNC110  (the simulator is in another thread)
        await asyncio.sleep(0.005)


async def read(sim: RegistrySimulator, offset: int = 1000, length: int = 5000) -> bytes:
    source = source_for(sim)
    try:
        return await source.read_range(BLOB_ID, offset, length)
    finally:
        await source.close()


async def test_ranges(sim: RegistrySimulator) -> None:
    source = source_for(sim)
    wanted = [(0, 1), (0, len(BLOB)), (len(BLOB) - 1, 1), (12345, 70000)]
    got = await asyncio.gather(*(source.read_range(BLOB_ID, o, n) for o, n in wanted))
    assert got == [BLOB[o : o + n] for o, n in wanted]
    assert sorted(x for x in sim.ranges(DIGEST) if x) == sorted((o, o + n - 1) for o, n in wanted)
    assert await source.blob_size(BLOB_ID) == len(BLOB)
    await source.close()
    assert all(r.headers["Accept-Encoding"] == "identity" for r in sim.log)
    assert all("Authorization" not in r.headers for r in sim.log)


async def test_size_that_the_manifest_told_is_not_asked_for(sim: RegistrySimulator) -> None:
    reference = parse_reference(f"{sim.host}/a/b:1")
    source = open_source(ResolvedImage("x", b"", reference=reference, blob_sizes={BLOB_ID: 5}), PLAIN)
    assert await source.blob_size(BLOB_ID) == 5
    assert sim.log == []
    await source.close()


async def test_connections_are_used_again(sim: RegistrySimulator) -> None:
    """A 401, a token and a redirect must not cost a connection each."""
    sim.gate.auth = Auth("bearer")
    sim.fault("redirect", where="blob", skip=1, times=1, uses=1)
    source = source_for(sim)
    for offset in range(20):
        await source.read_range(BLOB_ID, offset, 10)
    await source.close()
    assert [r.status for r in sim.requests("blob")] == [401, 307, *[206] * 19]
    assert len({r.peer for r in sim.log if r.server == "registry"}) == 1


async def test_a_redirect_that_ended_is_not_tried_again(sim: RegistrySimulator) -> None:
    sim.fault("redirect", where="blob", times=1, uses=1)
    source = source_for(sim)
    for offset in range(5):
        await source.read_range(BLOB_ID, offset, 10)
    await source.close()
    assert [r.status for r in sim.requests("storage")] == [206, 403]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("status", Unreachable),
        ("server-error", Unreachable),
        ("throttle", Throttled),
        ("not-found", NotFound),
        ("wrong-range", BadReply),
        ("no-content-range", BadReply),
        ("short-body", BadReply),
        ("encoded", BadReply),
        ("416-wrong-length", BadReply),
        ("cut", Unreachable),
        ("reset", Unreachable),
        ("redirect-loop", BadReply),
    ],
)
async def test_fault_and_error(sim: RegistrySimulator, fault: str, error: type[BackendError]) -> None:
    sim.fault(fault, where="blob", times=6)
    with pytest.raises(error) as e:
        await read(sim)
    assert BLOB_ID[:8] in str(e.value) or sim.host in str(e.value)
    sim.clear_faults()
    assert await read(sim) == BLOB[1000:6000]


async def test_a_throttled_error_carries_the_pause(sim: RegistrySimulator) -> None:
    sim.fault("throttle", retry_after=7)
    with pytest.raises(Throttled) as e:
        await read(sim)
    assert e.value.retry_after_s == 7


async def test_416_of_a_range_behind_the_end(sim: RegistrySimulator) -> None:
    with pytest.raises(BadReply, match=f"it has {len(BLOB)}"):
        await read(sim, len(BLOB), 10)


async def test_whole_blob_instead_of_a_range_is_sliced(sim: RegistrySimulator) -> None:
    sim.fault("ignore-range", where="blob")
    assert await read(sim, 200_000, 100) == BLOB[200_000:200_100]
    assert await read(sim, 0, 100) == BLOB[:100]
    assert await read(sim, 0, len(BLOB)) == BLOB
    with pytest.raises(BadReply, match="are needed"):
        await read(sim, len(BLOB) - 10, 11)


async def test_whole_blob_is_given_up_while_it_is_deep_and_sliced_when_nothing_else_helps(
    registry_sim: RegistrySimulator,
) -> None:
    size = DEFAULT_MAX_SKIP + 100_000
    blob = bytes(size - 10) + b"0123456789"
    blob_id = registry_sim.store.add_blob(blob).removeprefix("sha256:")
    registry_sim.fault("ignore-range", where="blob")
    source = source_for(registry_sim)
    for _ in range(3):
        with pytest.raises(RangeIgnored):
            await source.read_range(blob_id, size - 10, 10)
    # Given up means given up: at most what was in the socket's buffers has travelled.
    assert all(r.sent < size for r in registry_sim.log)
    # What was learnt is not forgotten because a slice could be cut out.
    for _ in range(2):
        assert await source.read_range(blob_id, size - 10, 10) == b"0123456789"
    await source.close()


async def test_redirects_are_kept_and_carry_no_authorization(
    sim: RegistrySimulator, no_credentials: Callable[[str, dict[str, str]], None]
) -> None:
    sim.gate.auth = Auth("basic", "me", "hunter2")
    no_credentials(sim.host, {"auth": base64.b64encode(b"me:hunter2").decode()})
    sim.fault("redirect", where="blob")
    source = source_for(sim)
    for offset in range(5):
        assert await source.read_range(BLOB_ID, offset, 10) == BLOB[offset : offset + 10]
    await source.close()
    assert [r.status for r in sim.requests("blob")] == [401, 307]
    assert [r.status for r in sim.requests("storage")] == [206] * 5
    assert all("Authorization" not in r.headers for r in sim.requests("storage"))
    assert "Authorization" in sim.requests("blob")[1].headers


async def test_a_signed_url_that_ends_is_asked_for_anew(sim: RegistrySimulator) -> None:
    sim.fault("redirect", where="blob", uses=2)
    source = source_for(sim)
    for offset in range(6):
        assert await source.read_range(BLOB_ID, offset, 10) == BLOB[offset : offset + 10]
    await source.close()
    assert [r.status for r in sim.requests("blob")] == [307] * 3
    assert [r.status for r in sim.requests("storage")] == [206, 206, 403, 206, 206, 403, 206, 206]


async def test_a_signed_url_that_never_works_is_an_error(sim: RegistrySimulator) -> None:
    sim.fault("redirect", where="blob", uses=0)
    with pytest.raises(Unreachable, match="403"):
        await read(sim)


async def test_after_a_failure_of_the_storage_the_registry_is_asked_again(sim: RegistrySimulator) -> None:
    redirect = sim.fault("redirect", where="blob")
    source = source_for(sim)
    await source.read_range(BLOB_ID, 0, 10)
    sim.fault("reset", where="storage", times=2)  # once on the kept connection, once on a new one
    with pytest.raises(Unreachable):
        await source.read_range(BLOB_ID, 0, 10)
    redirect.release()
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()
    assert sim.requests()[-1].server == "registry"


async def test_size_does_not_use_head(sim: RegistrySimulator) -> None:
    sim.fault("head-403")
    sim.fault("redirect", where="blob")
    source = source_for(sim)
    assert await source.blob_size(BLOB_ID) == len(BLOB)
    await source.close()


async def test_bearer_anonymous(sim: RegistrySimulator) -> None:
    sim.gate.auth = Auth("bearer")
    source = source_for(sim)
    await asyncio.gather(*(source.read_range(BLOB_ID, n, 10) for n in range(30)))
    await source.close()
    # Thirty requests at once, one token.
    assert len(sim.requests("token")) == 1


async def test_bearer_with_password_and_expiry_mid_read(
    sim: RegistrySimulator, no_credentials: Callable[[str, dict[str, str]], None]
) -> None:
    sim.gate.auth = Auth("bearer", "me", "hunter2")
    no_credentials(sim.host, {"username": "me", "password": "hunter2"})
    source = source_for(sim)
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    sim.revoke_tokens()
    assert await source.read_range(BLOB_ID, 10, 10) == BLOB[10:20]
    sim.fault("expire-tokens", where="blob", times=1)
    assert await source.read_range(BLOB_ID, 20, 10) == BLOB[20:30]
    await source.close()
    assert len(sim.requests("token")) == 3


async def test_identity_token(
    sim: RegistrySimulator, no_credentials: Callable[[str, dict[str, str]], None]
) -> None:
    sim.gate.auth = Auth("bearer", "me", "x", identity_token="refresh-me")
    no_credentials(sim.host, {"identitytoken": "refresh-me"})
    assert await read(sim) == BLOB[1000:6000]
    assert [r.method for r in sim.requests("token")] == ["POST"]


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_wrong_password(
    sim: RegistrySimulator, no_credentials: Callable[[str, dict[str, str]], None], kind: str
) -> None:
    sim.gate.auth = Auth(kind, "me", "right")
    no_credentials(sim.host, {"username": "me", "password": "hunter2"})
    with pytest.raises(AuthError) as e:
        await read(sim)
    assert "docker login" in str(e.value)
    assert "hunter2" not in str(e.value)


async def test_no_password(sim: RegistrySimulator) -> None:
    sim.gate.auth = Auth("basic", "me", "right")
    with pytest.raises(AuthError, match="asks for a user"):
        await read(sim)


async def test_token_service_that_throttles(sim: RegistrySimulator) -> None:
    sim.gate.auth = Auth("bearer")
    sim.fault("throttle", where="token", retry_after=3, times=1)
    with pytest.raises(Throttled):
        await read(sim)
    assert await read(sim) == BLOB[1000:6000]


async def test_registry_that_is_away_for_a_while(sim: RegistrySimulator) -> None:
    source = source_for(sim)
    await source.read_range(BLOB_ID, 0, 10)
    sim.refuse()
    for _ in range(3):
        with pytest.raises(Unreachable):
            await source.read_range(BLOB_ID, 0, 10)
    sim.accept()
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()


async def test_unknown_host() -> None:
    reference = parse_reference("no-such-host.invalid/a:1")
    source = open_source(ResolvedImage("x", b"", reference=reference), PLAIN)
    with pytest.raises(Unreachable, match="no-such-host"):
        await source.read_range(BLOB_ID, 0, 10)
    await source.close()


@pytest.mark.parametrize("fault", ["hold", "stall", "slow-loris"])
async def test_no_progress_is_a_timeout(sim: RegistrySimulator, fault: str) -> None:
    sim.fault(fault, where="blob", times=1, interval=0.01)
    reference = parse_reference(f"{sim.host}/a/b:1")
    backend = RegistryAccess(plain_http=True, http=HttpOptions(timeout_s=0.5)).backend(reference)
    source = OciSource(backend)
    with pytest.raises(BackendTimeout):
        await source.read_range(BLOB_ID, 0, 100_000)
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()


@pytest.mark.parametrize("fault", ["hold", "stall", "slow-loris"])
async def test_silence_leaves_time_for_other_tries(sim: RegistrySimulator, fault: str) -> None:
    """Of a short deadline a silent server takes a sixth, not the time-out that suits a long one."""
    sim.fault(fault, where="blob", times=3, interval=0.01)
    source = source_for(sim, attrs.evolve(PLAIN, io_deadline_s=1.2))
    async with asyncio.timeout(14):  # less than the long one
        for _ in range(3):
            with pytest.raises(BackendTimeout):
                await source.read_range(BLOB_ID, 0, 100_000)
        assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    await source.close()


async def test_a_held_range_holds_nobody_else(sim: RegistrySimulator) -> None:
    hold = sim.fault("hold", where="blob", span=(0, 99))
    source = source_for(sim)
    held = asyncio.create_task(source.read_range(BLOB_ID, 50, 10))
    await met(hold)
    assert await source.read_range(BLOB_ID, 100, 10) == BLOB[100:110]
    assert not held.done()
    hold.release()
    assert await held == BLOB[50:60]
    await source.close()


async def test_a_cancelled_read_gives_its_connection_back(sim: RegistrySimulator) -> None:
    hold = sim.fault("hold", where="blob", times=2)
    source = source_for(sim, attrs.evolve(PLAIN, connections=2))
    tasks = [asyncio.create_task(source.read_range(BLOB_ID, 0, 10)) for _ in range(2)]
    await met(hold, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await asyncio.wait_for(source.read_range(BLOB_ID, 0, 10), 30) == BLOB[:10]
    await source.close()


@pytest.mark.parametrize("blob_id", ["x", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "?x"])
async def test_ids_that_are_no_digest(sim: RegistrySimulator, blob_id: str) -> None:
    source = source_for(sim)
    with pytest.raises(BackendError) as e:
        await source.read_range(blob_id, 0, 1)
    assert not e.value.retryable
    assert sim.log == []
    await source.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 0), (0, -1), (1 << 63, 1)])
async def test_ranges_that_are_none(sim: RegistrySimulator, offset: int, length: int) -> None:
    with pytest.raises(ConfigError):
        await read(sim, offset, length)


def test_an_image_from_nowhere() -> None:
    with pytest.raises(ConfigError, match="--blob-dir"):
        open_source(ResolvedImage("x", b""), PLAIN)


async def test_tls(tool: Callable[[str], str], tmp_path: Path) -> None:
    from tests.sim.tls import make_certificate

    certificate, key = make_certificate(tool("openssl"), tmp_path)
    with RegistrySimulator(tls=(certificate, key)) as sim:
        sim.store.add_blob(BLOB)
        trusting = source_for(sim, Config(RegistryAccess(http=HttpOptions(ca_files=(certificate,)))))
        assert await trusting.read_range(BLOB_ID, 0, 10) == BLOB[:10]
        await trusting.close()
        wary = source_for(sim, Config(RegistryAccess()))
        with pytest.raises(UntrustedServer, match="--ca-file"):
            await wary.read_range(BLOB_ID, 0, 10)
        await wary.close()
        wrong = source_for(sim, Config(RegistryAccess(http=HttpOptions(ca_files=(certificate, key)))))
        with pytest.raises(ConfigError, match="PEM"):
            await wrong.read_range(BLOB_ID, 0, 10)
        await wrong.close()


async def test_tls_with_a_server_that_has_none(sim: RegistrySimulator) -> None:
    source = source_for(sim, Config(RegistryAccess()))
    with pytest.raises(UntrustedServer, match="--plain-http"):
        await source.read_range(BLOB_ID, 0, 10)
    await source.close()


async def test_http_with_a_server_that_speaks_tls(tool: Callable[[str], str], tmp_path: Path) -> None:
    from tests.sim.tls import make_certificate

    with (
        RegistrySimulator(tls=make_certificate(tool("openssl"), tmp_path)) as sim,
        pytest.raises(BackendError),
    ):
        await read(sim)
