"""Trees that are hard to build from: what is in the image afterwards, and what is said about the rest."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.reference import reference_image
from tests.source_trees import MIB, make_varied_tree, read_directory, read_image
from virtiofsd_rafs.errors import BuildError
from virtiofsd_rafs.image.build import BuildResult, build_image
from virtiofsd_rafs.native.builder import Builder
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import resolve, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtiofsd_rafs.rafs.v6 import Inode

_NOBODY = 65_534


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def content_of(result: BuildResult) -> tuple[bytes, bytes]:
    return result.bootstrap.read_bytes(), result.blob.read_bytes() if result.blob else b""


def find(result: BuildResult, path: bytes) -> tuple[Tree, Inode]:
    tree = Tree.parse(result.bootstrap.read_bytes())
    inode = resolve(tree, path)
    assert inode is not None
    return tree, inode


@pytest.mark.parametrize(("digester", "chunk_size"), [("blake3", 4096), ("sha256", MIB)])
def test_the_bytes_are_those_of_the_reference(
    src: Path, tmp_path: Path, digester: str, chunk_size: int
) -> None:
    make_varied_tree(src)
    result = build_image(src, tmp_path / "out", compressor="none", digester=digester, chunk_size=chunk_size)
    expected = reference_image(src, compressor="none", digester=digester, chunk_size=chunk_size)
    assert content_of(result) == expected


@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "gzip"])
def test_the_bytes_do_not_depend_on_the_threads(src: Path, tmp_path: Path, compressor: str) -> None:
    make_varied_tree(src)
    for i in range(300):
        (src / f"copy{i}").write_bytes(b"%d " % (i % 70) * 3000)
    built = {
        content_of(
            build_image(src, tmp_path / str(jobs), compressor=compressor, chunk_size=1 << 14, jobs=jobs)
        )
        for jobs in (1, 2, 7)
    }
    assert len(built) == 1


def test_hard_links_across_directories(src: Path, tmp_path: Path) -> None:
    (src / "a/b").mkdir(parents=True)
    (src / "z").write_bytes(b"content")
    for name in ("a/b/deep", "a/early", "zz"):
        os.link(src / "z", src / name)
    os.link(src / "z", tmp_path / "outside")
    result = build_image(src, tmp_path / "out")
    tree, _ = find(result, b"/")
    inodes = [inode for path, inode in walk(tree) if inode.is_reg]
    assert len(inodes) == 4
    assert {(inode.nid, inode.nlink) for inode in inodes} == {(inodes[0].nid, 4)}
    assert (result.content_size, result.n_chunks, result.n_duplicate_chunks) == (7, 1, 0)


def test_holes_are_neither_read_nor_stored(src: Path, tmp_path: Path) -> None:
    with (src / "big").open("wb") as f:
        f.truncate(1 << 40)
        f.seek(123 * MIB)
        f.write(b"data")
    before = _bytes_read()
    result = build_image(src, tmp_path / "out")
    # A tebibyte could not be read within any time limit, but a small part could go unnoticed.
    assert _bytes_read() - before < 16 * MIB
    assert (result.n_chunks, result.content_size) == (2, 1 << 40)
    assert result.n_duplicate_chunks == (1 << 20) - 2
    assert result.blob_size < 16_000
    tree, inode = find(result, b"/big")
    refs = tree.chunks(inode, 122 * MIB, 3 * MIB)
    assert [ref.chunk_index for ref in refs] == [0, 1, 0]


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_data_and_holes_in_every_order(src: Path, tmp_path: Path) -> None:
    """Extents that begin and end inside of chunks, at their borders, and at the end of the file."""
    size = 16 * 4096
    for number, pattern in enumerate(range(0, 256, 5)):
        with (src / f"{number}").open("wb") as f:
            for block in range(8):
                if pattern >> block & 1:
                    f.seek(block * 8192)
                    f.write(b"%d" % (number * 8 + block) * 500)
            f.truncate(size - (number % 3) * 1000)
    for chunk_size in (4096, 16_384):
        result = build_image(src, tmp_path / f"out{chunk_size}", chunk_size=chunk_size)
        assert read_image(*content_of(result)) == read_directory(src)


def test_a_sparse_tail_is_shorter_than_a_chunk(src: Path, tmp_path: Path) -> None:
    with (src / "f").open("wb") as f:
        f.truncate(3 * 65_536 + 5)
    result = build_image(src, tmp_path / "out", chunk_size=65_536, compressor="none")
    assert (result.n_chunks, result.n_duplicate_chunks) == (2, 2)
    assert content_of(result) == reference_image(src, chunk_size=65_536, compressor="none")


def test_zeros_that_were_written_are_the_same_chunk(src: Path, tmp_path: Path) -> None:
    (src / "written").write_bytes(bytes(2 * MIB))
    with (src / "hole").open("wb") as f:
        f.truncate(2 * MIB)
    assert build_image(src, tmp_path / "out").n_chunks == 1


def test_paths_longer_than_the_system_allows(src: Path, tmp_path: Path) -> None:
    names = [bytes([ord("a") + i % 26]) * 251 for i in range(20)]
    folder = os.open(src, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=folder)
        below = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    with open(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=folder), "wb") as f:
        f.write(b"leaf")
    os.symlink("x" * 4095, "link", dir_fd=folder)
    os.setxattr(f"/proc/self/fd/{folder}/leaf", "user.x", b"value")
    os.close(folder)
    result = build_image(src, tmp_path / "out", compressor="none")
    path = b"/" + b"/".join(names)
    tree, leaf = find(result, path + b"/leaf")
    assert tree.xattr_get(leaf, b"user.x") == b"value"
    assert next(tree.chunks(leaf)).length == 4
    assert tree.readlink(find(result, path + b"/link")[1]) == b"x" * 4095


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """The calling thread, and threads that it starts, access files as a user without rights."""
    libc = ctypes.CDLL(None)
    previous = libc.setfsuid(_NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(previous)


@pytest.mark.parametrize("what", ["f", "d"])
def test_what_may_not_be_read_is_named(what: str) -> None:
    # Every folder on the way has to be open to the other user, unlike tmp_path.
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o777)
        source = Path(work) / "src"
        (source / "a/d").mkdir(parents=True)
        (source / "a/f").write_bytes(b"secret")
        os.chmod(source / "a" / what, 0)
        failures: list[BuildError] = []

        def build() -> None:
            with _as_nobody():
                try:
                    build_image(source, Path(work) / "out")
                except BuildError as e:
                    failures.append(e)

        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert [str(e) for e in failures] == [f"cannot store a/{what}: Permission denied"]
        assert failures[0].path == f"a/{what}"
        assert os.listdir(Path(work) / "out") == []


def test_few_descriptors_and_little_memory_are_enough(src: Path, tmp_path: Path) -> None:
    (src / "large").write_bytes(os.urandom(1 << 20) * 128)
    for i in range(2000):
        (src / f"two{i}").write_bytes(b"%d" % i * 1500)
        with (src / f"hole{i}").open("wb") as f:
            f.truncate(8192)
            f.seek(5000)
            f.write(b"%d" % i)

    # The peak of this process image alone: what wait4 tells begins with the size of the parent.
    script = """
import re, resource, sys
from virtiofsd_rafs.cli import cli
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
cli(sys.argv[1:], standalone_mode=False)
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
assert peak < 100 << 10, peak
"""
    for options in ([], ["--chunk-size", "4K"]):
        arguments = ["build", src, "-o", tmp_path / "out", "-j", "4", *options]
        subprocess.run([sys.executable, "-c", script, *arguments], check=True)


def test_an_odd_path_is_printable(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (src / "x").mkdir()
    Path(os.fsdecode(os.fsencode(src) + b"/x/bad\n\xffname")).write_bytes(b"12")
    monkeypatch.setattr(c, "CHUNKS_MAX", 1)
    with pytest.raises(BuildError, match=r"cannot store x/bad\\n\\udcffname: ") as e:
        build_image(src, tmp_path / "out")
    assert "\n" not in str(e.value)


def test_an_interrupted_build_leaves_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(64):
        (src / f"{i}").write_bytes(os.urandom(MIB))
    run = Builder.run

    def looked_at_all_the_time(self: Builder, blob: int, watch: Callable[..., None] | None) -> object:
        return run(self, blob, watch, interval_s=0)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Builder, "run", looked_at_all_the_time)
    with pytest.raises(KeyboardInterrupt):
        build_image(src, tmp_path / "out", watch=interrupt)
    assert os.listdir(tmp_path / "out") == []
