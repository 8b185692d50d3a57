"""A page of latency distributions: a picture for each case, a curve for each side. Nothing but HTML and SVG.

Latency is on a logarithmic axis; the share of requests is drawn by its nines (0, 90 %, 99 %, ...), so that a
tail of one request in a thousand has as much room as the half that is fast.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.bench.kit.results import CaseResult
    from tests.bench.kit.runs import Steps

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 28
_NINES = 5
_COLOURS = 6
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#6b7280;--line:#d8dce2;--paper:#fff;
--c0:#1f6feb;--c1:#d4572a;--c2:#2c8a4b;--c3:#8250df;--c4:#b08800;--c5:#57606a}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#98a2b3;--line:#333a44;--paper:#14171c;
--c0:#6ea8fe;--c1:#ff8f66;--c2:#62c987;--c3:#bf9bff;--c4:#e3c04f;--c5:#aab2bd}}
body{margin:2rem auto;max-width:90rem;padding:0 1rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1rem;margin:0 0 .3rem}p{color:var(--soft);margin:.2rem 0}
main{display:grid;gap:2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));margin-top:2rem}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px}svg .grid{stroke:var(--line);stroke-width:1}
svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.3rem 0 0;padding:0}
li i{display:inline-block;width:1.4em;height:3px;margin-right:.5em;vertical-align:middle}
li span{color:var(--soft);font-variant-numeric:tabular-nums}
"""


def points(steps: Steps) -> list[tuple[float, float]]:
    """(latency, share of requests that took no longer), ascending."""
    total = sum(n for _, n in steps)
    seen, out = 0, []
    for value, n in steps:
        seen += n
        out.append((value, seen / total))
    return out


def nines(share: float) -> float:
    """0 for nothing, 1 for 90 %, 2 for 99 %, bounded."""
    return _NINES if share >= 1 else min(float(_NINES), -math.log10(1 - share))


def percentile(steps: Steps, share: float) -> float:
    """The latency that so many requests did not exceed.

    Raises:
        ValueError: there are no requests.
    """
    for value, reached in points(steps):
        if reached >= share:
            return value
    raise ValueError("no requests")


def duration(us: float) -> str:
    """``12 µs``, ``3.4 ms``, ``1.2 s``."""
    for limit, factor, unit in ((1e3, 1.0, "µs"), (1e6, 1e3, "ms"), (math.inf, 1e6, "s")):
        if us < limit:
            value = us / factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    raise ValueError(us)


class _Plot:
    """One picture: from latency and share to places."""

    def __init__(self, all_steps: Sequence[Steps]) -> None:
        values = [max(value, 0.1) for steps in all_steps for value, _ in steps]
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high = max(self.high, self.low + 1)

    def x(self, us: float) -> float:
        part = (math.log10(max(us, 0.1)) - self.low) / (self.high - self.low)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def y(self, share: float) -> float:
        return _HEIGHT - _BOTTOM - nines(share) / _NINES * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> Iterator[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for power in range(self.low, self.high + 1):
            x = self.x(10.0**power)
            yield f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>'
            anchor = "end" if power == self.high else "middle"
            yield f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{duration(10.0**power)}</text>'
        for text in ("0", "50", "90", "99", "99.9", "99.99"):
            y = self.y(float(text) / 100)
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text} %</text>'

    def curve(self, steps: Steps, colour: int) -> str:
        last = ""
        path = [f"M{self.x(steps[0][0]):.1f} {self.y(0):.1f}"]
        for value, share in points(steps):
            place = f"L{self.x(value):.1f} {self.y(share):.1f}"
            # Steps nearer than a tenth of a pixel are one.
            if place != last:
                path.append(place)
            last = place
        return f'<path class="curve" style="stroke:var(--c{colour})" d="{"".join(path)}"/>'


def figure(result: CaseResult) -> str:
    """A case: its picture and, for each side, some percentiles. Nothing if nobody was measured."""
    shown = [(i, name, steps) for i, (name, r) in enumerate(result.records.items()) if (steps := r.steps())]
    if not shown:
        return ""
    plot = _Plot([steps for _, _, steps in shown])
    curves = "".join(plot.curve(steps, i % _COLOURS) for i, _, steps in shown)
    legend = []
    for i, name, steps in shown:
        texts = [f"{label} {duration(percentile(steps, share))}" for label, share in _LABELS]
        legend.append(
            f'<li><i style="background:var(--c{i % _COLOURS})"></i>{escape(name)}'
            f" <span>{', '.join(texts)}</span></li>"
        )
    label = escape(f"{result.name}: share of requests by latency, a curve for each side")
    return (
        f"<figure><h2>{escape(result.name)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(plot.grid())}{curves}</svg>"
        f"<ul>{''.join(legend)}</ul></figure>"
    )


_LABELS = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))


def render(results: Sequence[CaseResult], machine: Mapping[str, Any]) -> str:
    """The page."""
    figures = "".join(map(figure, results))
    on = f"{machine['cpus']} CPUs, Linux {machine['kernel']}, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Latencies</title><style>{_STYLE}</style></head><body><h1>Latencies</h1>"
        "<p>Share of requests that took no longer, all rounds together. Farther left is better; where curves "
        "part only near the top, back-ends differ in their tails.</p>"
        f"<p>{escape(on)}</p><main>{figures}</main></body></html>\n"
    )
