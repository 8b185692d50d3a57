"""The command line: judges back-ends and compares them."""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests.conformance.catalogue import all_checks
from tests.conformance.judged import Judged, JudgedNydusd, JudgedOurs, attached, command, virtiofsd
from tests.conformance.ours import build
from tests.conformance.report import Result, load, merge, terminal, to_json, write_docs
from tests.conformance.runner import LIMIT_S, TIMEOUT_S, run
from tests.conformance.tree import Tree, load_tree, make_tree
from tests.conformance.verdict import OK

if TYPE_CHECKING:
    from tests.conformance.check import Check
    from tests.conformance.verdict import Verdict


def _named(text: str, default: str) -> tuple[str, str]:
    """Splits ``NAME=REST``; *default* where there is no name."""
    name, equals, rest = text.partition("=")
    plain = equals and name.replace("-", "").replace(".", "").replace(" ", "").isalnum()
    return (name, rest) if plain else (default, text)


def _back_ends(
    ours: bool,
    commands: tuple[str, ...],
    sockets: tuple[str, ...],
    virtiofsds: tuple[str, ...],
    nydusds: tuple[str, ...],
    tree: Tree,
    image: Path,
) -> list[Judged]:
    found: list[Judged] = []
    if ours or not (commands or sockets or virtiofsds or nydusds):
        found.append(JudgedOurs(tree, image))
    found += [virtiofsd(program, tree) for program in virtiofsds]
    found += [JudgedNydusd(program, image) for program in nydusds]
    for i, text in enumerate(commands, 1):
        name, template = _named(text, f"back-end {i}")
        found.append(command(name, template, tree, image=image))
    for text in sockets:
        name, socket = _named(text, "attached")
        found.append(attached(name, Path(socket)))
    return found


def _judge(judged: Judged, chosen: list[Check], tree: Tree, place: Path, timeout_s: float) -> Result:
    """Runs the checks, and tells of each that is not plainly ok."""
    place.mkdir()

    def tell(check: Check, verdict: Verdict) -> None:
        if verdict.word != OK:
            where = f" ({verdict.where})" if verdict.where else ""
            click.echo(f"{judged.name}: {check.id}: {verdict.word}: {verdict.how}{where}", err=True)

    verdicts = run(chosen, judged, tree, place, timeout_s=timeout_s, limit_s=LIMIT_S, tell=tell)
    return Result(judged.name, judged.version, verdicts)


@click.command()
@click.option("--ours", is_flag=True, help="Judge the daemon of this tree (the default without any other).")
@click.option("--virtiofsd", "virtiofsds", multiple=True, metavar="PROGRAM", help="Judge this virtiofsd.")
@click.option("--nydusd", "nydusds", multiple=True, metavar="PROGRAM", help="Judge this nydusd.")
@click.option(
    "--command",
    "commands",
    multiple=True,
    metavar="[NAME=]COMMAND",
    help="Judge what this command starts; {socket}, {dir} (the tree), {image} (folder of image.boot and its "
    "blobs) and {work} (a new folder) are put in.",
)
@click.option(
    "--attach",
    "sockets",
    multiple=True,
    metavar="[NAME=]SOCKET",
    help="Judge what listens there, again after each VM, and serves --tree.",
)
@click.option(
    "--tree", "tree_dir", type=click.Path(path_type=Path), help="Where the tree is; made if absent."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Only checks whose id matches; may be repeated.")
@click.option("--timeout", default=TIMEOUT_S, show_default=True, help="Seconds after which something hangs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Put results into this file.")
@click.option(
    "--from",
    "earlier",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Take these results of earlier runs, too; without a back-end nothing is run.",
)
@click.option("--write", type=click.Path(path_type=Path), help="Put the tables into this document.")
@click.option("--list", "listing", is_flag=True, help="List the checks and what they rest on.")
def main(
    ours: bool,
    virtiofsds: tuple[str, ...],
    nydusds: tuple[str, ...],
    commands: tuple[str, ...],
    sockets: tuple[str, ...],
    tree_dir: Path | None,
    only: tuple[str, ...],
    timeout: float,
    json_file: Path | None,
    earlier: tuple[Path, ...],
    write: Path | None,
    listing: bool,
) -> None:
    """Judges virtio-fs back-ends by what the specifications say. See docs/conformance.md.

    Exits with 1 if any back-end fails a check.
    """
    chosen = [c for c in all_checks() if not only or any(fnmatch.fnmatch(c.id, glob) for glob in only)]
    if listing:
        for check in chosen:
            click.echo(f"{check.id}\n    {check.title}.\n    {check.source}: {check.says}")
        return
    results: list[Result] = []
    if not earlier or ours or virtiofsds or nydusds or commands or sockets:
        with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as folder:
            work = Path(folder)
            root = tree_dir or work / "tree"
            tree = load_tree(root) if root.exists() else make_tree(root)
            build(tree, work / "image")
            judged = _back_ends(ours, commands, sockets, virtiofsds, nydusds, tree, work / "image")
            results = [_judge(one, chosen, tree, work / f"b{i}", timeout) for i, one in enumerate(judged)]
    if results:
        click.echo(terminal(results))
    failed = any(not verdict.passed for result in results for verdict in result.verdicts.values())
    if json_file is not None:
        results = merge(load(json_file) if json_file.exists() else [], results)
    for path in earlier:
        results = merge(results, load(path))
    if json_file is not None:
        json_file.write_text(to_json(results))
    if write is not None:
        write_docs(write, results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(prog_name="scripts/conformance")
