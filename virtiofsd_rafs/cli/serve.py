"""``virtiofsd-rafs serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from virtiofsd_rafs.cli._params import Size, format_size
from virtiofsd_rafs.cli._registry_options import lean_registry_options
from virtiofsd_rafs.cli._source_options import paths_in_config_file, source_options
from virtiofsd_rafs.config import (
    DEFAULT_AMPLIFY,
    DEFAULT_CONNECTIONS,
    DEFAULT_IO_DEADLINE_S,
    DEFAULT_POLL_US,
    DEFAULT_SPILL_SIZE,
    FILLS,
    LOG_LEVELS,
    MAX_AMPLIFY,
    MAX_POLL_US,
    MIN_SPILL_SIZE,
    PREFETCHES,
    PULLS,
    SANDBOXES,
    ServeConfig,
    default_api_socket,
    default_cache_dir,
)

if TYPE_CHECKING:
    from virtiofsd_rafs.backends.config import BackendConfig, RegistryAccess

_PATH = click.Path(path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("image")
@click.option("--socket-path", type=_PATH, required=True, help="Bind the vhost-user socket here.")
@click.option("--api-socket", type=_PATH, help="Bind the API's socket here.  [default: SOCKET_PATH.api]")
@click.option(
    "--cache-dir",
    type=_PATH,
    default=default_cache_dir,
    show_default="/var/cache/virtiofsd-rafs for root, ~/.cache/virtiofsd-rafs for others",
    help="Keep blobs here.",
)
@click.option(
    "--cache-size",
    type=Size(),
    default=0,
    show_default="no limit",
    help="Evict what was not used for longest when the cached blobs of all images exceed this.",
)
@click.option("--cache-nydusd", is_flag=True, help="Keep the cache readable for nydusd.")
@click.option("--no-cache", is_flag=True, help="Use no disk: bounded memory instead.")
@click.option(
    "--blob-dir", type=_FOLDER, help="Read blobs from this directory (IMAGE is a bootstrap file then)."
)
@source_options
@click.option(
    "--pull",
    type=click.Choice(PULLS),
    default="missing",
    show_default=True,
    help="When to ask the registry what a tag means: missing starts a known tag without asking.",
)
@lean_registry_options
@click.option(
    "--allow-unverified", is_flag=True, help="Serve images that lack digests for some of their data."
)
@click.option(
    "--io-deadline",
    type=click.FloatRange(1, 3600),
    default=DEFAULT_IO_DEADLINE_S,
    show_default=True,
    help="Seconds that a guest's request may wait for its data before it fails with EIO.",
)
@click.option(
    "--poll-us",
    type=click.IntRange(0, MAX_POLL_US),
    default=DEFAULT_POLL_US,
    show_default=True,
    help="Microseconds that a worker looks for more requests before it sleeps, at most.",
)
@click.option(
    "--amplify",
    type=Size(0, MAX_AMPLIFY),
    default=DEFAULT_AMPLIFY,
    show_default=format_size(DEFAULT_AMPLIFY),
    help="Bytes a fetch may span.",
)
@click.option(
    "--connections", type=int, default=DEFAULT_CONNECTIONS, show_default=True, help="Fetches at once."
)
@click.option(
    "--prefetch-files",
    type=_FILE,
    help="Fetch the files that this list names before the guest asks (as `record` writes it).",
)
@click.option(
    "--prefetch",
    type=click.Choice(PREFETCHES),
    default="table",
    show_default=True,
    help="What else to fetch before the guest asks: what the image's own table names, or all of it.",
)
@click.option(
    "--fill",
    type=click.Choice(FILLS),
    default="never",
    show_default=True,
    help="When to fetch the rest of the image, after which it needs no registry any more.",
)
@click.option(
    "--fill-rate",
    type=Size(),
    default=0,
    show_default="what the link carries",
    help="Bytes per second of the fill.",
)
@click.option(
    "--spill-size",
    type=Size(MIN_SPILL_SIZE),
    default=DEFAULT_SPILL_SIZE,
    show_default=format_size(DEFAULT_SPILL_SIZE),
    help="Memory that stands in when the cache disk is missing or full.",
)
@click.option(
    "--sandbox",
    type=click.Choice(SANDBOXES),
    default="auto",
    show_default=True,
    help="Confine the daemon as far as the kernel can; strict: or do not start.",
)
@click.option(
    "--sandbox-allow",
    type=_PATH,
    multiple=True,
    help="Let credential helpers read and write here; may be repeated.",
)
@click.option("--keep", is_flag=True, help="Listen again when the VMM has gone, instead of ending.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
def serve(
    image: str,
    socket_path: Path,
    api_socket: Path | None,
    cache_dir: Path,
    cache_size: int,
    cache_nydusd: bool,
    no_cache: bool,
    blob_dir: Path | None,
    blob_source: BackendConfig | None,
    config_file: Path | None,
    pull: str,
    allow_unverified: bool,
    io_deadline: float,
    poll_us: int,
    amplify: int,
    connections: int,
    prefetch_files: Path | None,
    prefetch: str,
    fill: str,
    fill_rate: int,
    spill_size: int,
    sandbox: str,
    sandbox_allow: tuple[Path, ...],
    keep: bool,
    log_level: str,
    plain_http: bool,
    access: RegistryAccess | None,
) -> None:
    """Serve IMAGE to one VM over vhost-user until the VM ends.

    IMAGE is a registry reference (host/repository:tag[@digest]), or a bootstrap file with --blob-dir,
    --blob-source or --config.

    \b
    Example: virtiofsd-rafs serve registry.example/app:1 --socket-path rafs.sock
    """
    config = ServeConfig(
        image=image,
        socket_path=socket_path,
        api_socket=api_socket or default_api_socket(socket_path),
        cache_dir=None if no_cache else cache_dir,
        cache_size=0 if no_cache else cache_size,
        cache_nydusd=cache_nydusd and not no_cache,
        blob_dir=blob_dir,
        blob_source=blob_source,
        config_file=config_file,
        read_paths=paths_in_config_file(),
        pull=pull,  # type: ignore[arg-type]  # click has checked the choice
        io_deadline_s=io_deadline,
        poll_us=poll_us,
        plain_http=plain_http,
        registry=access,
        allow_unverified=allow_unverified,
        log_level=log_level,  # type: ignore[arg-type]  # click has checked the choice
        sandbox=sandbox,  # type: ignore[arg-type]  # click has checked the choice
        sandbox_allow=sandbox_allow,
        keep=keep,
        amplify=amplify,
        connections=connections,
        prefetch_files=prefetch_files and prefetch_files.absolute(),
        prefetch=prefetch,  # type: ignore[arg-type]  # click has checked the choice
        fill=fill,  # type: ignore[arg-type]  # click has checked the choice
        fill_rate=fill_rate,
        spill_size=spill_size,
    )
    from virtiofsd_rafs.runtime.serve import serve as run

    sys.exit(run(config))
