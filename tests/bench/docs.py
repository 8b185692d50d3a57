"""Puts what was measured into docs/benchmarks.md: tables between marks, from the JSON of benchmarks.

A part of the document that is made here begins with ``<!-- bench: NAME -->`` and ends with
``<!-- /bench -->``. All else is written by hand.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guest.kit import ROOT
from tests.bench import build, cold, races, start
from tests.bench.figures import Spread, ratios
from tests.bench.kit import tables
from tests.bench.kit.results import CaseResult, from_json
from tests.bench.kit.tables import markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DOCUMENT = ROOT / "docs" / "benchmarks.md"
Blocks = dict[str, list[str]]
"""Lines by the name of the part."""


def machine_line(machine: Mapping[str, Any]) -> str:
    """What was measured on, in a sentence."""
    kernel = ".".join(str(machine["kernel"]).split("-")[0].split(".")[:2])
    load = f"{machine['load_average'][0]:.1f}"
    size = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{machine['cpus']} CPUs, {size}, Linux {kernel}; load average {load} at the start."


def _operations(results: Any) -> Blocks:
    cases = from_json(results["cases"])
    settings = results["settings"]
    way = _WAYS[settings["wait"]]
    how = f"{settings['rounds']} rounds of {settings['duration_s']:g} s; the front-end {way}."
    return {
        "operations sides": _sides(results["sides"]),
        "operations bars": tables.bar_table(cases),
        "operations ratios": [how, "", *tables.ratio_table(cases)],
        "operations numbers": tables.number_table(cases),
        "operations stalled": _stalled(cases),
    }


_WAYS = {"sleep": "sleeps", "poll": "polls"}


def _sides(sides: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, seen in sides.items():
        # A side that failed on the way has not been looked at.
        idle = seen.get("idle", {"cpu_us": [], "wakeups": math.nan})
        parts = ", ".join(f"{process.removeprefix('rafs-')} {us:.0f}" for process, us in idle["cpu_us"])
        pss = tables.mebibytes(seen["pss_kib"])
        numbers = [str(seen["files"]), str(seen["processes"]), pss]
        rows.append([name, seen["version"], *numbers, f"{idle['wakeups']:.0f}", parts])
    head = ["side", "version", "files", "processes", "PSS after reading all, MiB", "idle: sleeps / s"]
    return markdown([*head, "CPU, µs / s, by process"], rows)


def _stalled(cases: Sequence[CaseResult]) -> list[str]:
    rows = []
    for case in cases:
        for name, record in case.records.items():
            if case.what == "stalled" and record.runs:
                idle = Spread.of([run.idle_p99_us or 0 for run in record.runs])
                held = Spread.of([run.p99_us for run in record.runs])
                longest = min(run.max_us for run in record.runs)
                ratio = ratios([r.p99_us for r in record.runs], [r.idle_p99_us or 1 for r in record.runs])
                rows.append([name, idle.text(0), held.text(0), ratio.text(), f"{longest / 1000:.1f}"])
    return markdown(["side", "p99 without, µs", "p99 beside, µs", "ratio", "longest, ms (best round)"], rows)


def _held(results: Any) -> Blocks:
    both = [each for each in results if each["op"] == "both"]
    rows = []
    for each in both:
        cells = [_latencies(each[when]) for when in ("idle", "held")]
        rows.append([each["side"], each["trouble"], str(each["round"]), *cells, f"{each['ratio']:.2f}"])
    shape = "p50, p99, p99.9, max (µs)"
    head = ["side", "beside", "round", f"idle {shape}", f"beside {shape}", "p99 ratio"]
    return {"held": markdown(head, rows), "held best": _held_best(both)}


def _held_best(both: Sequence[Mapping[str, Any]]) -> list[str]:
    """As ``best`` in ``held`` says: of all rounds, so that a disturbed one makes nothing look good."""
    rows = []
    for trouble, side in dict.fromkeys((each["trouble"], each["side"]) for each in both):
        found = [each for each in both if (each["trouble"], each["side"]) == (trouble, side)]
        held = min((each["held"] for each in found), key=lambda op: op["p99_us"])
        ratio = held["p99_us"] / min(each["idle"]["p99_us"] for each in found)
        pauses = [ms for each in found if (ms := each["beside"]["stop_ms"]) is not None]
        pause = f"{max(pauses):.1f}" if pauses else ""
        failed = str(sum(each["beside"]["failed"] for each in found))
        rows.append([trouble, side, f"{ratio:,.2f}", f"{held['max_us'] / 1000:,.1f}", pause, failed])
    head = ["beside", "side", "p99, best round", "longest, ms", "pause of the VM, ms, longest"]
    return markdown([*head, "failed reads"], rows)


def _races(results: Any) -> Blocks:
    rows = [_texts(row, 2) for row in races.rows([races.Start(**each) for each in results])]
    return {"races": markdown(races.HEAD, rows)}


def _latencies(op: Mapping[str, float]) -> str:
    return ", ".join(f"{op[key]:,.0f}" for key in ("p50_us", "p99_us", "p999_us", "max_us"))


def _start(results: Any) -> Blocks:
    rows = start.summary([[each[name] for name in start.EVENTS] for each in results])
    head = ["", "median ms", "p95 ms", "best ms", "of `python -c pass`"]
    return {"start": markdown(head, [_texts(row, 0) for row in rows])}


def _texts(row: Sequence[object], digits: int) -> list[str]:
    return [f"{cell:,.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row]


def _memory(results: Any, arguments: Sequence[str]) -> Blocks:
    rows = []
    for each in results:
        pss, shared = (sum(m[key] for m in each["kib"]) / 1024 for key in ("pss", "shared"))
        parts = ", ".join(f"{m['name'].removeprefix('rafs-')} {m['pss'] / 1024:.1f}" for m in each["kib"])
        numbers = [f"{value:.1f}" for value in (pss, shared, pss - shared, each["alone_kib"] / 1024)]
        rows.append([each["side"], each["cache"], *numbers, parts if len(each["kib"]) > 1 else ""])
    head = ["side", "cache", "PSS, MiB", "shared", "without", "alone", "PSS by process"]
    # The made tree, or one that was given.
    return {"memory dir" if "--dir" in arguments else "memory": markdown(head, rows)}


def _cold(results: Any) -> Blocks:
    boots = [cold.Result(**each) for each in results["boots"]]
    rows = []
    for key in dict.fromkeys((b.image, b.cache, b.side) for b in boots):
        found = [b for b in boots if (b.image, b.cache, b.side) == key]
        time_s = Spread.of([b.time_s for b in found]).text(1)
        requests = Spread.of([b.requests for b in found]).median
        size = Spread.of([b.bytes / 1e6 for b in found]).median
        rows.append([*key, time_s, f"{requests:.0f}", f"{size:.1f}"])
    against = [_texts(row, 2) for row in cold.compared(boots)]
    return {
        "cold": markdown(["image", "cache", "side", "HTTP 200 after, s", "requests", "MB"], rows),
        "cold ratios": markdown(["image", "cache", "time, rafs / nydusd", "requests", "bytes"], against),
    }


def _fullread(results: Any) -> Blocks:
    rows = []
    for side in dict.fromkeys(each["side"] for each in results):
        found = [each for each in results if each["side"] == side]
        speed = Spread.of([each["read"] / each["seconds"] / 1e6 for each in found])
        cpu = Spread.of([each["cpu_s"] for each in found])
        requests = Spread.of([each["requests"] for each in found])
        rows.append([side, speed.text(0), cpu.text(), f"{requests.median:.0f}"])
    return {"fullread": markdown(["side", "MB/s", "processor time, s", "requests"], rows)}


def _build(results: Any) -> Blocks:
    rows = build.compared([build.Cost(**each) for each in results])
    head = ["tree", "side", "wall, s", "CPU, s", "peak, MiB", "blob, MB", "bootstrap, MB", "wall, ratio"]
    return {"build": markdown(head, [_texts(row, 2) for row in rows])}


def _faults(results: Any) -> Blocks:
    rows = []
    for side in dict.fromkeys(each["side"] for each in results):
        found = [each for each in results if each["side"] == side]
        texts = [", ".join(str(each[key]) for each in found) for key in ("damaged", "wrong", "failed")]
        rows.append([side, *texts, str(sum(each["hung"] for each in found))])
    head = ["side", "damaged replies, round by round", "wrong files", "failed files", "hangs"]
    return {"faults": markdown(head, rows)}


RENDERERS: dict[str, Callable[[Any], Blocks]] = {
    "operations": _operations,
    "held": _held,
    "races": _races,
    "start": _start,
    "memory": _memory,
    "cold": _cold,
    "fullread": _fullread,
    "build": _build,
    "faults": _faults,
}


def render(document: Mapping[str, Any]) -> Blocks:
    """The parts that a benchmark's JSON makes, each with a line about the machine.

    Raises:
        UsageError: there are none for this benchmark.
    """
    name = document.get("benchmark")
    if name not in RENDERERS:
        raise click.UsageError(f"nothing in the document is made from the results of {name}")
    line = machine_line(document["machine"])
    if name == "memory":
        blocks = _memory(document["results"], document["arguments"])
    else:
        blocks = RENDERERS[name](document["results"])
    return {block: [line, "", *lines] for block, lines in blocks.items()}


def placed(text: str, blocks: Blocks) -> str:
    """*text* with the content of its parts replaced.

    Raises:
        UsageError: a part is not in the text, or more than once.
    """
    for name, lines in blocks.items():
        mark = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        content = "\n".join(lines) + "\n"
        text, n = mark.subn(lambda found, new=content: f"{found[1]}{new}{found[2]}", text)  # type: ignore[misc]
        if n != 1:
            raise click.UsageError(f"the document has {n} parts '<!-- bench: {name} -->', not one")
    return text


@click.command()
@click.argument(
    "results", metavar="JSON...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, exists=True),
    default=DOCUMENT,
    show_default="docs/benchmarks.md",
)
def docs(results: tuple[Path, ...], path: Path) -> None:
    """Puts tables made from the JSON of benchmarks into docs/benchmarks.md, between its marks."""
    text = path.read_text()
    for each in results:
        blocks = render(json.loads(each.read_text()))
        text = placed(text, blocks)
        click.echo(f"{each}: {', '.join(blocks)}")
    path.write_text(text)
