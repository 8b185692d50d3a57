"""Operations on a warm cache: runs the cases on all sides in turn, prints medians and ratios."""

from __future__ import annotations

import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import click

from guest.daemon import PROGRAM, Daemon
from guest.pull_first import Virtiofsd
from tests.bench import peers, sides
from tests.bench.cases import CASES, Case, Targets, find_targets, load_of
from tests.bench.figures import write_json
from tests.bench.material import Material, prepare
from tests.bench.options import json_option, nydusd_option, virtiofsd_option, work_option
from tests.bench.processes import pin as pin_processes


@attrs.frozen
class Run:
    """One run of a case on a side."""

    ops_per_s: float
    bytes_per_s: float
    cpu_us: float
    """Processor time of all the back-end's processes per operation."""
    p50_us: float
    p99_us: float
    max_us: float
    kicks: float
    interrupts: float
    wakeups: float
    """Kicks, interrupts and sleeps of the back-end's threads per operation."""
    clean: bool


def run_case(side: sides.Side, case: Case, targets: Targets, options: dict[str, Any]) -> Run:
    load = load_of(case, targets, **options)
    before = side.usage()
    result = side.fe.load(load)
    used = side.usage() - before
    n = max(result.total.count, 1)
    if result.total.errors or result.total.wrong or result.lost:
        raise RuntimeError(f"{side.name}, {case.name}: {result}")
    return Run(
        result.ops_per_s,
        result.bytes_per_s,
        used.cpu_ns / 1000 / n,
        result.total.p50_us,
        result.total.p99_us,
        result.total.max_us,
        result.kicks / n,
        result.interrupts / n,
        used.wakeups / n,
        result.clean,
    )


def median(runs: list[Run]) -> Run:
    names = [field.name for field in attrs.fields(Run) if field.name != "clean"]
    values = {name: statistics.median(getattr(run, name) for run in runs) for name in names}
    return Run(**values, clean=all(run.clean for run in runs))


def ratio(case: Case, ours: list[Run], theirs: list[Run]) -> tuple[float, float]:
    """Medians over the pairs of runs: speed (above 1 is faster than the peer) and processor time."""
    if case.by_latency:
        speed = [b.p50_us / a.p50_us for a, b in zip(ours, theirs, strict=True)]
    else:
        speed = [a.ops_per_s / b.ops_per_s for a, b in zip(ours, theirs, strict=True)]
    cpu = [a.cpu_us / b.cpu_us for a, b in zip(ours, theirs, strict=True) if b.cpu_us]
    return statistics.median(speed), statistics.median(cpu or [0.0])


def print_case(case: Case, runs: dict[str, list[Run]]) -> None:
    click.echo(f"\n{case.name}" + ("  (speed by p50)" if case.by_latency else ""))
    click.echo(
        f"  {'side':<12}{'ops/s':>10}{'GB/s':>7}{'cpu us':>8}{'p50 us':>9}{'p99 us':>9}{'max us':>10}"
        f"{'kicks':>7}{'irqs':>6}{'sleeps':>7}{'speed':>7}{'cpu':>6}"
    )
    first = next(iter(runs))
    for name, results in runs.items():
        m = median(results)
        # What the first side achieves, as a multiple of this one.
        compared = ratio(case, runs[first], results) if name != first else None
        tail = f"{compared[0]:>7.2f}{compared[1]:>6.2f}" if compared else f"{'':>13}"
        click.echo(
            f"  {name:<12}{m.ops_per_s:>10.0f}{m.bytes_per_s / 1e9:>7.2f}{m.cpu_us:>8.2f}{m.p50_us:>9.1f}"
            f"{m.p99_us:>9.1f}{m.max_us:>10.0f}{m.kicks:>7.2f}{m.interrupts:>6.2f}{m.wakeups:>7.2f}{tail}"
            + ("" if m.clean else "  breaks ring rules")
        )


def compare_trees(trees: dict[str, dict[bytes, Any]]) -> None:
    """All sides must show the same names, modes, contents and links.

    Raises:
        RuntimeError: they do not.
    """
    views = {
        name: {
            path: (e.attr.mode, e.attr.uid, e.attr.gid, int(e.attr.mtime), e.sha256, e.target)
            for path, e in tree.items()
        }
        for name, tree in trees.items()
    }
    first = next(iter(views))
    for name, view in views.items():
        differing = [p for p in view.keys() | views[first].keys() if view.get(p) != views[first].get(p)]
        if differing:
            path = min(differing)
            raise RuntimeError(
                f"{name} and {first} differ in {len(differing)} files, first {path!r}: "
                f"{view.get(path)} and {views[first].get(path)}"
            )


@click.command()
@virtiofsd_option
@nydusd_option
@click.option("--other", metavar="PROGRAM", help="Compare with another virtiofsd-rafs on the image.")
@click.option(
    "--attach",
    multiple=True,
    metavar="NAME=SOCKET,PID",
    help="Compare with what listens there; may be repeated.",
)
@click.option("--no-own", is_flag=True, help="Leave this project's own daemon out.")
@click.option("--dir", "tree", type=click.Path(path_type=Path, exists=True), help="Serve this tree.")
@work_option
@click.option("--case", "only", multiple=True, help="Only cases whose name contains this; may be repeated.")
@click.option("--rounds", default=5, help="Runs of each case on each side, taken in turn.")
@click.option("--seconds", default=2.0, help="Length of a run.")
@click.option(
    "--wait", type=click.Choice(["sleep", "poll"]), default="sleep", help="How the front-end waits."
)
@click.option(
    "--canaries", is_flag=True, help="Watch all buffers for stray writes; slows the front-end down."
)
@click.option("--pin/--no-pin", default=True, help="Front-end on the first CPU, back-ends on the others.")
@json_option
def operations(
    virtiofsd: str | None,
    nydusd: str | None,
    other: str | None,
    attach: tuple[str, ...],
    no_own: bool,
    tree: Path | None,
    work: Path,
    only: tuple[str, ...],
    rounds: int,
    seconds: float,
    wait: str,
    canaries: bool,
    pin: bool,
    json_path: Path | None,
) -> None:
    """Getattr, lookup and reads on a warm cache, in turn with peers.

    All sides serve the same tree, which each has read once before, and must show the same content. Numbers
    are medians over the rounds; the columns speed and cpu are medians of the first side's ratio to the other,
    round by round: speed above 1 and cpu below 1 are in the first side's favour. "cpu us" is processor time
    of all processes of the back-end per operation.

    \b
    scripts/bench operations --virtiofsd /usr/libexec/virtiofsd --rounds 7 --json result.json
    """
    material = prepare(work, tree.resolve() if tree else None)
    own = {"rafs": None if no_own else PROGRAM, "other": Path(other) if other else None}
    with ExitStack() as stack:
        running: list[sides.Side] = []

        def add(side: sides.Side) -> None:
            running.append(stack.enter_context(side))

        for name, program in own.items():
            if program is not None:
                add(sides.start(name, _own(program, material, _empty(work / name))))
        if virtiofsd is not None:
            back_end = Virtiofsd(virtiofsd, material.tree, _empty(work / "virtiofsd"))
            add(sides.start("virtiofsd", back_end))
        if nydusd is not None:
            folder = _empty(work / "nydusd")
            blobs = peers.localfs(material.image)
            add(
                sides.start(
                    "nydusd", peers.Nydusd(nydusd, material.bootstrap, blobs, folder, folder / "cache")
                )
            )
        for spec in attach:
            name, _, rest = spec.partition("=")
            socket, _, pid = rest.rpartition(",")
            add(sides.attach(name, Path(socket), int(pid)))
        if not running:
            raise click.UsageError("nothing to measure")
        results = measure(
            running, only, rounds, pin, {"duration_s": seconds, "wait": wait, "canaries": canaries}
        )
    runs = {
        case: {name: [attrs.asdict(run) for run in each] for name, each in by_side.items()}
        for case, by_side in results.items()
    }
    write_json(json_path, runs)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _own(program: Path, material: Material, work: Path) -> Daemon:
    options = ["--blob-dir", str(material.image), "--cache-dir", str(work / "cache")]
    options += ["--log-level", "warning"]
    return Daemon(str(material.bootstrap), work, work / "log", options, program=program)


def measure(
    running: list[sides.Side], only: tuple[str, ...], rounds: int, pin: bool, options: dict[str, Any]
) -> dict[str, dict[str, list[Run]]]:
    """All runs by case and side; prints each case when it is done."""
    if pin:
        pin_processes([pid for side in running for pid in side.pids()])
    trees = {}
    targets: dict[str, Targets] = {}
    for side in running:
        trees[side.name] = side.fe.read_tree()
        targets[side.name] = find_targets(side.fe, trees[side.name])
        memory = f"{side.pss_kib()} KiB in {len(side.pids())} processes"
        click.echo(f"{side.name}: {len(trees[side.name])} files, {memory}")
    compare_trees(trees)
    results: dict[str, dict[str, list[Run]]] = {}
    for case in CASES:
        if only and not any(part in case.name for part in only):
            continue
        runs: dict[str, list[Run]] = {side.name: [] for side in running}
        for _ in range(rounds):
            for side in running:
                runs[side.name].append(run_case(side, case, targets[side.name], options))
        print_case(case, runs)
        results[case.name] = runs
    return results
