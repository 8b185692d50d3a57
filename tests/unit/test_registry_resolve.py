"""From IMAGE to a verified bootstrap: files, pulls, the cache, and what goes wrong on the way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.sim.gate import Auth
from tests.sim.store import sha256
from virtiofsd_rafs.errors import (
    AuthError,
    BadImage,
    ConfigError,
    DigestMismatch,
    NotFound,
    Unreachable,
    UnsupportedFeature,
)
from virtiofsd_rafs.image import resolve
from virtiofsd_rafs.image.resolve import ResolvedImage, resolve_image
from virtiofsd_rafs.registry import manifest as m

if TYPE_CHECKING:
    from tests.sim.registry import RegistrySimulator

BOOT = os.urandom(200_000)
BLOB = os.urandom(5000)
BLOB_ID = hashlib.sha256(BLOB).hexdigest()
METAS = {BLOB_ID: b"map" * 2000}


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests may be logged in somewhere; that must not matter."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def sim(registry_sim: RegistrySimulator) -> RegistrySimulator:
    registry_sim.store.add_image("a/b", "1", BOOT, [BLOB], metas=METAS)
    return registry_sim


async def pull(
    sim: RegistrySimulator, cache: Path | None, name: str = "a/b:1", **options: Any
) -> ResolvedImage:
    settings: dict[str, Any] = {"blob_dir": None, "plain_http": True, "deadline": 20, **options}
    return await resolve_image(f"{sim.host}/{name}", cache_dir=cache, **settings)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def content_files(cache: Path) -> list[Path]:
    return sorted((cache / "content" / "sha256").iterdir())


async def test_a_bootstrap_file(tmp_path: Path) -> None:
    (tmp_path / "image.boot").write_bytes(BOOT)
    resolved = await resolve_image(str(tmp_path / "image.boot"), cache_dir=None, blob_dir=None)
    assert resolved.bootstrap == BOOT
    assert resolved.blob_dir == tmp_path
    assert resolved.reference is None
    elsewhere = await resolve_image(
        str(tmp_path / "image.boot"), cache_dir=None, blob_dir=tmp_path / "blobs", pull="never"
    )
    assert elsewhere.blob_dir == tmp_path / "blobs"


async def test_a_relative_bootstrap_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.boot").write_bytes(BOOT)
    monkeypatch.chdir(tmp_path)
    assert (await resolve_image("image.boot", cache_dir=None, blob_dir=None)).bootstrap == BOOT


@pytest.mark.parametrize("image", ["/no/such/file", "./no-such-file", "no-such-file.boot"])
async def test_a_bootstrap_file_that_is_not_there(image: str) -> None:
    with pytest.raises(NotFound, match="host/repository:tag"):
        await resolve_image(image, cache_dir=None, blob_dir=None)


async def test_the_folder_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not looked for in a registry, under the name of the folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "image.boot").write_bytes(BOOT)
    monkeypatch.chdir(tmp_path)
    for image in ("out", "./out", str(tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"is a folder .*out/image\.boot"):
            await resolve_image(image, cache_dir=None, blob_dir=None)


async def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ConfigError, match="is no image reference"):
        await resolve_image("a" * 5000, cache_dir=None, blob_dir=None)


async def test_a_bootstrap_file_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MAX_BOOTSTRAP_LEN", 100)
    (tmp_path / "image.boot").write_bytes(BOOT)
    with pytest.raises(BadImage, match="longer than"):
        await resolve_image(str(tmp_path / "image.boot"), cache_dir=None, blob_dir=None)


async def test_blob_dir_goes_with_files_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--blob-dir"):
        await resolve_image("h.io/a", cache_dir=None, blob_dir=tmp_path)


@pytest.mark.parametrize("cached", [False, True])
async def test_pull(sim: RegistrySimulator, cache: Path, cached: bool) -> None:
    resolved = await pull(sim, cache if cached else None)
    assert resolved.bootstrap == BOOT
    assert resolved.blob_metas == METAS
    assert resolved.blob_sizes == {BLOB_ID: len(BLOB)}
    assert resolved.manifest_digest == sha256(sim.store.manifests["a/b", "1"][0])
    assert resolved.name == f"{sim.host}/a/b:1"
    assert str(resolved.reference) == resolved.name
    # Manifest and bootstrap layer, each once; no blob.
    assert [(r.where, r.method) for r in sim.log] == [("manifest", "GET"), ("blob", "GET")]


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize("compress", [True, False])
async def test_a_known_tag_starts_without_the_network(
    sim: RegistrySimulator, cache: Path, annotated: bool, compress: bool
) -> None:
    sim.store.add_image("a/b", "1", BOOT, [BLOB], compress=compress, annotate_uncompressed=annotated)
    first = await pull(sim, cache)
    sim.log.clear()
    assert await pull(sim, cache) == first
    assert await pull(sim, cache, pull="never") == first
    assert sim.log == []


def test_a_known_tag_imports_nothing_heavy(tmp_path: Path, sim: RegistrySimulator, cache: Path) -> None:
    import asyncio

    asyncio.run(pull(sim, cache))
    code = """
import sys
from pathlib import Path
from virtiofsd_rafs.image.resolve import resolve_image
try:
    resolve_image(sys.argv[1], cache_dir=Path(sys.argv[2]), blob_dir=None).send(None)
except StopIteration as e:
    heavy = {"aiohttp", "asyncio", "ssl", "socket", "tarfile"}
    print(len(e.value.bootstrap), sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{sim.host}/a/b:1", cache], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{len(BOOT)} []\n"


async def test_a_tag_that_moved(sim: RegistrySimulator, cache: Path) -> None:
    first = await pull(sim, cache)
    sim.store.add_image("a/b", "1", b"new" + BOOT, [BLOB])
    assert await pull(sim, cache) == first  # missing: known here
    assert (await pull(sim, cache, pull="always")).bootstrap == b"new" + BOOT
    assert (await pull(sim, cache)).bootstrap == b"new" + BOOT
    # The old content is still there for whoever pins it.
    pinned = await pull(sim, cache, f"a/b@{first.manifest_digest}", pull="never")
    assert pinned.bootstrap == BOOT


async def test_always_asks_the_tag_and_fetches_what_changed_only(sim: RegistrySimulator, cache: Path) -> None:
    await pull(sim, cache)
    sim.log.clear()
    await pull(sim, cache, pull="always")
    assert [r.where for r in sim.log] == ["manifest"]
    sim.refuse()
    with pytest.raises(Unreachable):
        await pull(sim, cache, pull="always", deadline=0.1)


async def test_never(sim: RegistrySimulator, cache: Path) -> None:
    with pytest.raises(NotFound, match="--pull=missing"):
        await pull(sim, cache, pull="never")
    with pytest.raises(NotFound, match="--pull=missing"):
        await pull(sim, None, pull="never")
    assert sim.log == []


async def test_by_digest(sim: RegistrySimulator, cache: Path) -> None:
    digest = sha256(sim.store.manifests["a/b", "1"][0])
    for name in (f"a/b@{digest}", f"a/b:other@{digest}"):
        assert (await pull(sim, cache, name)).bootstrap == BOOT
    with pytest.raises(NotFound):
        await pull(sim, cache, f"a/b@sha256:{'0' * 64}")


async def test_a_manifest_that_is_not_the_pinned_one(sim: RegistrySimulator, cache: Path) -> None:
    data, kind = sim.store.manifests["a/b", "1"]
    wanted = f"sha256:{'1' * 64}"
    sim.store.manifests["a/b", wanted] = (data, kind)
    with pytest.raises(DigestMismatch):
        await pull(sim, cache, f"a/b@{wanted}")
    assert not (cache / "content").exists()


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", [_damage, Path.unlink, lambda p: p.write_bytes(b"")])
async def test_damaged_content_is_fetched_again(
    sim: RegistrySimulator, cache: Path, which: int, how: Any
) -> None:
    first = await pull(sim, cache)
    path = content_files(cache)[which]
    good = path.read_bytes()
    how(path)
    sim.log.clear()
    assert await pull(sim, cache) == first
    assert len(sim.log) == 1
    assert path.read_bytes() == good


async def test_damaged_content_of_a_tag_that_moved_stays_the_known_image(
    sim: RegistrySimulator, cache: Path
) -> None:
    first = await pull(sim, cache)
    sim.store.add_image("a/b", "1", b"new" + BOOT, [BLOB])
    for path in content_files(cache):
        _damage(path)
    assert await pull(sim, cache) == first


async def test_damaged_content_that_is_gone_from_the_registry(sim: RegistrySimulator, cache: Path) -> None:
    first = await pull(sim, cache)
    del sim.store.manifests["a/b", str(first.manifest_digest)]
    sim.store.add_image("a/b", "1", b"new" + BOOT, [BLOB])
    for path in content_files(cache):
        _damage(path)
    assert (await pull(sim, cache)).bootstrap == b"new" + BOOT
    assert (await pull(sim, cache, pull="never")).bootstrap == b"new" + BOOT


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "{", '{"version": 1, "name": "x", "manifest": "sha256:../.."}']
)
async def test_a_damaged_record_counts_as_none(sim: RegistrySimulator, cache: Path, text: str) -> None:
    first = await pull(sim, cache)
    (record,) = (cache / "images").iterdir()
    record.write_text(text)
    assert await pull(sim, cache) == first
    assert json.loads(record.read_text())["manifest"] == first.manifest_digest


async def test_a_record_speaks_for_its_own_name_only(sim: RegistrySimulator, cache: Path) -> None:
    await pull(sim, cache)
    (record,) = (cache / "images").iterdir()
    other = hashlib.sha256(f"{sim.host}/a/b:2".encode()).hexdigest()
    record.rename(record.with_name(f"{other}.json"))
    with pytest.raises(NotFound):
        await pull(sim, cache, "a/b:2", pull="never")


async def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(
    sim: RegistrySimulator, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert (await pull(sim, tmp_path / "file" / "cache")).bootstrap == BOOT


async def test_nothing_half_written_is_left(sim: RegistrySimulator, cache: Path) -> None:
    await pull(sim, cache)
    assert {p.name for p in content_files(cache)} == {
        hashlib.sha256(p.read_bytes()).hexdigest() for p in content_files(cache)
    }
    assert [p.suffix for p in (cache / "images").iterdir()] == [".json"]


async def test_faults_that_a_retry_cures(sim: RegistrySimulator, cache: Path) -> None:
    sim.fault("server-error", where="manifest", times=1)
    sim.fault("throttle", where="manifest", skip=1, times=1, retry_after=0)
    sim.fault("cut", where="blob", times=2, after_bytes=50_000)
    assert (await pull(sim, cache)).bootstrap == BOOT
    # What had come before a cut is not fetched again.
    assert [r.span[0] for r in sim.requests("blob") if r.span] == [0, 50_000, 100_000]


async def test_a_corrupted_layer_is_fetched_again(sim: RegistrySimulator, cache: Path) -> None:
    sim.fault("corrupt", where="blob", times=1)
    assert (await pull(sim, cache)).bootstrap == BOOT


async def test_a_corrupted_manifest_of_a_tag_is_fetched_again(sim: RegistrySimulator, cache: Path) -> None:
    """A tag promises no digest, but the registry tells the one of what it means to send."""
    sim.fault("corrupt", where="manifest", times=1)
    assert (await pull(sim, cache)).bootstrap == BOOT
    assert len(sim.requests("manifest")) == 2


@pytest.mark.parametrize("where", ["blob", "manifest"])
async def test_content_that_is_always_corrupted_is_refused(
    sim: RegistrySimulator, cache: Path, where: str
) -> None:
    digest = sha256(sim.store.manifests["a/b", "1"][0])
    sim.fault("corrupt", where=where, at=10)
    with pytest.raises(DigestMismatch):
        await pull(sim, cache, f"a/b@{digest}")
    kept = content_files(cache) if (cache / "content").exists() else []
    assert all(hashlib.sha256(p.read_bytes()).hexdigest() == p.name for p in kept)


async def test_a_registry_that_is_away_at_first(sim: RegistrySimulator, cache: Path) -> None:
    import asyncio

    sim.refuse()
    task = asyncio.create_task(pull(sim, cache))
    await asyncio.sleep(0.3)
    assert not task.done()
    await asyncio.to_thread(sim.accept)
    assert (await task).bootstrap == BOOT


async def test_what_no_retry_cures_ends_at_once(sim: RegistrySimulator, cache: Path) -> None:
    with pytest.raises(NotFound, match="push it again"):
        await pull(sim, cache, "a/b:nope")
    sim.gate.auth = Auth("basic", "me", "pw")
    with pytest.raises(AuthError, match="docker login"):
        await pull(sim, cache)
    assert len(sim.log) == 2


async def test_credentials_from_the_docker_config(
    sim: RegistrySimulator, cache: Path, no_credentials: Path
) -> None:
    sim.gate.auth = Auth("bearer", "me", "pw")
    auth = base64.b64encode(b"me:pw").decode()
    write(no_credentials, json.dumps({"auths": {sim.host: {"auth": auth}}}))
    assert (await pull(sim, cache)).bootstrap == BOOT
    write(no_credentials, "{")
    with pytest.raises(AuthError, match=r"config\.json"):
        await pull(sim, cache, pull="always")


def platform(arch: str) -> dict[str, Any]:
    return {"platform": {"os": "linux", "architecture": arch}}


def entry(sim: RegistrySimulator, repo: str, tag: str, **more: Any) -> dict[str, Any]:
    data, kind = sim.store.manifests[repo, tag]
    return {"mediaType": kind, "digest": sha256(data), "size": len(data), **more}


def add_plain(sim: RegistrySimulator, repo: str, tag: str) -> None:
    layer = {"mediaType": m.OCI_LAYER_GZIP, "digest": sim.store.add_blob(b"layer"), "size": 5}
    document = {"schemaVersion": 2, "mediaType": m.OCI_MANIFEST, "config": layer, "layers": [layer]}
    sim.store.add_manifest(repo, tag, document)


async def test_an_index(sim: RegistrySimulator, cache: Path) -> None:
    add_plain(sim, "a/b", "plain")
    arch = m.host_architecture()
    for manifests in (
        [entry(sim, "a/b", "plain", **platform(arch)), entry(sim, "a/b", "1", **platform(arch))],
        [
            entry(sim, "a/b", "plain", **platform(arch)),
            entry(sim, "a/b", "1", artifactType=m.NYDUS_ARTIFACT, **platform(arch)),
            entry(sim, "a/b", "plain", **platform("s390x")),
        ],
    ):
        document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": manifests}
        sim.store.add_manifest("a/b", "multi", document, m.OCI_INDEX)
        resolved = await pull(sim, cache, "a/b:multi", pull="always")
        assert resolved.bootstrap == BOOT
        assert resolved.manifest_digest == sha256(sim.store.manifests["a/b", "1"][0])
        sim.log.clear()
        assert await pull(sim, cache, "a/b:multi") == resolved
        assert sim.log == []


async def test_an_index_of_plain_images(sim: RegistrySimulator, cache: Path) -> None:
    add_plain(sim, "a/b", "plain")
    manifests = [entry(sim, "a/b", "plain", **platform(m.host_architecture()))]
    document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": manifests}
    sim.store.add_manifest("a/b", "multi", document, m.OCI_INDEX)
    for name in ("a/b:plain", "a/b:multi"):
        with pytest.raises(UnsupportedFeature, match="plain OCI image"):
            await pull(sim, cache, name)
    assert not (cache / "images").exists()


async def test_an_index_in_an_index_in_an_index(sim: RegistrySimulator, cache: Path) -> None:
    name = "1"
    for level in ("x", "y", "z"):
        manifests = [entry(sim, "a/b", name)]
        document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": manifests}
        sim.store.add_manifest("a/b", level, document, m.OCI_INDEX)
        name = level
    assert (await pull(sim, cache, "a/b:y")).bootstrap == BOOT
    with pytest.raises(BadImage, match="nested"):
        await pull(sim, cache, "a/b:z")


async def test_a_layer_without_bootstrap(sim: RegistrySimulator, cache: Path) -> None:
    sim.store.add_image("a/b", "bad", b"", [], tar=bytes(1024))
    with pytest.raises(BadImage, match=r"image/image\.boot"):
        await pull(sim, cache, "a/b:bad")
    assert not (cache / "images").exists()


async def test_an_annotation_that_lies_is_not_believed(sim: RegistrySimulator, cache: Path) -> None:
    data, kind = sim.store.manifests["a/b", "1"]
    document = json.loads(data)
    document["layers"][-1]["annotations"][m.ANNOTATION_UNCOMPRESSED] = f"sha256:{'2' * 64}"
    sim.store.add_manifest("a/b", "lie", document, kind)
    first = await pull(sim, cache, "a/b:lie")
    assert first.bootstrap == BOOT
    sim.log.clear()
    assert await pull(sim, cache, "a/b:lie") == first
    assert sim.log == []


async def test_a_layer_that_is_longer_or_shorter_than_promised(sim: RegistrySimulator, cache: Path) -> None:
    data, kind = sim.store.manifests["a/b", "1"]
    for delta in (-1, 1):
        document = json.loads(data)
        document["layers"][-1]["size"] += delta
        sim.store.add_manifest("a/b", "odd", document, kind)
        with pytest.raises((DigestMismatch, Unreachable, OSError)):
            await pull(sim, cache, "a/b:odd", pull="always", deadline=1)
