"""Numbers for people and for programs: spreads, tables, JSON files."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least *share* (0 to 1) of all do not exceed: no interpolation.

    Raises:
        ValueError: there are no values, or *share* is out of range.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile {share} of {len(values)} values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@attrs.frozen
class Spread:
    """What repeated measurements of one thing gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """``1.02 (0.97 to 1.10)``"""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of the quotients of values that were measured in pairs."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def ratios_of(attribute: str, ours: Sequence[object], theirs: Sequence[object]) -> Spread:
    """As :func:`ratios`, of one attribute of measurements."""
    return ratios([getattr(x, attribute) for x in ours], [getattr(x, attribute) for x in theirs])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with aligned columns: numbers to the right (floats get two digits), the rest to the left."""
    texts = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [head, *texts]) for i in range(len(head))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(cells, widths, right, strict=True)]
        return "  " + "  ".join(parts).rstrip()

    return [line(head), *map(line, texts)]


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for line in table(head, rows):
        click.echo(line)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "hardware_virtualisation": Path("/dev/kvm").exists(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def write_json(path: Path | None, results: object, on: dict[str, Any] | None = None) -> None:
    """Writes *results* with the command's name and line and the machine to *path*, if one was given.

    *on* is what :func:`machine` said, if this process has changed since, by its own affinity for example.
    """
    if path is not None:
        context = click.get_current_context(silent=True)
        document = {
            "benchmark": context.command.name if context is not None else None,
            "machine": on or machine(),
            "arguments": sys.argv[1:],
            "results": results,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
