"""OSS and http-proxy beyond what all back-ends share: signatures and clocks, odd servers, redirects."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from aiohttp import web

from tests.sim.http_proxy import ProxySim
from tests.sim.oss import OssSim
from tests.sim.sources import Config
from tests.sim.web import WebSim
from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.base import CredentialUpdate
from virtiofsd_rafs.backends.config import HttpProxyBackend, OssBackend
from virtiofsd_rafs.backends.http_proxy import plan_proxy_body
from virtiofsd_rafs.backends.objects import ObjectSource
from virtiofsd_rafs.backends.oss import OssSigner
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BadReply,
    ConfigError,
    CredentialsExpired,
    RangeIgnored,
    Unreachable,
)
from virtiofsd_rafs.image.resolve import ResolvedImage
from virtiofsd_rafs.registry.protocol import BodyPlan, ReplyHead
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtiofsd_rafs.backends.base import BlobSource
    from virtiofsd_rafs.backends.config import BackendConfig

DATA = bytes(range(256)) * 64
KEY = "s3cr3t"


def source(backend: BackendConfig) -> BlobSource:
    return open_source(ResolvedImage("x", b""), Config(), backend)


async def read(backend: BackendConfig, offset: int = 10, length: int = 20) -> bytes:
    opened = source(backend)
    try:
        return await opened.read_range("blob", offset, length)
    finally:
        await opened.close()


async def size(backend: BackendConfig) -> int:
    opened = source(backend)
    try:
        return await opened.blob_size("blob")
    finally:
        await opened.close()


# -- OSS ----------------------------------------------------------------------------------------------------


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssSim]:
    for first in ("OSS_", "ALIBABA_CLOUD_"):
        for rest in ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET", "SESSION_TOKEN", "SECURITY_TOKEN"):
            monkeypatch.delenv(first + rest, raising=False)
    with OssSim("layers", "cn-hangzhou") as sim:
        sim.put("blob", DATA)
        sim.keys["id"] = (KEY, None)
        yield sim


def bucket(sim: OssSim, **settings: Any) -> OssBackend:
    keys = {"access_key_id": "id", "access_key_secret": Secret(KEY)}
    return OssBackend(bucket="layers", endpoint=sim.host, scheme="http", **{**keys, **settings})


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        ({}, "v1"),  # an address tells no region
        ({"region": "cn-hangzhou"}, "v4"),
        ({"region": "cn-hangzhou", "signature": "v1"}, "v1"),
        ({"region": "cn-hangzhou", "signature": "v4"}, "v4"),
    ],
)
async def test_versions_of_signatures(oss: OssSim, settings: dict[str, Any], version: str) -> None:
    assert await read(bucket(oss, **settings)) == DATA[10:30]
    assert oss.versions == [version]


async def test_urls_and_versions_of_real_endpoints() -> None:
    keys: dict[str, Any] = {"access_key_id": "id", "access_key_secret": Secret(KEY)}
    for endpoint, first in [
        ("oss-cn-hangzhou-internal.aliyuncs.com", "OSS4-HMAC-SHA256 Credential=id/"),
        ("oss-accelerate.aliyuncs.com", "OSS id:"),
    ]:
        signer = OssSigner(OssBackend(bucket="layers", endpoint=endpoint, prefix="a b/", **keys))
        plan = await signer.plan("blob")
        assert plan.url == f"https://layers.{endpoint}/a%20b/blob"
        assert plan.authorization is not None
        assert plan.authorization.reveal().startswith(first)
        assert KEY not in repr(plan)
    with pytest.raises(ConfigError, match="does not tell its region"):
        OssSigner(OssBackend(bucket="layers", endpoint="oss.example", signature="v4", **keys))


@pytest.mark.parametrize("first", ["OSS_", "ALIBABA_CLOUD_"])
async def test_keys_of_the_environment(oss: OssSim, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    oss.keys["sts"] = ("other", "token")
    monkeypatch.setenv(first + "ACCESS_KEY_ID", "sts")
    monkeypatch.setenv(first + "ACCESS_KEY_SECRET", "other")
    monkeypatch.setenv(first + ("SESSION_TOKEN" if first == "OSS_" else "SECURITY_TOKEN"), "token")
    assert await read(bucket(oss, access_key_id="", access_key_secret=None)) == DATA[10:30]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"access_key_id": "nobody"}, "does not know the access key id"),
        ({"access_key_secret": Secret("wrong")}, "the secret does not fit"),
        ({"access_key_id": "", "access_key_secret": None}, "AccessDenied"),
    ],
)
async def test_wrong_keys(oss: OssSim, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(AuthError, match=told) as e:
        await read(bucket(oss, **settings))
    assert "OSS_ACCESS_KEY_ID" in e.value.remedy or "the configuration" in e.value.remedy
    assert len(oss.seen) == 1


async def test_a_token_that_ended(oss: OssSim) -> None:
    oss.keys["sts"] = (KEY, "token")
    opened = source(bucket(oss, access_key_id="sts", security_token=Secret("token")))
    assert isinstance(opened, ObjectSource)
    assert await opened.read_range("blob", 0, 5) == DATA[:5]
    oss.expired.add("sts")
    with pytest.raises(CredentialsExpired, match="SecurityTokenExpired") as e:
        await opened.read_range("blob", 0, 5)
    assert e.value.retryable  # somebody may be about to give a new one
    oss.keys["sts2"] = ("new", "token2")
    opened.renew(
        CredentialUpdate(
            access_key_id="sts2", access_key_secret=Secret("new"), security_token=Secret("token2")
        )
    )
    assert await opened.read_range("blob", 0, 5) == DATA[:5]
    await opened.close()


async def test_a_wrong_clock_is_named(oss: OssSim) -> None:
    from virtiofsd_rafs.backends.http import HttpClient

    for settings in ({}, {"region": "cn-hangzhou"}):
        signer = OssSigner(bucket(oss, **settings), clock=lambda: 1_000_000_000.0)
        opened = ObjectSource(signer, HttpClient())
        with pytest.raises(AuthError, match="clock") as e:
            await opened.read_range("blob", 0, 5)
        assert e.value.remedy == "set this machine's clock"
        await opened.close()


# -- http-proxy ---------------------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[ProxySim]:
    with ProxySim("/blobs") as sim:
        sim.put("blob", DATA)
        yield sim


def server(sim: WebSim, **settings: Any) -> HttpProxyBackend:
    return HttpProxyBackend(addr=f"http://{sim.host}", path="/blobs", **settings)


@pytest.mark.parametrize("style", ["plain", "nydus", "no-head", "whole"])
async def test_servers_of_all_kinds(proxy: ProxySim, style: str) -> None:
    proxy.style = style
    assert await read(server(proxy)) == DATA[10:30]
    assert await read(server(proxy), len(DATA) - 7, 7) == DATA[-7:]
    assert await size(server(proxy)) == len(DATA)
    with pytest.raises(BadReply):
        await read(server(proxy), len(DATA) - 7, 8)


async def test_a_size_that_nobody_tells(proxy: ProxySim) -> None:
    proxy.style = "nydus"
    proxy.next_answers(405)
    with pytest.raises(BadReply, match="does not tell its size") as e:
        await size(server(proxy))
    assert "HEAD" in e.value.remedy


async def test_a_path_that_has_to_be_quoted(proxy: ProxySim) -> None:
    proxy.objects = {"/blobs/%C3%BC/blob": DATA}
    assert await read(attrs.evolve(server(proxy), path="/blobs/ü")) == DATA[10:30]
    proxy.objects = {"/blobs/a%20b/blob": DATA}
    assert await read(HttpProxyBackend(addr=f"http://{proxy.host}/blobs/a%20b")) == DATA[10:30]


def head(status: int, **fields: str) -> ReplyHead:
    return ReplyHead.of(status, [(name.replace("_", "-"), value) for name, value in fields.items()])


def body(reply: ReplyHead, offset: int, length: int) -> BodyPlan:
    return plan_proxy_body(reply, offset, length, what="blob", now=0.0)


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize("total", ["/20", "/30", "/1", "/*", ""])
def test_any_total_and_status_of_the_right_range(status: int, total: str) -> None:
    reply = head(status, content_range=f"bytes 10-29{total}")
    assert body(reply, 10, 20) == BodyPlan(0, 20, ends=True, total=None)


@pytest.mark.parametrize(
    "reply",
    [
        head(200, content_range="bytes 11-30/20"),
        head(206, content_range="bytes 11-30/100"),
        head(206, content_range="bytes 10-28/100"),
        head(200, content_range="bytes 0-19/20"),
        head(206),
        head(206, content_range="bytes 10-29/20", content_length="19"),
        head(206, content_range="bytes 10-29/20", content_encoding="gzip"),
        head(200, content_length="15"),
        head(416),
    ],
)
def test_replies_that_are_not_what_was_asked_for(reply: ReplyHead) -> None:
    with pytest.raises(BadReply):
        body(reply, 10, 20)


def test_a_whole_blob() -> None:
    assert body(head(200, content_length="100"), 10, 20) == BodyPlan(10, 20, ends=False, total=100)
    assert body(head(200), 10, 20).skip == 10
    with pytest.raises(RangeIgnored):
        body(head(200), 1 << 40, 20)


async def test_a_server_that_ignores_ranges_is_read_in_the_end(proxy: ProxySim) -> None:
    proxy.style = "whole"
    proxy.put("blob", bytes(9 << 20) + DATA)
    opened = source(server(proxy))
    for _ in range(3):
        with pytest.raises(RangeIgnored):
            await opened.read_range("blob", 9 << 20, 5)
    assert await opened.read_range("blob", 9 << 20, 5) == DATA[:5]
    await opened.close()


async def test_redirects_are_followed_and_take_no_password_along(proxy: ProxySim) -> None:
    class Front(WebSim):
        async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
            target = f"http://{proxy.host}{request.raw_path}?signed=a%2Fb+c"
            return web.Response(status=302, headers={"Location": target})

    with Front() as front:
        assert await read(server(front, auth=Secret("me:hunter2"))) == DATA[10:30]
        sent = base64.b64encode(b"me:hunter2").decode()
        assert front.seen[0].headers["Authorization"] == f"Basic {sent}"
        assert proxy.seen[0].path == "/blobs/blob?signed=a%2Fb+c"
        assert "Authorization" not in proxy.seen[0].headers
        assert proxy.seen[0].headers["Range"] == "bytes=10-29"


async def test_redirects_that_lead_nowhere(proxy: ProxySim) -> None:
    for location in (f"http://{proxy.host}/blobs/blob", "ftp://host/x"):
        proxy.next_answers(302, times=6, Location=location)
        with pytest.raises(BadReply):
            await read(server(proxy))


@pytest.mark.parametrize(("status", "kind"), [(401, AuthError), (500, Unreachable), (400, BadReply)])
async def test_refusals(proxy: ProxySim, status: int, kind: type[BackendError]) -> None:
    proxy.next_answers(status, times=2)
    with pytest.raises(kind) as e:
        await read(server(proxy))
    assert str(status) in str(e.value)


async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file") as e:
        await read(HttpProxyBackend(addr=str(tmp_path / "none.sock")))
    assert str(tmp_path) in str(e.value)
