"""Reports as one page that needs nothing else: no network, no other file, and no script to be read.

What comes from outside (names of files, of images, of sources) goes through :func:`_markup.esc` or a JSON
block. A content security policy forbids everything but the page's own style and the one script whose hash it
names, so that a mistake there could not run anything either.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from virtiofsd_rafs import __version__
from virtiofsd_rafs.report import _charts
from virtiofsd_rafs.report._markup import esc, pct
from virtiofsd_rafs.report.units import amount, count, duration, percent
from virtiofsd_rafs.report.verdict import headline, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtiofsd_rafs.report.model import Report

_STYLE = files(__package__).joinpath("page.css").read_text("utf-8")
_SCRIPT = files(__package__).joinpath("page.js").read_text("utf-8")
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; img-src data:"


def page(reports: Sequence[Report], *, note: str = "") -> str:
    """The page of *reports*, the first of which is the one that it is about.

    *note* says how they came about.
    """
    first = reports[0]
    about = " \u00b7 ".join(filter(None, (first.image, note)))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>Boot report: {esc(first.image or first.name)}</title><style>{_STYLE}</style></head><body>",
        f'<header><p class="kicker">Boot report</p><h1>{esc(headline(reports))}</h1>',
        f'<p class="lede">{esc(" ".join(verdict(first)[1:3]))}</p>',
        f'<p class="meta">{esc(about)}</p></header><main>',
    ]
    if len(reports) > 1:
        parts.append(_together(reports))
    parts += [_boot(report, number) for number, report in enumerate(reports)]
    parts += [
        "</main>",
        f"<footer>virtiofsd-rafs {esc(__version__)}. Times are seconds since the start of the boot. The"
        " bytes of a fetch are drawn as if they had come evenly while it ran.</footer>",
        '<div id="tip" role="status" hidden></div>',
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _together(reports: Sequence[Report]) -> str:
    race = ""
    if any(report.bytes for report in reports):
        race = f"<h3>Bytes over time</h3>{_charts.race(reports)}"
    return (
        '<section aria-labelledby="together"><h2 id="together">Side by side</h2>'
        f"{_charts.sides(reports)}{race}</section>"
    )


def _boot(report: Report, number: int) -> str:
    sentences = "".join(f"<li>{esc(sentence)}</li>" for sentence in verdict(report))
    parts = [
        f'<section aria-labelledby="boot{number}"><h2 id="boot{number}">{esc(report.name)}</h2>',
        _tiles(report),
        f'<ul class="verdict">{sentences}</ul>',
        "<h3>Time line</h3>",
        _charts.overview(report),
    ]
    if report.fetches:
        title = "Layers, as they came" if report.pulled else "Fetches, as they came"
        parts += [f"<h3>{title}</h3>", _charts.waterfall(report, number)]
    if report.files:
        parts += ["<h3>Files that were waited for longest</h3>", _files(report)]
    if len(report.sources) > 1 or report.errors:
        parts += ["<h3>Who answered</h3>", _sources(report)]
    return "\n".join([*parts, "</section>"])


def _tiles(report: Report) -> str:
    whole = report.image_bytes
    share = f'<div class="share"><i style="width:{pct(report.bytes, whole)}"></i></div>' if whole else ""
    fetched = f"{percent(report.bytes, whole)} of {amount(whole)}" if whole else "of an image of unknown size"
    tiles = [
        ("Up after", duration(report.end_s), ""),
        ("Fetched", amount(report.bytes), fetched + share),
        ("Requests", f"{len(report.fetches)}", f"{report.n_failed} failed" if report.fetches else ""),
    ]
    if not report.pulled:
        waits = (
            f"{percent(report.waiting_s, report.end_s)} of the time, {count(len(report.stalls), 'request')}"
        )
        tiles.append(("Guest waited", duration(report.waiting_s), waits))
    if report.unread_bytes is not None:
        of_it = f"{percent(report.unread_bytes, report.bytes)} of the fetched"
        tiles.append(("Not read", amount(report.unread_bytes), of_it))
    inner = "".join(
        f'<div class="tile"><dt>{name}</dt><dd><b>{value}</b>{below}</dd></div>'
        for name, value, below in tiles
    )
    return f'<dl class="tiles">{inner}</dl>'


def _files(report: Report) -> str:
    longest = report.files[0].seconds
    rows = "".join(
        f'<tr><td class="path">{esc(file.path)}'
        f'<span class="wb" style="width:{pct(file.seconds, longest)}"></span></td>'
        f'<td class="n">{duration(file.seconds)}</td><td class="n">{file.n_requests}</td>'
        f'<td class="n">{duration(file.longest_s)}</td></tr>'
        for file in report.files
    )
    return (
        '<div class="scroll"><table><caption class="v">Files that were waited for longest</caption>'
        '<thead><tr><th scope="col">File</th><th scope="col" class="n">Waited</th>'
        '<th scope="col" class="n">Requests</th><th scope="col" class="n">Longest</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _sources(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="path">{esc(source.name or "nobody")}</td><td class="n">{source.tries}</td>'
        f'<td class="n">{source.failures}</td><td class="n">{amount(source.bytes)}</td>'
        f'<td class="n">{duration(source.median_s)}</td></tr>'
        for source in report.sources
    )
    errors = ", ".join(f"{esc(msgid)} ({n})" for msgid, n in report.errors)
    return (
        '<div class="scroll"><table><caption class="v">Who answered the fetches</caption><thead><tr>'
        '<th scope="col">Source</th><th scope="col" class="n">Tries</th><th scope="col" class="n">Failed</th>'
        '<th scope="col" class="n">Bytes</th><th scope="col" class="n">Median</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>" + (f'<p class="note">Failures: {errors}</p>' if errors else "")
    )
