"""What a remote image costs: start-up, memory, a chunk that does not come, a boot over a slow link.

Each command measures the daemon and, where there is one, a peer in turn, and prints ratios.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guest.boot import boot, http_status
from guest.daemon import PROGRAM, Daemon
from guest.kit import VAR, Kernel, kernel_command_line, make_kit
from guest.qemu import Guest, Machine
from guest.registry import Registry, free_port
from guest.slowlink import SlowLinkProcess
from tests.bench.peer import Nydusd
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.frontend_load import Load, LoadResult, Op, Target
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
_IMAGE = "quickstart/image:latest"


@click.group()
def main() -> None:
    """Measures what a remote image costs."""


@contextlib.contextmanager
def _material() -> Iterator[tuple[RegistrySimulator, Path, Path]]:
    """A simulated registry with an image of 300 small files and one of 64 MiB; its source and its build."""
    work = VAR / "bench-remote"
    source = work / "source"
    if not source.exists():
        import random

        rng = random.Random(12)
        source.mkdir(parents=True)
        for i in range(300):
            (source / f"small-{i:03}").write_bytes(rng.randbytes(rng.randrange(9_000, 200_000)))
        (source / "large").write_bytes(rng.randbytes(64 * MIB))
        shutil.rmtree(work / "image", ignore_errors=True)
        build_image(source, work / "image")
    with RegistrySimulator() as sim:
        sim.store.add_build("bench", "1", work / "image")
        yield sim, source, work / "image"


@contextlib.contextmanager
def _daemon(sim: RegistrySimulator, folder: Path) -> Iterator[Daemon]:
    options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "warning"]
    with Daemon(f"{sim.host}/bench:1", folder, folder / "log", options) as daemon:
        daemon.wait_ready()
        yield daemon


def _warm_targets(fe: Frontend, source: Path) -> list[Target]:
    """The small files, read once."""
    targets = []
    for path in sorted(source.glob("small-*")):
        node = fe.resolve(path.name).nodeid
        targets.append(Target(nodeid=node, size=path.stat().st_size, content=path))
        for offset in range(0, targets[-1].size, MIB):
            fe.read(node, offset, MIB)
    return targets


@main.command()
@click.option("--nydusd", metavar="PROGRAM", help="Compare with this nydusd.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="How long the chunk is held back.")
def held(nydusd: str | None, rounds: int, seconds: float) -> None:
    """Warm reads and getattrs in one queue, idle and while one chunk is held back."""
    with _material() as (sim, source, image), tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        folder = Path(tmp)
        with _daemon(sim, folder) as daemon, Frontend.connect(daemon.socket) as fe:
            _held("rafs", sim, fe, source, rounds, seconds)
        if nydusd is not None:
            with (
                Nydusd(nydusd, image / "image.boot", sim.host, "bench", folder / "n") as peer,
                Frontend.connect(peer.socket, timeout_s=60) as fe,
            ):
                _held("nydusd", sim, fe, source, rounds, seconds)


def _held(name: str, sim: RegistrySimulator, fe: Frontend, source: Path, rounds: int, seconds: float) -> None:
    fe.start()
    fe.init()
    targets = _warm_targets(fe, source)
    ops = [Op("read", targets, 4096), Op("getattr", targets)]
    large = fe.resolve("large").nodeid
    ratios = []
    for n in range(rounds):
        idle = fe.load(Load(ops, depth=31, duration_s=seconds, canaries=False))
        fault = sim.fault("delay", where="blob", seconds=seconds)
        args = struct.pack("<QQIIQII", 0, (4 + 8 * n) * MIB, 4096, 0, 0, 0, 0)
        token = fe.request(Opcode.READ, large, args, 4096)
        stalled = fe.load(Load(ops, depth=31, duration_s=seconds, canaries=False, stall_s=60))
        assert fe.wait(token, 60).error == 0
        sim.clear_faults()
        fault.release()
        ratios.append(stalled.total.p99_us / idle.total.p99_us)
        click.echo(
            f"{name}, round {n + 1}: {_line(idle)} idle; {_line(stalled)} held; p99 x {ratios[-1]:.2f}"
        )
    click.echo(f"{name}: best p99 ratio {min(ratios):.2f}")


def _line(load: LoadResult) -> str:
    total = load.total
    return f"{load.ops_per_s:,.0f}/s, p99 {total.p99_us:,.0f} us, max {total.max_us / 1000:,.1f} ms"


@main.command()
@click.option("--rounds", default=30, show_default=True)
def start(rounds: int) -> None:
    """From exec to bound sockets, and to FUSE_INIT answered with a warm cache."""
    bare, bound, init = [], [], []
    with _material() as (sim, _, _image), tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        for _ in range(rounds + 1):
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", "pass"], check=True)
            bare.append(time.monotonic() - began)
            with _daemon(sim, Path(tmp)) as daemon:
                bound.append(time.monotonic() - daemon.started)
                with Frontend.connect(daemon.socket) as fe:
                    fe.start()
                    fe.init()
                    init.append(time.monotonic() - daemon.started)
    # The first round filled the cache.
    for name, times in (("python -c pass", bare), ("sockets bound", bound), ("FUSE_INIT answered", init)):
        values = sorted(1000 * t for t in times[1:])
        p95 = values[int(0.95 * (len(values) - 1))]
        ratio = statistics.median(t / b for t, b in zip(times[1:], bare[1:], strict=True))
        click.echo(f"{name:20} median {statistics.median(values):6.1f} ms, p95 {p95:6.1f} ms, x {ratio:5.1f}")


@main.command()
def memory() -> None:
    """Proportional set size of each process, idle after reads, with a registry image."""
    with _material() as (sim, source, _image), tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        for state in ("cold", "warm"):
            with _daemon(sim, Path(tmp)) as daemon, Frontend.connect(daemon.socket) as fe:
                fe.start()
                fe.init()
                _warm_targets(fe, source)
                time.sleep(10)
                processes = Session.attach(daemon.process.pid).status()["processes"]
                total = 0
                for role in ("keeper", "worker", "control"):
                    pss = _pss(processes[role]["pid"])
                    total += pss["Pss"]
                    shared = f"{pss['Pss_Shmem']} KiB of it shared memory"
                    click.echo(f"{state}: {role:8} {pss['Pss'] / 1024:5.1f} MiB, {shared}")
                click.echo(f"{state}: together {total / 1024:5.1f} MiB")


def _pss(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}


@main.command()
@click.option("--nydusd", metavar="PROGRAM", help="Compare with this nydusd.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--rate", default=30.0, show_default=True, help="Mbit/s of the link.")
@click.option("--latency", default=20.0, show_default=True, help="Milliseconds of a round trip.")
@click.option("--extra-files", default=0, help="Also boot the same image with so many more files.")
def cold(nydusd: str | None, rounds: int, rate: float, latency: float, extra_files: int) -> None:
    """Boots of the quickstart's image (run scripts/quickstart once before) over a slow link."""
    image, root = VAR / "quickstart" / "image", VAR / "quickstart" / "root"
    if not (image / "image.boot").exists():
        raise click.UsageError("run scripts/quickstart first: it makes the image")
    kernel = Kernel.find("6.12")
    work = VAR / "bench-remote"
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(Registry(work / "registry"))
        images = {"": (image, _IMAGE)}
        if extra_files:
            images["+files"] = (_extended(root, work, extra_files), "quickstart/more:latest")
        for out, name in images.values():
            reference = f"127.0.0.1:{registry.port}/{name}"
            subprocess.run(
                [PROGRAM, "push", out, reference, "--plain-http"], check=True, stdout=subprocess.DEVNULL
            )
        link = stack.enter_context(SlowLinkProcess(registry.port, rate_mbit=rate, latency_ms=latency))
        host = f"127.0.0.1:{link.port}"
        for n in range(rounds):
            for label, (out, name) in images.items():
                ours, theirs = work / "ours", work / "theirs"
                shutil.rmtree(ours, ignore_errors=True)
                shutil.rmtree(theirs, ignore_errors=True)
                for state in ("cold", "warm"):
                    result = _boot_ours(state, f"{host}/{name}", kernel, ours, work)
                    if nydusd is None:
                        click.echo(f"{n + 1} {state}{label}: rafs {_result(result)}")
                        continue
                    peer = _boot_nydusd(nydusd, out, host, name.partition(":")[0], kernel, theirs)
                    ratio = result["time_s"] / peer["time_s"]
                    both = f"rafs {_result(result)}; nydusd {_result(peer)}"
                    click.echo(f"{n + 1} {state}{label}: {both}; time x {ratio:.2f}")


def _result(r: dict[str, Any]) -> str:
    return f"{r['time_s']:.1f} s, {r['requests']} requests, {r['bytes'] / 1e6:.1f} MB"


def _extended(root: Path, work: Path, files: int) -> Path:
    """The image of *root* with *files* more files in it; kept for the next time."""
    out = work / f"image-{files}"
    if not (out / "image.boot").exists():
        tree = work / "extended"
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", root, tree], check=True)
        (tree / "extra").mkdir()
        for i in range(files):
            (tree / "extra" / f"file-{i}").write_text(f"unread {i}\n")
        build_image(tree, out)
        shutil.rmtree(tree)
    return out


def _boot_ours(state: str, reference: str, kernel: Kernel, cache: Path, work: Path) -> dict[str, Any]:
    options = ["--cache-dir", str(cache), "--plain-http"]
    done = boot(state, reference, kernel=kernel, options=options, logs=work / "logs")
    log = done.status["fetch_log"]
    return {
        "time_s": done.times["HTTP 200"],
        "requests": len(log),
        "bytes": sum(entry["length"] for entry in log),
    }


def _boot_nydusd(
    program: str, image: Path, host: str, repository: str, kernel: Kernel, cache: Path
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rafs-") as tmp:
        work, port = Path(tmp), free_port()
        kit = make_kit(work / "kit.img", kernel, "serve")
        began = time.monotonic()
        with Nydusd(program, image / "image.boot", host, repository, work / "n", cache=cache) as peer:
            machine = Machine(
                kernel=kernel.image,
                command_line=kernel_command_line(),
                vhost_socket=peer.socket,
                work_dir=work,
                kind="q35",
                kit=kit,
                memory=512,
                http_port=port,
            )
            with Guest(machine) as guest:
                while http_status(port) != 200:
                    if time.monotonic() > began + 300:
                        raise RuntimeError("the guest did not answer")
                    time.sleep(0.02)
                took = time.monotonic() - began
                metrics = json.loads(peer.get("/api/v1/metrics/backend"))
                guest.qmp("quit")
                guest.wait(30)
    return {"time_s": took, "requests": metrics["read_count"], "bytes": metrics["read_amount_total"]}


if __name__ == "__main__":
    main(prog_name="scripts/bench-remote")
