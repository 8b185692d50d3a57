"""Options that say how an IMAGE is found, the same for every command that reads one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from virtiofsd_rafs.cli._registry_options import registry_options
from virtiofsd_rafs.cli._source_options import source_options
from virtiofsd_rafs.config import IN_CONFIG_FILE

if TYPE_CHECKING:
    from virtiofsd_rafs.backends.config import BackendConfig
    from virtiofsd_rafs.cli._registry_options import Command
    from virtiofsd_rafs.config import BlobSource

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
    """Adds the options to *command*; their names are those of check_image's arguments.

    Where blobs are may be said as to ``serve``, also to a command that reads none of them.
    """

    @functools.wraps(command)
    def resolved(
        *args: Any, blob_source: BlobSource | None, config_file: Path | None, **kwargs: Any
    ) -> object:
        return command(*args, backend=_backend(blob_source, config_file), **kwargs)

    options = source_options(registry_options(resolved))
    for option in reversed(_OPTIONS):
        options = option(options)
    return options


def _backend(source: BlobSource | None, config_file: Path | None) -> BackendConfig | None:
    """Where blobs are, if not where the image comes from. Raises ConfigError."""
    if source != IN_CONFIG_FILE:
        return source
    from virtiofsd_rafs.backends.reload import load_config_file

    assert config_file is not None
    return load_config_file(config_file).backend
