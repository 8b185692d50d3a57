"""What a daemon can be told, checked, and the only place where defaults live.

Sizes are bytes, times seconds (``_s``). A field's name is also its spelling on the command line, in the
environment and in metrics.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import attrs

from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.sockets import api_beside

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.config import BackendConfig, RegistryAccess

# The back-end stands in the file of --config, which only control reads: it may hold credentials.
IN_CONFIG_FILE: Literal["config-file"] = "config-file"
BlobSource = Union["BackendConfig", Literal["config-file"]]

Pull = Literal["missing", "always", "never"]
LogLevel = Literal["debug", "info", "warning", "error"]
Prefetch = Literal["table", "none", "all"]
Fill = Literal["after-start", "never", "now"]
Sandbox = Literal["auto", "strict", "none"]

PULLS: tuple[Pull, ...] = ("missing", "always", "never")
LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
PREFETCHES: tuple[Prefetch, ...] = ("table", "none", "all")
FILLS: tuple[Fill, ...] = ("after-start", "never", "now")
SANDBOXES: tuple[Sandbox, ...] = ("auto", "strict", "none")

KIB = 1 << 10
MIB = 1 << 20

# Below the guest's hung-task limit of 120 s, so that a request fails with EIO before its kernel complains.
DEFAULT_IO_DEADLINE_S = 90.0
MAX_IO_DEADLINE_S = 3600.0
DEFAULT_POLL_US = 50
MAX_POLL_US = 1_000_000
# nydusd's amplify_io: about what a link of 30 Mbit/s carries in a third of a second.
DEFAULT_AMPLIFY = 1 * MIB
MAX_AMPLIFY = 64 * MIB
# 32 random readers of small chunks over 100 Mbit/s and 50 ms: 31 s with 1, 4.4 s with 8, 2.5 s with 16; over
# 30 Mbit/s and 20 ms more than 16 are slower again (docs/benchmarks.md). A boot uses four.
DEFAULT_CONNECTIONS = 16
MAX_CONNECTIONS = 256
# Memory that stands in without a cache disk: twice what a guest can ask for at once (32 requests of 1 MiB).
DEFAULT_SPILL_SIZE = 64 * MIB
MIN_SPILL_SIZE = 32 * MIB
# Less could not hold what a guest may ask for at once.
MIN_CACHE_SIZE = 16 * MIB
# Back-off between tries of a fetch: the first pause, doubling up to the cap. A source that comes back is
# noticed within the cap, which keeps an outage of 60 s well inside the deadline.
DEFAULT_RETRY_FIRST_S = 0.2
DEFAULT_RETRY_CAP_S = 4.0


def default_cache_dir() -> Path:
    """Where blobs are cached when nobody says: the system's cache for root, else the user's."""
    if os.geteuid() == 0:
        return Path("/var/cache/virtiofsd-rafs")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "virtiofsd-rafs"


def default_api_socket(socket_path: Path) -> Path:
    """Where the API listens when nobody says: beside the vhost-user socket."""
    return Path(api_beside(str(socket_path)))


def _one_of(*allowed: str) -> Callable[[object, attrs.Attribute[str], str], None]:
    def check(_: object, field: attrs.Attribute[str], value: str) -> None:
        if value not in allowed:
            raise ConfigError(f"{field.name} is {value!r}", remedy=f"use one of {', '.join(allowed)}")

    return check


def _between(low: float, high: float) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, field: attrs.Attribute[Any], value: Any) -> None:
        if not low <= value <= high:
            raise ConfigError(f"{field.name} is {value}", remedy=f"it must be between {low} and {high}")

    return check


@attrs.frozen(kw_only=True)
class ServeConfig:
    """One daemon that serves one image to one VM. Raises ConfigError for a value out of its range."""

    image: str
    """Reference (``host/repository:tag``) or path of a bootstrap file."""
    socket_path: Path | None = None
    """The vhost-user socket to bind; None when a listening descriptor was inherited."""
    api_socket: Path
    cache_dir: Path | None = None
    """None: no disk, memory only."""
    cache_size: int = attrs.field(default=0, validator=_between(0, 1 << 62))
    """Most bytes that the blobs in ``cache_dir`` may use on the disk, whoever stored them; 0: no limit."""
    cache_nydusd: bool = False
    """Keep the cache readable for nydusd, which rules out that parts of it are evicted."""
    blob_dir: Path | None = None
    blob_source: BlobSource | None = None
    """Where the blobs are, whatever the image says; None: where the image comes from."""
    config_file: Path | None = None
    """nydusd's configuration, from which other fields come; read again when credentials are refused."""
    read_paths: tuple[Path, ...] = ()
    """Files and folders that ``config_file`` names for reading."""
    pull: Pull = attrs.field(default="missing", validator=_one_of(*PULLS))
    io_deadline_s: float = attrs.field(
        default=DEFAULT_IO_DEADLINE_S, converter=float, validator=_between(1.0, MAX_IO_DEADLINE_S)
    )
    """How long a guest's request may wait for its data before it fails with EIO."""
    poll_us: int = attrs.field(default=DEFAULT_POLL_US, validator=_between(0, MAX_POLL_US))
    """How long a worker looks for more requests before it sleeps, at most; 0: it sleeps at once."""
    plain_http: bool = False
    """Speak http to the registry."""
    registry: RegistryAccess | None = None
    """Mirrors, proxy, certificates and credentials of registries; None: nothing special."""
    allow_unverified: bool = False
    """Serve images that have no digest for some of their chunks."""
    log_level: LogLevel = attrs.field(default="info", validator=_one_of(*LOG_LEVELS))
    keep: bool = False
    """Listen again when the VMM has gone."""
    amplify: int = attrs.field(default=DEFAULT_AMPLIFY, validator=_between(0, MAX_AMPLIFY))
    """Compressed bytes that one fetch may span beyond what was asked for; 0: no read-ahead."""
    connections: int = attrs.field(default=DEFAULT_CONNECTIONS, validator=_between(1, MAX_CONNECTIONS))
    """Fetches at once."""
    prefetch_files: Path | None = None
    """A list of files to fetch after the mount, before anybody asks."""
    prefetch: Prefetch = attrs.field(default="table", validator=_one_of(*PREFETCHES))
    """What else: what the image's own table names, nothing, or the whole image."""
    fill: Fill = attrs.field(default="never", validator=_one_of(*FILLS))
    """When the rest of the image is fetched: most guests use a small part of it, so never, unless asked."""
    fill_rate: int = attrs.field(default=0, validator=_between(0, 1 << 40))
    """Bytes per second of the fill; 0: what the link carries."""
    sandbox: Sandbox = attrs.field(default="auto", validator=_one_of(*SANDBOXES))
    """Confine the daemon as far as the kernel can, refuse to start when that is not all, or do not."""
    sandbox_allow: tuple[Path, ...] = ()
    """What credential helpers read and write beside the usual places."""
    spill_size: int = attrs.field(default=DEFAULT_SPILL_SIZE, validator=_between(MIN_SPILL_SIZE, 1 << 40))
    retry_first_s: float = attrs.field(default=DEFAULT_RETRY_FIRST_S, validator=_between(0.001, 60.0))
    retry_cap_s: float = attrs.field(default=DEFAULT_RETRY_CAP_S, validator=_between(0.001, 60.0))

    def __attrs_post_init__(self) -> None:
        if 0 < self.cache_size < MIN_CACHE_SIZE:
            raise ConfigError(
                f"cache_size is {self.cache_size}",
                remedy=f"it must be 0 (no limit) or at least {MIN_CACHE_SIZE}",
            )
        if self.cache_size and self.cache_nydusd:
            raise ConfigError(
                "cache_size and cache_nydusd exclude each other: nydusd believes that what was stored stays",
                remedy="leave one of them out",
            )
        ahead = self.fill != "never" or self.prefetch == "all" or self.prefetch_files is not None
        if ahead and self.connections < 2:
            raise ConfigError(
                "connections is 1, and one is always free for what the guest waits for",
                remedy="at least 2 for prefetch and fill",
            )
        if self.fill != "never" and self.cache_dir is None:
            raise ConfigError("fill needs a disk", remedy="give --cache-dir instead of --no-cache")

    @property
    def access(self) -> RegistryAccess:
        """How registries are reached. Not for the way to a cached image: the import costs 10 ms."""
        from virtiofsd_rafs.backends.config import RegistryAccess

        return RegistryAccess.of(self.registry, plain_http=self.plain_http)
