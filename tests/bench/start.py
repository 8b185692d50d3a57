"""How long a start takes, beside a start of Python that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from guest.daemon import Daemon
from tests.bench.figures import percentile, print_table, ratios, write_json
from tests.bench.material import in_registry, prepare, reference
from tests.bench.options import json_option, rounds_option, work_option
from virtiofsd_rafs.native.frontend import Frontend

EVENTS = ("python -c pass", "socket bound", "FUSE_INIT answered")


def one_start(image: str, folder: Path) -> list[float]:
    """Milliseconds to each of EVENTS."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    times = [time.monotonic() - began]
    options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "warning"]
    with Daemon(image, folder, folder / "log", options) as daemon:
        # A socket appears when it listens, not before.
        times.append(daemon.wait_ready() - daemon.started)
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            fe.init()
            times.append(time.monotonic() - daemon.started)
    return [1000 * seconds for seconds in times]


def summary(rounds: list[list[float]]) -> list[list[object]]:
    """A row for each of EVENTS: median, p95 and best in ms, and the ratio to the first event of its round."""
    columns = list(zip(*rounds, strict=True))
    rows: list[list[object]] = []
    for name, times in zip(EVENTS, columns, strict=True):
        spread = ratios(times, columns[0])
        rows.append([name, statistics.median(times), percentile(times, 0.95), min(times), spread.text(1)])
    return rows


@click.command()
@rounds_option(30)
@work_option
@json_option
def start(rounds: int, work: Path, json_path: Path | None) -> None:
    """From exec to the bound socket and to FUSE_INIT answered, warm cache.

    The image is in a registry and known here, the cache is warm. Each round starts the interpreter alone,
    too. Times in milliseconds.
    """
    with in_registry(prepare(work)) as sim, tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        one_start(reference(sim), Path(tmp))  # fills the cache
        times = [one_start(reference(sim), Path(tmp)) for _ in range(rounds)]
    print_table(["event", "median", "p95", "best", "of python -c pass"], summary(times))
    write_json(json_path, [dict(zip(EVENTS, each, strict=True)) for each in times])
