"""The tables of a comparison: for a terminal while it runs, in Markdown for a document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.kit import bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.figures import Spread
    from tests.bench.kit.results import CaseResult, Record
    from tests.bench.kit.runs import Run

_HEAD = (
    f"  {'side':<14}{'ops/s':>10}{'GB/s':>6}{'cpu us':>10}"
    f"{'p50 us':>10}{'p99 us':>10}{'p99.9':>10}{'max us':>11}"
    f"{'calls':>7}{'sleeps':>7}{'kicks':>6}{'irqs':>6}{'PSS':>5}{'speed':>7}{'cpu':>6}"
)


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(kib: int | None) -> str:
    return "n/a" if kib is None else f"{kib / 1024:.0f}"


def _optional(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def lines(result: CaseResult) -> list[str]:
    """A case for a terminal. Speed and cpu compare the first side with the one of the row."""
    title = result.name + ("  (speed by p50)" if result.by == "p50" else "")
    out = ["", title, _HEAD]
    for name, record in result.records.items():
        if record.runs:
            out.append(_line(result, name, record))
            out += [f"  {'':<14}{text}" for text in remarks(result, name)]
        else:
            out.append(f"  {name:<14}{record.note}")
    return out


def _line(result: CaseResult, name: str, record: Record) -> str:
    m = record.median()
    pss = mebibytes(record.pss_kib)
    tail = ""
    speed, cpu = result.speed(name), result.cpu(name)
    if name != result.first and speed is not None:
        tail = f" {speed.median:>6.2f}" + (f" {cpu.median:>5.2f}" if cpu is not None else "")
    return (
        f"  {name:<14}{number(m.ops_per_s):>10}{m.bytes_per_s / 1e9:>6.2f}{number(m.cpu_us):>10}"
        f"{m.p50_us:>10.1f}{m.p99_us:>10.1f}{m.p999_us:>10.1f}{m.max_us:>11.0f}"
        f"{_optional(record.syscalls, 2):>7}{m.wakeups:>7.2f}{m.kicks:>6.2f}{m.interrupts:>6.2f}"
        f"{pss:>5}{tail}"
    )


def remarks(result: CaseResult, name: str) -> list[str]:
    """What a row of numbers has no column for."""
    record = result.records[name]
    m = record.median()
    found = []
    if m.failed:
        found.append(f"faults: {m.failed}")
    if record.note:
        found.append(record.note)
    if record.syscalls_by == "strace":
        found.append("calls counted by strace, which slows the back-end down")
    if m.remote_requests is not None:
        found.append(f"remote: {m.remote_requests:.0f} requests, {(m.remote_bytes or 0) / 1e6:.1f} MB")
    if result.what == "disk":
        found.append(f"disk: {m.disk_bytes / 1e6:.1f} MB read")
    if (ratio := result.disturbance(name)) is not None:
        found.append(f"p99 is {ratio:.2f} x that without")
    return found


def bar_lines(results: Sequence[CaseResult]) -> list[str]:
    """What is asked and what was measured, for a terminal."""
    rows = bars.verdicts(results)
    if not rows:
        return []
    out = ["", "bars (medians; speed above and cpu below 1 are in favour of the first side)"]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        *out,
        *("  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows),
    ]


# -- Markdown ----------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(row) + " |" for row in rows]


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else spread.text()


def ratio_table(results: Sequence[CaseResult]) -> list[str]:
    """The first side against each of the others: speed and processor time."""
    names = list(dict.fromkeys(name for result in results for name in result.records))
    first, others = names[0], names[1:]
    head = ["case", *(text for name in others for text in (f"speed, {name}", f"cpu, {name}"))]
    rows = []
    for result in results:
        row = [result.name + (" (p50)" if result.by == "p50" else "")]
        if not result.records[first].runs:
            continue
        for name in others:
            record = result.records.get(name)
            note = "" if record is None or record.runs else record.note
            row += [_spread(result.speed(name)) or note, _spread(result.cpu(name))]
        rows.append(row)
    return markdown(head, rows)


def number_table(results: Sequence[CaseResult]) -> list[str]:
    """Medians of every side in every case."""
    head = [
        *("case", "side", "ops/s", "GB/s", "CPU, µs", "p50", "p99", "p99.9", "max, µs"),
        *("system calls", "sleeps", "PSS, MiB", "remarks"),
    ]
    rows = []
    for result in results:
        for i, (name, record) in enumerate(result.records.items()):
            case = result.name if i == 0 else ""
            if record.runs:
                notes = "; ".join(remarks(result, name))
                rows.append([case, name, *_numbers(record.median(), record), notes])
            else:
                rows.append([case, name, *[""] * 10, record.note])
    return markdown(head, rows)


def _numbers(m: Run, record: Record) -> list[str]:
    return [
        *(
            number(m.ops_per_s),
            f"{m.bytes_per_s / 1e9:.2f}" if m.bytes_per_s >= 5e6 else "",
            number(m.cpu_us),
        ),
        *(number(value) for value in (m.p50_us, m.p99_us, m.p999_us, m.max_us)),
        *(_optional(record.syscalls, 2), f"{m.wakeups:.2f}"),
        mebibytes(record.pss_kib),
    ]


def bar_table(results: Sequence[CaseResult]) -> list[str]:
    """What is asked and what was measured."""
    return markdown(["case", "what", "bar", "measured", ""], bars.verdicts(results))
