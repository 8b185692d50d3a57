"""``virtiofsd-rafs record``: what a guest has read, as a prefetch list."""

from __future__ import annotations

from pathlib import Path

import click

from virtiofsd_rafs.cli._api import fetch_body, which_socket

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--api-socket", type=_PATH, help="The daemon's API socket.")
@click.option(
    "--socket-path", type=_PATH, help="The daemon's vhost-user socket: its API socket lies beside it."
)
@click.option("-o", "--output", type=_PATH, help="Write the list here.  [default: standard output]")
@click.option("--files", "whole", is_flag=True, help="Only paths: each file once, without parts.")
def record(api_socket: Path | None, socket_path: Path | None, output: Path | None, whole: bool) -> None:
    """Write down what the guest of a running daemon has read so far, in the order of first use.

    The list is for `serve --prefetch-files` and `build --prefetch-files`: record it when a guest has started.

    \b
    Example: virtiofsd-rafs record --socket-path rafs.sock -o app.prefetch
    """
    listed = fetch_body(which_socket(api_socket, socket_path), "/api/v1/accessed")
    if whole:
        paths = dict.fromkeys(line.split(b"\t", 1)[0] for line in listed.splitlines())
        listed = b"".join(path + b"\n" for path in paths)
    with click.open_file(str(output or "-"), "wb") as file:
        file.write(listed)
