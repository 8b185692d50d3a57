"""Real guests with their root in a registry: what they see is what was built, whatever happens on the way."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from guest.boot import boot
from guest.daemon import PROGRAM, Daemon
from guest.initramfs import make_initramfs
from guest.kit import BUSYBOX, ROOT, VAR, Kernel, KitError, kernel_command_line, make_kit
from guest.qemu import Guest, Machine
from guest.registry import Registry
from guest.sample import make_sample
from guest.slowlink import SlowLinkProcess
from guest.tree import describe_source, difference, passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Kernels = Callable[[str], Kernel]

pytestmark = pytest.mark.guest

# A hang guard for one guest's whole life under emulation, seconds.
LONG = 400


@attrs.frozen
class Image:
    """A source tree and its image in the registry."""

    source: Path
    lines: list[str]
    reference: str
    size: int

    def through(self, link: SlowLinkProcess) -> str:
        """The reference of the same image behind *link*."""
        host, _, rest = self.reference.partition("/")
        return f"{host.partition(':')[0]}:{link.port}/{rest}"


@pytest.fixture(scope="session", autouse=True)
def guest_tools(tool: Callable[[str], str], missing: Callable[[str], None]) -> None:
    """Everything a guest needs is there."""
    for name in ("qemu-system-x86_64", "docker-registry", "mke2fs", "cc"):
        tool(name)
    if not BUSYBOX.exists():
        missing("busybox")
    if os.geteuid() != 0:
        missing("root")


@pytest.fixture(scope="session")
def kernel(missing: Callable[[str], None]) -> Kernels:
    def find(series: str) -> Kernel:
        try:
            return Kernel.find(series)
        except KitError:
            missing(f"kernel-{series}")
            raise

    return find


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder with a short path: sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="rafs-") as name:
        yield Path(name)


def publish(source: Path, registry: Registry, name: str, out: Path) -> Image:
    """Builds *source* and pushes it."""
    reference = f"127.0.0.1:{registry.port}/{name}:1"
    subprocess.run([PROGRAM, "build", source, "-o", out], check=True)
    subprocess.run([PROGRAM, "push", out, reference, "--plain-http"], check=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    return Image(source, describe_source(source), reference, size)


@pytest.fixture(scope="session")
def sample(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder / "root")
    return publish(folder / "root", registry, "guest/sample", folder / "image")


@pytest.fixture(scope="session")
def debian(registry: Registry, tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Image:
    """The image of the quickstart: Debian 12 with nginx and Python."""
    tool("debootstrap")
    root = VAR / "quickstart" / "root"
    subprocess.run([ROOT / "scripts" / "lib" / "debian-root", root], check=True)
    return publish(root, registry, "guest/debian", tmp_path_factory.mktemp("debian") / "image")


@contextlib.contextmanager
def running(
    reference: str,
    work: Path,
    kernel: Kernel,
    *words: str,
    options: tuple[str, ...] = (),
    cache: bool = True,
    **machine: Any,
) -> Iterator[tuple[Daemon, Guest]]:
    """A daemon and a guest that describes its tree."""
    arguments = ["--plain-http", *options]
    arguments += ["--cache-dir", str(work / "cache")] if cache else ["--no-cache"]
    kit = make_kit(work / "kit.img", kernel, "hash")
    with Daemon(reference, work, work / "daemon.log", arguments) as daemon:
        daemon.wait_ready()
        settings = Machine(
            kernel=kernel.image,
            command_line=kernel_command_line(extra=words),
            vhost_socket=daemon.socket,
            work_dir=work / "guest",
            kit=kit,
            initramfs=make_initramfs(work / "initramfs", kernel),
            **machine,
        )
        with Guest(settings) as guest:
            yield daemon, guest


def assert_same(image: Image, daemon: Daemon, guest: Guest, count: int = 1) -> None:
    """The last *count* passes of the report show the source, and the guest's kernel complained of nothing."""
    found = passes(guest.report_path.read_text())
    assert len(found) >= count, f"{guest.console()}\n{daemon.log.read_text(errors='replace')}"
    for seen in found[-count:]:
        assert difference(image.lines, seen.lines) == ""
        assert seen.code == 0, guest.console()
    bad = ("I/O error", "blocked for more than", "BUG:", "virtio-fs:", "Call Trace")
    assert [line.text for line in guest.lines if any(words in line.text for words in bad)] == []


def worker_pid(daemon: Daemon) -> int:
    """The worker's pid at the moment; 0 when there is none."""
    pid: int = daemon.status()["processes"]["worker"]["pid"]
    return pid


def wait_parked(daemon: Daemon, guest: Guest) -> None:
    """Waits until requests of the guest wait for data."""
    while not sum(queue["parked"] for queue in daemon.status()["queues"]):
        assert "job-ended" not in guest.milestones(), "the guest was through before anything was parked"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["q35", "microvm"])
@pytest.mark.parametrize("series", ["6.1", "6.12", "7"])
def test_a_guest_sees_exactly_the_source(
    sample: Image, work: Path, kernel: Kernels, series: str, kind: str
) -> None:
    chosen = kernel(series)
    with running(sample.reference, work, chosen, kind=kind) as (daemon, guest):
        _, line = guest.milestone("init", LONG)
        assert f"kernel={chosen.release}" in line.text
        assert "root=virtiofs,ro" in line.text
        assert guest.wait(LONG) == 0
        assert daemon.wait_end() == 0
    assert_same(sample, daemon, guest)


def test_two_request_queues_and_processors(sample: Image, work: Path, kernel: Kernels) -> None:
    with running(sample.reference, work, kernel("7"), cpus=2, request_queues=2) as (daemon, guest):
        assert guest.wait(LONG) == 0
        assert daemon.wait_end() == 0
    assert_same(sample, daemon, guest)


def test_without_a_cache_directory(sample: Image, work: Path, kernel: Kernels) -> None:
    with running(sample.reference, work, kernel("6.12"), cache=False) as (daemon, guest):
        assert guest.wait(LONG) == 0
        assert daemon.wait_end() == 0
    assert_same(sample, daemon, guest)


def test_debian_starts_its_web_server_lazily(
    debian: Image, registry: Registry, work: Path, kernel: Kernels
) -> None:
    options = ["--plain-http", "--cache-dir", str(work / "cache")]
    with SlowLinkProcess(registry.port, rate_mbit=100, latency_ms=5) as link:
        reference = debian.through(link)
        cold = boot("cold", reference, kernel=kernel("6.12"), options=options, logs=work, timeout=LONG)
    # The link is gone, and the registry with it: a warm cache needs neither.
    warm = boot("warm", reference, kernel=kernel("6.12"), options=options, logs=work, timeout=LONG)
    assert 0 < cold.status["agent"]["bytes_fetched"] < debian.size * 0.7
    assert warm.status["agent"]["bytes_fetched"] == 0


def kill_workers(daemon: Daemon, guest: Guest) -> int:
    """Kills one worker after the other, at random moments, until the guest has ended; how many."""
    noise = random.Random(7)
    killed: set[int] = set()
    while "job-ended" not in guest.milestones() and guest.process.poll() is None:
        pid = worker_pid(daemon)
        if pid and pid not in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                killed.add(pid)
        time.sleep(noise.uniform(0.0, 0.5))
    assert guest.wait(LONG) == 0
    assert daemon.wait_end() == 0
    return len(killed)


def test_the_worker_is_killed_again_and_again(debian: Image, work: Path, kernel: Kernels) -> None:
    with running(debian.reference, work, kernel("6.12"), "rafs.passes=2") as (daemon, guest):
        guest.milestone("pass-begins", LONG)
        assert kill_workers(daemon, guest) >= 10, "the guest was through before enough workers were killed"
    assert_same(debian, daemon, guest, count=2)


def test_the_worker_is_killed_while_requests_are_parked(
    sample: Image, registry: Registry, work: Path, kernel: Kernels
) -> None:
    with (
        SlowLinkProcess(registry.port, rate_mbit=8, latency_ms=50) as link,
        running(sample.through(link), work, kernel("7")) as (daemon, guest),
    ):
        guest.milestone("pass-begins", LONG)
        wait_parked(daemon, guest)
        assert kill_workers(daemon, guest) >= 10, "the guest was through before enough workers were killed"
    assert_same(sample, daemon, guest)


def test_stop_and_cont_while_requests_are_parked(
    sample: Image, registry: Registry, work: Path, kernel: Kernels
) -> None:
    with (
        SlowLinkProcess(registry.port, rate_mbit=8, latency_ms=50) as link,
        running(sample.through(link), work, kernel("6.12")) as (daemon, guest),
    ):
        guest.milestone("pass-begins", LONG)
        for _ in range(6):
            wait_parked(daemon, guest)
            guest.qmp("stop")
            assert guest.qmp("query-status")["status"] == "paused"
            # Data goes on arriving for requests that the stopped guest has made.
            time.sleep(0.3)
            guest.qmp("cont")
            time.sleep(0.2)
        assert guest.wait(LONG) == 0
        assert daemon.wait_end() == 0
    assert_same(sample, daemon, guest)


def test_reset_while_requests_are_parked(
    sample: Image, registry: Registry, work: Path, kernel: Kernels
) -> None:
    with (
        SlowLinkProcess(registry.port, rate_mbit=8, latency_ms=50) as link,
        running(sample.through(link), work, kernel("6.12"), may_reboot=True) as (daemon, guest),
    ):
        position = 0
        for _ in range(2):
            position, _ = guest.milestone("pass-begins", LONG, position)
            wait_parked(daemon, guest)
            guest.qmp("system_reset")
            position += 1
        # The third boot of the same machine goes through: each began with a FUSE_INIT of its own.
        guest.milestone("pass-begins", LONG, position)
        assert guest.wait(LONG) == 0
        assert daemon.wait_end() == 0
    assert_same(sample, daemon, guest)


def test_a_kept_daemon_serves_the_next_machine(sample: Image, work: Path, kernel: Kernels) -> None:
    with running(sample.reference, work, kernel("6.12"), options=("--keep",)) as (daemon, guest):
        assert guest.wait(LONG) == 0
        assert_same(sample, daemon, guest)
        with Guest(attrs.evolve(guest.machine, work_dir=work / "second")) as second:
            assert second.wait(LONG) == 0
            assert_same(sample, daemon, second)
        assert daemon.process.poll() is None
    assert daemon.process.returncode == 0
