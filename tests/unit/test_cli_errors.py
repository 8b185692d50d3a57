"""What somebody sees who gets something wrong: cause and remedy in one line, and the right exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from virtiofsd_rafs import cli
from virtiofsd_rafs.config import default_api_socket

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: str, cwd: Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtiofsd_rafs", *arguments]
    return subprocess.run(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content")
    assert run("build", "tree", "-o", "image", cwd=tmp_path).returncode == 0
    return tmp_path


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("plain/image", "Not a directory"),
        ("plain", "Not a directory"),
        ("n" * 256, "File name too long"),
        ("/proc/image", "No such file or directory"),
    ],
)
def test_a_folder_for_an_image_that_cannot_be_used(tree: Path, output: str, reason: str) -> None:
    (tree / "plain").touch()
    done = run("build", "tree", "-o", output, cwd=tree)
    assert done.returncode == 1
    assert done.stderr == (
        f"virtiofsd-rafs: output.unusable: cannot write to {tree / output}: {reason}"
        " (choose another folder with -o)\n"
    )


def test_output_that_cannot_be_written(tree: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = run("inspect", "image/image.boot", cwd=tree, stdout=full)
    finally:
        os.close(full)
    assert done.returncode == 1
    assert done.stderr == "virtiofsd-rafs: system.error: No space left on device\n"


def test_a_bug_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "cli", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 70
    assert "RuntimeError: a bug" in (errors := capsys.readouterr().err)
    assert "virtiofsd-rafs: internal.bug: " in errors


@pytest.mark.parametrize(
    "arguments",
    [("--blob-dir", "missing"), ("--blob-dir", "tree/file"), ("--ca-file", "missing"), ("--ca-file", "tree")],
)
def test_serve_refuses_places_that_are_not_there(tree: Path, arguments: tuple[str, str]) -> None:
    done = run("serve", "image/image.boot", "--socket-path", "s", "--no-cache", *arguments, cwd=tree)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert not (tree / "s").exists()


@pytest.mark.parametrize("path", ["", ".", "/", ".."])
def test_a_socket_path_without_a_name(tree: Path, path: str) -> None:
    done = run("serve", "image/image.boot", "--no-cache", "--socket-path", path, cwd=tree)
    assert done.returncode == 5
    assert done.stderr.startswith("virtiofsd-rafs: socket.setup: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_api_socket_lies_beside(tmp_path: Path) -> None:
    assert default_api_socket(tmp_path / "a.sock") == tmp_path / "a.sock.api"


def test_a_registry_that_is_down(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The wait is the commands'; here it only has to end.
    monkeypatch.setattr("virtiofsd_rafs.cli.inspect.ONE_SHOT_DEADLINE_S", 0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        reference = f"127.0.0.1:{unused.getsockname()[1]}/app:1"
        result = CliRunner().invoke(cli.cli, ["inspect", "--plain-http", reference])
    assert result.exception is not None
    assert "no connection: Connection refused (does the server run at that address?)" in str(result.exception)
