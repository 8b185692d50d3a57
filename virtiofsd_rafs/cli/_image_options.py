"""Options that say how an IMAGE is found, the same for every command that reads one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from virtiofsd_rafs.cli._registry_options import registry_options

if TYPE_CHECKING:
    from virtiofsd_rafs.cli._registry_options import Command

# Somebody looks at the terminal and can try again: long enough for a registry that restarts, no longer.
ONE_SHOT_DEADLINE_S = 20.0

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
)


def image_options(command: Command) -> Command:
    """Adds the options to *command*; their names are those of resolve_image's arguments."""
    command = registry_options(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
