"""A node with many guests: as many daemons over one cache directory, each VM reads the whole image at once.

Beside the daemons there are the registry (in the command's own process), all VMs, and who asks the APIs.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from guest.daemon import Daemon
from tests.bench import asking, processes
from tests.bench.figures import print_table, write_json
from tests.bench.material import Material, made_tree, prepare
from tests.bench.options import json_option, work_option
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.native.frontend import Frontend, Load, Op, Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.connection import Connection

_MiB = 1 << 20
_BLOCK = 128 * 1024
_DEPTH = 8
_REPOSITORY = "bench/image-{:02}"
_GUARD_S = 900.0


@attrs.frozen
class Traffic:
    """What one daemon got of the blob from the registry, in bytes."""

    n_requests: int
    sent: int
    different: int
    """Counting each byte once."""

    @property
    def twice(self) -> int:
        """Bytes that came more than once."""
        return self.sent - self.different


def traffic(spans: Iterable[tuple[int, int]]) -> Traffic:
    """Adds up ranges (first, last byte)."""
    ordered = sorted(spans)
    sent = different = 0
    end = -1
    for first, last in ordered:
        sent += last - first + 1
        different += max(0, last - max(first, end + 1) + 1)
        end = max(end, last)
    return Traffic(len(ordered), sent, different)


def traffic_of(sim: RegistrySimulator, digest: str, n: int) -> list[Traffic]:
    """What each of *n* daemons got of the blob *digest*: each has a repository of its own."""
    spans: dict[int, list[tuple[int, int]]] = {i: [] for i in range(n)}
    for record in sim.requests("blob", "GET"):
        match = re.search(r"/image-(\d+)/", record.path)
        if match and record.digest == digest and record.span is not None:
            spans[int(match[1])].append(record.span)
    return [traffic(each) for each in spans.values()]


def targets(fe: Frontend, tree: Path, content: Path) -> tuple[list[Target], int]:
    """All files, and how many blocks they have. Their bytes go into *content*: one mapping for them all."""
    found, n_blocks = [], 0
    with content.open("wb") as out:
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            data = path.read_bytes()
            node = fe.resolve(str(path.relative_to(tree))).nodeid
            if data:
                found.append(Target(node, len(data), content=content, content_offset=out.tell()))
                out.write(data)
                n_blocks += -(-len(data) // _BLOCK)
    return found, n_blocks


def play_vms(sockets: Sequence[Path], tree: Path, pipe: Connection) -> None:
    """The process of the VMs: says "ready", waits for a word, reads; sends seconds and faults of each VM."""
    results: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        vms = [stack.enter_context(Frontend.connect(s, memory=32 * _MiB, timeout_s=120)) for s in sockets]
        for fe in vms:
            fe.start()
            fe.init()
        everything, n_blocks = targets(vms[0], tree, folder / "content")
        op = Op("read", everything, _BLOCK, random=False)
        load = Load([op], depth=_DEPTH, count=n_blocks, canaries=False, stall_s=120)

        def read(i: int, fe: Frontend) -> None:
            result = fe.load(load)
            results[i] = {"seconds": result.elapsed_s, "clean": result.clean, "bytes": result.total.bytes}

        threads = [threading.Thread(target=read, args=each) for each in enumerate(vms)]
        pipe.send("ready")
        pipe.recv()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send([results.get(i) for i in range(len(vms))])
        pipe.recv()  # as long as the VMs are there, so are the daemons


def begin(daemons: Sequence[Daemon]) -> None:
    """Waits until each has its image and its API (which costs an import with the first question)."""
    for daemon in daemons:
        daemon.wait_ready()
        while not daemon.status()["image"]:
            time.sleep(0.05)


@click.command()
@click.option("--daemons", "n", type=click.IntRange(1, 99), default=64, show_default=True)
@click.option("--idle", "idle_s", default=15.0, show_default=True, help="Seconds of the idle measurement.")
@click.option(
    "--pace", default=64.0, show_default=True, help="Questions to the APIs per second, all together."
)
@click.option("--rate", "rate_mbit", type=float, help="Mbit/s of the registry's link. [default: loopback]")
@click.option("--latency", "latency_ms", default=0.0, help="Milliseconds before each of its answers.")
@work_option
@json_option
def many(
    n: int,
    idle_s: float,
    pace: float,
    rate_mbit: float | None,
    latency_ms: float,
    work: Path,
    json_path: Path | None,
) -> None:
    """Many daemons share one cache directory; their VMs read the whole image at the same time.

    Counts what the registry sent to each, and asks the daemons' APIs at a steady pace, idle and meanwhile,
    beside processes that do nothing but answer.
    """
    tree = made_tree(work / "tree-of-many", n_small=600, n_large=1)
    material = prepare(work, tree)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        bandwidth = None if rate_mbit is None else rate_mbit * 1e6 / 8
        sim = stack.enter_context(RegistrySimulator(latency_s=latency_ms / 1000, bandwidth=bandwidth))
        daemons = []
        for i in range(n):
            sim.store.add_build(_REPOSITORY.format(i), "1", material.image)
            (tmp / str(i)).mkdir()
            options = ["--plain-http", "--cache-dir", str(tmp / "cache"), "--log-level", "warning"]
            image = f"{sim.host}/{_REPOSITORY.format(i)}:1"
            daemons.append(stack.enter_context(Daemon(image, tmp / str(i), tmp / f"{i}.log", options)))
        begin(daemons)
        ours, theirs = context.Pipe()
        vms = context.Process(target=play_vms, args=([d.socket for d in daemons], tree, theirs), daemon=True)
        vms.start()
        stack.callback(vms.kill)
        await_word(ours)
        with asking.Asker(context, [d.api_socket for d in daemons], tmp, pace) as asker:
            idle = asker.measure_for(idle_s)
            sim.log.clear()
            before = [processes.usage(d.process.pid) for d in daemons]
            ours.send("go")
            busy, results = asker.measure_until(lambda: await_word(ours))
            spent = [processes.usage(d.process.pid) - b for d, b in zip(daemons, before, strict=True)]
        memory = [processes.pss_kib(d.process.pid) for d in daemons]
        got = traffic_of(sim, "sha256:" + material.blob_id, n)
        ours.send("end")
        vms.join(60)
    report(material, results, got, [s.cpu_ns for s in spent], memory)
    asking.report({"idle": idle, "while all read": busy})
    write_json(
        json_path,
        {
            "vms": results,
            "traffic": [attrs.asdict(each) for each in got],
            "pss_kib": memory,
            "answers_ms": {"idle": idle, "busy": busy},
        },
    )


def await_word(pipe: Connection) -> Any:
    """What the other process says next.

    Raises:
        ClickException: nothing, for a quarter of an hour.
    """
    if not pipe.poll(_GUARD_S):
        raise click.ClickException("the VMs make no progress")
    return pipe.recv()


def report(
    material: Material,
    results: Sequence[dict[str, Any]],
    got: Sequence[Traffic],
    cpu_ns: Sequence[int],
    memory: Sequence[int],
) -> None:
    """What was read and what it took."""
    blob = (material.image / material.blob_id).stat().st_size
    seconds = sorted(each["seconds"] for each in results)
    rows: list[list[object]] = [
        ["VMs, all bytes right", sum(each["clean"] for each in results)],
        ["seconds until the first, the last had read all", f"{seconds[0]:.1f}, {seconds[-1]:.1f}"],
        ["bytes of the blob", blob],
        ["bytes that the registry sent of it, all daemons", sum(t.sent for t in got)],
        ["the same, as a multiple", f"{sum(t.sent for t in got) / blob:.2f}"],
        ["most that one daemon got, as a part of the blob", f"{max(t.sent for t in got) / blob:.2f}"],
        ["bytes that a daemon got twice, all daemons", sum(t.twice for t in got)],
        ["requests of the blob, all daemons", sum(t.n_requests for t in got)],
        ["processor seconds, all daemons", f"{sum(cpu_ns) / 1e9:.1f}"],
        ["PSS of a daemon, MiB, median", f"{sorted(memory)[len(memory) // 2] / 1024:.1f}"],
    ]
    print_table(["what", "measured"], rows)
