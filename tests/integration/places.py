"""Places that hold blobs, each behind the same handle, for the tests of all back-ends (test_backends.py).

A place is a server (or a directory) with blobs in it, and what a test may do to it: hold its answers, take it
away and bring it back, refuse its credentials, renew them. What a place cannot have is done in the way that
comes nearest: a directory's credentials are its permissions, and what expires there is a file handle.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import json
import os
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import attrs

from guest.registry import Registry
from tests.sim.gate import Auth
from tests.sim.http_proxy import ProxySim
from tests.sim.oss import OssSim
from tests.sim.registry import RegistrySimulator
from tests.sim.s3 import S3Gate, moto_server, put_object
from tests.sim.sources import Config
from tests.sim.web import GatewaySim
from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.base import CredentialUpdate, Renewable
from virtiofsd_rafs.backends.config import (
    BackendConfig,
    HttpOptions,
    HttpProxyBackend,
    LocalBackend,
    OssBackend,
    RegistryBackend,
    S3Backend,
)
from virtiofsd_rafs.image.resolve import ResolvedImage
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pytest

    from tests.sim.web import WebSim
    from virtiofsd_rafs.backends.base import BlobSource

REPOSITORY = "some/where"


@attrs.define
class Place:
    """One place. Subclasses say how it is reached and what can be done to it."""

    name = ""
    _reload: Callable[[], BackendConfig | None] | None = attrs.field(default=None, init=False)
    _sources: list[BlobSource] = attrs.field(factory=list, init=False)

    def backend(self) -> BackendConfig:
        """How it is reached, with good credentials."""
        raise AssertionError

    def put(self, blob_id: str, data: bytes) -> None:
        """Stores a blob."""
        raise AssertionError

    def source(self, *, connections: int = 8, backend: BackendConfig | None = None) -> BlobSource:
        """A new source over the place; closed by ``close``."""
        image = ResolvedImage("x", b"")
        config = Config(connections=connections)
        source = open_source(image, config, backend or self.backend(), self._reload)
        self._sources.append(source)
        return source

    async def close(self) -> None:
        """Closes all sources."""
        while self._sources:
            await self._sources.pop().close()

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Makes everything as it was in the beginning."""
        self._reload = None

    def connections(self) -> int:
        """How many connections were used since ``reset``."""
        raise AssertionError

    def hold(self) -> Any:
        """Holds answers; an object with ``hits`` and ``release()``."""
        raise AssertionError

    def away(self) -> None:
        """Takes the place away."""
        raise AssertionError

    def back(self) -> None:
        """Brings it back."""
        raise AssertionError

    def refused(self) -> BackendConfig:
        """A way to reach it with credentials that it refuses."""
        raise AssertionError

    def expire(self, source: BlobSource) -> None:
        """Ends what *source* was let in with, and puts something new where it will find it."""
        raise AssertionError

    def serve_options(self) -> list[str]:
        """Options of ``serve`` for a bootstrap file whose blobs are here."""
        raise AssertionError

    def settings(self) -> tuple[str, dict[str, Any]]:
        """The same in nydusd's configuration: kind of back-end, and its settings with credentials."""
        raise AssertionError

    def rotate(self) -> None:
        """Ends the credentials that ``settings`` had, where there are any; it has others from now on."""


@attrs.define
class WebPlace(Place):
    """A place behind one of our servers."""

    sim: WebSim

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        self.sim.forget()

    def connections(self) -> int:
        return self.sim.connections()

    def hold(self) -> Any:
        return self.sim.hold()

    def away(self) -> None:
        self.sim.refuse()

    def back(self) -> None:
        self.sim.accept()


def _docker_login(folder: Path, host: str, user: str) -> None:
    auth = base64.b64encode(user.encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def _registry_settings(host: str, user: str) -> dict[str, Any]:
    auth = base64.b64encode(user.encode()).decode()
    return {"scheme": "http", "host": host, "repo": REPOSITORY, "auth": auth}


@attrs.define
class DistributionPlace(WebPlace):
    """Debian's docker-registry, which asks for a password, behind a gateway."""

    name = "docker-registry"
    sim: GatewaySim
    registry_port: int
    upload: Callable[[bytes], None]
    _folder: Path | None = None

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        self._folder = folder
        monkeypatch.setenv("DOCKER_CONFIG", str(folder))
        _docker_login(folder, self.sim.host, "me:hunter2")

    def backend(self) -> RegistryBackend:
        return RegistryBackend(host=self.sim.host, repository=REPOSITORY, scheme="http")

    def put(self, blob_id: str, data: bytes) -> None:
        self.upload(data)

    def refused(self) -> RegistryBackend:
        assert self._folder is not None
        _docker_login(self._folder, self.sim.host, "me:wrong")
        return self.backend()

    def expire(self, source: BlobSource) -> None:
        # What it has is no good from now on; the file has something better.
        assert isinstance(source, Renewable)
        wrong = Secret(base64.b64encode(b"me:wrong").decode())
        source.renew(CredentialUpdate(registry_auth=wrong))

    def serve_options(self) -> list[str]:
        return ["--blob-source", f"oci://{self.sim.host}/{REPOSITORY}", "--plain-http"]

    def settings(self) -> tuple[str, dict[str, Any]]:
        return "registry", _registry_settings(self.sim.host, "me:hunter2")


@attrs.define
class SimulatedRegistryPlace(Place):
    """Our registry simulator with bearer tokens."""

    name = "registry-sim"
    sim: RegistrySimulator
    _folder: Path | None = None

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        self._folder = folder
        self.sim.clear_faults()
        self.sim.log.clear()
        self.sim.gate.auth = Auth("bearer", "me", "hunter2")
        monkeypatch.setenv("DOCKER_CONFIG", str(folder))
        _docker_login(folder, self.sim.host, "me:hunter2")

    def backend(self) -> RegistryBackend:
        return RegistryBackend(host=self.sim.host, repository=REPOSITORY, scheme="http")

    def put(self, blob_id: str, data: bytes) -> None:
        self.sim.store.add_blob(data)

    def connections(self) -> int:
        return len({r.peer for r in self.sim.log})

    def hold(self) -> Any:
        return self.sim.fault("hold", where="blob")

    def away(self) -> None:
        self.sim.refuse()

    def back(self) -> None:
        self.sim.accept()

    def refused(self) -> RegistryBackend:
        assert self._folder is not None
        _docker_login(self._folder, self.sim.host, "me:wrong")
        return self.backend()

    def expire(self, source: BlobSource) -> None:
        self.sim.revoke_tokens()

    def serve_options(self) -> list[str]:
        return ["--blob-source", f"{self.sim.host}/{REPOSITORY}", "--plain-http"]

    def settings(self) -> tuple[str, dict[str, Any]]:
        auth = self.sim.gate.auth
        assert auth is not None
        return "registry", _registry_settings(self.sim.host, f"{auth.user}:{auth.password}")

    def rotate(self) -> None:
        self.sim.gate.auth = Auth("bearer", "me", "hunter3")
        self.sim.revoke_tokens()


@attrs.define
class DirectoryPlace(Place):
    """Two directories: the blobs are in the second one."""

    name = "directory"
    base: Path
    _patch: pytest.MonkeyPatch | None = None
    _held: _HeldReads | None = None

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        self._patch = monkeypatch
        for name in ("first", "second"):
            (self.base / name).mkdir(exist_ok=True)

    def backend(self) -> LocalBackend:
        return LocalBackend(dirs=(self.base / "first", self.base / "second"))

    def put(self, blob_id: str, data: bytes) -> None:
        (self.base / "second" / blob_id).write_bytes(data)

    def connections(self) -> int:
        """Open files stand for connections."""
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(self.base / "second"))
        return found

    def hold(self) -> Any:
        assert self._patch is not None
        self._held = _HeldReads(os.pread)
        self._patch.setattr(os, "pread", self._held)
        return self._held

    def away(self) -> None:
        (self.base / "second").rename(self.base / "away")
        assert self._patch is not None
        # An open file outlives its name, but not its server.
        self._patch.setattr(os, "pread", _failing(errno.ESTALE))

    def back(self) -> None:
        (self.base / "away").rename(self.base / "second")
        assert self._patch is not None
        self._patch.undo()

    def refused(self) -> LocalBackend:
        assert self._patch is not None

        def refusing(path: Any, flags: int, *more: Any) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        self._patch.setattr(os, "open", refusing)  # nothing is refused to root
        return self.backend()

    def expire(self, source: BlobSource) -> None:
        assert self._patch is not None
        self._patch.setattr(os, "pread", _failing(errno.ESTALE, times=1, then=os.pread))

    def serve_options(self) -> list[str]:
        return ["--blob-source", f"file://{self.base / 'second'}"]

    def settings(self) -> tuple[str, dict[str, Any]]:
        return "localfs", {"dir": str(self.base / "first"), "alt_dirs": [str(self.base / "second")]}


def _failing(error: int, *, times: int = 1 << 30, then: Any = None) -> Any:
    left = [times]

    def pread(*args: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return then(*args)

    return pread


class _HeldReads:
    """``os.pread`` that waits until ``release``."""

    def __init__(self, real: Any) -> None:
        self.hits = 0
        self._real = real
        self._event = threading.Event()

    def __call__(self, *args: Any) -> Any:
        self.hits += 1
        self._event.wait(60)
        return self._real(*args)

    def release(self) -> None:
        self._event.set()


@attrs.define
class S3Place(WebPlace):
    """moto's server behind a gate that verifies presigned URLs; keys come from botocore's usual file."""

    name = "s3"
    sim: S3Gate
    store: Callable[[str, bytes], None]
    _credentials: Path | None = None
    _serial: int = 0

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        self._credentials = folder / "credentials"
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(self._credentials))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self.sim.signatures.clear()
        self.sim.expired.clear()
        self._issue()

    def _issue(self) -> None:
        """New temporary keys, in the file and known to the gate."""
        self._serial += 1
        key_id, secret, token = f"ASIA{self._serial}", f"s3cr3t/{self._serial}+", f"tok+en/{self._serial}=="
        self.sim.keys[key_id] = (secret, token)
        assert self._credentials is not None
        self._credentials.write_text(
            f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {secret}\n"
            f"aws_session_token = {token}\n"
        )

    def backend(self) -> S3Backend:
        return S3Backend(bucket="layers", prefix="some/pre+fix ü/", endpoint=self.sim.host, scheme="http")

    def put(self, blob_id: str, data: bytes) -> None:
        self.store(f"/layers/some/pre%2Bfix%20%C3%BC/{blob_id}", data)

    def refused(self) -> S3Backend:
        return attrs.evolve(
            self.backend(), access_key_id=next(iter(self.sim.keys)), access_key_secret=Secret("hunter2")
        )

    def expire(self, source: BlobSource) -> None:
        self.sim.expired.update(self.sim.keys)
        self._issue()
        # Credentials that were only just read are not read again: the file is older than that.
        source._signer._loaded_at -= 60  # type: ignore[attr-defined]

    def serve_options(self) -> list[str]:
        place = f"s3://layers/some/pre%2Bfix%20%C3%BC?endpoint=http://{self.sim.host}&region=us-east-1"
        return ["--blob-source", place]

    def settings(self) -> tuple[str, dict[str, Any]]:
        key_id = f"ASIA{self._serial}"
        secret, token = self.sim.keys[key_id]
        return "s3", {
            "scheme": "http",
            "endpoint": self.sim.host,
            "region": "us-east-1",
            "bucket_name": "layers",
            "object_prefix": "some/pre+fix ü/",
            "access_key_id": key_id,
            "access_key_secret": secret,
            "session_token": token,
        }

    def rotate(self) -> None:
        self.sim.expired.update(self.sim.keys)
        self._issue()


@attrs.define
class OssPlace(WebPlace):
    """Our OSS server, with temporary keys from a configuration that is read again."""

    name = "oss"
    sim: OssSim
    version: str = "v4"
    _serial: int = 0

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        for name in list(os.environ):
            if name.startswith(("OSS_", "ALIBABA_CLOUD_")):
                monkeypatch.delenv(name)
        self.sim.expired.clear()
        self.sim.versions.clear()
        self._issue(monkeypatch)
        self._reload = self.backend

    def _issue(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self._serial += 1
        self.sim.keys[self._key_id] = (f"s3cr3t/{self._serial}+", f"tok+en/{self._serial}==")
        if monkeypatch is not None:
            secret, token = self.sim.keys[self._key_id]
            assert token is not None
            monkeypatch.setenv("OSS_ACCESS_KEY_ID", self._key_id)
            monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", secret)
            monkeypatch.setenv("OSS_SESSION_TOKEN", token)

    @property
    def _key_id(self) -> str:
        return f"STS.{self._serial}"

    def backend(self) -> OssBackend:
        secret, token = self.sim.keys[self._key_id]
        assert token is not None
        return OssBackend(
            bucket="layers",
            prefix="some/pre+fix ü/",
            endpoint=self.sim.host,
            scheme="http",
            region=self.sim.region if self.version == "v4" else "",
            access_key_id=self._key_id,
            access_key_secret=Secret(secret),
            security_token=Secret(token),
        )

    def put(self, blob_id: str, data: bytes) -> None:
        self.sim.put(f"some/pre+fix ü/{blob_id}", data)

    def refused(self) -> OssBackend:
        self._reload = None
        return attrs.evolve(self.backend(), access_key_secret=Secret("hunter2"))

    def expire(self, source: BlobSource) -> None:
        self.sim.expired.update(self.sim.keys)
        self._issue()

    def serve_options(self) -> list[str]:
        region = f"&region={self.sim.region}" if self.version == "v4" else ""
        place = f"oss://layers/some/pre%2Bfix%20%C3%BC?endpoint=http://{self.sim.host}{region}"
        return ["--blob-source", place]

    def settings(self) -> tuple[str, dict[str, Any]]:
        secret, token = self.sim.keys[self._key_id]
        return "oss", {
            "scheme": "http",
            "endpoint": self.sim.host,
            "region": self.backend().region,
            "bucket_name": "layers",
            "object_prefix": "some/pre+fix ü/",
            "access_key_id": self._key_id,
            "access_key_secret": secret,
            "security_token": token,
        }

    def rotate(self) -> None:
        self.sim.expired.update(self.sim.keys)
        self._issue()


@attrs.define
class OssV1Place(OssPlace):
    """The same, signed in the old way, because nobody knows the region."""

    name = "oss-v1"
    version: str = "v1"


@attrs.define
class ProxyPlace(WebPlace):
    """nydusd's http-proxy at a URL."""

    name = "http-proxy"
    sim: ProxySim

    def reset(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().reset(monkeypatch, folder)
        self.sim.user = None
        self.sim.style = "nydus"

    def backend(self) -> HttpProxyBackend:
        return HttpProxyBackend(
            addr=f"http://{self.sim.host}", path="/blobs/here", http=HttpOptions(timeout_s=10)
        )

    def put(self, blob_id: str, data: bytes) -> None:
        self.sim.put(blob_id, data)

    def refused(self) -> HttpProxyBackend:
        self.sim.user = "me:right"
        return attrs.evolve(self.backend(), auth=Secret("me:hunter2"))

    def expire(self, source: BlobSource) -> None:
        self.sim.user = "me:new"
        assert isinstance(source, Renewable)
        source.renew(CredentialUpdate(registry_auth=Secret(base64.b64encode(b"me:new").decode())))

    def serve_options(self) -> list[str]:
        return ["--blob-source", f"http://{self.sim.host}/blobs/here"]

    def settings(self) -> tuple[str, dict[str, Any]]:
        self.sim.user = self.sim.user or "me:s3cr3t"
        return "http-proxy", {"addr": f"http://{self.sim.user}@{self.sim.host}", "path": "/blobs/here"}

    def rotate(self) -> None:
        self.sim.user = "me:s3cr3t2"


@attrs.define
class UnixProxyPlace(ProxyPlace):
    """nydusd's http-proxy at a unix socket."""

    name = "http-proxy-unix"

    def backend(self) -> HttpProxyBackend:
        return HttpProxyBackend(addr=str(self.sim.unix_socket), path="/blobs/here")

    def serve_options(self) -> list[str]:
        return ["--blob-source", f"http+unix://{self.sim.unix_socket}?path=/blobs/here"]

    def settings(self) -> tuple[str, dict[str, Any]]:
        return "http-proxy", {"addr": str(self.sim.unix_socket), "path": "/blobs/here/"}

    def rotate(self) -> None:
        """A socket asks nobody who they are."""


NAMES = (
    "docker-registry",
    "registry-sim",
    "directory",
    "s3",
    "oss",
    "oss-v1",
    "http-proxy",
    "http-proxy-unix",
)


@contextmanager
def open_place(name: str, folder: Path, tool: Callable[[str], str]) -> Iterator[Place]:
    """The place called *name*, running; it may keep files in *folder*, whose path has to be short."""
    with ExitStack() as stack:
        match name:
            case "docker-registry":
                tool("docker-registry")
                registry = stack.enter_context(_password_registry(folder / "registry"))
                gateway = stack.enter_context(GatewaySim(f"http://127.0.0.1:{registry.port}"))
                upload = _uploader(registry.port)
                yield DistributionPlace(gateway, registry.port, upload)
            case "registry-sim":
                yield SimulatedRegistryPlace(stack.enter_context(RegistrySimulator()))
            case "directory":
                yield DirectoryPlace(folder)
            case "s3":
                moto = stack.enter_context(moto_server(folder))
                put_object(moto, "/layers")
                gate = stack.enter_context(S3Gate(moto))
                yield S3Place(gate, lambda path, data: put_object(moto, path, data))
            case "oss" | "oss-v1":
                sim = stack.enter_context(OssSim("layers", "cn-hangzhou"))
                yield (OssPlace if name == "oss" else OssV1Place)(sim)
            case "http-proxy":
                yield ProxyPlace(stack.enter_context(ProxySim("/blobs/here")))
            case "http-proxy-unix":
                yield UnixProxyPlace(stack.enter_context(ProxySim("/blobs/here", folder / "blobs.sock")))
            case _:
                raise AssertionError(name)


def _password_registry(folder: Path) -> Registry:
    """Debian's docker-registry, which lets in nobody but me:hunter2."""
    # As `htpasswd -B` writes it; docker-registry takes nothing but bcrypt.
    line = "me:$2b$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"

    class WithPassword(Registry):
        def _config(self, folder: Path) -> dict[str, Any]:
            (folder / "htpasswd").write_text(line)
            auth = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
            return {**super()._config(folder), "auth": auth}

    return WithPassword(folder)


def _uploader(port: int) -> Callable[[bytes], None]:
    """Uploads a blob to the registry at *port*."""
    headers = {"Authorization": "Basic " + base64.b64encode(b"me:hunter2").decode()}

    def upload(data: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", f"/v2/{REPOSITORY}/blobs/uploads/", headers=headers)
        reply = connection.getresponse()
        reply.read()
        location = (reply.headers["Location"] or "").removeprefix(f"http://127.0.0.1:{port}")
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        connection.request("PUT", f"{location}&digest={digest}", body=data, headers=headers)
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 201

    return upload
