"""``hash-tree`` describes a tree completely: every line against what Python finds, and every change shows."""

from __future__ import annotations

import hashlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from guest.kit import hash_tree_program

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "dir" / "sub").mkdir(parents=True)
    # Lengths around the block size of SHA-256 and its padding.
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 300_000):
        (root / "dir" / f"size {size}").write_bytes(bytes(i * 7 % 256 for i in range(size)))
    (root / "b\\n\xe4me").write_text("x")
    (root / "link").symlink_to("dir/sub")
    os.link(root / "dir" / "size 1", root / "z")
    os.mkfifo(root / "pipe", 0o640)
    os.utime(root / "link", ns=(0, -1_500_000_001), follow_symlinks=False)
    return root


def describe(root: Path, *options: str) -> dict[str, list[str]]:
    done = subprocess.run([hash_tree_program(), *options, root], capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert all(len(line) == 11 for line in lines)
    return {line[0]: line[1:] for line in lines}


def test_every_file_is_described(tree: Path) -> None:
    seen = describe(tree)
    assert len(seen) == 1 + sum(len(dirs) + len(files) for _, dirs, files in os.walk(tree))
    for path in tree.joinpath("dir").glob("size *"):
        stat = path.stat()
        line = seen["./dir/" + path.name.replace(" ", "\\x20")]
        assert line[:6] == [
            *("-", f"{stat.st_mode & 0o7777:04o}", str(stat.st_uid), str(stat.st_gid)),
            *(str(stat.st_nlink), str(stat.st_size)),
        ]
        assert line[6] == f"{stat.st_mtime_ns // 10**9}.{stat.st_mtime_ns % 10**9:09d}"
        assert line[7] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen["./link"][0] == "l"
    assert seen["./link"][7] == "dir/sub"
    assert seen["./link"][6] == "-2.499999999"
    assert seen["./pipe"][:2] == ["p", "0640"]
    assert seen["./z"][9] == "./dir/size\\x201"
    assert seen["./dir/size\\x201"][9] == "./dir/size\\x201"
    assert "./b\\x5cn\\xc3\\xa4me" in seen


def test_link_counts_of_directories_can_be_computed(tree: Path) -> None:
    seen = describe(tree, "-l")
    assert seen["."][4] == "3"
    assert seen["./dir"][4] == "3"
    assert seen["./dir/sub"][4] == "2"


@pytest.mark.parametrize("change", ["content", "mode", "time", "target", "name"])
def test_a_change_shows(tree: Path, change: str) -> None:
    before = describe(tree)
    file = tree / "dir" / "size 64"
    stat = file.stat()
    match change:
        case "content":
            file.write_bytes(b"y" + file.read_bytes()[1:])
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "mode":
            file.chmod(0o4600)
        case "time":
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        case "target":
            (tree / "link").unlink()
            (tree / "link").symlink_to("dir/suc")
        case "name":
            (tree / "pipe").rename(tree / "pipf")
    assert describe(tree) != before


def test_attributes_are_described(tree: Path) -> None:
    os.setxattr(tree / "dir", "user.b", b"\x00\xff")
    os.setxattr(tree / "dir", "user.a", b"")
    assert describe(tree)["./dir"][8] == "user.a=,user.b=00ff"


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [hash_tree_program(), tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr
