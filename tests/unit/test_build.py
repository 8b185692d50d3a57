"""The builder: what it writes is what was there, judged by our reader, by erofs-utils, and by the rules."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.source_trees import MIB, make_varied_tree, read_directory, read_image
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.errors import BuildError, ConfigError
from virtiofsd_rafs.image.build import BuildResult, build_image
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import resolve, walk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("varied") / "tree"
    root.mkdir()
    make_varied_tree(root)
    return root


def content_of(result: BuildResult) -> tuple[bytes, bytes]:
    return result.bootstrap.read_bytes(), result.blob.read_bytes() if result.blob else b""


def tree_of(result: BuildResult) -> Tree:
    return Tree.parse(result.bootstrap.read_bytes())


@pytest.mark.parametrize(
    ("compressor", "digester", "chunk_size"),
    [
        ("zstd", "blake3", MIB),
        ("lz4_block", "sha256", MIB),
        ("gzip", "blake3", 1 << 16),
        ("none", "sha256", 4096),
        ("none", "blake3", 16 * MIB),
    ],
)
def test_image_holds_the_source(
    varied: Path, tmp_path: Path, compressor: str, digester: str, chunk_size: int
) -> None:
    result = build_image(
        varied, tmp_path / "out", compressor=compressor, digester=digester, chunk_size=chunk_size
    )
    assert read_image(*content_of(result)) == read_directory(varied)
    tree = tree_of(result)
    assert tree.superblock.compressor.name.lower() == compressor
    assert tree.superblock.digester.name.lower() == digester
    assert tree.superblock.chunk_size == chunk_size
    assert tree.superblock.inos == result.n_inodes == len({inode.nid for _, inode in walk(tree)})


def test_output_is_bootstrap_and_blob_by_its_digest(varied: Path, tmp_path: Path) -> None:
    result = build_image(varied, tmp_path / "deep/out")
    blob = (tmp_path / "deep/out" / str(result.blob_id)).read_bytes()
    assert sorted(os.listdir(tmp_path / "deep/out")) == sorted(["image.boot", str(result.blob_id)])
    assert hashlib.sha256(blob).hexdigest() == result.blob_id
    assert len(blob) == result.blob_size == tree_of(result).blobs[0].record.compressed_size
    assert result.bootstrap.stat().st_size == result.bootstrap_size
    assert result.bootstrap.stat().st_mode & 0o777 == 0o644


def test_same_tree_same_bytes(varied: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", varied, copy], check=True)
    first = build_image(varied, tmp_path / "one")
    second = build_image(copy, tmp_path / "two")
    assert content_of(first) == content_of(second)
    # Into a folder that has an image already.
    assert content_of(build_image(varied, tmp_path / "two")) == content_of(first)


def test_layout_rules(varied: Path, tmp_path: Path) -> None:
    tree = tree_of(build_image(varied, tmp_path / "out"))
    sb, blob = tree.superblock, tree.blobs[0]
    assert sb.root_nid == 128
    assert sb.flags & c.SuperFlags.EXPLICIT_UID_GID
    assert sb.flags & c.SuperFlags.HAS_XATTR
    assert sb.flags & c.SuperFlags.INLINED_CHUNK_DIGEST
    assert len(tree.image) % c.BLOCK_SIZE == 0
    assert blob.device.mapped_blkaddr << 12 >= len(tree.image)
    assert blob.device.mapped_blkaddr << 12 & 0x7FFFF == 0
    assert blob.device.blocks << 12 == blob.uncompressed_size
    digests = [record.digest for record in tree.chunk_table()]
    assert len(set(digests)) == len(digests) == blob.chunk_count
    for path, inode in walk(tree):
        if inode.is_dir:
            names = [entry.name for entry in tree.entries(inode)]
            assert names == sorted(names), path
            assert {b".", b".."} <= set(names)
            block_end = inode.body_offset + inode.size % c.BLOCK_SIZE
            assert inode.layout != c.LAYOUT_FLAT_INLINE or block_end <= (inode.offset | 4095) + 1


def test_inodes_are_extended_where_compact_would_lose_something(varied: Path, tmp_path: Path) -> None:
    tree = tree_of(build_image(varied, tmp_path / "out"))

    def extended(path: str) -> bool:
        inode = resolve(tree, path.encode())
        assert inode is not None
        return inode.extended

    # mtime 0 is what a compact inode shows, but nydusd reads no device number there.
    assert [extended(f"/time/{name}") for name in ("zero", "link", "dir", "console")] == [False] * 3 + [True]
    assert [extended(p) for p in ("/time/before", "/time/nanoseconds", "/own/wide", "/a/hello")] == [True] * 4


def test_wide_owner_is_kept_without_mtime(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/f").write_bytes(b"x")
    os.chown(tmp_path / "src/f", 65_536, 65_535)
    os.utime(tmp_path / "src/f", ns=(0, 0))
    inode = resolve(tree_of(build_image(tmp_path / "src", tmp_path / "out")), b"/f")
    assert inode is not None
    assert (inode.extended, inode.uid, inode.gid, inode.mtime) == (True, 65_536, 65_535, 0)


def test_chunks_are_stored_once(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in "abc":
        (tmp_path / "src" / name).write_bytes(b"x" * MIB + b"y" * MIB + b"x" * MIB)
    result = build_image(tmp_path / "src", tmp_path / "out")
    assert (result.n_chunks, result.n_duplicate_chunks) == (2, 7)
    assert result.content_size == 9 * MIB


def test_sparse_file_beyond_4_gib(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    size = (4 << 30) + 4097
    with (tmp_path / "src/big").open("wb") as f:
        f.write(b"head")
        f.truncate(size)
        f.seek(size - 4)
        f.write(b"tail")
    result = build_image(tmp_path / "src", tmp_path / "out")
    assert result.n_chunks == 3  # head, zeros, tail
    tree = tree_of(result)
    inode = resolve(tree, b"/big")
    assert inode is not None
    assert inode.size == size
    refs = list(tree.chunks(inode))
    assert len(refs) == 4097
    assert {ref.chunk_index for ref in refs[1:-1]} == {1}
    assert (refs[-1].chunk_index, refs[-1].length) == (2, 4097)


def test_directory_of_100_000_names(tmp_path: Path) -> None:
    (tmp_path / "src/d").mkdir(parents=True)
    target = tmp_path / "src/d/000000"
    target.write_bytes(b"")
    # Hard links and files alike: file systems limit the links of one file.
    for i in range(1, 100_000):
        name = f"{tmp_path}/src/d/{i:06d}"
        if i % 1000:
            os.link(target, name)
        else:
            target = tmp_path / f"src/d/{i:06d}"
            target.write_bytes(b"")
    tree = tree_of(build_image(tmp_path / "src", tmp_path / "out"))
    inode = resolve(tree, b"/d")
    assert inode is not None
    names = [entry.name for entry in tree.entries(inode)]
    assert names == [b".", b"..", *(b"%06d" % i for i in range(100_000))]
    assert tree.lookup(inode, b"099999") is not None
    assert tree.lookup(inode, b"100000") is None


def test_tree_without_content_has_no_blob(tmp_path: Path) -> None:
    (tmp_path / "src/d").mkdir(parents=True)
    (tmp_path / "src/empty").touch()
    result = build_image(tmp_path / "src", tmp_path / "out")
    assert (result.blob, result.blob_id, result.n_chunks) == (None, None, 0)
    assert os.listdir(tmp_path / "out") == ["image.boot"]
    assert read_image(*content_of(result)) == read_directory(tmp_path / "src")
    assert not tree_of(result).superblock.has_xattr


@pytest.mark.parametrize("chunk_size", [4096, MIB])
def test_erofs_utils_accept_uncompressed_images(
    varied: Path, tmp_path: Path, chunk_size: int, tool: Callable[[str], str]
) -> None:
    result = build_image(varied, tmp_path / "out", compressor="none", chunk_size=chunk_size)
    extracted = tmp_path / "extracted"
    subprocess.run(
        [tool("fsck.erofs"), f"--extract={extracted}", f"--device={result.blob}", result.bootstrap],
        check=True,
    )
    # erofs-utils 1.5 restores neither xattrs nor hard links, and ends at whole seconds.
    kept = ("mode", "uid", "gid", "content")
    source, found = read_directory(varied), read_directory(extracted)
    assert found.keys() == source.keys()
    for path, entry in source.items():
        if path != b"/own/setuid":  # chown after chmod takes the bits away
            assert {k: found[path].get(k) for k in kept} == {k: entry.get(k) for k in kept}, path


def test_uncompressed_blob_is_its_own_address_space(varied: Path, tmp_path: Path) -> None:
    tree = tree_of(build_image(varied, tmp_path / "out", compressor="none"))
    for record in tree.chunk_table():
        assert record.compressed_offset == record.uncompressed_offset
        assert record.flags == 0
    assert tree.blobs[0].data_size == tree.blobs[0].uncompressed_size


def test_full_blob_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    for i in range(4):
        (tmp_path / f"src/{i}").write_text(str(i))
    monkeypatch.setattr(c, "CHUNKS_MAX", 4)
    with pytest.raises(BuildError, match="cannot store 3: the blob has 3 chunks"):
        build_image(tmp_path / "src", tmp_path / "out")
    monkeypatch.setattr(c, "CHUNKS_MAX", 1 << 24)
    monkeypatch.setattr(c, "UNCOMPRESSED_BLOB_MAX", 8192)
    with pytest.raises(BuildError, match="cannot store 2: the blob would become larger"):
        build_image(tmp_path / "src", tmp_path / "out")


def test_blob_that_ends_below_its_limit_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound that is kept for what stands behind the chunks really covers it."""
    (tmp_path / "src").mkdir()
    limit = 100_000
    monkeypatch.setattr(c, "COMPRESSED_BLOB_MAX", limit)

    def build(n_chunks: int) -> BuildResult:
        (tmp_path / "src/f").write_bytes(b"".join(bytes([i]) * 4096 for i in range(n_chunks)))
        return build_image(tmp_path / "src", tmp_path / "out", compressor="none", chunk_size=4096)

    most = next(n for n in range(1, 100) if not _builds(build, n + 1))
    assert limit - 20_000 < build(most).blob_size <= limit


def _builds(build: Callable[[int], BuildResult], n_chunks: int) -> bool:
    try:
        build(n_chunks)
    except BuildError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 1000, 2048, 5000, 12_288, 32 * MIB])
def test_impossible_chunk_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"chunk size {size}"):
        build_image(tmp_path, tmp_path / "out", chunk_size=size)


def test_output_inside_the_source(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "x/y"):
        with pytest.raises(ConfigError, match="inside the source"):
            build_image(tmp_path, out)


def test_source_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for source in ("f", "missing"):
        with pytest.raises(BuildError, match=source):
            build_image(tmp_path / source, tmp_path / "out")


def test_unknown_algorithm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="brotli"):
        build_image(tmp_path, tmp_path / "out", compressor="brotli")


def test_command(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/f").write_bytes(b"x" * 100_000)
    run = CliRunner().invoke(
        cli,
        [
            "build",
            f"{tmp_path}/src",
            "-o",
            f"{tmp_path}/out",
            "--compressor",
            "lz4_block",
            "--chunk-size",
            "64K",
        ],
    )
    assert run.exit_code == 0, run.output
    tree = Tree.parse((tmp_path / "out/image.boot").read_bytes())
    assert (tree.superblock.chunk_size, tree.superblock.compressor) == (65_536, c.Compressor.LZ4_BLOCK)
    assert str(tree.blobs[0].blob_id) in run.output


def test_command_prints_json(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/f").write_bytes(b"x" * 5000)
    (tmp_path / "list").write_text("/f\n/gone\n")
    options = ["-o", f"{tmp_path}/out", "--json", "-j", "3", "--prefetch-files", f"{tmp_path}/list"]
    run = CliRunner().invoke(cli, ["build", f"{tmp_path}/src", *options])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert (tmp_path / "out" / found["blob_id"]).stat().st_size == found["blob_size"]
    assert (found["inodes"], found["chunks"], found["content_size"], found["jobs"]) == (2, 1, 5000, 3)
    assert found["prefetch"] == {"entries": 1, "missing": ["/gone"]}
    assert found["seconds"]["total"] >= found["seconds"]["content"] >= 0
    assert run.stderr == f"not in {tmp_path}/src: /gone\n"
