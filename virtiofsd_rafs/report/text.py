"""Reports as lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.report.units import amount, count, duration, percent
from virtiofsd_rafs.report.verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtiofsd_rafs.report.model import Report

_FILES = 8
_BAR = 24


def lines(report: Report) -> list[str]:
    """One boot."""
    found = [f"{report.name}: {report.image}" if report.image else report.name]
    found += [f"  {sentence}" for sentence in verdict(report)]
    found += ["", "  time line (s)"]
    found += [f"  {event.at_s:9.3f}  {event.name}" for event in report.events]
    if report.fetches:
        found += ["", *_traffic(report)]
    if len(report.sources) > 1 or report.errors:
        found += ["", *_sources(report)]
    if report.files:
        found += ["", "  waited for most (s, requests, longest; file)"]
        found += [
            f"  {file.seconds:9.3f}  {file.n_requests:4d}  {file.longest_s:8.3f}  {file.path}"
            for file in report.files[:_FILES]
        ]
    return found


def _traffic(report: Report) -> Iterator[str]:
    whole = f" of {amount(report.image_bytes)}" if report.image_bytes else ""
    yield f"  fetched {amount(report.bytes)}{whole} in {count(len(report.fetches), 'request')}"
    if report.link_bytes is not None:
        yield f"  {amount(report.link_bytes)} over the link, with manifest and metadata"
    for reason, size in report.by_reason:
        share = percent(size, report.bytes)
        yield f"    {reason:<12} {amount(size):>9}  {share:>5}  {_bar(size, report.bytes)}".rstrip()
    if report.unread_bytes is not None:
        share = percent(report.unread_bytes, report.bytes)
        bar = _bar(report.unread_bytes, report.bytes)
        yield f"    {'(not read)':<12} {amount(report.unread_bytes):>9}  {share:>5}  {bar}".rstrip()


def _sources(report: Report) -> Iterator[str]:
    yield "  answered by (tries, failed, bytes, median)"
    for source in report.sources:
        yield (
            f"    {source.name or 'nobody':<24} {source.tries:5d} {source.failures:5d}"
            f" {amount(source.bytes):>9}  {duration(source.median_s)}"
        )
    for msgid, n in report.errors:
        yield f"    {n:5d} x {msgid}"


def _bar(part: float, whole: float) -> str:
    return "█" * round(_BAR * part / whole) if whole else ""


def side_by_side(reports: Sequence[Report]) -> list[str]:
    """The boots against each other, a line each."""
    width = max(len(report.name) for report in reports)
    slowest = max(report.end_s for report in reports)
    return [
        f"{report.name:<{width}}  {report.end_s:7.2f} s  {amount(report.traffic):>9}  "
        f"{_bar(report.end_s, slowest)}".rstrip()
        for report in reports
    ]
