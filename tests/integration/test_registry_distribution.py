"""Push, pull and ranges with a real registry: Debian's docker-registry."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from guest.registry import Registry
from tests.sim.sources import Config
from tests.sim.tls import make_certificate
from virtiofsd_rafs.backends import open_source
from virtiofsd_rafs.backends.config import HttpOptions, RegistryAccess
from virtiofsd_rafs.errors import AuthError, BackendError, BadReply, NotFound, UntrustedServer
from virtiofsd_rafs.image.assemble import assemble
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.image.resolve import resolve_image
from virtiofsd_rafs.image.upload import Pusher
from virtiofsd_rafs.registry.reference import parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLAIN = Config(RegistryAccess(plain_http=True))
# "me:hunter2", as `htpasswd -B` writes it; docker-registry takes nothing but bcrypt.
HTPASSWD = "me:$2b$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"


class PasswordRegistry(Registry):
    """Asks for a user and a password."""

    def _config(self, folder: Path) -> dict[str, Any]:
        (folder / "htpasswd").write_text(HTPASSWD)
        auth = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
        return {**super()._config(folder), "auth": auth}


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests may be logged in somewhere; that must not matter."""
    (tmp_path / "docker").mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    (folder / "source").mkdir()
    (folder / "source" / "numbers").write_text("\n".join(map(str, range(400_000))))
    (folder / "source" / "empty").touch()
    build_image(folder / "source", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def registry(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    tool("docker-registry")
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def blob_of(out: Path) -> Path:
    (blob,) = (p for p in out.iterdir() if p.name != "image.boot")
    return blob


async def test_push_pull_read(registry: Registry, out: Path, tmp_path: Path) -> None:
    reference = f"127.0.0.1:{registry.port}/some/where:v1"
    digest = await push_image(out, reference, plain_http=True)
    assert await push_image(out, reference, plain_http=True) == digest
    bootstrap, blob = (out / "image.boot").read_bytes(), blob_of(out).read_bytes()
    for name in (reference, reference.replace(":v1", f"@{digest}")):
        for cache_dir in (None, tmp_path / "cache"):
            image = await resolve_image(name, cache_dir=cache_dir, blob_dir=None, plain_http=True)
            assert image.bootstrap == bootstrap
            assert image.manifest_digest == digest
    source = open_source(image, PLAIN)
    wanted = [(0, len(blob)), (0, 1), (len(blob) - 1, 1), (1000, 70_000)]
    got = await asyncio.gather(*(source.read_range(blob_of(out).name, o, n) for o, n in wanted))
    assert got == [blob[o : o + n] for o, n in wanted]
    await source.close()
    fresh = open_source(attrs.evolve(image, blob_sizes={}), PLAIN)
    assert await fresh.blob_size(blob_of(out).name) == len(blob)
    await fresh.close()


async def test_a_range_behind_the_end(registry: Registry, out: Path) -> None:
    """docker-registry 2.8.2 announces the blob's length with 416 and sends 33 bytes: nobody waits for it."""
    reference = f"127.0.0.1:{registry.port}/some/where:v1"
    await push_image(out, reference, plain_http=True)
    image = await resolve_image(reference, cache_dir=None, blob_dir=None, plain_http=True)
    source = open_source(image, attrs.evolve(PLAIN, connections=1))
    blob = blob_of(out)
    size = blob.stat().st_size
    for offset, length in [(size, 1), (size + 100, 4096), (size - 1, 2)]:
        with pytest.raises(BadReply):
            await source.read_range(blob.name, offset, length)
        assert await source.read_range(blob.name, 0, 4) == blob.read_bytes()[:4]
    await source.close()


async def test_what_is_not_there(registry: Registry, out: Path) -> None:
    with pytest.raises(NotFound):
        await resolve_image(
            f"127.0.0.1:{registry.port}/no/such:image", cache_dir=None, blob_dir=None, plain_http=True
        )
    reference = f"127.0.0.1:{registry.port}/some/where:v1"
    await push_image(out, reference, plain_http=True)
    image = await resolve_image(reference, cache_dir=None, blob_dir=None, plain_http=True)
    source = open_source(image, PLAIN)
    with pytest.raises(NotFound):
        await source.read_range("0" * 64, 0, 1)
    await source.close()


async def test_upload_in_pieces(registry: Registry, out: Path) -> None:
    upload = assemble(out).uploads[0]
    reference = parse_reference(f"127.0.0.1:{registry.port}/in/pieces")
    async with Pusher(
        reference, access=RegistryAccess(plain_http=True), deadline_s=20, piece=upload.size // 4 + 1
    ) as pusher:
        assert await pusher.push_blob(upload) is False
        assert await pusher.push_blob(upload) is True


async def test_https_is_the_default(registry: Registry) -> None:
    with pytest.raises(UntrustedServer, match="--plain-http"):
        await resolve_image(f"127.0.0.1:{registry.port}/a:1", cache_dir=None, blob_dir=None, deadline=5)


def login(path: Path, port: int, password: str) -> None:
    entry = {"username": "me", "password": password}
    path.write_text(json.dumps({"auths": {f"127.0.0.1:{port}": entry}}))


async def test_password(tool: Callable[[str], str], tmp_path: Path, out: Path, docker_config: Path) -> None:
    tool("docker-registry")
    with PasswordRegistry(tmp_path / "registry") as registry:
        reference = f"127.0.0.1:{registry.port}/a/b:1"
        with pytest.raises(AuthError, match="asks for a user"):
            await push_image(out, reference, plain_http=True)
        login(docker_config, registry.port, "wrong")
        with pytest.raises(AuthError, match="refuses the user") as e:
            await push_image(out, reference, plain_http=True)
        assert "wrong" not in str(e.value)
        login(docker_config, registry.port, "hunter2")
        await push_image(out, reference, plain_http=True)
        image = await resolve_image(reference, cache_dir=None, blob_dir=None, plain_http=True)
        source = open_source(image, PLAIN)
        assert await source.read_range(blob_of(out).name, 0, 8) == blob_of(out).read_bytes()[:8]
        await source.close()
        assert "hunter2" not in registry.log.read_text()


async def test_tls(tool: Callable[[str], str], tmp_path: Path, out: Path) -> None:
    tool("docker-registry")
    certificate, key = make_certificate(tool("openssl"), tmp_path)

    class TlsRegistry(Registry):
        def _config(self, folder: Path) -> dict[str, Any]:
            config = super()._config(folder)
            config["http"]["tls"] = {"certificate": str(certificate), "key": str(key)}
            return config

        def _wait(self, timeout: float = 30) -> None:
            """Looks at no answer, for the registry speaks TLS: clients try again until it listens."""

    with TlsRegistry(tmp_path / "registry") as registry:
        reference = f"127.0.0.1:{registry.port}/a/b:1"
        access = RegistryAccess(http=HttpOptions(ca_files=(certificate,)))
        await push_image(out, reference, access=access)
        with pytest.raises(UntrustedServer, match="--ca-file"):
            await resolve_image(reference, cache_dir=None, blob_dir=None)
        image = await resolve_image(reference, cache_dir=None, blob_dir=None, access=access)
        source = open_source(image, Config(access))
        assert await source.read_range(blob_of(out).name, 0, 8) == blob_of(out).read_bytes()[:8]
        await source.close()
        with pytest.raises(BackendError):
            await resolve_image(reference, cache_dir=None, blob_dir=None, plain_http=True, deadline=0.5)
