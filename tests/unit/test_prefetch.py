"""Lists of files and what they mean in an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.rafs import NativeTree
from virtiofsd_rafs.runtime.prefetch import Listed, format_list, parse_list, resolve, resolve_table

if TYPE_CHECKING:
    from virtiofsd_rafs.runtime.backlog import Runs

CHUNK = 4096


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("prefetch")
    root = folder / "source"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/lib/deep/er").mkdir(parents=True)
    for name, n in (("usr/bin/tool", 3), ("usr/lib/one", 1), ("usr/lib/deep/er/two", 2), ("etc", 5)):
        (root / name).write_bytes(b"".join(f"{name} {i}".encode().ljust(CHUNK, b".") for i in range(n)))
    (root / "usr/lib/empty").touch()
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/lib/link").symlink_to("../../bin/tool")
    (root / "usr/out").symlink_to("../../../../../../bin/tool")
    (root / "loop").symlink_to("loop")
    return build_image(root, folder / "out", chunk_size=CHUNK).bootstrap.read_bytes()


def chunks_of(image: bytes, path: str) -> list[int]:
    tree = NativeTree(image)
    inode = tree.inode(tree.root)
    for name in path.strip("/").split("/"):
        found = tree.lookup(inode, name.encode())
        assert found is not None
        inode = tree.inode(found[0])
    return [part.chunk_index for part in tree.chunks(inode)]


def flat(runs: Runs) -> list[int]:
    return [first + i for _, first, n, _ in runs for i in range(n)]


def test_lists_are_read_and_written() -> None:
    data = (
        b"# a comment\n/a\n\n/b c\t0\t10\r\n/d\t4096\nrelative\n/e\tx\n/f\t1\t2\t3\n/g\0\n/h\t-1\n/i\t"
        + b"9" * 30
    )
    entries, bad = parse_list(data)
    assert entries == [Listed(b"/a"), Listed(b"/b c", 0, 10), Listed(b"/d", 4096)]
    assert bad == [6, 7, 8, 9, 10, 11]
    entries = [Listed(b"/a"), Listed(b"/b c", 5, 10), Listed(b"/\xff")]
    assert parse_list(format_list([*entries, Listed(b"/x\ny"), Listed(b"/x\ty")])) == (entries, [])


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([Listed(b"/usr/bin/tool")], ["/usr/bin/tool"]),
        ([Listed(b"/usr/lib/one"), Listed(b"/etc")], ["/usr/lib/one", "/etc"]),
        # directories: all below
        ([Listed(b"/usr/lib/")], ["/usr/lib/one", "/usr/lib/deep/er/two"]),
        # symbolic links on the way and at the end, out of the root as well
        ([Listed(b"/bin/tool")], ["/usr/bin/tool"]),
        ([Listed(b"/usr/lib/link")], ["/usr/bin/tool"]),
        ([Listed(b"/usr/out")], ["/usr/bin/tool"]),
        ([Listed(b"//usr/./lib/../bin//tool")], ["/usr/bin/tool"]),
        ([Listed(b"/usr/lib/empty")], []),
    ],
)
def test_paths(image: bytes, entries: list[Listed], expected: list[str]) -> None:
    resolved = resolve(image, entries)
    assert flat(resolved.runs) == [chunk for path in expected for chunk in chunks_of(image, path)]
    assert (resolved.everything, resolved.missing) == (False, [])


def test_parts_of_files_are_whole_chunks(image: bytes) -> None:
    all_five = chunks_of(image, "/etc")
    for offset, length, expected in [
        (0, 1, all_five[:1]),
        (CHUNK, CHUNK, all_five[1:2]),
        (CHUNK - 1, 2, all_five[:2]),
        (2 * CHUNK, None, all_five[2:]),
        (5 * CHUNK, None, []),
        (1 << 63, 1 << 63, []),
        (0, 1 << 64, all_five),
        (CHUNK, 0, []),
    ]:
        assert flat(resolve(image, [Listed(b"/etc", offset, length)]).runs) == expected, (offset, length)


def test_what_is_not_there_is_told(image: bytes) -> None:
    paths = [b"/nothing", b"/etc/below/a/file", b"/loop", b"/usr/bin/tool", b"/" + b"n" * 300]
    resolved = resolve(image, [Listed(path) for path in paths])
    assert resolved.missing == [b"/nothing", b"/etc/below/a/file", b"/loop", b"/" + b"n" * 300]
    assert flat(resolved.runs) == chunks_of(image, "/usr/bin/tool")


def test_the_root_means_everything(image: bytes) -> None:
    resolved = resolve(image, [Listed(b"/etc"), Listed(b"/"), Listed(b"/usr/bin/tool")])
    assert resolved.everything
    assert flat(resolved.runs) == chunks_of(image, "/etc")


def test_an_image_without_a_table(image: bytes) -> None:
    resolved = resolve_table(image)
    assert (flat(resolved.runs), resolved.everything, resolved.missing) == ([], False, [])


def with_table(image: bytes, *nids: int) -> bytes:
    """*image* with a prefetch table at its end."""
    table = b"".join(nid.to_bytes(4, "little") for nid in nids)
    made = bytearray(image + table.ljust(4096, b"\0"))
    at = 1024 + 128 + 40
    made[at : at + 12] = len(image).to_bytes(8, "little") + len(table).to_bytes(4, "little")
    return bytes(made)


def test_the_table_of_an_image(image: bytes) -> None:
    tree = NativeTree(image)

    def nid(name: bytes) -> int:
        found = tree.lookup(tree.inode(tree.root), name)
        assert found is not None
        return found[0]

    resolved = resolve_table(with_table(image, nid(b"etc"), nid(b"usr")))
    expected = ["/etc", "/usr/bin/tool", "/usr/lib/one", "/usr/lib/deep/er/two"]
    assert flat(resolved.runs) == [chunk for path in expected for chunk in chunks_of(image, path)]
    assert resolve_table(with_table(image, tree.root)).everything


def test_runs_name_file_and_place(image: bytes) -> None:
    tree = NativeTree(image)
    by_nid = {run.nid: run for run in tree.runs(tree.root)}
    for path, size in (("/etc", 5), ("/usr/bin/tool", 3)):
        first = chunks_of(image, path)[0]
        (run,) = (run for run in by_nid.values() if run.first == first)
        assert (run.offset, run.n_chunks, run.blob_index) == (0, size, 0)
    assert sum(run.n_chunks for run in by_nid.values()) == 11
