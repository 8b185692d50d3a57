"""A report in words: was it lazy, and why was it slow. Each sentence stands for itself."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from virtiofsd_rafs.report.model import BACKGROUND, HERE, LINK, RETRIES, Report
from virtiofsd_rafs.report.trace import DEMAND, FILL
from virtiofsd_rafs.report.units import amount, count, duration, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

# Above this part of the image, hardly anything is left that was not fetched.
_HARDLY_LAZY = 0.6
# Causes below this part of the waiting are not worth a sentence.
_NOTABLE = 0.05
# A link that carried this part of what it can was full; below, round trips cost the time.
_FULL = 0.7
# Of what was fetched without being asked for: more unread than this is too much.
_TOO_MUCH_UNREAD = 0.3
# A guest's kernel that takes more than this part of the boot before its first request is worth a word.
_LONG_KERNEL = 0.25
_FEW_BYTES = 1 << 20


def verdict(report: Report) -> list[str]:
    """The sentences, the most important first."""
    sentences = [_lazy(report), _waiting(report), *_why(report), _guest(report), *_waste(report)]
    sentences += _gaps(report)
    return [sentence for sentence in sentences if sentence]


def headline(reports: Sequence[Report]) -> str:
    """One sentence over all boots."""
    report = reports[0]
    if not report.fetches:
        return f"Nothing was fetched in {duration(report.end_s)}."
    share = ""
    if report.image_bytes:
        share = f" with {percent(report.bytes, report.image_bytes)} of the image"
    text = f"Up in {duration(report.end_s)}{share}."
    pulled = next((other for other in reports if other.pulled and other is not report), None)
    if pulled is not None:
        text += f" Pulling first took {duration(pulled.end_s)}."
    return text


def _lazy(report: Report) -> str:
    whole = report.image_bytes
    if report.pulled:
        return (
            f"Not lazy: the whole image, {amount(report.bytes)}, was downloaded before the guest could start."
        )
    if not report.fetches:
        return "Nothing had to be fetched: all that was read lay in the cache."
    what = f"{amount(report.bytes)} in {count(len(report.fetches), 'request')}"
    if whole is None:
        return f"Fetched {what}; the size of the image is not known."
    of_it = f"{what} were fetched, {percent(report.bytes, whole)} of the image's {amount(whole)}"
    filled = dict(report.by_reason).get(FILL, 0)
    if report.bytes - filled > _HARDLY_LAZY * whole:
        return f"Hardly lazy: {of_it}."
    if filled > report.bytes / 2:
        return f"Lazy, then filled: {of_it}; {amount(filled)} came by the background fill."
    return f"Lazy: {of_it}."


def _waiting(report: Report) -> str:
    if not report.stalls:
        return "" if report.pulled else "No request had to wait for data."
    waits = count(len(report.stalls), "request")
    return (
        f"In {duration(report.waiting_s)} of {duration(report.end_s)}"
        f" ({percent(report.waiting_s, report.end_s)}) the guest waited for data: {waits}."
    )


def _guest(report: Report) -> str:
    """The time before the guest's kernel asked for anything: nobody's data can shorten that."""
    ready, first = report.at("VM connected"), report.at("FUSE_INIT")
    if ready is None or first is None or first - ready < _LONG_KERNEL * report.end_s:
        return ""
    return (
        f"{duration(first - ready)} ({percent(first - ready, report.end_s)}) went by before the guest's"
        " kernel asked for the first time."
    )


def _why(report: Report) -> list[str]:
    causes = dict(report.causes)
    if not report.waits_s:
        return []
    texts = {LINK: _link, RETRIES: _retries, BACKGROUND: _background, HERE: _here}
    found = []
    for cause, seconds in sorted(causes.items(), key=lambda item: -item[1]):
        if seconds >= _NOTABLE * report.waits_s:
            share = percent(seconds, report.waits_s)
            found.append(f"{share} of the waiting {texts[cause](report)}")
    if report.errors and causes[RETRIES] < _NOTABLE * report.waits_s:
        found.append(f"{_failed(report)}; that cost the guest next to nothing.")
    return found


def _link(report: Report) -> str:
    best, carried = report.best_rate, report.waited_rate
    wanted = [f for f in report.fetches if f.ok and f.wanted]
    if not best or not wanted:
        return "was the link."
    rates = f"{amount(carried)}/s of the {amount(best)}/s that it reached at its best"
    if carried >= _FULL * best:
        return f"was the link's rate: it carried {rates}. Fewer bytes or a nearer registry would help."
    size = amount(statistics.median(fetch.length for fetch in wanted))
    return (
        f"was the link's round trips: it carried {rates}, in {count(len(wanted), 'fetch', 'fetches')}"
        f" (median {size}), each of about {duration(report.round_trip_s)} beside its bytes. Asking earlier"
        " would help: a prefetch list."
    )


def _retries(report: Report) -> str:
    return f"was for tries that had failed: {_failed(report).lower()}."


def _failed(report: Report) -> str:
    kinds = ", ".join(f"{msgid} ({n})" for msgid, n in report.errors[:4])
    failing = [s.name for s in report.sources if s.failures and s.name]
    where = f", from {', '.join(failing[:3])}" if failing else ""
    return f"{count(report.n_failed, 'fetch', 'fetches')} failed and had to be repeated: {kinds}{where}"


def _background(report: Report) -> str:
    return "was behind bytes that nobody had asked for (prefetch, fill): the link was busy with them."


def _here(report: Report) -> str:
    return "was on this host: verifying, storing and waking, or a busy processor."


def _waste(report: Report) -> list[str]:
    unread = report.unread_bytes
    if unread is None or not report.bytes:
        return []
    asked = dict(report.by_reason).get(DEMAND, 0)
    text = f"{amount(unread)} ({percent(unread, report.bytes)}) of what was fetched has not been read"
    ahead = report.bytes - asked
    if report.pulled:
        return [f"{text}."]
    if unread > _TOO_MUCH_UNREAD * report.bytes and ahead > _FEW_BYTES:
        return [f"{text}: less read-ahead (--amplify) would save it."]
    return [f"{text}."]


def _gaps(report: Report) -> list[str]:
    found = []
    if report.truncated:
        found.append("The daemon's logs were full: earlier fetches and waits may be missing here.")
    if report.n_later:
        later = count(report.n_later, "later fetch", "later fetches")
        found.append(f"{later}, after the boot, left out: --all shows everything.")
    return found
