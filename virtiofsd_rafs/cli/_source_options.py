"""Options that say where blobs are, and the file that may say it as well."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from virtiofsd_rafs.config import IN_CONFIG_FILE, BlobSource
from virtiofsd_rafs.errors import ConfigError, LocalError

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., object]

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _load(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Reads the file before other options are looked at: what it says are their defaults."""
    if value is None or ctx.resilient_parsing:
        return value
    loaded = _read(value)
    ctx.meta[__name__] = loaded
    ctx.default_map = {**(ctx.default_map or {}), **loaded.options}
    for warning in loaded.warnings:
        print(f"virtiofsd-rafs: warning: --config {value}: {warning}", file=sys.stderr)
    return value


class _Read(NamedTuple):
    """What this process may know of the file."""

    options: dict[str, Any]
    warnings: tuple[str, ...]
    has_backend: bool
    paths: tuple[Path, ...]
    """Files and folders that the back-end reads."""


def _read(path: Path) -> _Read:
    """What the file at *path* says, but for its credentials. Raises ConfigError.

    This process becomes the keeper, and each worker has a copy of its memory: so a child reads the file, and
    is gone with all that it has seen. Control reads it anew.
    """
    import pickle

    ours, theirs = os.pipe()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(_tell(path, theirs))
    os.close(theirs)
    with open(ours, "rb") as answer:
        data = answer.read()
    os.waitpid(pid, 0)
    if not data:
        raise LocalError(f"--config {path}: the lines above tell why it was not read")
    result = pickle.loads(data)  # noqa: S301  (of our own child)
    if isinstance(result, _Read):
        return result
    message, remedy = result
    raise ConfigError(message, remedy=remedy)


def _tell(path: Path, answer: int) -> int:
    """The child's part; the exit code."""
    import pickle

    try:
        result: _Read | tuple[str, str] = _read_here(path)
    except ConfigError as e:
        result = (e.message, e.remedy)
    except BaseException:
        import traceback

        traceback.print_exc()
        return LocalError.exit_code
    with open(answer, "wb") as f:
        pickle.dump(result, f)
    return 0


def _read_here(path: Path) -> _Read:
    from virtiofsd_rafs.backends import check_installed
    from virtiofsd_rafs.backends.reload import load_config_file

    loaded = load_config_file(path)
    if loaded.backend is not None:
        check_installed(loaded.backend)
    return _Read(loaded.options(), loaded.warnings, loaded.backend is not None, _paths(loaded.backend))


def _paths(backend: Any) -> tuple[Path, ...]:
    http = getattr(backend, "http", None)
    blob_file = getattr(backend, "blob_file", None)
    paths = (*getattr(backend, "dirs", ()), *getattr(http, "ca_files", ()))
    return paths if blob_file is None else (*paths, blob_file)


def paths_in_config_file() -> tuple[Path, ...]:
    """What the back-end in the file of ``--config`` reads; for a command with these options."""
    loaded = click.get_current_context().meta.get(__name__)
    return loaded.paths if isinstance(loaded, _Read) else ()


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

    It gets ``blob_source`` (see ServeConfig) and ``config_file``.
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


def _backend(url: str | None, blob_dir: Path | None, loaded: _Read | None) -> BlobSource | None:
    """Where blobs are; None: where the image comes from, or in *blob_dir*. Raises ConfigError."""
    if url is not None and blob_dir is not None:
        raise ConfigError("--blob-source and --blob-dir say two places", remedy="leave one of them out")
    if url is not None:
        from virtiofsd_rafs.backends import check_installed
        from virtiofsd_rafs.backends.location import parse_blob_source

        backend = parse_blob_source(url)
        check_installed(backend)
        return backend
    return IN_CONFIG_FILE if blob_dir is None and loaded is not None and loaded.has_backend else None
