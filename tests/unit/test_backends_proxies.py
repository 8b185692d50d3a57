"""Through an HTTP proxy, around it, and what it is told."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.forward_proxy import ForwardProxy
from tests.sim.gate import Auth
from tests.sim.registry import RegistrySimulator
from tests.sim.sources import Clock, nobody
from tests.sim.tls import make_certificate
from virtiofsd_rafs.backends import http as http_module
from virtiofsd_rafs.backends.base import CredentialUpdate
from virtiofsd_rafs.backends.config import HttpOptions, ProxyOptions, RegistryBackend
from virtiofsd_rafs.backends.oci import OciSource
from virtiofsd_rafs.backends.proxies import Bypass, Proxies, proxy_of
from virtiofsd_rafs.errors import AuthError, BackendTimeout, ConfigError, Unreachable
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOB = random.Random(4).randbytes(100_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody(monkeypatch, tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def sim(registry_sim: RegistrySimulator) -> RegistrySimulator:
    registry_sim.store.add_blob(BLOB)
    return registry_sim


@pytest.fixture
def proxy() -> Iterator[ForwardProxy]:
    with ForwardProxy() as proxy:
        yield proxy


def source(host: str, proxy: ProxyOptions | None, *, scheme: Any = "http", **options: Any) -> OciSource:
    http = HttpOptions(proxy=proxy, **options)
    return OciSource(RegistryBackend(host=host, repository="a/b", scheme=scheme, http=http))


async def read(source: OciSource, sim: RegistrySimulator, offset: int = 0) -> None:
    blob_id = next(iter(sim.store.blobs)).removeprefix("sha256:")
    assert await source.read_range(blob_id, offset, 1000) == BLOB[offset : offset + 1000]


# -- which -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "matches"),
    [
        ("", "a.example", 443, False),
        ("*", "a.example", 443, True),
        ("a.example", "a.example", 443, True),
        ("a.example", "b.a.example", 443, True),
        ("a.example", "ba.example", 443, False),
        (".a.example", "a.example", 443, True),
        ("*.a.example", "b.a.example", 443, True),
        ("A.Example.", "a.example", 443, True),
        ("x, a.example:5000", "a.example", 5000, True),
        ("x a.example:5000", "a.example", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "11.1.2.3", 80, False),
        ("10.1.2.3", "10.1.2.3", 80, True),
        ("2.3", "10.1.2.3", 80, False),
        ("[fd00::1]:80", "fd00::1", 80, True),
        ("fd00::/8", "fd00::1", 80, True),
        ("10.0.0.0/99,a.example", "a.example", 80, True),
    ],
)
def test_no_proxy(text: str, host: str, port: int, matches: bool) -> None:
    assert Bypass(text).matches(host, port) is matches


@given(st.text(alphabet="a.*:[]/0123456789, ", max_size=30), st.text(alphabet="a.:0", max_size=10))
def test_no_proxy_of_any_text(text: str, host: str) -> None:
    Bypass(text).matches(host, 80)


def test_what_the_environment_says() -> None:
    env = {
        "HTTP_PROXY": "plain.example:3128",
        "https_proxy": "http://me:hunter2@tls.example:3128",
        "HTTPS_PROXY": "http://other.example",
        "NO_PROXY": "inside.example",
    }
    proxies = Proxies(None, env)

    def chosen(url: str) -> str | None:
        proxy = proxies.choose(url)
        return proxy.options.url if proxy else None

    assert chosen("http://reg.example/v2/") == "http://plain.example:3128"
    assert chosen("https://reg.example/v2/") == "http://tls.example:3128"
    assert chosen("https://reg.inside.example/v2/") is None
    for host in ("localhost:5000", "127.0.0.1", "127.8.8.8:1", "[::1]:5000"):
        assert chosen(f"http://{host}/v2/") is None
    proxy = proxies.choose("https://reg.example/")
    assert proxy is not None
    assert proxy.options.auth == Secret("me:hunter2")
    assert not proxy.options.fallback
    assert "hunter2" not in repr(proxy.options)
    # What was configured comes first, for loopback as well.
    proxies.move(proxy_of("http://mine.example"))
    assert chosen("http://127.0.0.1:5000/") == "http://mine.example"
    assert chosen("https://inside.example/") is None


def test_one_proxy_for_everything_and_one_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    chosen = Proxies(None, {"ALL_PROXY": "http://p.example"}).choose("https://a.example/")
    assert chosen is not None
    assert Proxies(None, {"ALL_PROXY": "socks5://p.example"}).choose("https://a.example/") is None
    assert "does not speak HTTP" in caplog.text
    with pytest.raises(ConfigError, match="https_proxy") as e:
        Proxies(None, {"https_proxy": "http://me:hunter2@:x"})
    assert "hunter2" not in str(e.value)


# -- through -----------------------------------------------------------------------------------------------


async def test_http_goes_by_its_whole_url(sim: RegistrySimulator, proxy: ForwardProxy) -> None:
    sim.gate.auth = Auth("bearer")
    s = source("registry.test:" + str(sim.port), proxy_of(proxy.url))
    await read(s, sim)
    await s.close()
    assert {r.method for r in proxy.log} == {"GET"}
    assert any(r.target.startswith(f"http://registry.test:{sim.port}/v2/a/b/blobs/") for r in proxy.log)


async def test_the_environment_is_heard(
    sim: RegistrySimulator, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.host)
    s = source(f"registry.test:{sim.port}", None)
    await read(s, sim)
    await s.close()
    assert proxy.log
    straight = source(sim.host, None)  # loopback
    proxy.log.clear()
    await read(straight, sim)
    await straight.close()
    assert proxy.log == []


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_proxys_password(scheme: str, tool: Callable[[str], str], tmp_path: Path) -> None:
    tls = make_certificate(tool("openssl"), tmp_path)
    with (
        RegistrySimulator(tls=tls if scheme == "https" else None) as sim,
        ForwardProxy(auth="me:hunter2") as proxy,
    ):
        sim.store.add_blob(BLOB)
        ca = (tls[0],)
        anonymous = source(sim.host, ProxyOptions(url=proxy.url, fallback=False), scheme=scheme, ca_files=ca)
        with pytest.raises(AuthError, match="asks for a user"):
            await read(anonymous, sim)
        with pytest.raises(ConfigError):
            anonymous.renew(CredentialUpdate(proxy_url=Secret("ftp://x:hunter2@y")))
        anonymous.renew(CredentialUpdate(proxy_url=Secret(f"http://me:hunter2@{proxy.host}")))
        await read(anonymous, sim)
        await anonymous.close()
        options = ProxyOptions.of(f"http://me:hunter3@{proxy.host}", fallback=False)
        wrong = source(sim.host, options, scheme=scheme, ca_files=ca)
        with pytest.raises(AuthError, match="refuses the user") as e:
            await read(wrong, sim)
        assert "hunter3" not in str(e.value)
        await wrong.close()
        # What is for the proxy does not go on to the server.
        assert all("Proxy-Authorization" not in r.headers for r in sim.log)
        if scheme == "https":
            assert {r.method for r in proxy.log} == {"CONNECT"}
            pair = base64.b64encode(b"me:hunter2").decode()
            assert proxy.log[-2].fields["proxy-authorization"] == f"Basic {pair}"
            assert all("authorization" not in r.fields for r in proxy.log)


async def test_a_proxy_that_is_reached_by_https(tool: Callable[[str], str], tmp_path: Path) -> None:
    tls = make_certificate(tool("openssl"), tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls)
    with RegistrySimulator(tls=tls) as sim, ForwardProxy(ssl=context) as proxy:
        sim.store.add_blob(BLOB)
        s = source(sim.host, proxy_of(f"https://{proxy.host}"), scheme="https", ca_files=(tls[0],))
        await read(s, sim)
        await s.close()
        assert proxy.log[0].method == "CONNECT"


async def test_connections_through_a_proxy_are_used_again(tool: Callable[[str], str], tmp_path: Path) -> None:
    tls = make_certificate(tool("openssl"), tmp_path)
    with RegistrySimulator(tls=tls) as sim, ForwardProxy() as proxy:
        sim.store.add_blob(BLOB)
        s = source(sim.host, proxy_of(proxy.url), scheme="https", ca_files=(tls[0],))
        for offset in range(10):
            await read(s, sim, offset)
        await s.close()
        assert len(proxy.log) == 1


async def test_use_http_leaves_tls_to_the_proxy(sim: RegistrySimulator, proxy: ForwardProxy) -> None:
    options = ProxyOptions(url=proxy.url, use_http=True)
    s = source(sim.host, options, scheme="https")
    await read(s, sim)
    await s.close()
    assert proxy.log[0].target.startswith("http://")


# -- around ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock.of(monkeypatch, http_module)


@pytest.mark.parametrize("trouble", ["refused", "silent", "502", "407"])
@pytest.mark.parametrize("fallback", [True, False])
async def test_a_proxy_in_trouble(
    sim: RegistrySimulator, proxy: ForwardProxy, clock: Clock, trouble: str, fallback: bool
) -> None:
    options = ProxyOptions(url=proxy.url, fallback=fallback)
    s = source(sim.host, options, timeout_s=0.4, connect_timeout_s=0.1)
    await read(s, sim)
    match trouble:
        case "refused":
            proxy.refuse()
        case "silent":
            proxy.silent = True
        case "502":
            proxy.status = 502
        case "407":
            proxy.auth = "me:pw"
    if not fallback:
        error = {"407": AuthError, "silent": BackendTimeout}.get(trouble, Unreachable)
        with pytest.raises(error) as e:
            await read(s, sim)
        assert trouble == "502" or proxy.url in str(e.value)
        await s.close()
        if trouble == "refused":
            proxy.accept()
        return
    await read(s, sim)
    asked = len(proxy.log)
    for offset in range(10):
        await read(s, sim, offset)
    assert len(proxy.log) == asked  # it rests
    clock.now += 1000
    if trouble == "refused":
        proxy.accept()
    proxy.silent, proxy.status, proxy.auth = False, None, None
    await read(s, sim)
    assert len(proxy.log) == asked + 1
    await s.close()


async def test_when_the_server_is_away_the_proxy_is_not_to_blame(
    sim: RegistrySimulator, proxy: ForwardProxy, clock: Clock
) -> None:
    s = source(sim.host, ProxyOptions(url=proxy.url))
    sim.refuse()
    for _ in range(3):
        with pytest.raises(Unreachable):
            await read(s, sim)
    assert len(proxy.log) == 3
    sim.accept()
    await read(s, sim)
    assert len(proxy.log) == 4
    await s.close()


async def test_a_proxy_with_a_ping_url_is_pinged_before_it_gets_requests_again(
    sim: RegistrySimulator, proxy: ForwardProxy, clock: Clock
) -> None:
    with ForwardProxy() as health:
        health.status = 500
        s = source(sim.host, ProxyOptions(url=proxy.url, ping_url=f"{health.url}/healthz"))
        proxy.status = 502
        await read(s, sim)
        asked = len(proxy.log)
        proxy.status = None
        moves = 0

        async def after_a_rest() -> None:
            # A ping may end after the clock was moved; its rest then begins there.
            nonlocal moves
            moves += 1
            clock.now += 1000
            await asyncio.gather(*(read(s, sim, k) for k in range(5)))
            await asyncio.sleep(0.01)

        for n in range(1, 3):
            async with asyncio.timeout(30):
                while len(health.log) < n:
                    await after_a_rest()
        assert len(proxy.log) == asked
        health.status = 200
        async with asyncio.timeout(30):
            while len(proxy.log) == asked:
                await after_a_rest()
        assert 3 <= len(health.log) <= moves
        await s.close()


async def test_certificates_are_not_checked_when_nobody_wants_it(
    tool: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RegistrySimulator(tls=make_certificate(tool("openssl"), tmp_path)) as sim:
        sim.store.add_blob(BLOB)
        s = source(sim.host, None, scheme="https", skip_verify=True)
        await read(s, sim)
        await s.close()
    assert "CERTIFICATES ARE NOT CHECKED" in caplog.text
