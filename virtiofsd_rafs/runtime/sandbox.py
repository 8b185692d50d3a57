"""What a daemon may still reach once it serves: the paths, out of its configuration.

The sandbox is put on before the keeper forks anything, so it holds for keeper, control and the credential
helpers that control starts; each worker puts a closer one on top (native/crates/sandbox, docs/adr).
Imported on the way of every start: little else is imported here.
"""

from __future__ import annotations

import os
import sys

from virtiofsd_rafs.cache.names import RECORD_SUFFIX
from virtiofsd_rafs.errors import TYPE_CHECKING, SandboxError, VirtiofsdRafsError
from virtiofsd_rafs.native import sandbox
from virtiofsd_rafs.native.sandbox import READ, REMOVE, RUN, WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from virtiofsd_rafs.cache.nydusd import Used
    from virtiofsd_rafs.config import ServeConfig

Allowed = tuple[bytes, str]

_RUN = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store")
# The resolver's files may be replaced while we run, so the folders that hold them.
_READ = (
    "/etc",
    "/proc",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/run/nscd",
    "/run/secrets",
    "/var/lib/ca-certificates",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
# Where credentials are; what helpers keep of theirs.
_HOME_READ = (".docker", ".config/containers")
_HOME_WRITE = (".aws", ".azure", ".config/gcloud", ".ecr", ".gnupg", ".password-store")
# Variables that name a file or a folder which is read.
_VARIABLES = (
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CA_BUNDLE",
    "AWS_DATA_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
# Too much is in there.
_NEVER_WHOLE = ("/", "/home", "/root", "/run", "/tmp", "/var")  # noqa: S108  (nothing is made there)


class Confined:
    """The sandbox that is in force: its mode, and ``parts`` of :func:`native.sandbox.confine`.

    ``foreign`` is what nydusds had open before: from inside, descriptors of others cannot be looked at.
    """

    __slots__ = ("foreign", "mode", "parts")

    def __init__(self, mode: str, parts: int, foreign: tuple[Used, ...]) -> None:
        self.mode = mode
        self.parts = parts
        self.foreign = foreign

    def status(self) -> dict[str, Any]:
        """For the status."""
        return {
            "mode": self.mode,
            "no_new_privileges": True,
            "capabilities_dropped": True,
            "seccomp": sandbox.has_seccomp(self.parts),
            "landlock_abi": sandbox.landlock_abi(self.parts),
            "complete": sandbox.is_whole(self.parts),
        }


def confine(config: ServeConfig) -> Confined | None:
    """Confine this process and its children, as *config* asks for; None: not at all. Raises SandboxError."""
    if config.sandbox == "none":
        return None
    strict = config.sandbox == "strict"
    if strict and not sandbox.is_whole(sandbox.available()):
        raise SandboxError(f"--sandbox strict: {_missing(sandbox.available())}", remedy=_REMEDY)
    _make_cache_dir(config)
    foreign = _used_by_nydusd(config)
    try:
        parts, why = sandbox.confine(list(allowed(config)))
    except VirtiofsdRafsError as e:
        raise SandboxError(f"the daemon cannot be confined: {e}", remedy="--sandbox none") from e
    if not sandbox.is_whole(parts):
        text = f"{_missing(parts)}{f': {why}' if why else ''}"
        if strict:
            raise SandboxError(f"--sandbox strict: {text}", remedy=_REMEDY)
        print(f"virtiofsd-rafs: warning: the sandbox is not complete: {text}", file=sys.stderr, flush=True)
    return Confined(config.sandbox, parts, foreign)


_REMEDY = (
    "it needs Linux 5.13 or later with seccomp and with landlock among CONFIG_LSM or lsm=, and a container "
    "runtime that allows both; --sandbox auto takes what there is"
)


def _missing(parts: int) -> str:
    missing = [] if sandbox.has_seccomp(parts) else ["seccomp filters"]
    if not sandbox.landlock_abi(parts):
        missing.append("Landlock")
    return f"the kernel lacks {' and '.join(missing)}"


def _used_by_nydusd(config: ServeConfig) -> tuple[Used, ...]:
    """What nydusds have open of the files in the cache that both know."""
    try:
        names = () if config.cache_dir is None else os.listdir(config.cache_dir)
    except OSError:
        return ()
    shared = [name.removesuffix(RECORD_SUFFIX) for name in names if name.endswith(RECORD_SUFFIX)]
    if not shared or config.cache_dir is None:
        return ()  # nearly always, and then nothing is imported
    from virtiofsd_rafs.cache.nydusd import users

    return tuple(users(config.cache_dir, shared))


def _make_cache_dir(config: ServeConfig) -> None:
    """It must exist to be allowed. If it cannot be made, control says why when it needs it."""
    if config.cache_dir is not None:
        try:
            config.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return


def allowed(config: ServeConfig) -> Iterator[Allowed]:
    """What the daemon may do with which paths, and all below them."""
    search = os.environ.get("PATH", "").split(os.pathsep)
    closed = _closed()
    for path in {*_RUN, sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, *search}:
        # Python adds the folder that it was started in, which may be a home.
        if os.path.isabs(path) and os.path.normpath(path) not in closed:
            yield RUN, path
    yield RUN, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this package
    for path in {*_READ, *_around(*_configured(config)), *_around(*_named_by_variables())}:
        yield READ, path
    for path in _DEVICES:
        yield WRITE, path
    home = os.environ.get("HOME") or os.path.expanduser("~")
    for name in _HOME_READ:
        yield READ, os.path.join(home, name)
    for name in _HOME_WRITE:
        yield WRITE, os.path.join(home, name)
    for folder in (config.cache_dir, *config.sandbox_allow):
        if folder is not None:
            yield WRITE, str(folder)
    for socket in (config.socket_path, config.api_socket):
        if socket is not None:
            yield REMOVE, os.path.dirname(socket) or "."


def _configured(config: ServeConfig) -> Iterator[str]:
    """Files and folders that options name."""
    if config.blob_dir is not None or config.config_file is not None or os.path.exists(config.image):
        yield config.image
    source: Any = config.blob_source
    access = config.registry
    for path in (
        config.blob_dir,
        config.config_file,
        config.prefetch_files,
        *config.read_paths,
        *getattr(source, "dirs", ()),
        getattr(source, "blob_file", None),
        *(getattr(getattr(source, "http", None), "ca_files", ())),
        *(() if access is None else (access.auth_file, *access.http.ca_files)),
    ):
        if path is not None:
            yield str(path)
            yield from _links_in(path)


def _links_in(path: Path) -> Iterator[str]:
    """Where the links in a folder point to now, if it is one: blobs may be kept elsewhere."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield os.path.realpath(entry.path)
    except OSError:
        return


def _named_by_variables() -> Iterator[str]:
    environment = os.environ
    yield from (path for name in _VARIABLES if (path := environment.get(name)))
    if base := environment.get("XDG_CONFIG_HOME"):
        yield os.path.join(base, "containers")
    runtime = environment.get("XDG_RUNTIME_DIR")
    yield os.path.join(runtime, "containers") if runtime else f"/run/containers/{os.getuid()}"


def _closed() -> set[str]:
    """Homes, and the top of the file system."""
    return {*_NEVER_WHOLE, os.path.expanduser("~"), os.path.normpath(os.environ.get("HOME", "/"))}


def _around(*paths: str) -> Iterator[str]:
    """The paths; with a file its folder, too, for it may be replaced while we run.

    Not what is closed: for the sake of one file nobody would open it.
    """
    closed = _closed()
    for path in paths:
        path = os.path.abspath(path)
        yield path
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(path):
            yield from {os.path.dirname(path), folder} - closed
