"""What control counts, and the text that Prometheus reads. The only place where names of metrics stand.

Counters of the workers live in shared memory and come through ``Session.status``.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtiofsd_rafs.native.session import Trace

# Upper bounds of the fetch duration histogram, in seconds.
FETCH_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Fetches and stalls that the logs remember: more than a boot of any image makes, in a few megabytes.
LOG_LEN = 4096
STALL_LOG_LEN = 4096
# Stalls that are kept with their files.
SLOWEST_LEN = 64


Run = tuple[int, int, str]
"""First chunk, number of chunks, reason: neighbours in a fetch have mostly consecutive numbers."""


def runs_of(chunks: Iterable[tuple[int, str]]) -> tuple[Run, ...]:
    """*chunks* (number, reason) without the repetition."""
    runs: list[Run] = []
    for chunk, reason in chunks:
        if runs and runs[-1][0] + runs[-1][1] == chunk and runs[-1][2] == reason:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, reason)
        else:
            runs.append((chunk, 1, reason))
    return tuple(runs)


class FetchRecord(NamedTuple):
    """One finished try of a fetch. Times are CLOCK_MONOTONIC in ns, as those of the session."""

    started_ns: int
    ended_ns: int
    blob_index: int
    offset: int
    length: int
    n_chunks: int
    n_wanted: int
    """Chunks of it that a request waited for; the others were read ahead."""
    attempt: int
    nodeid: int
    """Node whose read asked first."""
    file_offset: int
    result: str
    """"ok", or the msgid of what went wrong."""
    reason: str = "demand"
    """Why it was started: demand, prefetch, fill."""
    runs: tuple[Run, ...] = ()
    """Its chunks with the reason of each: demand, read-ahead, prefetch, fill."""
    source: str = ""
    """Who answered: registry, local, a mirror's host:port. Empty when nobody did."""

    @property
    def chunks(self) -> tuple[tuple[int, str], ...]:
        """Number and reason of each chunk, by their place in the blob."""
        return tuple((first + i, reason) for first, n, reason in self.runs for i in range(n))


class Stalls:
    """Requests that had to wait for data: how many, how long, the latest and the longest ones."""

    def __init__(self) -> None:
        self.log: deque[Trace] = deque(maxlen=STALL_LOG_LEN)
        self.count = 0
        self.total_ns = 0
        self._heap: list[tuple[int, int, Trace]] = []

    def add(self, traces: Iterable[Trace]) -> None:
        """Takes answered requests in."""
        for trace in traces:
            stall_ns = max(0, trace.done_ns - trace.parked_ns)
            self.count += 1
            self.total_ns += stall_ns
            self.log.append(trace)
            # The number keeps equal stalls from being compared any further.
            entry = (stall_ns, self.count, trace)
            if len(self._heap) < SLOWEST_LEN:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def slowest(self) -> list[Trace]:
        """The longest stalls, longest first."""
        return [trace for _, _, trace in sorted(self._heap, reverse=True)]


class Metrics:
    """Counters of one control process; they start at 0 with it."""

    def __init__(self) -> None:
        self.fetches: Counter[str] = Counter()
        """Tries by result."""
        self.chunks: Counter[str] = Counter()
        """Fetched chunks by outcome."""
        self.verifications: Counter[str] = Counter()
        """Stored chunks that were verified, by outcome (good, bad)."""
        self.bytes_fetched = 0
        self.fetch_seconds = 0.0
        self.fetch_buckets = [0] * (len(FETCH_BUCKETS_S) + 1)
        self.log: deque[FetchRecord] = deque(maxlen=LOG_LEN)

    def fetched(self, record: FetchRecord, n_bytes: int) -> None:
        """A try of a fetch has ended and brought *n_bytes*."""
        self.log.append(record)
        self.fetches[record.result] += 1
        self.bytes_fetched += n_bytes
        seconds = (record.ended_ns - record.started_ns) / 1e9
        self.fetch_seconds += seconds
        for i, bound in enumerate(FETCH_BUCKETS_S):
            if seconds <= bound:
                self.fetch_buckets[i] += 1
                break
        else:
            self.fetch_buckets[-1] += 1

    def as_dict(self) -> dict[str, Any]:
        """The counters as JSON sees them."""
        return {
            "fetches": dict(self.fetches),
            "chunks": dict(self.chunks),
            "verifications": dict(self.verifications),
            "bytes_fetched": self.bytes_fetched,
            "fetch_seconds": round(self.fetch_seconds, 6),
        }


class Sample(NamedTuple):
    """One line for Prometheus."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


# name -> (type, help). Names are without the prefix.
_FAMILIES = {
    "fetches_total": ("counter", "Tries to fetch a range of a blob, by result."),
    "fetched_bytes_total": ("counter", "Bytes that fetches brought."),
    "fetch_duration_seconds": ("histogram", "Duration of one try of a fetch."),
    "chunks_total": ("counter", "Fetched chunks, by outcome."),
    "verifications_total": ("counter", "Stored chunks that were verified after a boot, by outcome."),
    "posts_total": ("counter", "Chunks that workers asked for."),
    "retries_total": ("counter", "Chunks that were asked for again after a failure."),
    "expired_total": ("counter", "Chunks given up because nobody waits any more."),
    "chunks_wanted_total": ("counter", "Chunks put into fetches because a request waited for them."),
    "chunks_read_ahead_total": ("counter", "Chunks put into fetches without being asked for."),
    "chunks_waiting": ("gauge", "Chunks that requests wait for now."),
    "fetches_in_flight": ("gauge", "Fetches under way."),
    "cache_chunks": ("gauge", "Chunks of the image by state."),
    "cache_disk_errors_total": ("counter", "How often the cache disk refused."),
    "spill_bytes": ("gauge", "Use of the memory that stands in for the cache disk."),
    "worker_crashes_total": ("counter", "Workers that were replaced."),
    "worker_requests_total": ("counter", "FUSE requests answered."),
    "requests_parked": ("gauge", "FUSE requests that wait for chunks."),
    "requests_in_flight": ("gauge", "FUSE requests that were taken and not answered."),
    "frontend_connected": ("gauge", "1 while a VMM is connected."),
}
_PREFIX = "virtiofsd_rafs_"


def _line(name: str, labels: tuple[tuple[str, str], ...], value: float) -> str:
    def quote(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inner = ",".join(f'{key}="{quote(text)}"' for key, text in labels)
    return f"{_PREFIX}{name}{{{inner}}} {value:.10g}" if inner else f"{_PREFIX}{name} {value:.10g}"


def render(metrics: Metrics, samples: list[Sample]) -> str:
    """Prometheus' text format 0.0.4 of *metrics* and of *samples*, whose names this module knows."""
    by_name: dict[str, list[str]] = {name: [] for name in _FAMILIES}
    counted = [
        *(Sample("fetches_total", n, (("result", result),)) for result, n in metrics.fetches.items()),
        *(Sample("chunks_total", n, (("outcome", outcome),)) for outcome, n in metrics.chunks.items()),
        *(Sample("verifications_total", n, (("outcome", o),)) for o, n in metrics.verifications.items()),
        Sample("fetched_bytes_total", metrics.bytes_fetched),
    ]
    for sample in counted + samples:
        by_name[sample.name].append(_line(sample.name, sample.labels, sample.value))
    total = 0
    histogram = by_name["fetch_duration_seconds"]
    bounds = [*(f"{bound:g}" for bound in FETCH_BUCKETS_S), "+Inf"]
    for bound, n in zip(bounds, metrics.fetch_buckets, strict=True):
        total += n
        histogram.append(_line("fetch_duration_seconds_bucket", (("le", bound),), total))
    histogram.append(_line("fetch_duration_seconds_sum", (), metrics.fetch_seconds))
    histogram.append(_line("fetch_duration_seconds_count", (), total))
    out = []
    for name, (kind, text) in _FAMILIES.items():
        if by_name[name]:
            out += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}", *by_name[name]]
    return "\n".join(out) + "\n"
