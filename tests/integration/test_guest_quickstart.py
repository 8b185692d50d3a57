"""The quickstart from beginning to end, and what it says about a boot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.boot import Boot
from guest.quickstart import arguments
from guest.registry import Traffic
from guest.report import compare, describe
from guest.sample import make_sample

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]

STATUS = {
    "session": {"mounted_ns": 101_000_000_000, "init_ns": 102_500_000_000},
    "agent": {"fetches": {"ok": 3, "backend.timeout": 1}, "bytes_fetched": 5_000_000},
    "image": {"bootstrap_size": 1_000_000, "blobs": [{"stored_size": 9_000_000}]},
    "stalls": {
        "count": 2,
        "total_ns": 900_000_000,
        "slowest": [
            {
                "path": "/bin/sh",
                "nodeid": 5,
                "offset": 0,
                "length": 4096,
                "parked_ns": 103_000_000_000,
                "done_ns": 103_700_000_000,
            },
            {
                "path": "",
                "nodeid": 7,
                "offset": 8192,
                "length": 100,
                "parked_ns": 104_000_000_000,
                "done_ns": 104_200_000_000,
            },
        ],
    },
}


def test_a_boot_as_data_and_as_text() -> None:
    boot = Boot("cold", 100.0, {"daemon ready": 0.1, "HTTP 200": 9.0}, STATUS)
    result = describe(boot, None, Traffic(6, 5_500_000))
    assert list(result["times_s"].items()) == [
        ("daemon ready", 0.1),
        ("image mounted", 1.0),
        ("FUSE_INIT", 2.5),
        ("HTTP 200", 9.0),
    ]
    assert (result["requests"], result["bytes"], result["image_bytes"]) == (4, 5_000_000, 10_000_000)
    assert result["registry"] == {"requests": 6, "bytes": 5_500_000}
    assert [stall["path"] for stall in result["stalls"]] == ["/bin/sh", "node 7"]
    assert [stall["duration_s"] for stall in result["stalls"]] == [0.7, 0.2]
    text = "\n".join(result["text"])
    assert "5.0 MB of 10.0 MB (50 %)" in text
    assert compare([result]) == ["cold: HTTP 200 after   9.00 s,     4 requests,    5.0 MB"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--rate", "0"],
        ["--dir", "/nonexistent"],
        ["--image", "noslash"],
        ["--image", "a/b", "--dir", "/"],
        ["--plain-http"],
        ["--machine", "pc"],
        ["extra"],
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        arguments(argv)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def quickstart(*argv: str) -> subprocess.CompletedProcess[str]:
    """The script's second half: that of the first, the installation, is what made this run possible."""
    return subprocess.run(
        [sys.executable, "-m", "guest.quickstart", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.guest
def test_a_directory_is_booted_cold_and_warm(tmp_path: Path, tool: Callable[[str], str]) -> None:
    tool("qemu-system-x86_64")
    tool("docker-registry")
    assert os.geteuid() == 0, "the tree to boot needs device nodes: run the tests as root"
    make_sample(tmp_path / "tree")
    done = quickstart("--dir", str(tmp_path / "tree"), "--rate", "100", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    cold, warm = result["boots"]
    for boot in (cold, warm):
        order = list(boot["times_s"])
        assert [
            order.index(event) for event in ("daemon ready", "FUSE_INIT", "first exec", "HTTP 200")
        ] == sorted(order.index(event) for event in ("daemon ready", "FUSE_INIT", "first exec", "HTTP 200"))
    assert 0 < cold["bytes"] < cold["image_bytes"]
    # Manifest, bootstrap and chunks: the registry's own account covers what the daemon says it fetched.
    assert cold["registry"]["bytes"] >= cold["bytes"]
    assert any(stall["path"] == "/bin/busybox" for stall in cold["stalls"])
    assert (warm["requests"], warm["bytes"], warm["stalls"]) == (0, 0, [])
    assert warm["registry"] == {"requests": 0, "bytes": 0}


@pytest.mark.guest
def test_an_image_that_is_not_there_is_named(tool: Callable[[str], str]) -> None:
    tool("qemu-system-x86_64")
    done = quickstart("--image", "127.0.0.1:1/nothing:here", "--plain-http", "--timeout", "5")
    assert done.returncode == 1
    assert "quickstart: " in done.stderr
    assert "logs are in" in done.stderr
