"""Boots of a guest whose root is behind a slow link."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from guest.boot import boot
from guest.daemon import PROGRAM, Daemon
from guest.kit import VAR, Kernel
from guest.registry import Registry
from guest.slowlink import SlowLinkProcess
from tests.bench import peers, sides
from tests.bench.figures import print_table, ratios, ratios_of, write_json
from tests.bench.material import Material, built, in_registry, prepare, reference
from tests.bench.options import json_option, nydusd_option, rounds_option, work_option
from tests.bench.trace import boot_like, file_sizes, replay
from virtiofsd_rafs.cli._api import fetch_body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest.daemon import BackEnd

_FOLDER_OF_EXTRAS = "usr/lib/extra"
_PER_FOLDER = 1000
CACHES = ("cold", "listed", "warm")


@attrs.frozen
class Result:
    """One boot: seconds from exec of the back-end to HTTP 200, what the registry answered for the blob."""

    side: str
    image: str
    cache: str
    round: int
    time_s: float
    requests: int
    bytes: int


class Recorded(Daemon):
    """A daemon whose status holds what its guest has read, as a prefetch list."""

    def status(self) -> dict[str, Any]:
        return super().status() | {"accessed": fetch_body(self.api_socket, "/api/v1/accessed")}


@attrs.frozen
class Bench:
    """What all boots share."""

    registry: Registry
    link: SlowLinkProcess
    kernel: Kernel
    work: Path
    nydusd: str | None

    def push(self, material: Material, name: str) -> None:
        image = f"127.0.0.1:{self.registry.port}/bench/{name}:1"
        argv: list[str | Path] = [PROGRAM, "push", material.image, image, "--plain-http"]
        subprocess.run(argv, check=True, capture_output=True)

    def boot(self, side: str, material: Material, name: str, cache: str, number: int) -> Result:
        """Boots once; the cache folder of the side is emptied unless *cache* is "warm".

        A cold boot of ours writes down what it read, a "listed" one prefetches that.
        """
        folder = self.work / f"cache-{side}"
        if cache != "warm":
            shutil.rmtree(folder, ignore_errors=True)
        listed = self.work / f"{name}.prefetch"
        options = ["--cache-dir", str(folder), "--plain-http"]
        if cache == "listed":
            options += ["--prefetch-files", str(listed)]
        host = f"127.0.0.1:{self.link.port}"

        def nydusd(image: str, work: Path, log: Path, options: Sequence[str]) -> BackEnd:
            assert self.nydusd is not None
            del image, options
            blobs = peers.registry(host, f"bench/{name}")
            return peers.Nydusd(self.nydusd, material.bootstrap, blobs, work, folder, log)

        def ours(image: str, work: Path, log: Path, options: Sequence[str]) -> BackEnd:
            return (
                Recorded(image, work, log, options) if cache == "cold" else Daemon(image, work, log, options)
            )

        before = self.registry.traffic(material.blob_id)
        done = boot(
            f"{side}-{cache}",
            f"{host}/bench/{name}:1",
            kernel=self.kernel,
            options=options,
            logs=self.work / "logs",
            back_end=nydusd if side == "nydusd" else ours,
        )
        if "accessed" in done.status:
            listed.write_bytes(done.status["accessed"])
        traffic = self.registry.traffic(material.blob_id) - before
        return Result(side, name, cache, number, done.times["HTTP 200"], traffic.requests, traffic.bytes)


def with_extras(tree: Path, work: Path, n_files: int) -> Material:
    """The image of a copy of *tree* with *n_files* more small files, each with content of its own.

    The copy is removed when the image is made.
    """
    out = work / f"image-extra-{n_files}"
    copy = work / "extended"
    if not out.exists():
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", tree, copy], check=True)
        add_extras(copy, n_files)
        built(copy, out)
        shutil.rmtree(copy)
    return Material(copy, out)


def add_extras(tree: Path, n_files: int) -> None:
    """Writes the files below :file:`usr/lib/extra`, 1 000 per folder."""
    for i in range(n_files):
        folder = tree / _FOLDER_OF_EXTRAS / f"{i // _PER_FOLDER:04}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{i:07}").write_text(f"file {i} that nobody reads\n" * 10)


@attrs.frozen
class Replay:
    """What the registry was asked for: requests and bytes; *contents* are the answers, hashed."""

    image: str
    metadata: int
    """Of the bootstrap layer, as it is transferred."""
    read: int
    requests: int
    bytes: int
    contents: list[str] = attrs.field(repr=False)


def replayed(name: str, material: Material) -> Replay:
    """A boot-like trace is read without a VM, one READ at a time, with an empty cache.

    Extra files are not read: the trace is the same for both images.
    """
    with ExitStack() as stack:
        sim = stack.enter_context(in_registry(material))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vr-")))
        options = ["--plain-http", "--cache-dir", str(folder / "cache"), "--log-level", "warning"]
        daemon = Daemon(reference(sim), folder, folder / "log", options)
        side = stack.enter_context(sides.start("rafs", daemon))
        tree = side.fe.read_tree(content=False, xattrs=False)
        extra = b"/" + _FOLDER_OF_EXTRAS.encode() + b"/"
        sizes = {path: size for path, size in file_sizes(tree).items() if not path.startswith(extra)}
        total = replay(side.fe, tree, boot_like(sizes))
        digest = f"sha256:{material.blob_id}"
        blob = sim.store.blobs[digest]
        answers = [blob[span[0] : span[1] + 1] for span in sim.ranges(digest) if span is not None]
        layers = {r.digest for r in sim.requests("blob", "GET") if r.digest != digest}
        metadata = sum(len(sim.store.blobs[layer]) for layer in layers)
    contents = [hashlib.sha256(answer).hexdigest() for answer in answers]
    return Replay(name, metadata, total, len(answers), sum(map(len, answers)), contents)


def in_common(a: Replay, b: Replay) -> int:
    """How many requests of *b* brought the same bytes as one of *a*."""
    return (Counter(a.contents) & Counter(b.contents)).total()


def compared(results: Sequence[Result]) -> list[list[object]]:
    """Ours against nydusd's, by image and cache: ratios of time, requests and bytes over the pairs."""
    rows: list[list[object]] = []
    for image, cache in dict.fromkeys((r.image, r.cache) for r in results):
        ours, theirs = (
            [r for r in results if (r.side, r.image, r.cache) == (side, image, cache)]
            for side in ("rafs", "nydusd")
        )
        if ours and theirs:
            columns = ["time_s", "requests", "bytes"] if cache == "cold" else ["time_s"]
            spreads = [ratios_of(key, ours, theirs).text() for key in columns]
            rows.append([image, cache, *spreads, *[""] * (3 - len(spreads))])
    return rows


@click.command()
@nydusd_option
@click.option(
    "--dir",
    "tree",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    default=VAR / "quickstart" / "root",
    show_default="var/quickstart/root",
    help="The root that is booted; scripts/quickstart leaves one there.",
)
@rounds_option(3)
@click.option("--rate", default=30.0, show_default=True, help="Mbit/s of the link.")
@click.option("--latency", default=20.0, show_default=True, help="Milliseconds of a round trip.")
@click.option("--kernel", default="6.12", show_default=True, help="Series of the guest's kernel.")
@click.option(
    "--extra-files", default=0, help="Compare with an image of so many more files, which nobody reads."
)
@click.option("--boots/--no-boots", default=True, help="Without: only the replay for --extra-files.")
@work_option
@json_option
def cold(
    nydusd: str | None,
    tree: Path,
    rounds: int,
    rate: float,
    latency: float,
    kernel: str,
    extra_files: int,
    boots: bool,
    work: Path,
    json_path: Path | None,
) -> None:
    """Boots to HTTP 200 over a slow link: cold, cold with what the first boot read as a prefetch list, warm.

    From exec of the back-end; sides take turns, who begins changes each round. Requests and bytes are those
    that the registry answered for the blob until the VM and its back-end had ended. This daemon reads
    manifest and bootstrap over the link as well, which costs it time; nydusd gets the bootstrap as a file.

    With --extra-files the same trace is also replayed on both images without a VM, where nothing depends on
    time.
    """
    materials = {"image": prepare(work, tree)}
    if extra_files:
        materials["extended"] = with_extras(tree, work, extra_files)
    results: list[Result] = []
    if boots:
        with ExitStack() as stack:
            registry = stack.enter_context(Registry(work / "registry"))
            link = stack.enter_context(SlowLinkProcess(registry.port, rate_mbit=rate, latency_ms=latency))
            bench = Bench(registry, link, Kernel.find(kernel), work, nydusd)
            results = all_boots(bench, materials, rounds)
    document: dict[str, object] = {"boots": [attrs.asdict(each) for each in results]}
    if extra_files:
        replays = [replayed(name, each) for name, each in materials.items()]
        click.echo("a boot-like trace without a VM")
        head = ["image", "metadata", "read", "requests", "bytes"]
        print_table(head, [[getattr(each, key) for key in head] for each in replays])
        click.echo(f"requests that brought the same bytes: {in_common(*replays)} of {replays[0].requests}")
        document["replay"] = [attrs.asdict(each) for each in replays]
    write_json(json_path, document)


def all_boots(bench: Bench, materials: dict[str, Material], rounds: int) -> list[Result]:
    """All rounds; prints each boot when it is done and the ratios in the end."""
    for name, material in materials.items():
        bench.push(material, name)
    order = ["rafs", *(["nydusd"] if bench.nydusd else [])]
    results: list[Result] = []
    for number in range(1, rounds + 1):
        for name, material in materials.items():
            for cache in CACHES:
                for side in order if cache != "listed" else ["rafs"]:
                    got = bench.boot(side, material, name, cache, number)
                    results.append(got)
                    size = f"{got.requests} requests, {got.bytes / 1e6:.1f} MB"
                    click.echo(f"{number} {name} {cache} {side}: {got.time_s:.2f} s, {size}")
        order.reverse()
    ours = {cache: [r.time_s for r in results if (r.side, r.cache) == ("rafs", cache)] for cache in CACHES}
    click.echo(f"with a list / warm, median (least to most): {ratios(ours['listed'], ours['warm']).text()}")
    rows = compared(results)
    if rows:
        click.echo("rafs / nydusd, median (least to most)")
        print_table(["image", "cache", "time", "requests", "bytes"], rows)
    return results
