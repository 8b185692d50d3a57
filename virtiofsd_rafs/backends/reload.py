"""The configuration file on disk: read at the start, and again when credentials were refused."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.backends.config import RegistryBackend
from virtiofsd_rafs.config_file import MAX_LEN, FileConfig, parse
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from virtiofsd_rafs.backends.config import BackendConfig

_log = logging.getLogger(__name__)

# nydusd takes a registry's ``auth`` from here rather than from the file.
AUTH_VARIABLE = "IMAGE_PULL_AUTH"


def load_config_file(path: Path, environment: Mapping[str, str] = os.environ) -> FileConfig:
    """What the file at *path* says. Raises ConfigError."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_LEN + 1)
    except OSError as e:
        raise ConfigError(f"--config {path}: {e.strerror}", remedy="check its name and permissions") from e
    try:
        parsed = parse(data)
    except ConfigError as e:
        raise ConfigError(f"--config {path}: {e.message}", remedy=e.remedy) from None
    auth = environment.get(AUTH_VARIABLE)
    if auth and isinstance(parsed.backend, RegistryBackend):
        parsed = attrs.evolve(parsed, backend=attrs.evolve(parsed.backend, auth=Secret(auth)))
    return parsed


def backend_in(path: Path) -> BackendConfig | None:
    """The back-end that the file names now; None when the file cannot be used at the moment."""
    try:
        return load_config_file(path).backend
    except ConfigError as e:
        _log.warning("%s", e)
        return None
