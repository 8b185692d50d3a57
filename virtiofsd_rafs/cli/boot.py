"""``virtiofsd-rafs boot``: what happened while a guest started."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from virtiofsd_rafs.cli._api import fetch_json
from virtiofsd_rafs.config import default_api_socket
from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from virtiofsd_rafs.report.model import Report

_PATH = click.Path(path_type=Path)
_MAX_FILE = 256 << 20


@click.group()
def boot() -> None:
    """Show what happened while a guest started."""


@boot.command()
@click.argument("sources", nargs=-1, required=True, type=_PATH, metavar="API_SOCKET|TRACE...")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to look at here.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also what was fetched after the boot (15 quiet seconds end it).",
)
def report(sources: tuple[Path, ...], html: Path | None, as_json: bool, everything: bool) -> None:
    """Tell what was fetched while a guest started, why, and who waited for it.

    Each argument is a running daemon's API socket, or a file with what it answered to GET /api/v1/trace.
    Several are shown side by side.

    \b
    Example: virtiofsd-rafs boot report rafs.sock.api --html boot.html
    """
    from virtiofsd_rafs.report import model, text, trace

    reports: list[Report] = []
    for source in sources:
        parsed = trace.parse(_read(source), name=source.stem if len(sources) > 1 else "boot")
        reports.append(model.analyse(parsed, everything=everything))
    if html is not None:
        from virtiofsd_rafs.report.html import page

        html.write_text(page(reports), encoding="utf-8")
    if as_json:
        click.echo(json.dumps({"boots": [found.as_dict() for found in reports]}, indent=2))
        return
    for found in reports:
        click.echo("\n".join([*text.lines(found), ""]))
    if len(reports) > 1:
        click.echo("\n".join([*text.side_by_side(reports), ""]))
    if html is not None:
        click.echo(f"page: {html}")


def _read(source: Path) -> Any:
    """The trace of a daemon or in a file."""
    try:
        kind = source.stat().st_mode
    except FileNotFoundError:
        raise ConfigError(
            f"{source}: there is no such socket or file",
            remedy="give a running daemon's API socket, or a trace that was kept",
        ) from None
    if stat.S_ISSOCK(kind):
        beside = default_api_socket(source)
        return fetch_json(beside if beside.exists() else source, "/api/v1/trace")
    if stat.S_ISDIR(kind):
        raise ConfigError(f"{source}: is a directory", remedy="give an API socket or a trace")
    with source.open("rb") as file:
        content = file.read(_MAX_FILE)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise ConfigError(
            f"{source}: is no JSON", remedy="keep what GET /api/v1/trace answers, and give that"
        ) from e
