"""``virtiofsd-rafs status``: a client of the daemon's API socket."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from virtiofsd_rafs.cli._api import FULL_STATUS, fetch_json, which_socket

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH = click.Path(path_type=Path)
# Cursor to the corner; the rest of the line, and in the end of the screen, is cleared: nothing flickers.
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command()
@click.option("--api-socket", type=_PATH, help="The daemon's API socket.")
@click.option(
    "--socket-path", type=_PATH, help="The daemon's vhost-user socket: its API socket lies beside it."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--watch", is_flag=True, help="Go on until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks with --watch.",
)
def status(
    api_socket: Path | None, socket_path: Path | None, as_json: bool, watch: bool, interval: float
) -> None:
    """Show a running daemon's image, cache, traffic, and who waits for what.

    \b
    Example: virtiofsd-rafs status --socket-path rafs.sock --watch
    """
    api = which_socket(api_socket, socket_path)
    try:
        for found in _looks(api, interval if watch else None):
            _show(found, as_json=as_json, watch=watch)
    except KeyboardInterrupt:
        if not watch:
            raise


def _looks(api: Path, interval_s: float | None) -> Iterator[dict[str, Any]]:
    """The status, once or again and again."""
    yield fetch_json(api, FULL_STATUS)
    while interval_s is not None:
        time.sleep(interval_s)
        yield fetch_json(api, FULL_STATUS)


def _show(found: dict[str, Any], *, as_json: bool, watch: bool) -> None:
    if as_json:
        # One line for each look, so that a program can read on.
        click.echo(json.dumps(found, indent=None if watch else 2))
        return
    from virtiofsd_rafs.report.now import screen

    lines = screen(found)
    if watch and sys.stdout.isatty():
        shown = "".join(f"{line}{_REST_OF_LINE}\n" for line in lines)
        click.echo(f"{_HOME}{shown}{_REST_OF_SCREEN}", nl=False)
    else:
        click.echo("\n".join([*lines, ""] if watch else lines))
