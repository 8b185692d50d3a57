"""Small pieces of markup. Everything that is not written here is escaped here."""

from __future__ import annotations

import html
import json
import math
from typing import Any


def esc(text: object) -> str:
    """*text* for element content and quoted attributes."""
    return html.escape(str(text), quote=True)


def data_block(name: str, value: Any) -> str:
    """*value* as JSON that a script of the page reads. Nothing in it can end the block or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{esc(name)}">{text}</script>'


def pct(part: float, whole: float = 1.0) -> str:
    """A CSS percentage within 0 and 100."""
    share = 100 * part / whole if whole > 0 else 0.0
    return f"{min(100.0, max(0.0, share)):.6g}%"


def ticks(start: float, end: float, most: int = 6) -> list[float]:
    """Round numbers in the range, at most *most* of them and a bit."""
    span = end - start
    if span <= 0:
        return [start]
    step = 10 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(start / step - 1e-9)
    return [i * step for i in range(first, math.floor(end / step + 1e-9) + 1)]


def axis(start: float, end: float) -> str:
    """A time axis in seconds below a chart."""
    span = end - start
    marks = []
    for i, t in enumerate(found := ticks(start, end)):
        last = ' class="last"' if i == len(found) - 1 and (end - t) < 0.06 * span else ""
        # Only the very first may stand at the edge as it is.
        at = pct(t - start, span)
        marks.append(f'<span{last} style="left:{at}">{t:g} s</span>')
    lead = "" if found and found[0] - start < 0.02 * span else "<span></span>"
    return f'<div class="ax" aria-hidden="true">{lead}{"".join(marks)}</div>'


def grid(start: float, end: float) -> str:
    """Thin lines at the ticks of the axis."""
    lines = (f'<i style="left:{pct(t - start, end - start)}"></i>' for t in ticks(start, end))
    return f'<div class="grid">{"".join(lines)}</div>'
