"""What a comparison found, in memory and as JSON: all that tables, pictures and documents are made from."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import attrs

from tests.bench.figures import Spread, ratios
from tests.bench.kit.runs import Run, Steps, median, merged

if TYPE_CHECKING:
    from tests.bench.kit.cases import Case


@attrs.define
class Record:
    """A side in a case."""

    runs: list[Run] = attrs.field(factory=list)
    syscalls: float | None = None
    """System calls per request; ``None`` if they were not counted."""
    syscalls_by: str = "n/a"
    pss_kib: int | None = None
    note: str = ""
    """Why there are no runs, or fewer."""

    def median(self) -> Run:
        return median(self.runs)

    def steps(self) -> Steps:
        return merged([run.steps for run in self.runs])


@attrs.define
class CaseResult:
    """All sides in a case, by name, the first one being that which the others are compared with."""

    name: str
    what: str
    by: str
    records: dict[str, Record]

    @classmethod
    def of(cls, case: Case, names: list[str]) -> CaseResult:
        return cls(case.name, case.what, case.by, {name: Record() for name in names})

    @property
    def first(self) -> str:
        return next(iter(self.records))

    def speed(self, other: str) -> Spread | None:
        """How much faster the first side is, round by round; above 1 is in its favour. ``None``: no pairs."""
        pairs = self._pairs(other)
        if not pairs:
            return None
        if self.by == "p50":
            return ratios([b.p50_us for _, b in pairs], [a.p50_us for a, _ in pairs])
        return ratios([a.ops_per_s for a, _ in pairs], [b.ops_per_s for _, b in pairs])

    def cpu(self, other: str) -> Spread | None:
        """The first side's processor time per operation as a multiple of the other's; ``None``: no pairs."""
        pairs = [(a, b) for a, b in self._pairs(other) if b.cpu_us]
        if not pairs:
            return None
        return ratios([a.cpu_us for a, _ in pairs], [b.cpu_us for _, b in pairs])

    def _pairs(self, other: str) -> list[tuple[Run, Run]]:
        if other not in self.records:
            return []
        return list(zip(self.records[self.first].runs, self.records[other].runs, strict=False))

    def disturbance(self, name: str) -> float | None:
        """p99 beside what disturbs as a multiple of p99 without: the median over the rounds."""
        values = [run.p99_us / run.idle_p99_us for run in self.records[name].runs if run.idle_p99_us]
        return statistics.median(values) if values else None


def to_json(results: list[CaseResult]) -> list[dict[str, Any]]:
    """For :func:`from_json`. Steps are kept once for each side of a case."""
    cases = []
    for result in results:
        sides = {}
        for name, record in result.records.items():
            runs = [attrs.asdict(run, filter=lambda field, _: field.name != "steps") for run in record.runs]
            rest = attrs.asdict(record, filter=lambda field, _: field.name != "runs")
            sides[name] = rest | {"runs": runs, "steps": [list(step) for step in record.steps()]}
        cases.append({"name": result.name, "what": result.what, "by": result.by, "sides": sides})
    return cases


def from_json(cases: list[dict[str, Any]]) -> list[CaseResult]:
    """What :func:`to_json` made; all steps are with the first run of a side."""
    results = []
    for case in cases:
        records = {}
        for name, side in case["sides"].items():
            rest = {key: value for key, value in side.items() if key not in ("runs", "steps")}
            runs = [Run(**run) for run in side["runs"]]
            if runs:
                steps = tuple((float(value), int(n)) for value, n in side["steps"])
                runs[0] = attrs.evolve(runs[0], steps=steps)
            records[name] = Record(runs=runs, **rest)
        results.append(CaseResult(case["name"], case["what"], case["by"], records))
    return results
