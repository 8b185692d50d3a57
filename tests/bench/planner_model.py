"""A model of link and guest around the real planner: what a policy costs, in seconds of model time.

Nothing is measured here: requests share a link of a given rate, each takes a round trip more, and a reader
asks for chunks one after the other, or thinks in between as long as it did in a recorded boot. The same input
gives the same numbers on any machine.
"""

from __future__ import annotations

import heapq
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import click

from guest.kit import VAR
from tests.bench.figures import print_table
from tests.bench.material import Material, prepare
from tests.bench.options import work_option
from virtiofsd_rafs.config import DEFAULT_AMPLIFY, DEFAULT_CONNECTIONS
from virtiofsd_rafs.native.rafs import FileRun, NativeTree
from virtiofsd_rafs.runtime.backlog import Run, Runs
from virtiofsd_rafs.runtime.planner import Planner
from virtiofsd_rafs.runtime.wants import NOBODY, Fetch, Posted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


# What decoding and verifying take, in bytes of the blob per second.
_DECODE = 250e6


class Access(NamedTuple):
    """A read of the guest: seconds that it thinks before, and the chunks of blob 0 that it needs."""

    think_s: float
    chunks: tuple[int, ...]


@attrs.define
class Blob:
    """The chunks of a blob, as the planner sees them."""

    offsets: list[int]
    lengths: list[int]
    sizes: list[int]
    have: set[int] = attrs.field(factory=set)

    @classmethod
    def of(cls, bootstrap: bytes) -> Blob:
        """Blob 0 of an image."""
        infos = NativeTree(bootstrap).chunk_map(0)
        n = max(infos) + 1
        blob = cls([0] * n, [0] * n, [0] * n)
        for number, info in infos.items():
            blob.offsets[number] = info.compressed_offset
            blob.lengths[number] = info.compressed_size
            blob.sizes[number] = info.uncompressed_size
        return blob

    def size(self, chunk: int) -> int:
        return self.sizes[chunk]

    def promised(self, chunk: int) -> bool:
        return 0 <= chunk < len(self.sizes) and self.sizes[chunk] > 0

    def ready(self, chunk: int) -> bool:
        return chunk in self.have

    def unverified(self, _: int) -> bool:
        return False

    def hinted(self, _: int) -> bool:
        return False


@attrs.define(eq=False)
class _Transfer:
    fetch: Fetch
    left: float


@attrs.frozen
class Cost:
    """What a trace took."""

    seconds: float
    waited: float
    requests: int
    bytes: int
    wasted: int
    """Bytes of chunks that nobody read."""

    def row(self) -> list[object]:
        """For a table: seconds, seconds waited, requests, MB, wasted MB."""
        return [self.seconds, self.waited, self.requests, self.bytes / 1e6, self.wasted / 1e6]


class Model:
    """Runs a trace. *rate* in bytes per second, *trip* in seconds."""

    def __init__(self, blob: Blob, rate: float, trip: float, **options: Any) -> None:
        self.blob = attrs.evolve(blob, have=set())
        self.rate, self.trip = rate, trip
        self.now = 0.0
        self.touched = bytearray(len(blob.sizes))
        self.requests = self.bytes = 0
        settings: dict[str, Any] = {"amplify": DEFAULT_AMPLIFY, "connections": DEFAULT_CONNECTIONS}
        self.planner = Planner(
            {0: self.blob},
            io_deadline_s=1e9,
            retry_first_s=1.0,
            retry_cap_s=1.0,
            touched={0: self.touched},
            **(settings | options),
        )
        self._opening: list[tuple[float, int, Fetch]] = []
        self._open: list[_Transfer] = []
        self._decoding: list[tuple[float, int, Fetch]] = []

    def _pump(self) -> None:
        for fetch in self.planner.next_fetches(self.now):
            self.requests += 1
            self.bytes += fetch.length
            heapq.heappush(self._opening, (self.now + self.trip, fetch.fetch_id, fetch))

    def _next(self) -> float | None:
        """When something happens."""
        times = [heap[0][0] for heap in (self._opening, self._decoding) if heap]
        if self._open:
            least = min(transfer.left for transfer in self._open)
            times.append(self.now + least * len(self._open) / self.rate)
        event = self.planner.next_event()
        if event is not None:
            times.append(max(event, self.now + 1e-6))
        return min(times, default=None)

    def _advance(self, until: float) -> None:
        """Lets time pass up to the next thing that happens, no farther than *until*."""
        event = self._next()
        to = until if event is None else min(event, until)
        if self._open:
            share = (to - self.now) * self.rate / len(self._open)
            for transfer in self._open:
                transfer.left -= share
        self.now = to
        for transfer in [t for t in self._open if t.left <= 1e-3]:
            self._open.remove(transfer)
            done = self.now + transfer.fetch.length / _DECODE
            heapq.heappush(self._decoding, (done, transfer.fetch.fetch_id, transfer.fetch))
        while self._opening and self._opening[0][0] <= self.now:
            fetch = heapq.heappop(self._opening)[2]
            self._open.append(_Transfer(fetch, fetch.length))
        while self._decoding and self._decoding[0][0] <= self.now:
            fetch = heapq.heappop(self._decoding)[2]
            self.blob.have.update(fetch.chunks)
            self.planner.stored(fetch.fetch_id, [], self.now)
        self._pump()

    def run(self, trace: Iterable[Access], listed: Sequence[Run] = ()) -> Cost:
        """Reads everything in *trace*; *listed* is prefetched."""
        self.planner.background.prefetch(Runs(listed))
        self._pump()
        waited = 0.0
        for think_s, chunks in trace:
            until = self.now + think_s
            while self.now < until:
                self._advance(until)
            began = self.now
            for chunk in chunks:
                if not self.blob.ready(chunk):
                    assert self.planner.post((0, chunk), self.now, NOBODY) is not Posted.INVALID
            self._pump()
            while not all(self.blob.ready(chunk) for chunk in chunks):
                self._advance(float("inf"))
            for chunk in chunks:
                self.touched[chunk] = 1
            waited += self.now - began
        wasted = sum(self.blob.lengths[chunk] for chunk in self.blob.have if not self.touched[chunk])
        return Cost(self.now, waited, self.requests, self.bytes, wasted)


# -- traces ----------------------------------------------------------------------------------------------


def files_of(bootstrap: bytes) -> list[list[int]]:
    """The chunks of each file."""
    tree = NativeTree(bootstrap)
    files: dict[int, list[FileRun]] = {}
    for run in tree.runs(tree.root):
        files.setdefault(run.nid, []).append(run)
    return [[run.first + i for run in runs for i in range(run.n_chunks)] for runs in files.values()]


def whole_files(files: list[list[int]], share: float, *, shuffled: bool, seed: int = 1) -> Iterator[Access]:
    """A share of all files, each from begin to end, chunk by chunk."""
    rng = random.Random(seed)
    chosen = rng.sample(range(len(files)), round(share * len(files)))
    for number in chosen if shuffled else sorted(chosen):
        for chunk in files[number]:
            yield Access(0.0, (chunk,))


def single_chunks(blob: Blob, n: int, seed: int = 1) -> Iterator[Access]:
    """Chunks here and there, as random reads of large files want them."""
    rng = random.Random(seed)
    known = [chunk for chunk in range(len(blob.sizes)) if blob.promised(chunk)]
    for chunk in rng.sample(known, min(n, len(known))):
        yield Access(0.0, (chunk,))


def recorded(trace: dict[str, Any]) -> list[Access]:
    """What a daemon with ``--amplify 0`` was asked for (``GET /api/v1/trace``), and how long the guest
    thought.

    Fetches that began while another one was waited for count as one read.
    """
    fetches = sorted(trace["fetches"], key=lambda fetch: fetch["started_ns"])
    out: list[Access] = []
    free_at = trace["first_init_ns"]
    until = 0
    for fetch in fetches:
        chunks = tuple(chunk for chunk, _ in fetch["chunks"])
        if out and fetch["started_ns"] < until:
            out[-1] = Access(out[-1].think_s, out[-1].chunks + chunks)
        else:
            out.append(Access(max(0, fetch["started_ns"] - free_at) / 1e9, chunks))
        until = max(until, fetch["ended_ns"])
        free_at = max(free_at, until)
    return out


_HEAD = ("s", "waited s", "requests", "MB", "wasted MB")
LINKS = {
    "30 Mbit/s, 20 ms": (30e6 / 8, 0.025),
    "100 Mbit/s, 100 ms": (100e6 / 8, 0.11),
    "1 Gbit/s, 1 ms": (125e6, 0.003),
}


def patterns(material: Material, trace: Path | None) -> dict[str, tuple[Blob, list[Access]]]:
    """All traces of one image by name."""
    bootstrap = material.bootstrap.read_bytes()
    blob, files = Blob.of(bootstrap), files_of(bootstrap)
    out = {
        "all files in order": (blob, list(whole_files(files, 1.0, shuffled=False))),
        "all files at random": (blob, list(whole_files(files, 1.0, shuffled=True))),
        "a seventh at random": (blob, list(whole_files(files, 0.15, shuffled=True))),
        "2 % at random": (blob, list(whole_files(files, 0.02, shuffled=True))),
        "300 single chunks": (blob, list(single_chunks(blob, 300))),
    }
    if trace is not None:
        out["recorded boot"] = (blob, recorded(json.loads(trace.read_text())))
    return out


@click.command()
@click.option(
    "--dir",
    "tree",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    default=VAR / "quickstart" / "root",
    show_default="var/quickstart/root",
    help="The root whose image is read; scripts/quickstart leaves one there.",
)
@click.option(
    "--trace", type=click.Path(path_type=Path), help="GET /api/v1/trace after a boot with --amplify 0."
)
@click.option("--amplify", default=DEFAULT_AMPLIFY, show_default=True)
@click.option("--first-window", type=int, help="Read-ahead of a new reader.")
@work_option
def model(tree: Path, trace: Path | None, amplify: int, first_window: int | None, work: Path) -> None:
    """What the planner would do on links that are only modelled, by pattern of reads. Deterministic."""
    found = patterns(prepare(work, tree), trace)
    rows: list[list[object]] = []
    for link, (rate, trip) in LINKS.items():
        for name, (blob, accesses) in found.items():
            cost = Model(blob, rate, trip, amplify=amplify, first_window=first_window).run(accesses)
            rows.append([link, name, *cost.row()])
    print_table(["link", "reads", *_HEAD], rows)
    if trace is not None:
        head = ["link", "boot with its own list, s", *_HEAD[1:]]
        print_table(head, with_lists(found))


def with_lists(found: dict[str, tuple[Blob, list[Access]]]) -> list[list[object]]:
    """The recorded boot when its chunks are prefetched in their order."""
    blob, accesses = found["recorded boot"]
    listed = [Run(0, chunk, 1) for access in accesses for chunk in access.chunks]
    rows: list[list[object]] = []
    for link, (rate, trip) in LINKS.items():
        cost = Model(blob, rate, trip).run(accesses, listed)
        rows.append([link, *cost.row()])
    return rows
