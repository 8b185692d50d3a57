"""Warm requests beside one that waits for a chunk which the registry holds back."""

from __future__ import annotations

import struct
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import Daemon
from tests.bench import peers, sides
from tests.bench.figures import print_table, write_json
from tests.bench.material import LARGE_SIZE, N_LARGE, REPOSITORY, Material, in_registry, prepare, reference
from tests.bench.options import json_option, nydusd_option, rounds_option, work_option
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import Load, Op, OpResult, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.sim.registry import RegistrySimulator

N_WARM = 500
_GUARD_S = 60.0
# By so much the load ends before the chunk comes: what is answered after that is not part of it.
_MARGIN_S = 0.5


@attrs.frozen
class Outcome:
    """One operation in one round: idle, and while the chunk was held back."""

    side: str
    round: int
    op: str
    idle: OpResult
    held: OpResult

    @property
    def ratio(self) -> float:
        """What the held-back chunk does to p99."""
        return self.held.p99_us / self.idle.p99_us


@attrs.define
class Patient:
    """A side with warm files and some cold ones."""

    side: sides.Side
    ops: list[Op]
    cold: list[Target]


def warm_up(side: sides.Side, material: Material) -> Patient:
    """Reads 500 of the small files; the large ones stay in the registry."""
    fe = side.fe
    paths = sorted(material.tree.glob("dir*/file*"))
    paths = [path for path in paths if path.stat().st_size >= 4096][:N_WARM]
    warm = []
    for path in paths:
        node = fe.resolve(str(path.relative_to(material.tree))).nodeid
        warm.append(Target(node, size=path.stat().st_size, fh=fe.open(node), content=path))
        for offset in range(0, warm[-1].size, 1 << 20):
            fe.read(node, offset, 1 << 20, fh=warm[-1].fh)
    cold = []
    for path in sorted(material.tree.glob("large*")):
        node = fe.resolve(path.name).nodeid
        cold.append(Target(node, size=LARGE_SIZE, fh=fe.open(node), content=path))
    return Patient(side, [Op("read", warm, 4096), Op("getattr", warm)], cold)


def one_round(patient: Patient, sim: RegistrySimulator, number: int, seconds: float) -> list[Outcome]:
    """Both loads, and the read that waits beside the second one; every round takes another cold file.

    Raises:
        RuntimeError: a request failed or brought wrong bytes, or the read did not reach the registry.
    """
    fe, target = patient.side.fe, patient.cold[number]
    load = Load(patient.ops, depth=32, duration_s=seconds - _MARGIN_S, canaries=False, stall_s=_GUARD_S)
    idle = fe.load(load)
    fault = sim.fault("hold", where="blob")
    offset = LARGE_SIZE // 2
    token = fe.request(
        Opcode.READ, target.nodeid, struct.pack("<QQIIQII", target.fh, offset, 4096, 0, 0, 0, 0), 4096
    )
    deadline = time.monotonic() + _GUARD_S
    while not fault.hits:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{patient.side.name}: the read of a cold chunk did not reach the registry")
        time.sleep(0.001)
    timer = threading.Timer(seconds, fault.release)
    timer.start()
    try:
        held = fe.load(load)
    finally:
        timer.join()
    reply = fe.wait(token, _GUARD_S)
    assert target.content is not None
    with target.content.open("rb") as file:
        file.seek(offset)
        if reply.error or reply.data != file.read(4096):
            raise RuntimeError(f"{patient.side.name}: the read that was held back failed: {reply.error}")
    for result in (idle, held):
        if result.total.errors or result.total.wrong or result.lost:
            raise RuntimeError(f"{patient.side.name}: {result}")
    pairs = zip(patient.ops, idle.ops, held.ops, strict=True)
    outcomes = [Outcome(patient.side.name, number + 1, op.kind, a, b) for op, a, b in pairs]
    return [*outcomes, Outcome(patient.side.name, number + 1, "both", idle.total, held.total)]


def best(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Of both operations together: the best p99 beside a held-back chunk as a multiple of the best idle one,
    and the longest request of that round in microseconds.

    Both are the best of all rounds, so that a disturbed idle round makes nothing look good.
    """
    both = [each for each in outcomes if each.op == "both"]
    held = min((each.held for each in both), key=lambda result: result.p99_us)
    return held.p99_us / min(each.idle.p99_us for each in both), held.max_us


@click.command()
@nydusd_option
@rounds_option(3, N_LARGE)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=5.0,
    show_default=True,
    help="How long the chunk is held back.",
)
@work_option
@json_option
def held(nydusd: str | None, rounds: int, seconds: float, work: Path, json_path: Path | None) -> None:
    """Warm 4 KiB reads and getattrs, depth 32, while one chunk does not come.

    One queue; the same load without and with one more read in it, whose chunk the registry holds back.
    Latencies in microseconds.
    """
    material = prepare(work)
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        sim = stack.enter_context(in_registry(material))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "warning"]
        back_end = Daemon(reference(sim), folder, folder / "log", options)
        patients = [warm_up(stack.enter_context(sides.start("rafs", back_end)), material)]
        if nydusd is not None:
            blobs = peers.registry(sim.host, REPOSITORY)
            other = folder / "nydusd"
            peer = peers.Nydusd(nydusd, material.bootstrap, blobs, other, other / "cache")
            patients.append(warm_up(stack.enter_context(sides.start("nydusd", peer)), material))
        for number in range(rounds):
            for patient in patients:
                outcomes += one_round(patient, sim, number, seconds)
                time.sleep(1)  # what the released chunk brings along is stored
    head = ["side", "round", "requests", "load", "count", "p50", "p99", "p99.9", "max", "p99 ratio"]
    rows: list[list[object]] = []
    for each in outcomes:
        for name, r in (("idle", each.idle), ("held", each.held)):
            ratio = each.ratio if name == "held" else ""
            latencies = [float(us) for us in (r.p50_us, r.p99_us, r.p999_us, r.max_us)]
            rows.append(
                [each.side, each.round, each.op, name, r.count, *latencies, f"{ratio:.2f}" if ratio else ""]
            )
    print_table(head, rows)
    for patient in patients:
        name = patient.side.name
        ratio, longest = best([each for each in outcomes if each.side == name])
        click.echo(f"{name}: best of {rounds}: p99 x {ratio:.2f}, longest {longest / 1000:.1f} ms")
    write_json(json_path, [attrs.asdict(each) | {"ratio": each.ratio} for each in outcomes])
