"""Warm requests beside others that wait: for chunks which the registry holds back, for a disk."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs
import click

from tests.bench import sides, stalls
from tests.bench.figures import print_table, write_json
from tests.bench.kit import contenders, pages
from tests.bench.material import LARGE_SIZE, Material, in_registry, prepare
from tests.bench.options import json_option, nydusd_option, rounds_option, virtiofsd_option, work_option
from virtiofsd_rafs.native.frontend import Load, Op, OpResult, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.kit.contenders import Contender
    from tests.bench.stalls import Beside

Trouble = Literal["chunk", "chunks", "disk"]
TROUBLES: tuple[Trouble, ...] = ("chunk", "chunks", "disk")
N_HELD = {"chunk": 1, "chunks": 64}
N_WARM = 500
DISK_DEPTH = 32
# By so much the load ends before the chunks come: what is answered after that is not part of it.
_MARGIN_S = 0.5


@attrs.frozen
class Outcome:
    """One operation in one round: idle, and beside what waits."""

    side: str
    trouble: Trouble
    round: int
    op: str
    idle: OpResult
    held: OpResult
    beside: Beside

    @property
    def ratio(self) -> float:
        """What the trouble does to p99."""
        return self.held.p99_us / self.idle.p99_us


@attrs.define
class Patient:
    """A side with warm files and some cold ones."""

    side: sides.Side
    ops: list[Op]
    cold: list[Target]

    def warm_up(self) -> None:
        """Reads all of the warm files."""
        for target in self.ops[0].targets:
            for offset in range(0, target.size, 1 << 20):
                self.side.fe.read(target.nodeid, offset, 1 << 20, fh=target.fh)

    def load(self, seconds: float) -> Load:
        return Load(self.ops, depth=32, duration_s=seconds, canaries=False, stall_s=stalls.GUARD_S)


def admit(side: sides.Side, material: Material) -> Patient:
    """500 of the small files are the warm ones, and read once; the large ones are not touched."""
    fe = side.fe
    paths = [path for path in sorted(material.tree.glob("dir*/file*")) if path.stat().st_size >= 4096]
    warm = []
    for path in paths[:N_WARM]:
        node = fe.resolve(str(path.relative_to(material.tree))).nodeid
        warm.append(Target(node, size=path.stat().st_size, fh=fe.open(node), content=path))
    cold = []
    for path in sorted(material.tree.glob("large*")):
        node = fe.resolve(path.name).nodeid
        cold.append(Target(node, size=LARGE_SIZE, fh=fe.open(node), content=path))
    patient = Patient(side, [Op("read", warm, 4096), Op("getattr", warm)], cold)
    patient.warm_up()
    return patient


def one_round(
    contender: Contender, trouble: Trouble, number: int, material: Material, seconds: float
) -> list[Outcome]:
    """A back-end with an empty cache, and both loads on it: idle, and beside the trouble.

    Raises:
        RuntimeError: a warm request failed or brought wrong bytes, or the trouble was none.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        sim = stack.enter_context(in_registry(material))
        if trouble == "disk":
            # On the disk that holds the tree: /tmp may be memory.
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="held-", dir=material.tree.parent))
            )
            back_end = contender.start(folder)
        else:
            assert contender.over is not None
            back_end = contender.over(sim, folder)
        patient = admit(stack.enter_context(sides.start(contender.name, back_end)), material)
        fe = patient.side.fe
        load = patient.load(seconds - _MARGIN_S)
        if trouble == "disk":
            assert contender.data is not None
            whole = Op("read", patient.cold, 128 << 10, random=False)
            count = len(patient.cold) * -(-LARGE_SIZE // whole.size)
            fe.load(Load([whole], depth=8, count=count, canaries=False, stall_s=stalls.GUARD_S))
            data = list(contender.data(folder))
            pages.drop(data)
            patient.warm_up()
            parts = {path: stalls.absent_ranges(path) for path in data}
            idle = fe.load(load)
            entered = stalls.disk_reads(patient.side, parts, patient.cold, DISK_DEPTH, seconds)
        else:
            idle = fe.load(load)
            pause = trouble == "chunks"
            entered = stalls.held_chunks(
                patient.side, sim, patient.cold, N_HELD[trouble], seconds, pause=pause
            )
        with entered as beside:
            held = fe.load(load)
    for result in (idle, held):
        if result.total.errors or result.total.wrong or result.lost:
            raise RuntimeError(f"{contender.name}, {trouble}: {result}")
    name = contender.name
    pairs = zip(patient.ops, idle.ops, held.ops, strict=True)
    outcomes = [Outcome(name, trouble, number, op.kind, a, b, beside) for op, a, b in pairs]
    return [*outcomes, Outcome(name, trouble, number, "both", idle.total, held.total, beside)]


def best(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Of both operations together: the best p99 beside what waits as a multiple of the best idle one,
    and the longest request of that round in microseconds.

    Both are the best of all rounds, so that a disturbed idle round makes nothing look good.
    """
    both = [each for each in outcomes if each.op == "both"]
    held = min((each.held for each in both), key=lambda result: result.p99_us)
    return held.p99_us / min(each.idle.p99_us for each in both), held.max_us


def _show(outcomes: Sequence[Outcome]) -> None:
    head = ["side", "beside", "round", "requests", "load", "count", "p50", "p99", "p99.9", "max", "p99 ratio"]
    rows: list[list[object]] = []
    for each in outcomes:
        for name, r in (("idle", each.idle), ("beside", each.held)):
            ratio = f"{each.ratio:.2f}" if name == "beside" else ""
            latencies = [float(us) for us in (r.p50_us, r.p99_us, r.p999_us, r.max_us)]
            rows.append([each.side, each.trouble, each.round, each.op, name, r.count, *latencies, ratio])
    print_table(head, rows)


def _verdict(side: str, trouble: Trouble, outcomes: Sequence[Outcome]) -> str:
    ratio, longest = best(outcomes)
    text = f"{side}, {trouble}: p99 x {ratio:.2f}, longest {longest / 1000:.1f} ms"
    besides = [each.beside for each in outcomes if each.op == "both"]
    stops = [beside.stop_ms for beside in besides if beside.stop_ms is not None]
    if stops:
        text += f"; paused with {N_HELD[trouble]} parked in {max(stops):.1f} ms at most"
    colds = [beside.cold for beside in besides if beside.cold is not None]
    if colds:
        slowest = min(cold.ops_per_s for cold in colds)
        disk = min(beside.disk_mib for beside in besides)
        text += f"; reads from disk {slowest:.0f}/s, {disk:.0f} MiB at least"
    failed = sum(beside.failed for beside in besides)
    return text + (f"; {failed} of the reads that waited failed" if failed else "")


@click.command()
@virtiofsd_option
@nydusd_option
@rounds_option(3)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=5.0,
    show_default=True,
    help="How long chunks are held back, and the disk is read.",
)
@click.option(
    "--beside",
    "troubles",
    type=click.Choice(TROUBLES),
    multiple=True,
    default=TROUBLES,
    help="What waits: one chunk, 64 chunks, or reads of a disk; may be repeated. Default: each.",
)
@work_option
@json_option
def held(
    virtiofsd: str | None,
    nydusd: str | None,
    rounds: int,
    seconds: float,
    troubles: tuple[Trouble, ...],
    work: Path,
    json_path: Path | None,
) -> None:
    """Warm 4 KiB reads and getattrs, depth 32, while chunks do not come, or beside reads of a cold disk.

    One queue; the same load without and with more reads in it: one, or 64, whose chunks the registry holds
    back, or 4 KiB at random, depth 32, whose data lies on the disk and not in the page cache. A new back-end
    with an empty cache for every round. Latencies in microseconds.
    """
    material = prepare(work)
    found = contenders.find(
        material,
        work,
        virtiofsd_program=virtiofsd or contenders.NONE,
        nydusd_program=nydusd,
        with_floor=False,
    )
    outcomes: list[Outcome] = []
    for trouble in troubles:
        taking_part = [c for c in found if trouble == "disk" or c.over is not None]
        for number in range(1, rounds + 1):
            for contender in taking_part:
                outcomes += one_round(contender, trouble, number, material, seconds)
                time.sleep(0.5)
    _show(outcomes)
    for trouble in troubles:
        for side in dict.fromkeys(each.side for each in outcomes if each.trouble == trouble):
            own = [each for each in outcomes if (each.side, each.trouble) == (side, trouble)]
            click.echo(_verdict(side, trouble, own))
    write_json(json_path, [attrs.asdict(each) | {"ratio": each.ratio} for each in outcomes])
