"""The initramfs of guests whose kernel has no virtio-fs built in: another program reads what ours wrote."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from guest.initramfs import Entry, cpio, directory, make_initramfs, plain, program
from guest.kit import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def made_kernel(tmp_path: Path) -> Kernel:
    """A kernel with two modules whose load order is not that of their names."""
    modules = tmp_path / "kernel" / "root-modules"
    modules.mkdir(parents=True)
    (modules / "order").write_text("b.ko\na.ko\n")
    (modules / "a.ko").write_bytes(b"A" * 5)
    (modules / "b.ko").write_bytes(b"B" * 4096)
    return Kernel("made", tmp_path / "kernel")


def test_busybox_unpacks_what_was_packed(tmp_path: Path, tool: Callable[[str], str]) -> None:
    content = bytes(range(256))
    archive = cpio([directory("d"), plain("d/odd", content[:7]), program("p", content), plain("empty", b"")])
    subprocess.run([tool("busybox"), "cpio", "-i"], input=archive, cwd=tmp_path, check=True, timeout=60)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "empty", "odd", "p"]
    assert (tmp_path / "d" / "odd").read_bytes() == content[:7]
    assert (tmp_path / "p").read_bytes() == content
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").stat().st_size == 0


def test_device_nodes_and_padding() -> None:
    archive = cpio([Entry("console", 0o020600, device=(5, 1))])
    assert len(archive) % 4 == 0
    assert archive.startswith(b"070701" + b"00000001" + b"00002180")
    assert archive[6 + 8 * 9 : 6 + 8 * 11] == b"0000000500000001"
    assert archive.count(b"TRAILER!!!") == 1


def test_the_same_kernel_gives_the_same_bytes(made_kernel: Kernel, tmp_path: Path) -> None:
    first = make_initramfs(tmp_path / "first", made_kernel)
    for path in made_kernel.root_modules:
        path.touch()
    second = make_initramfs(tmp_path / "second", made_kernel)
    assert first is not None
    assert second is not None
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().index(b"B" * 4096) < first.read_bytes().index(b"A" * 5)


def test_a_kernel_with_everything_built_in_needs_none(made_kernel: Kernel, tmp_path: Path) -> None:
    (made_kernel.folder / "root-modules" / "order").write_text("")
    assert make_initramfs(tmp_path / "out", made_kernel) is None
    (made_kernel.folder / "root-modules" / "order").unlink()
    assert make_initramfs(tmp_path / "out", made_kernel) is None
    assert not (tmp_path / "out").exists()
