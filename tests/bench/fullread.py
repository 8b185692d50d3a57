"""The whole image read from a registry on loopback, with an empty cache."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import PROGRAM, Daemon
from guest.kit import VAR
from guest.registry import Registry
from guest.slowlink import SlowLinkProcess
from tests.bench import peers, sides
from tests.bench.figures import print_table, ratios_of, write_json
from tests.bench.material import Material, prepare
from tests.bench.options import json_option, nydusd_option, rounds_option, work_option
from virtiofsd_rafs.native.frontend import Load, Op, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest.daemon import BackEnd
    from virtiofsd_rafs.native.frontend import Frontend

_READ = 128 << 10
"""As a guest's read-ahead cuts files."""


@attrs.frozen
class Full:
    """One read of all files."""

    side: str
    round: int
    read: int
    """Bytes of file content."""
    seconds: float
    cpu_s: float
    """Processor time of all the back-end's processes."""
    requests: int
    fetched: int
    """What the registry answered for the blob."""
    connections: int | None
    """How many were opened, as far as the side tells."""

    @property
    def mb_per_s(self) -> float:
        return self.read / self.seconds / 1e6


def all_files(fe: Frontend) -> list[Target]:
    """Every regular file with content, in the order of their paths."""
    tree = fe.read_tree(content=False, xattrs=False)
    files = [entry for _, entry in sorted(tree.items()) if stat.S_ISREG(entry.attr.mode) and entry.attr.size]
    files = list({entry.nodeid: entry for entry in files}.values())
    return [Target(entry.nodeid, size=entry.attr.size, fh=0) for entry in files]


def read_all(
    side: sides.Side, targets: Sequence[Target], depth: int, random_reads: int = 0
) -> tuple[int, float, float]:
    """Bytes, seconds and processor time of reading *targets* from begin to end, one after the other; or of so
    many *random_reads* of them.

    Raises:
        RuntimeError: a request failed or was short.
    """
    targets = [attrs.evolve(target, fh=side.fe.open(target.nodeid)) for target in targets]
    # Of all files; random reads may be of any length.
    size = sum(target.size for target in targets)
    count = random_reads or sum(-(-target.size // _READ) for target in targets)
    op = Op("read", targets, _READ, random=bool(random_reads))
    load = Load([op], depth=depth, count=count, canaries=False, stall_s=120)
    before = side.usage()
    result = side.fe.load(load)
    used = side.usage() - before
    total = result.total
    if total.errors or result.lost or (not random_reads and total.bytes != size):
        raise RuntimeError(f"{side.name}: {result}")
    return total.bytes, result.elapsed_s, used.cpu_ns / 1e9


def one_round(
    name: str,
    start: Callable[[Path], BackEnd],
    material: Material,
    registry: Registry,
    number: int,
    depth: int,
    random_reads: int,
) -> Full:
    """Starts a side with an empty cache and reads everything."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        side = stack.enter_context(sides.start(name, start(work)))
        targets = all_files(side.fe)
        before = registry.traffic(material.blob_id)
        read, seconds, cpu_s = read_all(side, targets, depth, random_reads)
        status = side.back_end.status() if side.back_end is not None else {}
        traffic = registry.traffic(material.blob_id) - before
    opened = status.get("agent", {}).get("connections", {}).get("opened")
    return Full(name, number, read, seconds, cpu_s, traffic.requests, traffic.bytes, opened)


@click.command()
@nydusd_option
@click.option(
    "--dir",
    "tree",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    default=VAR / "quickstart" / "root",
    show_default="var/quickstart/root",
    help="The root that is read; scripts/quickstart leaves one there.",
)
@rounds_option(5)
@click.option("--depth", default=8, show_default=True, help="Requests in flight.")
@click.option("--random", "random_reads", default=0, help="So many reads here and there instead.")
@click.option("--rate", default=0.0, help="Mbit/s of a link between; 0: none.")
@click.option("--latency", default=20.0, show_default=True, help="Milliseconds of a round trip on it.")
@click.option("--option", "options", multiple=True, help="Further arguments of serve.")
@work_option
@json_option
def fullread(
    nydusd: str | None,
    tree: Path,
    rounds: int,
    depth: int,
    random_reads: int,
    rate: float,
    latency: float,
    options: tuple[str, ...],
    work: Path,
    json_path: Path | None,
) -> None:
    """Reads all files of an image through a registry on loopback, from begin to end, with an empty cache.

    One queue, several requests in flight, 128 KiB each. The daemon verifies every chunk, nydusd does not.
    Sides take turns, who begins changes each round.
    """
    material = prepare(work, tree)
    results: list[Full] = []
    with ExitStack() as stack:
        registry = stack.enter_context(Registry(work / "registry"))
        host, repository = f"127.0.0.1:{registry.port}", "bench/fullread"
        argv: list[str | Path] = [PROGRAM, "push", material.image, f"{host}/{repository}:1", "--plain-http"]
        subprocess.run(argv, check=True, capture_output=True)
        if rate:
            link = SlowLinkProcess(registry.port, rate_mbit=rate, latency_ms=latency)
            host = f"127.0.0.1:{stack.enter_context(link).port}"

        def ours(folder: Path) -> BackEnd:
            cache = work / "cache-rafs"
            shutil.rmtree(cache, ignore_errors=True)
            arguments = ["--plain-http", "--cache-dir", str(cache), "--log-level", "warning", *options]
            return Daemon(f"{host}/{repository}:1", folder, folder / "log", arguments)

        def theirs(folder: Path) -> BackEnd:
            assert nydusd is not None
            cache = work / "cache-nydusd"
            shutil.rmtree(cache, ignore_errors=True)
            return peers.Nydusd(nydusd, material.bootstrap, peers.registry(host, repository), folder, cache)

        order = [("rafs", ours), *([("nydusd", theirs)] if nydusd else [])]
        for number in range(1, rounds + 1):
            for name, start in order:
                got = one_round(name, start, material, registry, number, depth, random_reads)
                results.append(got)
                text = f"{got.mb_per_s:.0f} MB/s, cpu {got.cpu_s:.2f} s, {got.requests} requests"
                opened = "" if got.connections is None else f", {got.connections} connections"
                fetched = f"{got.fetched / 1e6:.1f} MB{opened}"
                click.echo(f"{number} {name}: {got.seconds:.2f} s, {text}, {fetched}")
            order.reverse()
    if nydusd:
        a, b = ([each for each in results if each.side == side] for side in ("rafs", "nydusd"))
        rows = [
            ["throughput", ratios_of("mb_per_s", a, b).text()],
            ["cpu", ratios_of("cpu_s", a, b).text()],
        ]
        click.echo("rafs / nydusd, median (least to most)")
        print_table(["what", "ratio"], rows)
    write_json(json_path, [attrs.asdict(each) for each in results])
