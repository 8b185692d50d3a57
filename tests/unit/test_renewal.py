"""Credentials that come while the daemon runs, and those that it was started with."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, UnixConnector

from virtiofsd_rafs.backends.base import CredentialUpdate
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret
from virtiofsd_rafs.runtime import api
from virtiofsd_rafs.runtime.renewal import Renewal, parse_update
from virtiofsd_rafs.runtime.view import View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

AUTH = base64.b64encode(b"me:hunter2").decode()


class Source:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.updates: list[CredentialUpdate] = []

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        raise AssertionError

    async def blob_size(self, blob_id: str) -> int:
        raise AssertionError

    async def close(self) -> None:
        pass

    def renew(self, update: CredentialUpdate) -> None:
        if update.access_key_id == "bad":
            raise ConfigError("no")
        self.updates.append(update)


def test_an_update() -> None:
    body = {
        "registry_auth": AUTH,
        "registry_token": "t",
        "proxy_url": "http://me:hunter2@p.example:80",
        "access_key_id": "id",
        "access_key_secret": "s",
        "security_token": "",
        "dragonfly_scheduler_endpoint": "http://d.example",
    }
    update = parse_update(json.dumps(body).encode())
    assert update == CredentialUpdate(
        registry_auth=Secret(AUTH),
        registry_token=Secret("t"),
        proxy_url=Secret("http://me:hunter2@p.example:80"),
        access_key_id="id",
        access_key_secret=Secret("s"),
        security_token=Secret(""),
    )
    assert "hunter2" not in repr(update)
    assert parse_update(b"{}") == CredentialUpdate()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        '"hunter2"',
        "{" * 100_000,
        '{"registry_auth": 1}',
        '{"registry_auth": "hunter2"}',
        '{"proxy_url": "hunter2:x"}',
        '{"proxy_url": "socks5://me:hunter2@p"}',
        '{"registry_pass": "hunter2"}',
        json.dumps({"registry_auth": "hunter2" * 20_000}),
    ],
)
def test_updates_that_make_no_sense(body: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_update(body.encode())
    assert "hunter2" not in str(e.value)
    assert e.value.__cause__ is None


def test_an_update_is_used_kept_and_taken_over() -> None:
    source, renewed = Source(), []
    memory = os.memfd_create("test")
    renewal = Renewal(lambda: source, lambda: renewed.append(1), memory)
    renewal.take(CredentialUpdate(registry_auth=Secret(AUTH), access_key_id="a"))
    renewal.take(CredentialUpdate(access_key_id="b"))
    assert [u.access_key_id for u in source.updates] == ["a", "b"]
    assert len(renewed) == 2
    with pytest.raises(ConfigError):
        renewal.take(CredentialUpdate(access_key_id="bad"))
    renewal.take(CredentialUpdate())
    assert len(renewed) == 2
    assert renewal.names() == ["registry_auth", "access_key_id"]
    # A source that is opened later, and the next control process.
    for successor in (renewal, Renewal(lambda: None, lambda: None, memory)):
        later = Source()
        successor.opened(later)
        assert later.updates == [CredentialUpdate(registry_auth=Secret(AUTH), access_key_id="b")]
    fresh = Source()
    Renewal(lambda: None, lambda: None, os.memfd_create("test")).opened(fresh)
    assert fresh.updates == []


@asynccontextmanager
async def serving(folder: Path, source: Source) -> AsyncIterator[ClientSession]:
    from tests.unit.test_api import FakeSession
    from virtiofsd_rafs.config import ServeConfig

    view = View(FakeSession(), ServeConfig(image="x", api_socket=folder / "api"))  # type: ignore[arg-type]
    view.renewal = Renewal(lambda: source, lambda: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "api"))
    listener.listen()
    stop = await api.start(listener, view)
    try:
        async with ClientSession(connector=UnixConnector(str(folder / "api"))) as session:
            yield session
    finally:
        await stop()


async def test_the_api_takes_what_nydusds_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    caplog.set_level("DEBUG")
    async with serving(tmp_path, source) as session:

        async def put(path: str, body: Any) -> tuple[int, str]:
            async with session.put(f"http://x{path}", data=body) as reply:
                return reply.status, await reply.text()

        good = json.dumps({"registry_auth": AUTH, "dragonfly_scheduler_endpoint": "x"})
        assert await put("/api/v1/config?id=/", good) == (204, "")
        assert await put("/api/v1/config?id=%2Fmnt%2Fimage", good) == (204, "")
        assert source.updates == [CredentialUpdate(registry_auth=Secret(AUTH))] * 2
        for path, body in (
            ("/api/v1/config", good),
            ("/api/v1/config?id=/", "hunter2"),
            ("/api/v1/config?id=/", '{"registry_auth": "hunter2"}'),
            ("/api/v1/config?id=/", '{"access_key_id": "bad"}'),
        ):
            status, text = await put(path, body)
            assert status == 400
            assert set(json.loads(text)) == {"code", "message"}
            assert "hunter2" not in text
        status, text = await put("/api/v1/config?id=/", b"x" * 1_000_000)
        assert (status, set(json.loads(text))) == (413, {"code", "message"})
        assert len(source.updates) == 2
        async with session.get("http://x/api/v1/config?id=/") as reply:
            assert await reply.json() == {"registry_auth": "***"}
    assert "renewed by the API: registry_auth" in caplog.text
    assert "hunter2" not in caplog.text
    assert AUTH not in caplog.text


def test_secrets_of_the_environment_are_hidden() -> None:
    """From /proc/<pid>/environ of this process and its children, and back for those who may have them."""
    code = """
import os
from virtiofsd_rafs.runtime.environment import hide_secrets, reveal_secrets
fd = hide_secrets()
print(sorted(k for k in os.environ if k.endswith(("_proxy", "_PROXY", "_KEY", "_AUTH"))))
pid = os.fork()
if pid == 0:
    print("hunter2" in open("/proc/self/environ").read(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
reveal_secrets(fd)
print(os.environ["HTTPS_PROXY"], os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["X"], flush=True)
print("hunter2" in open("/proc/self/environ").read())
"""
    env = {
        "A": "1",
        "HTTPS_PROXY": "http://me:hunter2@p.example",
        "http_proxy": "http://p.example",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "IMAGE_PULL_AUTH": "hunter2\udcff",
        "X": "y",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-u", "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.splitlines() == [
        "['http_proxy']",
        "False",
        "http://me:hunter2@p.example hunter2 y",
        "False",
    ]


def test_an_environment_without_secrets_stays_as_it_is() -> None:
    code = (
        "from virtiofsd_rafs.runtime.environment import *; fd = hide_secrets(); reveal_secrets(fd); print(fd)"
    )
    env = {"HTTP_PROXY": "http://p.example", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-u", "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "None\n"
