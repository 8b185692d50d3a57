"""The command: a comparison of back-ends, warm and cold, with tables, JSON and a page of latencies."""

from __future__ import annotations

import json
import time
from pathlib import Path

import attrs
import click

from tests.bench.figures import machine, write_json
from tests.bench.kit import contenders as who
from tests.bench.kit import page, tables
from tests.bench.kit.cases import chosen
from tests.bench.kit.measure import Comparison
from tests.bench.kit.results import from_json, to_json
from tests.bench.kit.runs import Setting
from tests.bench.material import prepare
from tests.bench.options import json_option, nydusd_option, work_option


@click.command()
@click.option(
    "--virtiofsd",
    metavar="PROGRAM",
    default=who.AUTO,
    show_default="Debian's, unpacked below var",
    help="virtiofsd, on the tree; none leaves it out.",
)
@nydusd_option
@click.option("--other", metavar="PROGRAM", help="Another virtiofsd-rafs, on the image.")
@click.option(
    "--command",
    "commands",
    multiple=True,
    metavar="NAME='PROGRAM ...'",
    help="Any back-end; {socket} and, where they occur, {dir}, {image}, {bootstrap}, {work} are replaced.",
)
@click.option(
    "--attach",
    multiple=True,
    metavar="NAME=SOCKET,PID",
    help="What listens there; may be repeated.",
)
@click.option("--no-own", is_flag=True, help="Leave this project's own daemon out.")
@click.option("--no-floor", is_flag=True, help="Leave the floor program out.")
@click.option("--floor-poll-us", type=int, help="The floor program once more, polling for so long.")
@click.option("--dir", "tree", type=click.Path(path_type=Path, exists=True), help="Serve this tree.")
@work_option
@click.option("--quick", is_flag=True, help="The main cases only, shorter and in fewer rounds: 3 minutes.")
@click.option("--case", "only", multiple=True, help="Only cases whose name contains this; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), help="Runs of a case on each side, in turn.  [5; quick 3]")
@click.option("--seconds", type=click.FloatRange(0.05), help="Length of a run.  [1; quick 0.5]")
@click.option(
    "--wait", type=click.Choice(["sleep", "poll"]), default="sleep", help="How the front-end waits."
)
@click.option(
    "--canaries", is_flag=True, help="Watch all buffers for stray writes; slows the front-end down."
)
@click.option("--pin/--no-pin", default=True, help="Front-end on the first CPU, back-ends on the others.")
@json_option
@click.option(
    "--page",
    "page_path",
    type=click.Path(path_type=Path),
    help="Write the pictures of latencies here.  [latency.html beside the JSON, or in the work folder]",
)
def operations(
    virtiofsd: str,
    nydusd: str | None,
    other: str | None,
    commands: tuple[str, ...],
    attach: tuple[str, ...],
    no_own: bool,
    no_floor: bool,
    floor_poll_us: int | None,
    tree: Path | None,
    work: Path,
    quick: bool,
    only: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    wait: str,
    canaries: bool,
    pin: bool,
    json_path: Path | None,
    page_path: Path | None,
) -> None:
    """Requests of every kind, warm and cold, on all sides in turn: what scripts/bench does by default.

    All sides serve the same tree, which each has read once before, and must show the same content; only the
    floor program has a tree of its own. Numbers are medians over the rounds; the columns speed and cpu are
    medians of the first side's ratio to the other, round by round: speed above 1 and cpu below 1 are in the
    first side's favour. "cpu us" is processor time of all processes of the back-end per operation; "calls"
    are its system calls and "sleeps" its threads' sleeps per request.

    \b
    scripts/bench --nydusd PROGRAM --rounds 7 --json result.json
    scripts/bench --command 'mine=/usr/bin/mine --socket {socket} --shared {dir}' --no-own
    """
    began = time.monotonic()
    on = machine()
    cases = chosen(only, quick=quick)
    if not cases:
        raise click.UsageError("no case has such a name")
    attached = [who.Attached.parse(text) for text in attach]
    material = prepare(work, tree.resolve() if tree else None)
    found = who.find(
        material,
        work,
        own=not no_own,
        other=other,
        virtiofsd_program=virtiofsd,
        nydusd_program=nydusd,
        commands=commands,
        with_floor=not no_floor,
        floor_poll_us=floor_poll_us,
    )
    setting = Setting(seconds or (0.5 if quick else 1.0), wait, canaries)
    comparison = Comparison(material, found, attached, rounds or (3 if quick else 5), setting, work, pin=pin)
    results = comparison.measure(cases)
    for line in tables.bar_lines(results):
        click.echo(line)
    document = {
        "settings": attrs.asdict(setting) | {"rounds": comparison.rounds},
        "sides": comparison.seen,
        "cases": to_json(results),
    }
    write_json(json_path, document, on)
    where = page_path or (json_path.with_name("latency.html") if json_path else work / "latency.html")
    where.write_text(page.render(results, on))
    click.echo(f"\n{time.monotonic() - began:.0f} s; latencies: {where}")


@click.command("page")
@click.argument("json_path", metavar="JSON", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path), default=Path("latency.html"))
def page_command(json_path: Path, out: Path) -> None:
    """Draws the latencies of a comparison's JSON again, into OUT."""
    document = json.loads(json_path.read_text())
    if document.get("benchmark") != "operations":
        raise click.UsageError(f"{json_path} is of {document.get('benchmark')}, which has no latencies")
    out.write_text(page.render(from_json(document["results"]["cases"]), document["machine"]))
