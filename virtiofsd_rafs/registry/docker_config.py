"""Files with registry credentials: docker's config.json, and auth.json of podman, skopeo and buildah. No I/O.

Keys under ``auths`` are hosts or URLs; auth.json also has repositories and namespaces
(``host/namespace/repository``), of which the longest one that fits decides.

Source: docker/cli, config.json; containers-auth.json(5).
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.errors import AuthError
from virtiofsd_rafs.registry.auth import Credentials
from virtiofsd_rafs.registry.protocol import without_query
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

_HUB = "docker.io"
_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io")


@attrs.frozen
class DockerConfig:
    """What one file holds about registries."""

    auths: Mapping[str, Credentials] = attrs.field(factory=dict)
    """By ``host`` or ``host/path``."""
    helpers: Mapping[str, str] = attrs.field(factory=dict)
    default_helper: str | None = None
    path: str = "config.json"
    """The file, for messages."""

    def lookup(self, host: str, repository: str = "") -> Credentials | None:
        """The credentials for *repository* at *host*, as ``Reference`` names them."""
        key = f"{config_host(host)}/{repository}".rstrip("/")
        while key:
            found = self.auths.get(key)
            if found is not None:
                return found
            key = key.rpartition("/")[0]
        return None

    def helper(self, host: str) -> str | None:
        """The credential helper that is meant for *host* alone."""
        return self.helpers.get(config_host(host))


def parse_docker_config(data: bytes, path: str = "config.json") -> DockerConfig:
    """The registries in the file *path*. Entries without credentials (``{}``) count as none.

    Raises AuthError when it is no JSON object or an ``auth`` is no base64 of user:password. The message never
    shows the value.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        # Without the cause, whose text shows a part of the file.
        raise AuthError(f"{path} is no JSON", remedy="mend it, or log in again") from None
    if not isinstance(config, dict):
        raise AuthError(f"{path} is no JSON object", remedy="mend it, or log in again")
    auths: dict[str, Credentials] = {}
    for name, entry in _object(config.get("auths")).items():
        credentials = _credentials(name, _object(entry), path)
        if credentials is not None:
            # The first spelling of a host wins, as for docker.
            auths.setdefault(_auth_key(name), credentials)
    helpers = {
        config_host(k): v for k, v in _object(config.get("credHelpers")).items() if isinstance(v, str) and v
    }
    store = config.get("credsStore")
    return DockerConfig(auths, helpers, store if isinstance(store, str) and store else None, path)


def config_host(name: str) -> str:
    """The host in *name*, a key of such a file or a host; Docker Hub has many names."""
    host = re.sub(r"^https?://", "", name.strip().lower()).partition("/")[0]
    return _HUB if host in _HUB_HOSTS else host


def _auth_key(name: str) -> str:
    host = config_host(name)
    path = "" if "://" in name else name.strip().partition("/")[2].strip("/")
    # Old clients wrote the API's version behind the host.
    return host if path in ("", "v1", "v2") else f"{host}/{path}"


def _credentials(name: str, entry: dict[str, Any], path: str) -> Credentials | None:
    username, password = _text(entry.get("username")), _text(entry.get("password"))
    auth = _text(entry.get("auth"))
    if auth:
        try:
            username, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
        except ValueError:
            colon = ""
        if not colon:
            shown = without_query("//" + name)[2:]
            raise AuthError(
                f"{path}: `auth` of {shown!r} is no base64 of user:password", remedy="log in again"
            )
        password = password.rstrip("\0")
    identity = _text(entry.get("identitytoken"))
    if not password and not identity:
        return None
    return Credentials(username, Secret(password), Secret(identity) if identity else None)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
