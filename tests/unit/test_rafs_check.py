"""``check`` and ``inspect``: faults are found, named, and all of them; sound images have none."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.source_trees import FIXTURES, make_varied_tree
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.image.build import BuildResult, build_image
from virtiofsd_rafs.image.check import Report, check_bootstrap, check_image
from virtiofsd_rafs.image.push import push_image
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.sim.registry import RegistrySimulator
    from virtiofsd_rafs.rafs.v6 import Inode


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    root = tmp_path_factory.mktemp("check")
    (root / "src").mkdir()
    make_varied_tree(root / "src")
    return build_image(root / "src", root / "out", chunk_size=1 << 16)


@pytest.fixture
def image(built: BuildResult, tmp_path: Path) -> Path:
    """A copy of the image that may be damaged."""
    shutil.copytree(built.bootstrap.parent, tmp_path / "image")
    return tmp_path / "image"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def blob_of(image: Path) -> Path:
    (blob,) = (path for path in image.iterdir() if path.name != "image.boot")
    return blob


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)


def find(image: Path, path: bytes) -> tuple[Tree, Inode]:
    tree = Tree.parse((image / "image.boot").read_bytes())
    inode = resolve(tree, path)
    assert inode is not None
    return tree, inode


def faults(image: Path, **options: Any) -> list[str]:
    """What check finds, as "where: message"."""
    report = Report()
    asyncio.run(check_image(str(image / "image.boot"), report, **options))
    return [f"{finding.where}: {finding.message}" for finding in report.findings]


def test_sound_image(image: Path, built: BuildResult) -> None:
    done = run("check", image / "image.boot", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["ok"]
    assert report["findings"] == []
    assert report["n_inodes"] == built.n_inodes
    assert report["n_chunks"] == report["n_chunks_verified"] == built.n_chunks
    assert report["blobs_read"] == [built.blob_id]


@pytest.mark.parametrize(("n", "said"), [(1, "; 1 fault\n"), (2, "; 2 faults\n")])
def test_faults_are_counted_in_words(image: Path, n: int, said: str) -> None:
    offset = Tree.parse((image / "image.boot").read_bytes()).superblock.ext.chunk_table_offset
    # What the prefetch table names must exist; the chunk table holds plenty of numbers that are no nids.
    patch(image / "image.boot", c.EXT_SUPER_OFFSET + 40, struct.pack("<QI", offset, 4 * n))
    done = run("check", image / "image.boot", "--metadata-only")
    assert done.exit_code == 3
    assert done.output.endswith(said)
    assert "prefetch table: image.malformed: no name leads to nid" in done.output


def test_blob_elsewhere(image: Path, tmp_path: Path, built: BuildResult) -> None:
    (tmp_path / "blobs").mkdir()
    blob_of(image).rename(tmp_path / "blobs" / str(built.blob_id))
    alone = run("check", image / "image.boot")
    assert alone.exit_code == 0
    assert "was not read" in alone.output
    assert " 0 of them verified" in alone.output
    together = run("check", image / "image.boot", "--blob-dir", tmp_path / "blobs")
    assert f" {built.n_chunks} of them verified" in together.output
    (tmp_path / "empty").mkdir()
    missing = run("check", image / "image.boot", "--blob-dir", tmp_path / "empty")
    assert type(missing.exception).__name__ == "NotFound"
    # And as `serve` is told.
    source = run("check", image / "image.boot", "--blob-source", f"file://{tmp_path}/blobs")
    assert f" {built.n_chunks} of them verified" in source.output
    missing = run("check", image / "image.boot", "--blob-source", f"file://{tmp_path}/empty")
    assert type(missing.exception).__name__ == "NotFound"
    config = tmp_path / "nydusd.json"
    backend = {"type": "localfs", "localfs": {"dir": f"{tmp_path}/blobs"}}
    config.write_text(json.dumps({"version": 2, "backend": backend}))
    configured = run("check", image / "image.boot", "--config", config)
    assert f" {built.n_chunks} of them verified" in configured.output
    assert run("inspect", image / "image.boot", "--config", config).exit_code == 0
    two = run("check", image / "image.boot", "--blob-dir", tmp_path, "--blob-source", "file:///x")
    assert "say two places" in str(two.exception)


@pytest.fixture
def pushed(
    registry_sim: RegistrySimulator, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The reference of the image in a registry."""
    (tmp_path / "docker").mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    reference = f"{registry_sim.host}/a/b:1"
    asyncio.run(push_image(image, reference, plain_http=True))
    return reference


def test_image_in_a_registry(pushed: str, built: BuildResult) -> None:
    done = run("check", pushed, "--plain-http")
    assert done.exit_code == 0, done.output
    assert f" {built.n_chunks} of them verified; no faults" in done.output
    summary = json.loads(run("inspect", pushed, "--plain-http", "--json").output)
    assert summary["manifest_digest"].startswith("sha256:")
    assert summary["blobs"][0]["id"] == built.blob_id
    assert " hello\n" in run("inspect", pushed, "/a", "--plain-http").output


def test_registry_that_lost_the_blob(
    pushed: str, registry_sim: RegistrySimulator, built: BuildResult
) -> None:
    """No fault of the image: the command ends with the back-end's error."""
    del registry_sim.store.blobs[f"sha256:{built.blob_id}"]
    done = run("check", pushed, "--plain-http")
    assert type(done.exception).__name__ == "NotFound"
    assert done.exception.exit_code == 4
    assert run("check", pushed, "--plain-http", "--metadata-only").exit_code == 0


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of public test data is absent")
def test_image_of_nydus_image() -> None:
    done = run("check", FIXTURES / "bootstrap/rafs-v6-2.2.boot", "--blob-dir", FIXTURES / "blobs")
    assert done.exit_code == 0, done.output
    assert "2 of them verified; no faults" in done.output


def test_damaged_chunk_is_named_and_the_check_goes_on(image: Path, built: BuildResult) -> None:
    tree, _ = find(image, b"/")
    records = list(tree.chunk_table())
    blob = blob_of(image)
    content = blob.read_bytes()
    for index in (1, 5):
        at = records[index].compressed_offset
        patch(blob, at, bytes([content[at] ^ 1]))
    done = run("check", image / "image.boot", "--json")
    assert done.exit_code == 3
    report = json.loads(done.output)
    assert [(f["where"], f["msgid"]) for f in report["findings"]] == [
        (f"blob {built.blob_id}, chunk {index}", "digest.mismatch") for index in (1, 5)
    ]
    assert report["n_chunks_verified"] == built.n_chunks - 2
    assert run("check", image / "image.boot", "--metadata-only").exit_code == 0


@pytest.mark.parametrize("section", ["toc", "ci", "ci header", "digests"])
def test_damaged_blob_metadata(image: Path, section: str) -> None:
    tree, _ = find(image, b"/")
    r = tree.blobs[0].record
    header_end = r.ci_offset + r.ci_compressed_size + 4096
    at = {
        "toc": r.compressed_size - 900,
        "ci": r.ci_offset + 40,
        "ci header": header_end - 1000,
        "digests": header_end + 512 + 40,
    }[section]
    patch(blob_of(image), at, bytes([blob_of(image).read_bytes()[at] ^ 1]))
    assert faults(image)
    assert not faults(image, metadata_only=True)


def test_cut_off_blob(image: Path) -> None:
    blob = blob_of(image)
    os.truncate(blob, blob.stat().st_size // 2)
    assert len(faults(image)) > 1


def test_bootstrap_that_does_not_open(image: Path) -> None:
    patch(image / "image.boot", 1024, b"\0")
    done = run("check", image / "image.boot")
    assert done.exit_code == 3
    assert "bootstrap: image.malformed: bad image: superblock.magic at byte 1024" in done.output


def test_every_fault_of_the_tree_is_named(image: Path) -> None:
    boot = image / "image.boot"
    _, folder = find(image, b"/many")
    _, parent = find(image, b"/emptydir")
    _, link = find(image, b"/a/link")
    _, hello = find(image, b"/a/hello")
    _, file = find(image, b"/xattrs/file")
    _, same = find(image, b"/a/same")
    patch(boot, (folder.union << 12) + 8, b"\xff\xff")
    patch(boot, parent.body_offset + 12, struct.pack("<Q", folder.nid))
    patch(boot, link.body_offset, b"\0")
    patch(boot, hello.offset + c.EXTENDED_INODE.offsets["i_nlink"], struct.pack("<I", 2))
    patch(boot, file.xattr_offset + 13, b"\x09")
    patch(boot, same.offset + c.EXTENDED_INODE.offsets["i_mode"], struct.pack("<H", stat.S_IFIFO))
    found = faults(image, metadata_only=True)
    for expected in (
        "/many: bad image: directory",
        f"/emptydir: .. is nid {folder.nid} instead of 128",
        "/a/link: bad image: symlink",
        "more names than its link count 2",
        "/xattrs/file: bad image: xattr",
        "/a/same: the entry has type 8, the inode 1",
    ):
        assert any(expected in fault for fault in found), (expected, found)
    assert len(found) == 6


def test_flags_and_devices(image: Path) -> None:
    boot = image / "image.boot"
    flags = struct.unpack_from("<Q", boot.read_bytes(), c.EXT_SUPER_OFFSET)[0]
    patch(boot, c.EXT_SUPER_OFFSET, struct.pack("<Q", flags & ~0x20))
    patch(boot, c.DEVICE_TABLE_OFFSET + 64, struct.pack("<I", 1))
    found = faults(image, metadata_only=True)
    assert ["HAS_XATTR" in fault for fault in found] == [False, True]
    assert "device slot is smaller" in found[0]


def test_chunk_table_that_lacks_a_chunk(image: Path) -> None:
    tree, _ = find(image, b"/")
    size = tree.superblock.ext.chunk_table_size - 80
    at = c.EXT_SUPER_OFFSET + c.EXT_SUPER_BLOCK.offsets["chunk_table_size"]
    patch(image / "image.boot", at, struct.pack("<Q", size))
    (fault,) = faults(image, metadata_only=True)
    assert "is not described" in fault


def test_chunk_information_that_differs_from_the_table(image: Path) -> None:
    tree, _ = find(image, b"/")
    at = tree.superblock.ext.chunk_table_offset
    patch(image / "image.boot", at + 3, b"\xaa\xbb")  # in the digest of chunk 0
    found = faults(image)
    assert len(found) == 2
    assert "chunk 0: chunk information and chunk table differ" in found[0]
    assert "chunk 0: digest" in found[1]


def test_inline_data_that_crosses_a_block() -> None:
    """The kernel refuses it; readers of ours do not mind."""
    image = bytearray(4 * c.BLOCK_SIZE)
    sb = c.ErofsSuperBlock(
        c.SUPER_MAGIC,
        0,
        c.FEATURE_COMPAT_RAFS_V6,
        12,
        0,
        126,
        1,
        0,
        0,
        4,
        1,
        0,
        bytes(16),
        bytes(16),
        12,
        0,
        0,
        11,
    )
    ext = c.ExtSuperBlock(0x84, 4096, 0, 4096, 0, 0, 0, 0)
    image[1024 : 1024 + 128] = c.SUPER_BLOCK.build(sb)
    image[1152 : 1152 + c.EXT_SUPER_BLOCK.size] = c.EXT_SUPER_BLOCK.build(ext)
    at = 4096 + 126 * 32
    names = c.DIRENT.build(c.DirentRecord(126, 24, 2)) + c.DIRENT.build(c.DirentRecord(126, 25, 2)) + b"..."
    raw = c.CompactInode(c.LAYOUT_FLAT_INLINE << 1, 0, 0o40755, 2, len(names) + 100, 0, 0, 1, 0, 0)
    image[at : at + 32 + len(names)] = c.COMPACT_INODE.build(raw) + names
    report = Report()
    assert check_bootstrap(bytes(image), report)
    (finding,) = report.findings
    assert finding.where == "/"
    assert "crosses a block" in finding.message


def test_inspect_whole_image(image: Path, built: BuildResult) -> None:
    done = run("inspect", image / "image.boot", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.output)
    assert (summary["compressor"], summary["digester"], summary["chunk_size"]) == ("zstd", "blake3", 1 << 16)
    assert (summary["inodes"], summary["chunks"]) == (built.n_inodes, built.n_chunks)
    assert summary["content_size"] == built.content_size
    assert summary["symlinks"] == 4
    assert (summary["devices"], summary["fifos"], summary["sockets"]) == (3, 1, 1)
    kinds = ("files", "directories", "symlinks", "devices", "fifos", "sockets")
    assert sum(summary[kind] for kind in kinds) == summary["inodes"] == summary["names"] - 3
    assert summary["blobs"][0]["id"] == built.blob_id
    assert summary["compression_ratio"] == round(built.content_size / summary["stored_bytes"], 3)
    text = run("inspect", image / "image.boot")
    assert text.exit_code == 0
    assert str(built.blob_id) in text.output


def test_inspect_directory(image: Path) -> None:
    listed = json.loads(run("inspect", image / "image.boot", "/", "--json").output)
    names = [os.fsencode(entry["name"]) for entry in listed]
    assert names == sorted(names)
    assert b"\xff\xfe\x80bad" in names
    by_name = {entry["name"]: entry for entry in listed}
    assert by_name["null"]["device"] == [1, 3]
    assert by_name["disk"]["device"] == [259, 300_000]
    assert by_name["dangling"]["target"] == "y" * 100
    text = run("inspect", image / "image.boot", "/a").output.splitlines()
    assert len(text) == 9
    (hello,) = (line for line in text if line.endswith("Z hello"))
    assert hello.startswith("-rw-r--r--   3 ")


def test_inspect_file(image: Path) -> None:
    tree, inode = find(image, b"/xattrs/file")
    found = json.loads(run("inspect", image / "image.boot", "xattrs/file", "--json").output)
    assert (found["nid"], found["size"], found["mode_text"]) == (inode.nid, 1, "-rwxr-xr-x")
    assert found["xattrs"]["user.a"] == b"1".hex()
    (chunk,) = found["chunks"]
    record = list(tree.chunk_table())[chunk["chunk"]]
    assert (chunk["digest"], chunk["length"]) == (record.digest.hex(), 1)
    text = run("inspect", image / "image.boot", "/xattrs/file").output
    assert "user.a = b'1'" in text
    assert record.digest.hex() in text
    before = run("inspect", image / "image.boot", "/time/before").output
    assert "modified 1969-12-31T23:59:58.500000000Z" in before


def test_inspect_what_is_not_there(image: Path) -> None:
    done = run("inspect", image / "image.boot", "/nothing")
    assert type(done.exception).__name__ == "ConfigError"
    assert "/nothing" in str(done.exception)


def test_inspect_dump(image: Path) -> None:
    done = run("inspect", image / "image.boot", "--dump")
    assert done.exit_code == 0
    assert "    1024  magic = 0xe0f5e1e2" in done.output
