"""``virtiofsd-rafs cache``: what it shows, what it removes and leaves alone, what it finds out."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.cli.cache import cache as command
from virtiofsd_rafs.image.content import ContentStore
from virtiofsd_rafs.image.resolve import resolve_image
from virtiofsd_rafs.native.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sim.registry import RegistrySimulator

N = 24
DAY = 86400


def run(folder: Path, *args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(command, [args[0], "--cache-dir", str(folder), *args[1:]])
    assert result.exit_code == code, result.output
    return result


def run_json(folder: Path, *args: str, code: int = 0) -> dict[str, Any]:
    data = json.loads(run(folder, *args, "--json", code=code).stdout)
    assert isinstance(data, dict)
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path: Path) -> dict[str, MadeImage]:
    return {name: make_image(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new", "local"))}


def pull(sim: RegistrySimulator, folder: Path, name: str, image: MadeImage) -> str:
    """As `serve` does: resolves the image of that name."""
    sim.store.add_image("app", name, image.bootstrap, [image.blob])
    reference = f"{sim.host}/app:{name}"
    asyncio.run(
        resolve_image(reference, cache_dir=folder, blob_dir=None, access=RegistryAccess(plain_http=True))
    )
    return reference


def fill(folder: Path, image: MadeImage, *, used: float | None = None) -> Store:
    store = Store(image.bootstrap, cache_dir=folder, spill_size=1 << 20)
    assert store.open_blob(0)
    store.ingest(0, 0, image.blob, range(N))
    if used is not None:
        used_at = (4096 + 4 * N + 7) // 8 * 8
        with (folder / f"{image.blob_id}.chunk_state").open("r+b") as f:
            f.seek(used_at)
            f.write(struct.pack(f"<{N}I", *[int(used)] * N))
    return store


@pytest.fixture
def cached(registry_sim: RegistrySimulator, folder: Path, images: dict[str, MadeImage]) -> list[str]:
    """Two images from a registry, one of them not used for 40 days, and a blob of a bootstrap file."""
    names = [pull(registry_sim, folder, name, images[name]) for name in ("old", "new")]
    fill(folder, images["old"], used=time.time() - 40 * DAY).close()
    fill(folder, images["new"]).close()
    fill(folder, images["local"]).close()
    for path in (folder / "content" / "sha256").iterdir():
        os.utime(path, (0, time.time() - 40 * DAY))
    return names


def stems(folder: Path) -> set[str]:
    return {path.name.removesuffix(".chunk_state") for path in folder.glob("*.chunk_state")}


def test_ls_and_du(cached: list[str], folder: Path, images: dict[str, MadeImage]) -> None:
    found = run_json(folder, "ls")
    blobs = {blob["blob_id"]: blob for blob in found["blobs"]}
    assert set(blobs) == {image.blob_id for image in images.values()}
    old, new, local = (blobs[images[name].blob_id] for name in ("old", "new", "local"))
    assert [blob["images"] for blob in (old, new, local)] == [[cached[0]], [cached[1]], []]
    assert (new["n_chunks"], new["n_verified"], new["n_present"]) == (N, N, 0)
    assert abs(new["last_used"] - time.time()) < 60
    assert abs(old["last_used"] - time.time() + 40 * DAY) < 60
    files = list(folder.glob(f"{images['new'].blob_id}.*"))
    assert new["disk_bytes"] == sum(path.stat().st_blocks for path in files) * 512
    assert {image["name"]: image["complete"] for image in found["images"]} == dict.fromkeys(cached, True)
    assert not any(blob["in_use"] or blob["nydusd"] for blob in found["blobs"])
    usage = run_json(folder, "du")
    assert usage["unreferenced_bytes"] == local["disk_bytes"]
    assert usage["disk_bytes"] == found["disk_bytes"]
    assert found["disk_bytes"] == sum(row["disk_bytes"] for row in usage["images"]) + local["disk_bytes"]
    assert cached[0] in run(folder, "ls").stdout
    assert cached[0] in run(folder, "du").stdout


def test_gc_removes_what_no_image_needs(
    cached: list[str], folder: Path, images: dict[str, MadeImage]
) -> None:
    before = stems(folder)
    would = run_json(folder, "gc", "--dry-run")
    assert stems(folder) == before
    done = run_json(folder, "gc")
    assert {k: v for k, v in would.items() if k != "dry_run"} == {
        k: v for k, v in done.items() if k != "dry_run"
    }
    assert (done["images"], done["blobs"]) == ([], [images["local"].blob_id])
    assert stems(folder) == before - {images["local"].blob_id}
    left = run_json(folder, "ls")
    assert left["disk_bytes"] == done["disk_bytes_left"]
    assert [image["complete"] for image in left["images"]] == [True, True]


def test_images_from_bootstrap_files_keep_their_blobs(
    cached: list[str], folder: Path, images: dict[str, MadeImage]
) -> None:
    """As `serve` notes them; a file that is gone is no image any more."""
    image, file = images["local"], images["local"].folder / "image.boot"
    ContentStore(folder).remember_file(str(file), [image.blob_id])
    assert {found["name"] for found in run_json(folder, "ls")["images"]} == {*cached, str(file)}
    assert (run_json(folder, "gc")["images"], run_json(folder, "gc")["blobs"]) == ([], [])
    assert run_json(folder, "verify")["unknown"] == []
    with fill(folder, image):
        done = run_json(folder, "gc", "--max-size", "0")
        assert (done["images"], done["kept_in_use"]) == (sorted(cached, reverse=True), [str(file)])
    file.rename(file.with_name("elsewhere"))
    done = run_json(folder, "gc")
    assert (done["images"], done["blobs"]) == ([str(file)], [image.blob_id])
    assert run_json(folder, "ls")["images"] == []
    assert stems(folder) == set()


@pytest.mark.usefixtures("cached")
def test_a_bootstrap_file_that_is_something_else_by_now(folder: Path, images: dict[str, MadeImage]) -> None:
    """It is told, and the others are looked after."""
    file = images["local"].folder / "image.boot"
    ContentStore(folder).remember_file(str(file), [images["local"].blob_id])
    file.write_bytes(b"something else" * 500)
    (problem,) = run_json(folder, "verify")["problems"]
    assert problem.startswith(f"{file}: bad image")
    assert set(run_json(folder, "export")["blobs"]) == {images[name].blob_id for name in ("old", "new")}
    run(folder, "export", "--bootstrap", str(file), code=1)


def test_gc_by_age_and_by_size(cached: list[str], folder: Path, images: dict[str, MadeImage]) -> None:
    done = run_json(folder, "gc", "--older-than", "30d")
    assert done["images"] == [cached[0]]
    assert stems(folder) == {images["new"].blob_id}
    assert [image["name"] for image in run_json(folder, "ls")["images"]] == [cached[1]]
    assert run_json(folder, "gc", "--max-size", "1GiB")["images"] == []
    assert run_json(folder, "gc", "--max-size", "0")["images"] == [cached[1]]
    assert stems(folder) == set()
    assert run_json(folder, "ls")["disk_bytes"] == 0


def test_gc_leaves_what_is_in_use(cached: list[str], folder: Path, images: dict[str, MadeImage]) -> None:
    with fill(folder, images["old"]) as store, fill(folder, images["local"]) as other:
        # A daemon without its control: only the worker's descriptors are left.
        fds = store.share(0)
        store.close()
        done = run_json(folder, "gc", "--max-size", "0")
        assert done["images"] == [cached[1]]
        assert done["kept_in_use"] == [cached[0]]
        assert stems(folder) == {images["old"].blob_id, images["local"].blob_id}
        assert other.chunks(0).ready(3)
        for fd in fds:
            assert fd is not None
            os.close(fd)
    assert cached[0] in run(folder, "gc", "--max-size", "0").stdout
    assert stems(folder) == set()


def test_verify_finds_and_cures(cached: list[str], folder: Path, images: dict[str, MadeImage]) -> None:
    good = run_json(folder, "verify")
    assert (good["ok"], good["n_good"], good["n_bad"]) == (True, 2 * N, 0)
    assert good["unknown"] == [images["local"].blob_id]
    data = folder / f"{images['new'].blob_id}.blob.data"
    with fill(folder, images["new"]) as store:  # a running daemon
        for chunk in (2, 7):
            with data.open("r+b") as f:
                f.seek(images["new"].chunks[chunk].uncompressed_offset + 5)
                f.write(b"\0\0")
        before = data.stat().st_blocks
        bootstrap = images["local"].folder / "image.boot"
        bad = run_json(folder, "verify", "--bootstrap", str(bootstrap), code=6)
        assert (bad["ok"], bad["n_good"], bad["n_reclaimed"], bad["unknown"]) == (False, 3 * N - 2, 2, [])
        assert bad["bad"] == [{"blob": images["new"].blob_id, "chunk": chunk} for chunk in (2, 7)]
        view = store.chunks(0)
        assert [chunk for chunk in range(N) if not view.ready(chunk)] == [2, 7]
        assert data.stat().st_blocks < before
    assert "0 were bad" in run(folder, "verify").stdout


def test_verify_creates_nothing(
    registry_sim: RegistrySimulator, folder: Path, images: dict[str, MadeImage]
) -> None:
    pull(registry_sim, folder, "new", images["new"])
    assert run_json(folder, "verify")["blobs"] == []
    assert stems(folder) == set()


def test_damaged_files_are_no_obstacle(cached: list[str], folder: Path, images: dict[str, MadeImage]) -> None:
    (folder / f"{images['new'].blob_id}.chunk_state").write_bytes(b"x" * 5000)
    next((folder / "images").iterdir()).write_bytes(b"{")
    (folder / "lonely.blob.data").write_bytes(b"x")
    for i, record in enumerate(
        ({"file": "/\ud800", "blobs": []}, {"name": "\ud800", "manifest": f"sha256:{0:064}"})
    ):
        (folder / "images" / f"{i}.json").write_text(json.dumps({"version": 1, **record}))
    found = run_json(folder, "ls")
    assert len(found["blobs"]) == 4
    run_json(folder, "du")
    run_json(folder, "verify")
    run_json(folder, "gc", "--dry-run")


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["ls", "--cache-dir", str(tmp_path / "none")])
    assert "cannot be read" in str(result.exception)
    assert "serve --cache-dir" in str(result.exception)


def test_an_age_that_is_none(folder: Path) -> None:
    assert "is no time" in run(folder, "gc", "--older-than", "soon", code=2).output
