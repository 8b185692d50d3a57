"""What guests get when a registry damages a part of its replies: wrong files, failed files, hangs."""

from __future__ import annotations

import hashlib
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import Daemon
from tests.bench import peers, sides
from tests.bench.figures import print_table, write_json
from tests.bench.options import json_option, nydusd_option, rounds_option
from tests.faults.image import make_image
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.native.frontend import FrontendTimeout

if TYPE_CHECKING:
    from tests.faults.image import Image

N_FOLDERS = 96
# A side that answers nothing for so long hangs.
_HANG_S = 30.0


@attrs.frozen
class Outcome:
    """One side in one round; files by what came of them."""

    side: str
    round: int
    replies: int
    damaged: int
    wrong: int
    failed: int
    hung: bool


def read_all(side: sides.Side, image: Image) -> tuple[int, int, bool]:
    """Files with wrong bytes, files whose reads failed, and whether an answer did not come."""
    side.fe.timeout_s = _HANG_S
    expected, files = [], []
    try:
        for name, folder in image.folders.items():
            for file, data in folder.files.items():
                entry = side.fe.resolve(f"{name}/{file}")
                files.append((entry.nodeid, side.fe.open(entry.nodeid), len(data)))
                expected.append(hashlib.sha256(data).hexdigest())
        found = side.fe.digest(files, depth=32, read_size=128 * 1024)
    except FrontendTimeout:
        return 0, 0, True
    wrong = sum(d is not None and d != want for (d, _), want in zip(found, expected, strict=True))
    return wrong, sum(d is None for d, _ in found), False


def measure(name: str, program: str | None, image: Image, share: float, number: int) -> Outcome:
    """One side with an empty cache, from a registry of its own."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp")))
        sim = stack.enter_context(RegistrySimulator())
        sim.store.add_build("app", "1", image.out)
        fault = sim.fault("corrupt", where="blob", digest=image.digest, share=share)
        fault.rng = random.Random(number)
        if program is None:
            options = ["--plain-http", "--cache-dir", str(work / "cache")]
            back_end = Daemon(f"{sim.host}/app:1", work, work / "log", options)
        else:
            bootstrap = image.out / BOOTSTRAP_NAME
            back_end = peers.Nydusd(program, bootstrap, peers.registry(sim.host, "app"), work, work / "cache")
        side = stack.enter_context(sides.start(name, back_end))
        wrong, failed, hung = read_all(side, image)
        replies = [r for r in sim.requests("blob", "GET") if r.digest == image.digest]
        return Outcome(name, number, len(replies), fault.hits, wrong, failed, hung)


@click.command()
@rounds_option(6)
@click.option(
    "--share", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Of replies that are bad."
)
@nydusd_option
@json_option
def faults(rounds: int, share: float, nydusd: str | None, json_path: Path | None) -> None:
    """Files read through a registry that flips a bit in a part of its replies."""
    programs = {"rafs": None} | ({"nydusd": nydusd} if nydusd else {})
    outcomes = []
    with tempfile.TemporaryDirectory() as base:
        image = make_image(Path(base), [f"folder{i}" for i in range(N_FOLDERS)])
        for number in range(1, rounds + 1):
            outcomes += [measure(name, program, image, share, number) for name, program in programs.items()]
    n_files = sum(len(folder.files) for folder in image.folders.values())
    click.echo(f"{n_files} files of {image.blob_size} stored bytes, {share:.0%} of replies damaged")
    rows = [
        [o.side, str(o.round), str(o.replies), str(o.damaged), str(o.wrong), str(o.failed), str(o.hung)]
        for o in outcomes
    ]
    print_table(["side", "round", "replies", "damaged", "wrong files", "failed files", "hung"], rows)
    if json_path is not None:
        write_json(json_path, [attrs.asdict(o) for o in outcomes])
