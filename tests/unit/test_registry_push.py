"""What a build becomes in a registry."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.sim.gate import Auth
from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.errors import AuthError, BadReply, ConfigError, DigestMismatch, NotFound, Unreachable
from virtiofsd_rafs.image.assemble import assemble
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.image.resolve import resolve_image
from virtiofsd_rafs.image.upload import Pusher
from virtiofsd_rafs.registry import manifest as m
from virtiofsd_rafs.registry.reference import parse_reference

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sim.registry import RegistrySimulator


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests may be logged in somewhere; that must not matter."""
    (tmp_path / "docker").mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"hello" * 1000)
    (source / "b").write_bytes(bytes(range(256)) * 40_000)
    build_image(source, tmp_path / "out")
    return tmp_path / "out"


def blob_of(out: Path) -> Path:
    (blob,) = (p for p in out.iterdir() if p.name != "image.boot")
    return blob


def test_the_manifest(out: Path) -> None:
    parts = assemble(out)
    blob = blob_of(out)
    document = json.loads(parts.manifest)
    assert document["artifactType"] == "application/vnd.nydus.image.manifest.v1+json"
    blob_layer, bootstrap_layer = document["layers"]
    assert blob_layer == {
        "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1",
        "digest": f"sha256:{blob.name}",
        "size": blob.stat().st_size,
        "annotations": {"containerd.io/snapshot/nydus-blob": "true"},
    }
    assert bootstrap_layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    annotations = bootstrap_layer["annotations"]
    assert annotations["containerd.io/snapshot/nydus-bootstrap"] == "true"
    assert annotations["containerd.io/snapshot/nydus-fs-version"] == "6"
    assert json.loads(annotations["containerd.io/snapshot/nydus-reference-blob-ids"]) == [blob.name]
    config = json.loads(next(u.data for u in parts.uploads if u.digest == document["config"]["digest"]))
    assert config["rootfs"]["diff_ids"] == [f"sha256:{blob.name}", annotations["containerd.io/uncompressed"]]
    assert (config["os"], config["architecture"]) == ("linux", m.host_architecture())


def test_the_same_build_gives_the_same_digest(out: Path) -> None:
    assert assemble(out).digest == assemble(out).digest


def test_other_files_in_the_folder_do_not_matter(out: Path) -> None:
    before = assemble(out).digest
    (out / hashlib.sha256(b"stray").hexdigest()).write_bytes(b"stray")
    (out / "notes.txt").write_text("x")
    assert assemble(out).digest == before


async def test_there_and_back(registry_sim: RegistrySimulator, out: Path) -> None:
    sim = registry_sim
    lines: list[str] = []
    digest = await push_image(out, f"{sim.host}/a/b:1", plain_http=True, progress=lines.append)
    assert digest == m.digest_of(sim.store.manifests["a/b", "1"][0])
    assert len(lines) == 3
    assert all("pushed" in line for line in lines)
    resolved = await resolve_image(f"{sim.host}/a/b:1", cache_dir=None, blob_dir=None, plain_http=True)
    blob = blob_of(out)
    assert resolved.bootstrap == (out / "image.boot").read_bytes()
    assert resolved.blob_sizes == {blob.name: blob.stat().st_size}
    assert list(resolved.blob_metas) == [blob.name]
    assert sim.store.blobs[f"sha256:{blob.name}"] == blob.read_bytes()


async def test_what_is_there_is_not_sent_again(registry_sim: RegistrySimulator, out: Path) -> None:
    sim = registry_sim
    await push_image(out, f"{sim.host}/a/b:1", plain_http=True)
    sim.log.clear()
    lines: list[str] = []
    await push_image(out, f"{sim.host}/a/b:2", plain_http=True, progress=lines.append)
    assert all("already there" in line for line in lines)
    assert sim.requests("upload") == []
    assert sim.store.manifests["a/b", "1"] == sim.store.manifests["a/b", "2"]


async def test_large_blobs_go_in_pieces(
    registry_sim: RegistrySimulator, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = registry_sim
    upload = assemble(out).uploads[0]
    reference = parse_reference(f"{sim.host}/a/b:1")
    piece = upload.size // 3 + 1
    async with Pusher(
        reference, access=RegistryAccess(plain_http=True), deadline_s=20, piece=piece
    ) as pusher:
        assert await pusher.push_blob(upload) is False
    assert [r.method for r in sim.requests("upload")] == ["POST", "PATCH", "PATCH", "PUT"]
    assert sim.store.blobs[upload.digest] == blob_of(out).read_bytes()


async def test_faults_that_a_retry_cures(registry_sim: RegistrySimulator, out: Path) -> None:
    sim = registry_sim
    sim.fault("server-error", where="upload", method="PUT", times=1)
    sim.fault("throttle", where="blob", method="HEAD", times=1, retry_after=0)
    sim.fault("server-error", where="manifest", method="PUT", times=1)
    await push_image(out, f"{sim.host}/a/b:1", plain_http=True, deadline=20)
    assert ("a/b", "1") in sim.store.manifests


async def test_head_may_be_refused(registry_sim: RegistrySimulator, out: Path) -> None:
    registry_sim.fault("head-403")
    await push_image(out, f"{registry_sim.host}/a/b:1", plain_http=True)
    assert ("a/b", "1") in registry_sim.store.manifests


async def test_a_registry_that_is_away(registry_sim: RegistrySimulator, out: Path) -> None:
    registry_sim.refuse()
    with pytest.raises(Unreachable):
        await push_image(out, f"{registry_sim.host}/a/b:1", plain_http=True, deadline=0.1)


async def test_a_registry_that_disagrees_about_a_digest(registry_sim: RegistrySimulator, out: Path) -> None:
    registry_sim.fault("no-digest-match", where="upload", method="PUT")
    with pytest.raises(BadReply, match="400"):
        await push_image(out, f"{registry_sim.host}/a/b:1", plain_http=True, deadline=0.1)
    assert registry_sim.store.manifests == {}


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_authentication(
    registry_sim: RegistrySimulator, out: Path, docker_config: Path, kind: str
) -> None:
    sim = registry_sim
    sim.gate.auth = Auth(kind, "me", "hunter2")
    with pytest.raises(AuthError, match="docker login"):
        await push_image(out, f"{sim.host}/a/b:1", plain_http=True)
    entry = {"username": "me", "password": "hunter2"}
    docker_config.write_text(json.dumps({"auths": {sim.host: entry}}))  # noqa: ASYNC240
    await push_image(out, f"{sim.host}/a/b:1", plain_http=True)
    assert ("a/b", "1") in sim.store.manifests
    if kind == "bearer":
        assert "push" in sim.requests("token")[-1].path


async def test_what_cannot_be_pushed(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build DIR"):
        await push_image(tmp_path, "h.io/a:1")
    with pytest.raises(ConfigError, match="choose its digest"):
        await push_image(out, f"h.io/a@sha256:{'0' * 64}")


def test_a_damaged_blob(out: Path) -> None:
    blob = blob_of(out)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(DigestMismatch, match=blob.name):
        assemble(out)


def test_a_missing_blob(out: Path) -> None:
    blob = blob_of(out)
    blob.unlink()
    with pytest.raises(NotFound, match=blob.name):
        assemble(out)


def test_command_line(registry_sim: RegistrySimulator, out: Path) -> None:
    from click.testing import CliRunner

    from virtiofsd_rafs.cli.push import push

    done = CliRunner().invoke(push, [str(out), f"{registry_sim.host}/a/b:1", "--plain-http"])
    assert done.exit_code == 0, done.output
    digest = m.digest_of(registry_sim.store.manifests["a/b", "1"][0])
    assert done.stdout == f"{digest}\n"
    assert "pushed" in done.stderr
