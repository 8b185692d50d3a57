"""What control counts, and the text that Prometheus reads. The only place where names of metrics stand.

Counters of the workers live in shared memory and come through ``Session.status``.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtiofsd_rafs.native.session import Trace

# Upper bounds of the fetch duration histogram, in seconds.
FETCH_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Upper bounds of the histogram of waiting requests: from a warm page of the host to the usual deadline.
WAIT_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0)
# Fetches and stalls that the logs remember: more than a boot of any image makes, in a few megabytes.
LOG_LEN = 4096
STALL_LOG_LEN = 4096
# Stalls that are kept with their files.
SLOWEST_LEN = 64
# The label of a try that nobody answered.
NOBODY = "none"


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


class Histogram:
    """How many durations fell below each bound, as Prometheus counts them."""

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self.bounds_s = bounds_s
        self.buckets = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.buckets[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


class Stalls:
    """Requests that had to wait for data: how many, how long, the latest and the longest ones."""

    def __init__(self) -> None:
        self.log: deque[Trace] = deque(maxlen=STALL_LOG_LEN)
        self.count = 0
        self.total_ns = 0
        self.waits = Histogram(WAIT_BUCKETS_S)
        self._heap: list[tuple[int, int, Trace]] = []

    def add(self, traces: Iterable[Trace]) -> None:
        """Takes answered requests in."""
        for trace in traces:
            stall_ns = max(0, trace.done_ns - trace.parked_ns)
            self.count += 1
            self.total_ns += stall_ns
            self.waits.add(stall_ns / 1e9)
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
        self.by_source: Counter[tuple[str, str, str]] = Counter()
        """Tries by result, reason, and who answered."""
        self.bytes_by_source: Counter[tuple[str, str]] = Counter()
        """Bytes by reason, and who brought them."""
        self.durations = Histogram(FETCH_BUCKETS_S)
        self.log: deque[FetchRecord] = deque(maxlen=LOG_LEN)

    def fetched(self, record: FetchRecord, n_bytes: int) -> None:
        """A try of a fetch has ended and brought *n_bytes*."""
        self.log.append(record)
        self.fetches[record.result] += 1
        self.bytes_fetched += n_bytes
        source = record.source or NOBODY
        self.by_source[record.result, record.reason, source] += 1
        self.bytes_by_source[record.reason, source] += n_bytes
        self.durations.add((record.ended_ns - record.started_ns) / 1e9)

    def as_dict(self) -> dict[str, Any]:
        """The counters as JSON sees them."""
        return {
            "fetches": dict(self.fetches),
            "chunks": dict(self.chunks),
            "verifications": dict(self.verifications),
            "bytes_fetched": self.bytes_fetched,
            "fetch_seconds": round(self.durations.sum_s, 6),
        }


class Sample(NamedTuple):
    """One line for Prometheus."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


# name -> (type, help). Names are without the prefix.
FAMILIES = {
    "fetches_total": ("counter", "Tries to fetch a range of a blob, by result, reason and source."),
    "fetch_bytes_total": ("counter", "Bytes that fetches brought, by reason and source."),
    "fetch_duration_seconds": ("histogram", "Duration of one try of a fetch."),
    "request_wait_seconds": ("histogram", "How long a FUSE request waited for chunks, of those that had to."),
    "chunks_fetched_total": ("counter", "Fetched chunks, by outcome."),
    "chunks_verified_total": ("counter", "Stored chunks that were verified after a boot, by outcome."),
    "chunks_posted_total": ("counter", "Chunks that workers asked for."),
    "chunks_retried_total": ("counter", "Chunks that were asked for again after a failure."),
    "chunks_expired_total": ("counter", "Chunks given up because nobody waits any more."),
    "chunks_planned_total": ("counter", "Chunks put into fetches, by reason."),
    "chunks_joined_total": (
        "counter",
        "Chunks that were asked for while they came ahead, by reason.",
    ),
    "chunks_left_total": ("counter", "Chunks that another daemon was fetching, and brought in time."),
    "image_complete": ("gauge", "1 while all of the image is on the cache disk."),
    "chunks_waiting": ("gauge", "Chunks that requests wait for now."),
    "fetches_in_flight": ("gauge", "Fetches under way."),
    "outage_seconds": ("gauge", "Since when nothing comes, whatever is tried; 0 while the source delivers."),
    "cache_chunks": ("gauge", "Chunks of the image by state."),
    "cache_chunks_touched": ("gauge", "Chunks that reads were answered from."),
    "cache_disk_errors_total": ("counter", "How often the cache disk refused."),
    "cache_bytes": ("gauge", "What the blobs of all images use on the cache disk, as of the last sweep."),
    "cache_limit_bytes": ("gauge", "What they may use; 0: no limit."),
    "cache_sweeps_total": ("counter", "How often this daemon looked whether something must be evicted."),
    "cache_evicted_chunks_total": ("counter", "Chunks that this daemon evicted, of any image."),
    "cache_evicted_bytes_total": ("counter", "Bytes that the cache disk got back for them."),
    "cache_spill_bytes": ("gauge", "Use of the memory that stands in for the cache disk."),
    "http_requests_total": ("counter", "HTTP requests by whether they opened a connection or reused one."),
    "source_requests_total": ("counter", "Requests to each place that has the blobs."),
    "source_errors_total": ("counter", "Those that failed, and answers whose bytes were wrong."),
    "source_received_bytes_total": ("counter", "Bytes that each place sent."),
    "source_resting": ("gauge", "1 while a mirror is left alone because it failed."),
    "worker_crashes_total": ("counter", "Workers that were replaced."),
    "requests_total": ("counter", "FUSE requests answered, by operation."),
    "requests_parked": ("gauge", "FUSE requests that wait for chunks."),
    "requests_in_flight": ("gauge", "FUSE requests that were taken and not answered."),
    "frontend_connected": ("gauge", "1 while a VMM is connected."),
    "ready": ("gauge", "1 while a VM that connects is served."),
    "loop_lag_seconds": ("gauge", "How late the event loop of control was when this was asked for."),
    "build_info": ("gauge", "1, with the version of the package."),
}
_PREFIX = "virtiofsd_rafs_"


def _line(name: str, labels: tuple[tuple[str, str], ...], value: float) -> str:
    def quote(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inner = ",".join(f'{key}="{quote(text)}"' for key, text in labels)
    return f"{_PREFIX}{name}{{{inner}}} {value:.10g}" if inner else f"{_PREFIX}{name} {value:.10g}"


def _histogram(name: str, histogram: Histogram) -> list[str]:
    total = 0
    lines = []
    bounds = [*(f"{bound:g}" for bound in histogram.bounds_s), "+Inf"]
    for bound, n in zip(bounds, histogram.buckets, strict=True):
        total += n
        lines.append(_line(f"{name}_bucket", (("le", bound),), total))
    return [*lines, _line(f"{name}_sum", (), histogram.sum_s), _line(f"{name}_count", (), total)]


def render(metrics: Metrics, samples: list[Sample], stalls: Stalls | None = None) -> str:
    """Prometheus' text format 0.0.4 of *metrics*, *stalls* and *samples*, whose names this module knows."""
    by_name: dict[str, list[str]] = {name: [] for name in FAMILIES}
    counted = [
        *(
            Sample("fetches_total", n, (("result", result), ("reason", reason), ("source", source)))
            for (result, reason, source), n in metrics.by_source.items()
        ),
        *(
            Sample("fetch_bytes_total", n, (("reason", reason), ("source", source)))
            for (reason, source), n in metrics.bytes_by_source.items()
        ),
        *(
            Sample("chunks_fetched_total", n, (("outcome", outcome),))
            for outcome, n in metrics.chunks.items()
        ),
        *(Sample("chunks_verified_total", n, (("outcome", o),)) for o, n in metrics.verifications.items()),
    ]
    for sample in counted + samples:
        by_name[sample.name].append(_line(sample.name, sample.labels, sample.value))
    by_name["fetch_duration_seconds"] = _histogram("fetch_duration_seconds", metrics.durations)
    waits = stalls.waits if stalls is not None else Histogram(WAIT_BUCKETS_S)
    by_name["request_wait_seconds"] = _histogram("request_wait_seconds", waits)
    out = []
    for name, (kind, text) in FAMILIES.items():
        if by_name[name]:
            out += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}", *by_name[name]]
    return "\n".join(out) + "\n"
