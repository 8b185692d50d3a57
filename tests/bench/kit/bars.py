"""What is asked of this project's daemon, as far as a comparison can tell: bars against measured medians."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.kit.results import CaseResult

OURS = "rafs"
FLOOR_CPU = 1.6


@attrs.frozen
class Bar:
    """A case against peers: the better one of those that were measured counts.

    ``speed`` is at least, ``cpu`` at most. Against the floor ``cpu`` is :data:`FLOOR_CPU` in all cases.
    """

    case: str
    peers: tuple[str, ...]
    speed: float
    cpu: float | None = None


BARS = (
    Bar("getattr qd32", ("nydusd",), 1.2, 1.0),
    Bar("lookup qd32", ("nydusd",), 1.4, 0.7),
    Bar("read 4k random qd32", ("nydusd", "virtiofsd"), 1.4, 0.65),
    Bar("read 4k random qd1", ("nydusd", "virtiofsd"), 1 / 1.1),
    # A back-end that polls while the front-end does, against one that sleeps.
    Bar("read 4k random qd1, polling", ("nydusd", "virtiofsd"), 1 / 0.3),
    Bar("read 128k sequential qd8", ("nydusd", "virtiofsd"), 1.0, 0.9),
    Bar("read 1m sequential qd8", ("nydusd", "virtiofsd"), 1.0, 0.9),
    Bar("walk of the tree qd1", ("nydusd",), 1 / 0.8),
)
# Of warm reads beside a remote that does not answer.
STALLED_RATIO, STALLED_MAX_US = 3.0, 50_000.0

Row = tuple[str, str, str, str, str]
"""Case, what is compared, bar, measured, verdict."""


def verdicts(results: Sequence[CaseResult]) -> list[Row]:
    """A row for each bar whose case and peers were measured; without our own side there is none."""
    found = {result.name: result for result in results if result.first == OURS}
    rows: list[Row] = []
    for bar in BARS:
        if bar.case in found:
            rows += _against_peers(found[bar.case], bar)
            rows += _against_floor(found[bar.case])
    for result in found.values():
        if result.what == "stalled":
            rows += _stalled(result)
    if found:
        runs = [run for result in found.values() for run in result.records[OURS].runs]
        n = sum(sum(run.faults.values()) for run in runs)
        rows.append(_row("all cases", "ring faults", "0", str(n), n == 0))
    return rows


def _row(case: str, what: str, bar: str, measured: str, kept: bool) -> Row:
    return case, what, bar, measured, "kept" if kept else "MISSED"


def _against_peers(result: CaseResult, bar: Bar) -> list[Row]:
    speeds = {peer: spread for peer in bar.peers if (spread := result.speed(peer)) is not None}
    if not speeds:
        return []
    # The better peer is the one that we are least ahead of.
    better = min(speeds, key=lambda peer: speeds[peer].median)
    speed = speeds[better]
    kept = speed.median >= bar.speed
    rows = [_row(result.name, f"speed, {better}", f">= {bar.speed:.2f}", speed.text(), kept)]
    cpus = {peer: spread for peer in speeds if (spread := result.cpu(peer)) is not None}
    if bar.cpu is not None and cpus:
        cheaper = max(cpus, key=lambda peer: cpus[peer].median)
        cpu = cpus[cheaper]
        kept = cpu.median <= bar.cpu
        rows.append(_row(result.name, f"cpu, {cheaper}", f"<= {bar.cpu:.2f}", cpu.text(), kept))
    return rows


def _against_floor(result: CaseResult) -> list[Row]:
    cpu = result.cpu("floor")
    if cpu is None:
        return []
    return [_row(result.name, "cpu, floor", f"<= {FLOOR_CPU:.2f}", cpu.text(), cpu.median <= FLOOR_CPU)]


def _stalled(result: CaseResult) -> list[Row]:
    """The best of the rounds: a disturbed one says nothing about the back-end."""
    runs = [run for run in result.records[result.first].runs if run.idle_p99_us]
    if not runs:
        return []
    ratio = min(run.p99_us for run in runs) / min(run.idle_p99_us or 1 for run in runs)
    longest = min(run.max_us for run in runs)
    return [
        _row(result.name, "p99, idle", f"<= {STALLED_RATIO:.2f}", f"{ratio:.2f}", ratio <= STALLED_RATIO),
        _row(
            result.name,
            "longest, ms",
            f"<= {STALLED_MAX_US / 1000:.0f}",
            f"{longest / 1000:.1f}",
            longest <= STALLED_MAX_US,
        ),
    ]
