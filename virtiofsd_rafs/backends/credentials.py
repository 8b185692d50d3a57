"""docker's config.json on disk: where every tool of the field looks for registry credentials."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from virtiofsd_rafs.errors import AuthError
from virtiofsd_rafs.registry.auth import DockerConfig, parse_docker_config

_log = logging.getLogger(__name__)
_MAX_CONFIG_LEN = 1 << 20


def config_path() -> Path | None:
    """``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``; None for a user without a home."""
    folder = os.environ.get("DOCKER_CONFIG")
    if folder:
        return Path(folder) / "config.json"
    try:
        return Path.home() / ".docker" / "config.json"
    except RuntimeError:
        return None


def load_docker_config() -> DockerConfig:
    """The user's credentials; empty when there is no file.

    Raises AuthError when there is one that cannot be used: going on anonymously would only hide the reason.
    """
    path = config_path()
    if path is None:
        return DockerConfig()
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_CONFIG_LEN + 1)
    except (FileNotFoundError, NotADirectoryError):
        return DockerConfig()
    except OSError as e:
        raise AuthError(f"{path} cannot be read: {e.strerror}", remedy="mend its permissions") from e
    if len(data) > _MAX_CONFIG_LEN:
        raise AuthError(
            f"{path} is longer than {_MAX_CONFIG_LEN} bytes", remedy="point DOCKER_CONFIG elsewhere"
        )
    _log.debug("registry credentials come from %s", path)
    return parse_docker_config(data)
