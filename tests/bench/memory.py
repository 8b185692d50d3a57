"""Memory of the idle processes after a read trace like a boot's."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import BackEnd, Daemon
from guest.pull_first import Virtiofsd
from tests.bench import peers, processes, sides
from tests.bench.figures import print_table, write_json
from tests.bench.material import REPOSITORY, Material, in_registry, prepare, reference
from tests.bench.options import json_option, nydusd_option, virtiofsd_option, work_option
from tests.bench.trace import boot_like, file_sizes, replay

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.registry import RegistrySimulator


def measured(name: str, back_end: BackEnd, idle_s: float) -> tuple[list[processes.Memory], int, int]:
    """After *idle_s* of rest: memory of the processes, KiB of all were they alone, bytes read before."""
    with sides.start(name, back_end) as side:
        tree = side.fe.read_tree(content=False, xattrs=False)
        total = replay(side.fe, tree, boot_like(file_sizes(tree)))
        time.sleep(idle_s)
        return processes.memory(side.pid), processes.alone_kib(side.pid), total


def starters(
    material: Material, sim: RegistrySimulator, folder: Path, virtiofsd: str | None, nydusd: str | None
) -> dict[str, Callable[[], BackEnd]]:
    """How each side is started; a second start finds the cache of the first."""
    options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "warning"]
    found: dict[str, Callable[[], BackEnd]] = {
        "rafs": lambda: Daemon(reference(sim), folder, folder / "log", options)
    }
    if nydusd is not None:
        blobs = peers.registry(sim.host, REPOSITORY)
        found["nydusd"] = lambda: peers.Nydusd(
            nydusd, material.bootstrap, blobs, folder / "n", folder / "n" / "cache"
        )
    if virtiofsd is not None:
        found["virtiofsd"] = lambda: Virtiofsd(virtiofsd, material.tree, folder / "v")
    return found


@click.command()
@virtiofsd_option
@nydusd_option
@click.option("--dir", "tree", type=click.Path(path_type=Path, exists=True), help="Serve this tree.")
@click.option("--idle", default=10.0, show_default=True, help="Seconds of rest before measuring.")
@work_option
@json_option
def memory(
    virtiofsd: str | None,
    nydusd: str | None,
    tree: Path | None,
    idle: float,
    work: Path,
    json_path: Path | None,
) -> None:
    """PSS of each process, idle after reads, image in a registry.

    All names and attributes are read and about every seventh file, once with an empty cache, once after a
    restart with a warm one. "shared" is the part in shared memory: pages of the guest that a process has
    touched, which belong to the VMM as well, and tables in memfds. "alone" counts pages of programs and
    libraries whole that other processes on the machine use, too. In MiB.
    """
    material = prepare(work, tree.resolve() if tree else None)
    results: list[dict[str, object]] = []
    rows: list[list[object]] = []
    with in_registry(material) as sim, tempfile.TemporaryDirectory(prefix="vr-") as tmp:
        for name, start in starters(material, sim, Path(tmp), virtiofsd, nydusd).items():
            for state in ("cold", "warm"):
                found, alone, total = measured(name, start(), idle)
                sums = [sum(getattr(m, key) for m in found) for key in ("pss", "shared", "file")]
                whole = processes.Memory("together", *sums)
                for each in [*(found if len(found) > 1 else []), whole]:
                    parts: list[object] = [kib / 1024 for kib in (each.pss, each.shared, each.own)]
                    parts.append(f"{alone / 1024:.2f}" if each is whole else "")
                    rows.append([name, state, each.name, *parts])
                results.append(
                    {
                        "side": name,
                        "cache": state,
                        "read_bytes": total,
                        "alone_kib": alone,
                        "kib": [attrs.asdict(m) for m in found],
                    }
                )
    print_table(["side", "cache", "process", "PSS", "shared", "without", "alone"], rows)
    write_json(json_path, results)
