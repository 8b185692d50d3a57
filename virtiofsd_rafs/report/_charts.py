"""The pictures of a report: phases, curves, marks of waiting, the waterfall. HTML and SVG as text.

Positions are percentages of the width, so that the pictures fit any screen and letters keep their size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

from virtiofsd_rafs.report._markup import axis, data_block, esc, grid, pct
from virtiofsd_rafs.report.intervals import Intervals
from virtiofsd_rafs.report.trace import PULL, REASONS
from virtiofsd_rafs.report.units import amount, count, duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtiofsd_rafs.report.model import Report
    from virtiofsd_rafs.report.trace import Fetch, Stall

# Points of a curve: more than any screen shows.
_SAMPLES = 240
# Marks nearer than this part of the width are drawn as one: a page stays small however many requests waited.
_MARK_GAP = 0.0004
# Event numbers nearer than this would cover each other on a phone.
_FLAG_GAP = 0.058
_MAX_FLAG_LANES = 6
# With more rows than this, a browser lays out only those that are seen.
_MANY_ROWS = 500
_PHASE_NAMES = {"download": "pull", "unpack": "unpack", "kernel": "kernel", "user": "user space"}


def reason_class(reason: str) -> str:
    """The part of class names that stands for *reason*."""
    return reason if reason in REASONS else "other"


# -- side by side -------------------------------------------------------------------------------------------


def phases(report: Report) -> list[tuple[str, float, float]]:
    """Class, start and end of each part of the boot that the events divide it into."""
    edges = [
        ("download", report.at("downloaded")),
        ("unpack", report.at("unpacked")),
        ("kernel", report.at("first exec") or report.at("first read of a program")),
        ("user", report.end_s),
    ]
    found, start = [], 0.0
    for name, end in edges:
        if end is not None and end > start:
            found.append((name, start, end))
            start = end
    return found


def sides(reports: Sequence[Report]) -> str:
    """A bar for each boot, all on one scale."""
    slowest = max(report.end_s for report in reports)
    items = []
    for report in reports:
        bars = []
        for name, start, end in phases(report):
            label = _PHASE_NAMES[name] if end - start > 0.08 * slowest else ""
            place = f"left:{pct(start, slowest)};width:{pct(end - start, slowest)}"
            title = f"{_PHASE_NAMES[name]}: {duration(end - start)}"
            bars.append(f'<i class="ph-{name}" style="{place}" title="{esc(title)}">{label}</i>')
        waiting = Intervals((stall.start_s, stall.end_s) for stall in report.stalls)
        spoken = ", ".join(
            f"{_PHASE_NAMES[name]} {duration(end - start)}" for name, start, end in phases(report)
        )
        note = f"{amount(report.traffic)} over the link"
        if report.stalls:
            note += f", waited {duration(report.waiting_s)}"
        items.append(
            f'<li><div class="side-head"><b>{esc(report.name)}</b><span>{esc(note)}'
            f' &#8195;<em class="num">{duration(report.end_s)}</em></span></div>'
            f'<div class="phases" role="img" aria-label="{esc(spoken)}">{"".join(bars)}</div>'
            f'<div class="waits">{_marks(waiting, 0.0, slowest)}</div></li>'
        )
    return f'<ul class="sides">{"".join(items)}</ul>'


def _marks(waiting: Intervals, start: float, end: float) -> str:
    joined: list[list[float]] = []
    for a, b in waiting.spans:
        if joined and a - joined[-1][1] < _MARK_GAP * (end - start):
            joined[-1][1] = b
        elif b > start and a < end:
            joined.append([max(a, start), b])
    places = (f"left:{pct(a - start, end - start)};width:{pct(b - a, end - start)}" for a, b in joined)
    return "".join(f'<i style="{place}"></i>' for place in places)


def race(reports: Sequence[Report]) -> str:
    """Bytes over time, a curve for each boot that fetched something."""
    shown = [report for report in reports if report.bytes]
    slowest = max(report.end_s for report in reports)
    most = max(report.bytes for report in shown)
    paths, dots, legend = [], [], []
    for i, report in enumerate(shown):
        good = [fetch for fetch in report.fetches if fetch.ok]
        times = [report.end_s * n / _SAMPLES for n in range(_SAMPLES + 1)]
        points = [(t, sum(row)) for t, row in zip(times, _arrived(good, times), strict=True)]
        path = "M" + "L".join(f"{1000 * t / slowest:.1f} {200 - 200 * y / most:.1f}" for t, y in points)
        paths.append(f'<path class="c{i % 4}" vector-effect="non-scaling-stroke" d="{path}"/>')
        place = f"left:{pct(report.end_s, slowest)};top:{200 - 200 * report.bytes / most:.1f}px"
        dots.append(f'<i class="dot c{i % 4}" style="{place}"></i>')
        legend.append(
            '<li><svg class="curves" viewBox="0 0 30 8" aria-hidden="true">'
            f'<path class="c{i % 4}" d="M0 4H30"/></svg>'
            f"{esc(report.name)}: {amount(report.bytes)}</li>"
        )
    return (
        f'<div class="chart"><ul class="legend">{"".join(legend)}</ul>'
        '<div class="plot" role="img" aria-label="Bytes fetched over time, a curve for each boot">'
        f"{grid(0, slowest)}"
        '<svg class="curves" viewBox="0 0 1000 200" height="200" preserveAspectRatio="none"'
        ' aria-hidden="true">'
        f"{''.join(paths)}</svg>{''.join(dots)}</div>{axis(0, slowest)}</div>"
    )


# -- one boot -----------------------------------------------------------------------------------------------


def legend(report: Report) -> str:
    """What the colours and patterns mean, of those that occur."""
    seen = [reason for reason, _ in report.by_reason]
    items = [f'<li><i class="r-{reason_class(reason)}"></i>{esc(reason)}</li>' for reason in seen]
    if report.stalls:
        items.append('<li><i class="mark"></i>a request waited</li>')
    if report.errors:
        items.append('<li><i class="b x" style="position:static"></i>failed</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def overview(report: Report) -> str:
    """The whole boot: numbered events, bytes by reason, and when requests waited."""
    end = report.end_s
    events = [event for event in report.events if 0 <= event.at_s <= end]
    flags, lanes = _flags([event.at_s / end for event in events])
    stems = "".join(f'<i style="left:{pct(event.at_s, end)}"></i>' for event in events)
    listed = "".join(
        f'<li><b>{i}</b>{esc(event.name)}<span class="n">{event.at_s:.2f} s</span></li>'
        for i, event in enumerate(events, 1)
    )
    parts = [f'<div class="flags" style="height:{22 * lanes}px" aria-hidden="true">{flags}</div>']
    if report.bytes:
        parts.append(_area(report))
    if report.stalls:
        parts.append(_waiting(report))
    return (
        f'<div class="chart">{legend(report) if report.fetches else ""}<div class="plot">'
        f'<div class="grid stems">{stems}</div>{"".join(parts)}</div>{axis(0, end)}'
        f'<ol class="events">{listed}</ol></div>'
    )


def _flags(places: Sequence[float]) -> tuple[str, int]:
    """Numbers at *places* (0 to 1), in as many lanes as keep them apart."""
    last: list[float] = []
    flags = []
    for number, place in enumerate(places, 1):
        free = (lane for lane, at in enumerate(last) if place - at >= _FLAG_GAP)
        lane = next(free, len(last))
        if lane == len(last) and lane < _MAX_FLAG_LANES:
            last.append(place)
        else:
            lane = min(lane, _MAX_FLAG_LANES - 1)
            last[lane] = place
        flags.append(f'<i style="left:{pct(place)};top:{22 * lane}px">{number}</i>')
    return "".join(flags), len(last)


def _arrived(fetches: Sequence[Fetch], times: Sequence[float]) -> list[list[float]]:
    """Bytes by reason (in the order of the report's) that had come at each of *times*, which are in order.

    The bytes of a fetch are taken to come evenly while it runs.
    """
    reasons = _reasons(fetches)
    rates = [[0.0] * len(reasons) for _ in range(len(times) + 1)]
    steps = [[0.0] * len(reasons) for _ in range(len(times) + 1)]
    for fetch in fetches:
        a, b = bisect_left(times, fetch.start_s), bisect_left(times, fetch.end_s)
        for reason, size in fetch.by_reason:
            i = reasons.index(reason)
            # A straight line between the samples around start and end.
            if b > a:
                rates[a][i] += size / (b - a)
                rates[b][i] -= size / (b - a)
            else:
                steps[b][i] += size
    rows, rate, total = [], [0.0] * len(reasons), [0.0] * len(reasons)
    for n in range(len(times)):
        total = [t + r + s for t, r, s in zip(total, rate, steps[n], strict=True)]
        rate = [r + change for r, change in zip(rate, rates[n], strict=True)]
        rows.append(total)
    return rows


def _reasons(fetches: Sequence[Fetch]) -> list[str]:
    seen = {reason for fetch in fetches for reason, _ in fetch.by_reason}
    return [*(reason for reason in REASONS if reason in seen), *sorted(seen - set(REASONS))]


def _area(report: Report) -> str:
    good = [fetch for fetch in report.fetches if fetch.ok]
    times = [report.end_s * n / _SAMPLES for n in range(_SAMPLES + 1)]
    rows = _arrived(good, times)
    most = sum(rows[-1]) or 1.0
    areas, below = [], [0.0] * len(times)
    for i, reason in enumerate(_reasons(good)):
        above = [b + row[i] for b, row in zip(below, rows, strict=True)]
        edge = [f"{1000 * n / _SAMPLES:.1f} {150 - 150 * y / most:.1f}" for n, y in enumerate(above)]
        back = [f"{1000 * n / _SAMPLES:.1f} {150 - 150 * y / most:.1f}" for n, y in enumerate(below)]
        areas.append(f'<path class="a-{reason_class(reason)}" d="M{"L".join(edge + back[::-1])}Z"/>')
        below = above
    return (
        '<p class="track-name">bytes fetched</p><div class="plot area" role="img"'
        f' aria-label="Bytes fetched over time, {amount(report.bytes)} in the end">'
        f'<span class="top num">{amount(report.bytes)}</span>'
        '<svg viewBox="0 0 1000 150" height="150" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(areas)}</svg></div>"
    )


def _waiting(report: Report) -> str:
    """Each request that waited as a line, in lanes, so that the height shows how many did at once."""
    lanes: list[float] = []
    segments = []
    for stall in report.stalls:
        lane = next((i for i, free in enumerate(lanes) if free <= stall.start_s), len(lanes))
        if lane == len(lanes):
            lanes.append(0.0)
        lanes[lane] = stall.end_s
        width = max(1.0, 1000 * stall.seconds / report.end_s)
        segments.append(f"M{1000 * stall.start_s / report.end_s:.1f} {lane + 0.5:g}h{width:.1f}")
    height = min(120, max(14, 7 * len(lanes)))
    return (
        f'<p class="track-name">requests that waited, {len(lanes)} at once at most</p>'
        f'<svg class="marks" viewBox="0 0 1000 {len(lanes)}" height="{height}" preserveAspectRatio="none"'
        f' role="img" aria-label="{esc(count(len(report.stalls), "request"))} waited">'
        f'<path stroke-width=".7" d="{"".join(segments)}"/></svg>'
    )


_FIELDS = (
    "why",
    "bytes",
    "when",
    "took",
    "chunks",
    "place",
    "try",
    "answered by",
    "result",
    "not read",
    "waited",
)


def waterfall(report: Report, number: int) -> str:
    """A row for each fetch."""
    start, end = _window(report)
    waits = _waits_of(report)
    texts: dict[str, int] = {}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    rows, data = [], []
    for fetch, stalls in zip(report.fetches, waits, strict=True):
        rows.append(_row(fetch, stalls, start, end))
        why = ", ".join(f"{reason} {amount(size)}" for reason, size in fetch.by_reason if size)
        data.append(
            [
                text(_label(fetch)),
                why or fetch.reason,
                amount(fetch.length),
                f"{fetch.start_s:.3f} to {fetch.end_s:.3f} s",
                duration(fetch.end_s - fetch.start_s),
                str(fetch.n_chunks or ""),
                f"blob {fetch.blob}, byte {fetch.offset}" if fetch.reason != PULL else "",
                str(fetch.attempt) if fetch.attempt > 1 else "",
                text(fetch.source),
                text(fetch.result),
                amount(fetch.unread) if fetch.unread else "",
                ", ".join(duration(stall.seconds) for stall in stalls[:6]),
            ]
        )
    block = data_block(f"data{number}", {"texts": list(texts), "fields": _FIELDS, "fetches": data})
    style = "rows many" if len(rows) > _MANY_ROWS else "rows"
    name = f"{count(len(rows), 'fetch', 'fetches')} of {report.name}, a row each; arrow keys show details"
    return (
        f'<div class="chart wf">{legend(report)}'
        f'<div class="wf-ax"><span></span>{axis(start, end)}<span></span></div>'
        f'<div class="wf-scroll" tabindex="0" role="region" aria-label="{esc(name)}">'
        f'<ol class="{style}" data-of="data{number}">{"".join(rows)}</ol></div></div>{block}'
    )


def _window(report: Report) -> tuple[float, float]:
    """The stretch that has fetches, with a little room."""
    start = min(fetch.start_s for fetch in report.fetches)
    end = max(fetch.end_s for fetch in report.fetches)
    room = max(1e-3, 0.01 * (end - start))
    return max(0.0, start - room), end + room


def _waits_of(report: Report) -> list[list[Stall]]:
    """For each fetch the requests that waited for it, as far as its file and time tell."""
    of_path: dict[str, list[int]] = defaultdict(list)
    for i, fetch in enumerate(report.fetches):
        of_path[fetch.path].append(i)
    found: list[list[Stall]] = [[] for _ in report.fetches]
    for stall in report.stalls:
        numbers = of_path.get(stall.path, [])
        ends = [report.fetches[i].end_s for i in numbers[:64]]
        best = min(
            (i for i in range(len(ends)) if ends[i] >= stall.start_s),
            key=lambda i: abs(ends[i] - stall.end_s),
            default=None,
        )
        if best is not None and report.fetches[numbers[best]].start_s < stall.end_s:
            found[numbers[best]].append(stall)
    return found


def _label(fetch: Fetch) -> str:
    if fetch.path:
        return fetch.path
    return f"{fetch.reason}: {amount(fetch.offset)} into blob {fetch.blob}"


def _row(fetch: Fetch, stalls: Sequence[Stall], start: float, end: float) -> str:
    span = end - start
    label = _label(fetch)
    folder, slash, name = label.rpartition("/") if fetch.path else ("", "", label)
    left, width = pct(fetch.start_s - start, span), pct(fetch.end_s - fetch.start_s, span)
    places = (
        f"left:{pct(max(s.start_s, start) - start, span)};width:{pct(s.seconds, span)}" for s in stalls[:16]
    )
    marks = "".join(f'<i class="w" style="{place}"></i>' for place in places)
    path = f'<span class="d">{esc(folder + slash)}</span><span class="f">{esc(name)}</span>'
    track = f"{_bar(fetch, left, width)}{marks}{_flag(fetch, start, span)}"
    spoken = f'<span class="v">, {esc(fetch.reason)}, {esc(fetch.result)}</span>'
    return (
        f'<li><span class="p">{path}</span><span class="t" aria-hidden="true">{track}</span>'
        f'<span class="n">{amount(fetch.length)}{spoken}</span></li>'
    )


def _bar(fetch: Fetch, left: str, width: str) -> str:
    place = f"left:{left};width:{width}"
    if not fetch.ok:
        return f'<i class="b x" style="{place}"></i>'
    shares = [(reason, size) for reason, size in fetch.by_reason if size]
    if len(shares) < 2:
        reason = shares[0][0] if shares else fetch.reason
        return f'<i class="b r-{reason_class(reason)}" style="{place}"></i>'
    total = sum(size for _, size in shares)
    inner = "".join(
        f'<u class="r-{reason_class(r)}" style="width:{pct(size, total)}"></u>' for r, size in shares
    )
    return f'<i class="b" style="{place}">{inner}</i>'


def _flag(fetch: Fetch, start: float, span: float) -> str:
    """Words beside the bar: a failure, or which try it was."""
    words = list(_words(fetch))
    if not words:
        return ""
    behind = (fetch.end_s - start) / span
    at, side = (behind, "") if behind < 0.75 else ((fetch.start_s - start) / span, "l")
    style = f"{side} ok" if fetch.ok else side
    return f'<em class="{style}" style="left:{pct(at)}">{esc(", ".join(words))}</em>'


def _words(fetch: Fetch) -> Iterator[str]:
    if not fetch.ok:
        yield f"\u00d7 {fetch.result.rpartition('.')[2]}"
    if fetch.attempt > 1:
        yield f"try {fetch.attempt}"
