"""Workers killed at random under a load that checks every byte."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import Daemon
from tests.bench.figures import percentile, print_table, write_json
from tests.bench.material import in_registry, prepare, reference
from tests.bench.options import json_option, work_option
from virtiofsd_rafs.native.frontend import Frontend, Load, Op, Target
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from virtiofsd_rafs.native.frontend import LoadResult

# Fewer entries than requests come in a moment: all indices wrap all the time.
RING = 64
_GUARD_S = 30.0


@attrs.define
class Killer:
    """Kills the worker of a session at random moments, and notes how long each successor took."""

    session: Session
    pause_ms: float
    rng: random.Random = attrs.Factory(lambda: random.Random(1))
    gaps_ms: list[float] = attrs.Factory(list)

    def kill_one(self) -> None:
        """One kill, a random moment after the last worker had become ready.

        Raises:
            TimeoutError: no successor became ready.
        """
        time.sleep(self.rng.random() * self.pause_ms / 1000)
        before = self._worker()
        with suppress(ProcessLookupError):
            os.kill(before["pid"], 9)
        deadline = time.monotonic() + _GUARD_S
        while time.monotonic() < deadline:
            now = self._worker()
            if now["reaped_ns"] > before["reaped_ns"] and now["ready_ns"] > now["reaped_ns"]:
                self.gaps_ms.append((now["ready_ns"] - now["reaped_ns"]) / 1e6)
                return
            time.sleep(0.0005)
        raise TimeoutError(f"no worker became ready within {_GUARD_S:g} s after a kill")

    def _worker(self) -> dict[str, int]:
        worker: dict[str, int] = self.session.status()["processes"]["worker"]
        return worker


def targets(fe: Frontend, tree: Path) -> list[Target]:
    """All files of *tree* of at least a page, with their content to compare."""
    found = []
    for path in sorted(tree.rglob("*")):
        if path.is_file() and path.stat().st_size >= 4096:
            node = fe.resolve(str(path.relative_to(tree))).nodeid
            found.append(Target(node, size=path.stat().st_size, content=path))
    return found


def verdict(result: LoadResult, faults: dict[str, int]) -> dict[str, int]:
    """What may not happen, counted. *faults* are those of the whole connection."""
    late = ("late_write", "write_outside", "request_modified", "write_while_stopped")
    return {
        "errors": result.total.errors,
        "wrong bytes": result.total.wrong,
        "unanswered": result.lost,
        "answered twice or never asked": faults.get("not_in_flight", 0) + faults.get("used_id_range", 0),
        "written late or outside": sum(faults.get(kind, 0) for kind in late),
        "other faults": sum(
            n
            for kind, n in faults.items()
            if kind not in (*late, "not_in_flight", "used_id_range", "wrong_data")
        ),
    }


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--pause", default=20.0, show_default=True, help="Longest life of a ready worker, ms.")
@work_option
@json_option
def crash(kills: int, pause: float, work: Path, json_path: Path | None) -> None:
    """Workers killed at random moments: what the VM sees, how fast they are replaced.

    32 reads and getattrs are in flight in a ring of 64, starting with an empty cache over a registry; every
    reply is compared with the source, every buffer watched for stray writes.
    """
    material = prepare(work)
    with in_registry(material) as sim, tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        folder = Path(tmp)
        options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "error"]
        with Daemon(reference(sim), folder, folder / "log", options) as daemon:
            daemon.wait_ready()
            with Frontend.connect(daemon.socket, queue_size=RING) as fe:
                fe.start()
                fe.init()
                files = targets(fe, material.tree)
                ops = [Op("read", files, 4096, weight=3), Op("read", files, 131072), Op("getattr", files)]
                killer = Killer(Session.attach(daemon.process.pid), pause)
                failed: list[BaseException] = []

                def kill_all() -> None:
                    try:
                        for _ in range(kills):
                            killer.kill_one()
                    except BaseException as error:
                        failed.append(error)
                    finally:
                        fe.stop_loads()

                thread = threading.Thread(target=kill_all)
                thread.start()
                result = fe.load(Load(ops, depth=32, duration_s=86_400))
                thread.join()
                if failed:
                    raise failed[0]
                faults = fe.check()
                counted = verdict(result, faults)
    gaps = killer.gaps_ms
    click.echo(f"{len(gaps)} kills under {result.total.count:,} requests")
    print_table(["what may not happen", "count"], [[kind, n] for kind, n in counted.items()])
    click.echo("from reap to ready, ms")
    shares = (("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("longest", 1.0))
    print_table([name for name, _ in shares], [[percentile(gaps, share) for _, share in shares]])
    write_json(
        json_path,
        {
            "kills": len(gaps),
            "requests": result.total.count,
            "verdict": counted,
            "faults": faults,
            "reap_to_ready_ms": gaps,
        },
    )
    if any(counted.values()):
        raise click.ClickException("the VM noticed")
