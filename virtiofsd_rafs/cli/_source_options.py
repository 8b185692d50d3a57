"""Options that say where blobs are, and the file that may say it as well."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.config import BackendConfig
    from virtiofsd_rafs.config_file import FileConfig

    Command = Callable[..., object]

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _load(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Reads the file before other options are looked at: what it says are their defaults."""
    if value is None or ctx.resilient_parsing:
        return value
    from virtiofsd_rafs.backends.reload import load_config_file

    loaded = load_config_file(value)
    ctx.meta[__name__] = loaded
    ctx.default_map = {**(ctx.default_map or {}), **loaded.options()}
    for warning in loaded.warnings:
        print(f"virtiofsd-rafs: warning: --config {value}: {warning}", file=sys.stderr)
    return value


_OPTIONS = (
    click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=_load,
        help="Take back-end, cache and prefetch from a configuration file of nydusd (JSON or TOML); "
        "other options win over it.",
    ),
    click.option(
        "--blob-source",
        metavar="URL",
        help="Read blobs from file:///DIR, s3://BUCKET/FOLDER, oss://BUCKET/FOLDER, http(s)://HOST/PATH, "
        "http+unix:///SOCKET or oci://HOST/REPOSITORY, wherever the image comes from.",
    ),
)


def source_options(command: Command) -> Command:
    """Adds the options to *command*, which has ``--blob-dir``, ``--cache-dir`` and ``--no-cache`` as well.

    It gets ``blob_source``, a back-end's configuration or None, and ``config_file``.
    """

    @functools.wraps(command)
    def collected(*args: Any, blob_source: str | None, blob_dir: Path | None, **kwargs: Any) -> object:
        ctx = click.get_current_context()
        if ctx.get_parameter_source("cache_dir") in _GIVEN and (
            ctx.get_parameter_source("no_cache") is ParameterSource.DEFAULT_MAP
        ):
            kwargs["no_cache"] = False
        backend = _backend(blob_source, blob_dir, ctx.meta.get(__name__))
        return command(*args, blob_source=backend, blob_dir=blob_dir, **kwargs)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


def _backend(url: str | None, blob_dir: Path | None, loaded: FileConfig | None) -> BackendConfig | None:
    """Where blobs are; None: where the image comes from, or in *blob_dir*. Raises ConfigError."""
    if url is not None and blob_dir is not None:
        raise ConfigError("--blob-source and --blob-dir say two places", remedy="leave one of them out")
    backend: BackendConfig | None = None
    if url is not None:
        from virtiofsd_rafs.backends.location import parse_blob_source

        backend = parse_blob_source(url)
    elif blob_dir is None and loaded is not None:
        backend = loaded.backend
    if backend is not None:
        from virtiofsd_rafs.backends import check_installed

        check_installed(backend)
    return backend
