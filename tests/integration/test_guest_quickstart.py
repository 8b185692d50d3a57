"""The quickstart from beginning to end, and what it records for the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.boot import Boot
from guest.pull_first import VIRTIOFSD, Layer, Pull, PullError, pack, pull, push
from guest.quickstart import arguments
from guest.registry import Registry, Traffic
from guest.report import comparison, recording, recording_of_pull
from guest.sample import make_sample
from guest.tree import describe_source
from tests.sim.traces import lively
from virtiofsd_rafs.report.model import analyse
from virtiofsd_rafs.report.trace import parse

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


def test_a_boot_is_recorded_for_the_report() -> None:
    boot = Boot("cold", 4990.0, {"daemon ready": 10.1, "HTTP 200": 19.0}, {}, lively(20))
    report = analyse(parse(recording(boot, "Cold cache", Traffic(6, 5_500_000))))
    assert (report.name, report.end_s, report.traffic) == ("Cold cache", 9.0, 5_500_000)
    assert report.at("daemon ready") == pytest.approx(0.1)
    assert report.fetches


def test_a_pull_counts_until_the_boot_behind_it() -> None:
    second = 10**9
    layers = [Layer(0, 700, 11 * second, 13 * second), Layer(1, 300, 11 * second, 14 * second)]
    pulled = Pull(10 * second, 14 * second, 15 * second, layers)
    # The boot began two seconds later, and these do not count.
    boot = Boot("pull-first", 17.0, {"daemon ready": 0.5, "first exec": 2.0, "HTTP 200": 4.0}, {})
    report = analyse(parse(recording_of_pull(pulled, boot, "Pull first", "app", Traffic(4, 1100))))
    assert [(event.name, event.at_s) for event in report.events] == [
        ("pull begins", 0.0),
        ("first fetch", 1.0),
        ("downloaded", 4.0),
        ("unpacked", 5.0),
        ("daemon ready", 5.5),
        ("first exec", 7.0),
        ("HTTP 200", 9.0),
    ]
    assert (report.end_s, report.bytes, report.image_bytes, report.pulled) == (9.0, 1000, 1000, True)
    assert comparison([report, report]) == "Pull first: 1.00 of the time of pull first, 1.00 of its bytes"


def test_a_tree_becomes_layers_and_a_tree_again(tmp_path: Path, tool: Callable[[str], str]) -> None:
    tool("docker-registry")
    assert os.geteuid() == 0, "the tree to unpack has foreign owners: run the tests as root"
    make_sample(tmp_path / "tree")
    (tmp_path / "tree" / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "tree" / "usr").chmod(0o711)
    (tmp_path / "tree" / "usr" / "lib" / "library").write_bytes(b"l" * 10_000)
    layers = pack(tmp_path / "tree", tmp_path / "layers")
    assert len(layers) > 1
    with Registry(tmp_path / "registry") as registry:
        host = f"127.0.0.1:{registry.port}"
        push(layers, host, "test/oci")
        pulled = pull(host, "test/oci", tmp_path / "pulled")
        with pytest.raises(PullError, match="HTTP 404"):
            pull(host, "test/nothing", tmp_path / "other")
    assert pulled.started_ns < pulled.downloaded_ns < pulled.unpacked_ns
    # Sockets are no part of a tar archive, and hard links may end up in different layers.
    left, right = describe_source(tmp_path / "tree"), describe_source(tmp_path / "pulled" / "root")
    names = [line.split("\t", 1)[0] for line in left]
    there = {line.split("\t", 1)[0] for line in right}
    assert [name for name in names if name not in there and "socket" not in name] == []
    assert (tmp_path / "pulled" / "root" / "usr").stat().st_mode & 0o777 == 0o711


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
def test_a_directory_is_booted_cold_and_warm_and_pulled_first(
    tmp_path: Path, tool: Callable[[str], str], missing: Callable[[str], None]
) -> None:
    tool("qemu-system-x86_64")
    tool("docker-registry")
    assert os.geteuid() == 0, "the tree to boot needs device nodes: run the tests as root"
    make_sample(tmp_path / "tree")
    if not VIRTIOFSD.exists():
        missing("virtiofsd")
    out = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "page.html")]
    done = quickstart("--dir", str(tmp_path / "tree"), "--rate", "100", *out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    cold, warm, pulled = result["boots"]
    for boot, expected in (
        (cold, ("daemon ready", "FUSE_INIT", "first exec", "HTTP 200")),
        (warm, ("daemon ready", "FUSE_INIT", "first exec", "HTTP 200")),
        (pulled, ("pull begins", "downloaded", "unpacked", "first exec", "HTTP 200")),
    ):
        order = [list(boot["events"]).index(event) for event in expected]
        assert order == sorted(order)
    assert 0 < cold["bytes"] < cold["image_bytes"]
    # Manifest, bootstrap and chunks: the registry's own account covers what the daemon says it fetched.
    assert cold["link_bytes"] >= cold["bytes"]
    assert any(file["path"] == "/bin/busybox" for file in cold["files"])
    assert (warm["n_fetches"], warm["bytes"], warm["files"], warm["link_bytes"]) == (0, 0, [], 0)
    assert pulled["link_bytes"] >= pulled["bytes"] == pulled["image_bytes"] > cold["bytes"]
    text = (tmp_path / "page.html").read_text()
    for name in ("Cold cache", "Warm cache", "Pull first", "/bin/", "layer 1 of"):
        assert name in text
    assert f"page to look at: {tmp_path / 'page.html'}" in done.stdout


@pytest.mark.guest
def test_an_image_that_is_not_there_is_named(tool: Callable[[str], str]) -> None:
    tool("qemu-system-x86_64")
    done = quickstart("--image", "127.0.0.1:1/nothing:here", "--plain-http", "--timeout", "5")
    assert done.returncode == 1
    assert "quickstart: " in done.stderr
    assert "logs are in" in done.stderr
