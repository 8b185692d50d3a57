"""Options that say how an IMAGE is found, the same for every command that reads one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

# Somebody looks at the terminal and can try again: long enough for a registry that restarts, no longer.
ONE_SHOT_DEADLINE_S = 20.0

F = TypeVar("F", bound="Callable[..., object]")

_OPTIONS = (
    click.option(
        "--blob-dir",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with the blobs of a bootstrap file; default: the file's own.",
    ),
    click.option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where images are kept between runs; default: nowhere.",
    ),
    click.option(
        "--pull",
        type=click.Choice(["missing", "always", "never"]),
        default="missing",
        show_default=True,
        help="When to ask the registry what a tag names.",
    ),
    click.option("--plain-http", is_flag=True, help="Speak http instead of https."),
    click.option(
        "--ca-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="PEM certificates to trust beside the system's.",
    ),
)


def image_options(command: F) -> F:
    """Adds the options to *command*; their names are those of resolve_image's arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
