"""Images that know what a start reads first: the order of their chunks, and the prefetch table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.source_trees import MIB, read_directory, read_image
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.image.build import BuildResult, build_image
from virtiofsd_rafs.native.rafs import NativeTree
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import resolve, walk

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 4096


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefetch") / "src"
    for name in ("a", "b", "usr/lib/c", "usr/lib/d", "usr/lib/sub/e", "usr/bin/f"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        # Three chunks of each, all different.
        (root / name).write_bytes(b"".join(f"{name}{i}".encode().ljust(CHUNK, b".") for i in range(3)))
    (root / "empty").touch()
    os.link(root / "a", root / "usr/hard")
    (root / "lib").symlink_to("usr/lib")
    (root / "absolute").symlink_to("/usr/bin/f")
    (root / "escape").symlink_to("/../../../../etc/passwd")
    os.mkfifo(root / "fifo")
    return root


def build(
    src: Path, out: Path, *entries: bytes | tuple[bytes, int, int | None], jobs: int = 2
) -> BuildResult:
    listed = [entry if isinstance(entry, tuple) else (entry, 0, None) for entry in entries]
    return build_image(src, out, chunk_size=CHUNK, prefetch=listed, jobs=jobs)


def layout(result: BuildResult) -> list[str]:
    """What each chunk of the blob holds, in order: the first file in the tree that has it, and its number."""
    tree = Tree.parse(result.bootstrap.read_bytes())
    found: dict[int, str] = {}
    for path, inode in walk(tree):
        if inode.is_reg:
            for number, ref in enumerate(tree.chunks(inode)):
                found.setdefault(ref.chunk_index, f"{path.decode()}:{number}")
    return [found[index] for index in sorted(found)]


def read_back(result: BuildResult) -> dict[bytes, dict[str, Any]]:
    assert result.blob is not None
    return read_image(result.bootstrap.read_bytes(), result.blob.read_bytes())


def table(result: BuildResult) -> list[str]:
    image = result.bootstrap.read_bytes()
    tree = Tree.parse(image)
    paths = {inode.nid: path.decode() for path, inode in reversed(list(walk(tree)))}
    nids = tree.prefetch_nids()
    assert NativeTree(image).prefetch_nids() == nids
    assert len(nids) == result.n_prefetch
    return [paths[nid] for nid in nids]


def all_of(*paths: str) -> list[str]:
    return [f"{path}:{number}" for path in paths for number in range(3)]


def test_listed_files_come_first_in_the_order_of_the_list(src: Path, tmp_path: Path) -> None:
    plain = layout(build(src, tmp_path / "plain"))
    result = build(src, tmp_path / "out", b"/usr/lib/d", b"/usr/bin/f")
    first = all_of("/usr/lib/d", "/usr/bin/f")
    assert layout(result) == first + [chunk for chunk in plain if chunk not in first]
    assert table(result) == ["/usr/lib/d", "/usr/bin/f"]
    assert read_back(result) == read_directory(src)
    other = build(src, tmp_path / "other", b"/usr/lib/d", b"/usr/bin/f", jobs=1)
    assert other.blob_id == result.blob_id
    assert other.bootstrap.read_bytes() == result.bootstrap.read_bytes()


def test_parts_of_files_come_first_and_the_rest_in_its_place(src: Path, tmp_path: Path) -> None:
    result = build(
        src,
        tmp_path / "out",
        (b"/b", 5000, 1),
        (b"/usr/lib/c", 2 * CHUNK, None),
        (b"/b", 0, 5000),  # chunk 0, and chunk 1 once more
        (b"/b", 1 << 40, 5),
        (b"/b", 0, 0),
    )
    first = ["/b:1", "/usr/lib/c:2", "/b:0"]
    found = layout(result)
    assert found[:3] == first
    assert found[3:] == [chunk for chunk in layout(build(src, tmp_path / "plain")) if chunk not in first]
    assert table(result) == ["/b", "/usr/lib/c"]
    assert read_back(result) == read_directory(src)


def test_a_directory_stands_for_all_files_in_it(src: Path, tmp_path: Path) -> None:
    result = build(src, tmp_path / "out", b"/usr/lib/sub", b"/usr/lib", b"/")
    assert layout(result)[:9] == all_of("/usr/lib/sub/e", "/usr/lib/c", "/usr/lib/d")
    assert table(result) == ["/usr/lib/sub", "/usr/lib", "/"]


def test_links_lead_to_files_of_the_image_only(src: Path, tmp_path: Path) -> None:
    result = build(
        src, tmp_path / "out", b"/lib/d", b"usr/../absolute", b"/usr/lib/d", b"/escape", b"/usr/hard"
    )
    assert layout(result)[:9] == all_of("/usr/lib/d", "/usr/bin/f", "/a")
    assert table(result) == ["/usr/lib/d", "/usr/bin/f", "/a"]
    assert result.prefetch_missing == ("/escape",)


def test_what_is_no_file_of_the_tree_is_reported(src: Path, tmp_path: Path) -> None:
    result = build(
        src, tmp_path / "out", b"/gone", b"/a/x", b"/fifo", b"/gone", b"/bad\xff", b"/a\0b", b"/empty"
    )
    assert result.prefetch_missing == ("/gone", "/a/x", "/fifo", "/bad\\udcff", "/a\\x00b")
    assert table(result) == ["/empty"]


def test_a_listed_sparse_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a").write_bytes(b"a")
    with (tmp_path / "src/z").open("wb") as f:
        f.truncate(100 * MIB)
        f.seek(50 * MIB)
        f.write(b"data")
    result = build_image(tmp_path / "src", tmp_path / "out", prefetch=[(b"/z", 50 * MIB, 1), (b"/z", 0, MIB)])
    tree = Tree.parse(result.bootstrap.read_bytes())
    inode = resolve(tree, b"/z")
    assert inode is not None
    assert [ref.chunk_index for ref in tree.chunks(inode)] == [1] * 50 + [0] + [1] * 49
    assert read_back(result) == read_directory(tmp_path / "src")


def test_a_long_table_moves_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for i in range(3000):
        (tmp_path / f"src/{i:04}").write_text(str(i))
    names = [b"/%04d" % i for i in range(2999, -1, -1)]
    result = build(tmp_path / "src", tmp_path / "out", *names)
    tree = Tree.parse(result.bootstrap.read_bytes())
    assert table(result) == [name.decode() for name in names]
    assert (tree.superblock.root_nid, tree.superblock.ext.prefetch_table_offset) == (128, 4096 + 256)
    assert result.bootstrap.read_bytes()[4096 + 256 + 12_000 : 16_384 + 4096].strip(b"\0") == b""


def test_nothing_to_prefetch(src: Path, tmp_path: Path) -> None:
    assert (
        build(src, tmp_path / "a").bootstrap.read_bytes()
        == build(src, tmp_path / "b", b"/gone").bootstrap.read_bytes()
    )
    (tmp_path / "src").mkdir()
    (tmp_path / "src/empty").touch()
    result = build(tmp_path / "src", tmp_path / "out", b"/empty")
    assert (result.blob, result.n_prefetch, table(result)) == (None, 0, [])


def test_the_command_takes_a_list_and_inspect_shows_the_table(src: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"# what nginx reads\n/usr/lib/d\n\n/b\t4096\t10\n/gone\n")
    options = ["--prefetch-files", f"{tmp_path}/list", "--chunk-size", "4KiB"]
    run = CliRunner().invoke(cli, ["build", str(src), "-o", f"{tmp_path}/out", *options])
    assert run.exit_code == 0, run.output
    assert "prefetch   2 files and directories\n" in run.stdout
    assert run.stderr == f"not in {src}: /gone\n"
    shown = CliRunner().invoke(cli, ["inspect", f"{tmp_path}/out/image.boot"])
    assert "prefetch   /usr/lib/d, /b\n" in shown.output
    checked = CliRunner().invoke(cli, ["check", f"{tmp_path}/out/image.boot"])
    assert "; no faults\n" in checked.output


def test_a_list_that_makes_no_sense_is_refused(src: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"/a\nrelative\n")
    run = CliRunner().invoke(
        cli, ["build", str(src), "-o", f"{tmp_path}/out", "--prefetch-files", f"{tmp_path}/list"]
    )
    assert run.exit_code != 0
    assert "list, line 2" in str(run.exception)
    assert not (tmp_path / "out").exists()
