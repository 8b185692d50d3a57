"""The facade of the Rust reader: errors, sizes beyond one call, threads. What it reads: tests/property."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from virtiofsd_rafs.errors import BadImage, ConfigError, UnsupportedFeature
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.rafs import NativeTree
from virtiofsd_rafs.rafs.walk import resolve, walk


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("native-rafs") / "source"
    (root / "many").mkdir(parents=True)
    for i in range(3000):
        (root / "many" / f"{i:05}{'n' * 60}").symlink_to("target")
    # More chunks than one call returns.
    (root / "big").write_bytes(b"".join(i.to_bytes(4, "little") * 1024 for i in range(1501)))
    return build_image(root, root.parent / "out", chunk_size=4096).bootstrap.read_bytes()


@pytest.fixture
def tree(image: bytes) -> NativeTree:
    return NativeTree(image)


def test_malformed_images_are_named_with_place(image: bytes) -> None:
    with pytest.raises(BadImage, match="superblock at byte 1024") as caught:
        NativeTree(b"")
    assert caught.value.exit_code == 3
    damaged = bytearray(image)
    damaged[1024 + 13] = 1
    with pytest.raises(BadImage, match=r"superblock\.extslots at byte 1024: 1, not 0"):
        NativeTree(bytes(damaged))


def test_unsupported_images_are_named(image: bytes) -> None:
    tarfs = bytearray(image)
    tarfs[1024 + 12] = 9
    with pytest.raises(UnsupportedFeature, match="tarfs"):
        NativeTree(bytes(tarfs))


@pytest.mark.parametrize("nid", [0, 1 << 40, 1 << 60, (1 << 64) - 1])
def test_any_node_id_may_be_asked_for(tree: NativeTree, nid: int) -> None:
    with pytest.raises(BadImage, match="inode"):
        tree.inode(nid)


def test_wrong_kinds_of_files_are_refused(tree: NativeTree) -> None:
    root = tree.inode(tree.root)
    big = resolve_native(tree, b"/big")
    with pytest.raises(BadImage, match="not a directory"):
        tree.lookup(big, b"x")
    with pytest.raises(BadImage, match="not a directory"):
        list(tree.entries(big))
    with pytest.raises(BadImage, match="not a symbolic link"):
        tree.readlink(root)
    with pytest.raises(BadImage, match="not stored in the bootstrap"):
        tree.inline_data(big)
    with pytest.raises(BadImage, match="not a file in chunks"):
        list(tree.chunks(root))
    with pytest.raises(ConfigError, match="no blob 1"):
        tree.chunk_map(1)


def resolve_native(tree: Any, path: bytes) -> Any:
    inode = resolve(tree, path)
    assert inode is not None
    return inode


def test_directories_beyond_one_call(tree: NativeTree) -> None:
    many = resolve_native(tree, b"/many")
    entries = list(tree.entries(many))
    assert len(entries) == 3002
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    half = entries[1500].next_cookie
    assert list(tree.entries(many, half)) == entries[1501:]
    assert tree.lookup(many, entries[2000].name) == (entries[2000].nid, 10)


def test_chunks_beyond_one_call(tree: NativeTree) -> None:
    big = resolve_native(tree, b"/big")
    parts = list(tree.chunks(big))
    assert len(parts) == 1501
    assert sum(part.length for part in parts) == big.size
    chunks = tree.chunk_map(0)
    assert len(chunks) == tree.blobs[0].chunk_count == 1501
    assert list(chunks) == sorted(chunks)
    assert all(chunk.digest is not None and len(chunk.digest) == 32 for chunk in chunks.values())
    assert list(tree.chunks(big, 1 << 70)) == []
    assert list(tree.chunks(big, 4096, 1 << 70)) == parts[1:]


def test_the_tree_keeps_its_own_copy(image: bytes) -> None:
    copy = bytearray(image)
    tree = NativeTree(bytes(copy))
    copy[:] = bytes(len(copy))
    gc.collect()
    assert tree.inode(tree.root).is_dir


def test_many_threads_share_a_tree(tree: Any) -> None:
    def read(_: int) -> list[tuple[bytes, int]]:
        return [(node.path, node.inode.nid) for node in walk(tree)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(8)))
    assert len(results[0]) == 3003
    assert all(result == results[0] for result in results)
