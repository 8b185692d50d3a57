"""Building an image, beside nydus-image, from trees that lie in the page cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from tests.bench.cold import add_extras
from tests.bench.figures import Spread, print_table, ratios_of, write_json
from tests.bench.material import made_tree
from tests.bench.options import json_option, rounds_option, work_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CHUNK_SIZE = "0x100000"
_RUNNER = """
import json, os, sys, time
start = time.monotonic()
pid = os.fork()
if pid == 0:
    try:
        os.sched_setaffinity(0, json.loads(sys.argv[1]))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.execvp(sys.argv[2], sys.argv[2:])
    finally:
        os._exit(127)
_, status, usage = os.wait4(pid, 0)
wall = time.monotonic() - start
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([wall, cpu, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


@attrs.frozen
class Cost:
    """What one build took: seconds, the largest resident set, and bytes written."""

    tree: str
    side: str
    round: int
    wall_s: float
    cpu_s: float
    peak_kib: int
    blob_size: int
    bootstrap_size: int
    digest: str
    """SHA-256 over both files."""


def measured(
    tree: str, side: str, number: int, command: Sequence[str], out: Path, cpus: set[int] | None = None
) -> Cost:
    """Runs *command*, which leaves an image in the empty folder *out*; on *cpus* only, if given.

    Raises:
        RuntimeError: it failed.
    """
    mask = sorted(cpus if cpus is not None else os.sched_getaffinity(0))
    # From a small process: the largest resident set of a child begins with that of its parent.
    runner = [sys.executable, "-S", "-E", "-c", _RUNNER, json.dumps(mask), *command]
    done = subprocess.run(runner, stdout=subprocess.PIPE, check=True)
    wall_s, cpu_s, peak_kib, status = json.loads(done.stdout)
    if status != 0:
        raise RuntimeError(f"{command[0]} ended with {status}")
    blobs = [path for path in out.iterdir() if len(path.name) == 64]
    (bootstrap,) = (path for path in out.iterdir() if path.name in ("image.boot", "bootstrap"))
    digest = hashlib.sha256()
    for path in (*blobs, bootstrap):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Cost(
        tree,
        side,
        number,
        wall_s,
        cpu_s,
        peak_kib,
        sum(path.stat().st_size for path in blobs),
        bootstrap.stat().st_size,
        digest.hexdigest(),
    )


def ours(tree: Path, out: Path) -> list[str]:
    chunk_size = str(int(_CHUNK_SIZE, 16))
    program = [sys.executable, "-m", "virtiofsd_rafs", "build"]
    return [*program, str(tree), "-o", str(out), "--compressor", "zstd", "--chunk-size", chunk_size]


def theirs(program: str, tree: Path, out: Path) -> list[str]:
    options = [
        "--compressor",
        "zstd",
        "--digester",
        "blake3",
        "--chunk-size",
        _CHUNK_SIZE,
        "--fs-version",
        "6",
    ]
    return [program, "create", *options, "-B", str(out / "bootstrap"), "-D", str(out), str(tree)]


def read_all(tree: Path) -> None:
    """Reads all files of *tree*: hosts that give memory back drop what was not used for some seconds."""
    buffer = bytearray(1 << 20)
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def compared(costs: Sequence[Cost]) -> list[list[object]]:
    """A row per tree and side: medians, and what they are of the other side's, pair by pair."""
    rows: list[list[object]] = []
    for tree in dict.fromkeys(cost.tree for cost in costs):
        of = {
            side: [cost for cost in costs if (cost.tree, cost.side) == (tree, side)]
            for side in dict.fromkeys(cost.side for cost in costs)
        }
        for side, found in of.items():
            ratio = ""
            if len(of) == 2 and side == "rafs":
                ratio = ratios_of("wall_s", found, of["nydus-image"]).text()
            rows.append(
                [
                    tree,
                    side,
                    Spread.of([c.wall_s for c in found]).text(),
                    Spread.of([c.cpu_s for c in found]).median,
                    max(c.peak_kib for c in found) / 1024,
                    found[0].blob_size / 1e6,
                    found[0].bootstrap_size / 1e6,
                    ratio,
                ]
            )
    return rows


def small_files(work: Path, count: int) -> Path:
    """A tree of *count* files of 300 bytes, made when it is not there yet."""
    tree = work / f"small-{count}"
    if not tree.exists():
        making = tree.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        add_extras(making, count)
        making.rename(tree)
    return tree


@click.command()
@click.option("--nydus-image", metavar="PROGRAM", help="Compare with this nydus-image.")
@click.option("--dir", "tree", type=click.Path(path_type=Path, exists=True), help="Build this tree.")
@click.option(
    "--small-files",
    "n_small",
    default=100_000,
    show_default=True,
    help="And a tree of so many; 0: none.",
)
@rounds_option(5)
@work_option
@json_option
def build(
    nydus_image: str | None,
    tree: Path | None,
    n_small: int,
    rounds: int,
    work: Path,
    json_path: Path | None,
) -> None:
    """Time, memory and size of a build, side by side in turn: zstd, chunks of 1 MiB.

    The tree is read before each build, so that it lies in the page cache. The image goes to a new folder each
    time. Wall time includes the start of the interpreter and, for us but not nydus-image, syncing both files.
    Peak is the largest resident set. One more build on a single CPU must give the same bytes.
    """
    trees = {"files": tree.resolve() if tree else made_tree(work / "tree")}
    if n_small:
        trees[f"{n_small} small"] = small_files(work, n_small)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="build-", dir=work) as tmp:

        def run(name: str, side: str, number: int, cpus: set[int] | None = None) -> Cost:
            commands: dict[str, Callable[[Path, Path], list[str]]] = {"rafs": ours}
            if nydus_image:
                commands["nydus-image"] = partial(theirs, nydus_image)
            out = Path(tmp) / "out"
            out.mkdir()
            try:
                # What the build before has left to write would slow this one down.
                os.sync()
                read_all(trees[name])
                return measured(name, side, number, commands[side](trees[name], out), out, cpus)
            finally:
                shutil.rmtree(out)

        sides = ["rafs", "nydus-image"] if nydus_image else ["rafs"]
        for name in trees:
            for side in sides:
                run(name, side, 0)
            for number in range(1, rounds + 1):
                for side in sides if number % 2 else reversed(sides):
                    costs.append(run(name, side, number))
            one = run(name, "rafs", 0, {min(os.sched_getaffinity(0))})
            digests = {cost.digest for cost in costs if (cost.tree, cost.side) == (name, "rafs")}
            if digests != {one.digest}:
                raise click.ClickException(f"{name}: builds differ, or one on a single CPU does")
    head = ["tree", "side", "wall s", "CPU s", "peak MiB", "blob MB", "bootstrap MB", "wall, ratio"]
    print_table(head, compared(costs))
    click.echo(f"the same bytes in {rounds} builds and on a single CPU")
    write_json(json_path, [attrs.asdict(cost) for cost in costs])
