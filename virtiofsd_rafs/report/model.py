"""What a trace says about a boot: traffic, waiting, and where the waiting came from. Pure.

A request's wait is divided, instant by instant, among four causes, in this order: a try for its own file had
failed and was being repeated (*retries*); bytes that some request waited for were on their way (*link*);
another file's failed try was being repeated (*retries*); only bytes that nobody waited for were on their way
(*background*); nothing was on its way (*here*: verifying, storing, waking, a busy host).
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.report.intervals import Intervals
from virtiofsd_rafs.report.trace import PULL, REASONS, Event, Fetch, Stall, Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LINK, RETRIES, BACKGROUND, HERE = "link", "retries", "background", "here"
CAUSES = (LINK, RETRIES, BACKGROUND, HERE)

# A start is over when nobody has waited for anything for so long.
QUIET_S = 15.0
# The rate of the link is the most that it carried in a stretch of this length.
_RATE_WINDOW_S = 0.5
_RATE_STEP_S = 0.05
_MAX_STEPS = 100_000
# A failed try is repeated soon: so many later fetches are looked at to find it.
_LOOK_AHEAD = 512


@attrs.frozen
class FileWaits:
    """What was waited for in one file."""

    path: str
    n_requests: int
    seconds: float
    """In which at least one request waited for it."""
    longest_s: float


@attrs.frozen
class Source:
    """Who answered: a registry, a mirror, a directory. An empty name: nobody did."""

    name: str
    tries: int
    failures: int
    bytes: int
    median_s: float
    """Of the tries that ended well."""


@attrs.frozen
class Report:
    """One boot, analysed. Fetches and stalls are those of the boot; later ones are counted in ``n_later``."""

    name: str
    image: str
    events: tuple[Event, ...]
    end_s: float
    """When the boot was over: its last event, fetch or wait."""
    fetches: tuple[Fetch, ...]
    stalls: tuple[Stall, ...]
    n_later: int
    truncated: bool
    image_bytes: int | None
    link_bytes: int | None
    bytes: int
    """Of the tries that ended well."""
    lost_bytes: int
    """That came and were wrong."""
    by_reason: tuple[tuple[str, int], ...]
    unread_bytes: int | None
    waiting_s: float
    """In which at least one request waited."""
    waits_s: float
    """Of all requests together."""
    causes: tuple[tuple[str, float], ...]
    """Parts of ``waits_s``."""
    best_rate: float
    """Bytes per second that the link carried at its best; 0 when it carried nothing."""
    waited_rate: float
    """Bytes per second while a request waited for the link."""
    round_trip_s: float
    """The part of the median fetch that its bytes do not explain."""
    files: tuple[FileWaits, ...]
    """Longest waits first."""
    sources: tuple[Source, ...]
    errors: tuple[tuple[str, int], ...]
    """Failed tries by msgid, most frequent first."""

    @property
    def n_failed(self) -> int:
        """Tries that did not end well."""
        return sum(n for _, n in self.errors)

    @property
    def pulled(self) -> bool:
        """Whether the image was downloaded before the boot: the classic way."""
        return any(fetch.reason == PULL for fetch in self.fetches)

    @property
    def traffic(self) -> int:
        """Bytes over the link, as completely as they are known."""
        return self.bytes + self.lost_bytes if self.link_bytes is None else self.link_bytes

    def at(self, event: str) -> float | None:
        """When *event* happened, in seconds."""
        return next((e.at_s for e in self.events if e.name == event), None)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for programs; docs/scripting.md describes them."""
        shown = {
            field: getattr(self, field)
            for field in ("name", "image", "image_bytes", "link_bytes", "bytes", "lost_bytes", "unread_bytes")
        }
        return shown | {
            "end_s": _round(self.end_s),
            "events": {event.name: _round(event.at_s) for event in self.events},
            "n_fetches": len(self.fetches),
            "n_failed": self.n_failed,
            "n_later": self.n_later,
            "truncated": self.truncated,
            "bytes_by_reason": dict(self.by_reason),
            "n_waits": len(self.stalls),
            "waiting_s": _round(self.waiting_s),
            "waits_s": _round(self.waits_s),
            "causes_s": {cause: _round(seconds) for cause, seconds in self.causes},
            "best_rate": round(self.best_rate),
            "waited_rate": round(self.waited_rate),
            "round_trip_s": _round(self.round_trip_s),
            "files": [_rounded(file) for file in self.files],
            "sources": [_rounded(source) for source in self.sources],
            "errors": dict(self.errors),
        }


def _round(value: float) -> float:
    return round(value, 6)


def _rounded(item: FileWaits | Source) -> dict[str, Any]:
    return {key: _round(v) if isinstance(v, float) else v for key, v in attrs.asdict(item).items()}


def analyse(trace: Trace, *, everything: bool = False, n_files: int = 25) -> Report:
    """The report of *trace*: of the boot in it, or (*everything*) of all that it has."""
    cut = float("inf") if everything or _recorded(trace) else _boot_end(trace)
    fetches = tuple(fetch for fetch in trace.fetches if fetch.start_s <= cut)
    stalls = tuple(stall for stall in trace.stalls if stall.start_s <= cut)
    good = [fetch for fetch in fetches if fetch.ok]
    ends = [fetch.end_s for fetch in fetches] + [stall.end_s for stall in stalls]
    ends += [event.at_s for event in trace.events]
    end = max(trace.events[-1].at_s if _recorded(trace) else max(ends, default=0.0), 1e-3)
    waiting = Intervals((stall.start_s, stall.end_s) for stall in stalls)
    # What came after the boot tells about the link, too.
    best = _best_rate([fetch for fetch in trace.fetches if fetch.ok])
    causes, on_link = _causes(fetches, stalls)
    while_waiting = sum(
        fetch.length * on_link.within(fetch.start_s, fetch.end_s) / (fetch.end_s - fetch.start_s)
        for fetch in good
        if fetch.end_s > fetch.start_s
    )
    counted = [fetch.unread for fetch in good if fetch.unread is not None]
    return Report(
        name=trace.name,
        image=trace.image,
        events=trace.events,
        end_s=end,
        fetches=fetches,
        stalls=stalls,
        n_later=len(trace.fetches) - len(fetches),
        truncated=trace.truncated,
        image_bytes=trace.image_bytes,
        link_bytes=trace.link_bytes,
        bytes=sum(fetch.length for fetch in good),
        lost_bytes=sum(fetch.arrived for fetch in fetches if not fetch.ok),
        by_reason=_by_reason(good),
        unread_bytes=sum(counted) if counted else None,
        waiting_s=waiting.total,
        waits_s=sum(stall.seconds for stall in stalls),
        causes=causes,
        best_rate=best,
        waited_rate=while_waiting / on_link.total if on_link.total else 0.0,
        round_trip_s=_round_trip(good, best),
        files=_files(stalls, n_files),
        sources=_sources(fetches),
        errors=tuple(Counter(fetch.result for fetch in fetches if not fetch.ok).most_common()),
    )


def _recorded(trace: Trace) -> bool:
    """Whether somebody saw the boot from outside and told when it was over."""
    return bool(trace.events) and trace.events[-1].name.startswith("HTTP")


def _boot_end(trace: Trace) -> float:
    """When the first stretch of activity that concerns the guest ends."""
    spans = [(fetch.start_s, fetch.end_s) for fetch in trace.fetches if fetch.wanted]
    spans += [(stall.start_s, stall.end_s) for stall in trace.stalls]
    spans += [(event.at_s, event.at_s) for event in trace.events if event.at_s >= 0]
    end = None
    for start, stop in sorted(spans):
        if end is not None and start - end > QUIET_S:
            break
        end = stop if end is None else max(end, stop)
    return float("inf") if end is None else end


def _by_reason(fetches: Iterable[Fetch]) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for fetch in fetches:
        total.update(dict(fetch.by_reason))
    order = {reason: i for i, reason in enumerate(REASONS)}
    return tuple(sorted(total.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _best_rate(fetches: Sequence[Fetch]) -> float:
    """Bytes per second in the best stretch of the link, a fetch's bytes being spread over its time."""
    if not fetches:
        return 0.0
    start, end = min(f.start_s for f in fetches), max(f.end_s for f in fetches)
    step = max(_RATE_STEP_S, (end - start) / _MAX_STEPS)
    # Changes of the rate, then its sum; the bytes in a window are the difference of two sums of that.
    changes = [0.0] * (int((end - start) / step) + 2)
    for fetch in fetches:
        first = int((fetch.start_s - start) / step)
        last = max(first + 1, int((fetch.end_s - start) / step))
        changes[first] += fetch.length / (last - first)
        changes[min(last, len(changes) - 1)] -= fetch.length / (last - first)
    sums, rate = [0.0], 0.0
    for change in changes:
        rate += change
        sums.append(sums[-1] + rate)
    width = min(len(changes), max(1, round(_RATE_WINDOW_S / step)))
    most = max(sums[i + width] - sums[i] for i in range(len(sums) - width))
    return most / (width * step)


def _round_trip(fetches: Sequence[Fetch], rate: float) -> float:
    waits = [max(0.0, f.end_s - f.start_s - (f.length / rate if rate else 0.0)) for f in fetches]
    return statistics.median(waits) if waits else 0.0


def _repeats(fetches: Sequence[Fetch]) -> list[tuple[Fetch, float]]:
    """Each failed try, with the time at which its bytes were asked for again (or at which it failed)."""
    starts = [fetch.start_s for fetch in fetches]
    found = []
    for fetch in fetches:
        if fetch.ok:
            continue
        i = bisect_left(starts, fetch.end_s)
        until = fetch.end_s
        for later in fetches[i : i + _LOOK_AHEAD]:
            same = later.blob == fetch.blob and later.offset < fetch.offset + fetch.length
            if same and fetch.offset < later.offset + later.length:
                until = later.start_s
                break
        found.append((fetch, until))
    return found


def _causes(
    fetches: Sequence[Fetch], stalls: Sequence[Stall]
) -> tuple[tuple[tuple[str, float], ...], Intervals]:
    """Seconds of waiting by cause; and when a request waited while wanted bytes were on their way."""
    link = Intervals((f.start_s, f.end_s) for f in fetches if f.ok and f.wanted)
    background = Intervals((f.start_s, f.end_s) for f in fetches if f.ok and not f.wanted)
    repeats = _repeats(fetches)
    failing = Intervals((fetch.start_s, until) for fetch, until in repeats)
    of_path: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for fetch, until in repeats:
        of_path[fetch.path].append((fetch.start_s, until))
    own = {path: Intervals(spans) for path, spans in of_path.items()}
    own_or_link = {path: spans | link for path, spans in own.items()}
    link_or_failing = link | failing
    anything = link_or_failing | background
    total = dict.fromkeys(CAUSES, 0.0)
    for stall in stalls:
        span = stall.start_s, stall.end_s
        on_link = link.within(*span)
        if stall.path in own:
            on_link = own_or_link[stall.path].within(*span) - own[stall.path].within(*span)
        known, fetching = link_or_failing.within(*span), anything.within(*span)
        total[LINK] += on_link
        total[RETRIES] += known - on_link
        total[BACKGROUND] += fetching - known
        total[HERE] += stall.seconds - fetching
    waiting = Intervals((stall.start_s, stall.end_s) for stall in stalls)
    return tuple((cause, max(0.0, total[cause])) for cause in CAUSES), waiting & link


def _files(stalls: Iterable[Stall], limit: int) -> tuple[FileWaits, ...]:
    of_path: dict[str, list[Stall]] = defaultdict(list)
    for stall in stalls:
        of_path[stall.path].append(stall)
    files = [
        FileWaits(
            path,
            len(waits),
            Intervals((stall.start_s, stall.end_s) for stall in waits).total,
            max(stall.seconds for stall in waits),
        )
        for path, waits in of_path.items()
    ]
    return tuple(sorted(files, key=lambda file: (-file.seconds, file.path))[:limit])


def _sources(fetches: Iterable[Fetch]) -> tuple[Source, ...]:
    of_name: dict[str, list[Fetch]] = defaultdict(list)
    for fetch in fetches:
        of_name[fetch.source].append(fetch)
    sources = []
    for name, tries in of_name.items():
        good = [fetch for fetch in tries if fetch.ok]
        median = statistics.median(f.end_s - f.start_s for f in good) if good else 0.0
        size = sum(fetch.length for fetch in good)
        sources.append(Source(name, len(tries), len(tries) - len(good), size, median))
    return tuple(sorted(sources, key=lambda source: (-source.tries, source.name)))
