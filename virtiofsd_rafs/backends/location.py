"""``--blob-source URL``: one line that says where blobs are.

The spellings are those that other tools made common: ``s3://`` of AWS's tools with the query of Go CDK and
Arrow (``?region=&endpoint=``), ``oss://`` of ossutil, ``http+unix://`` of docker's clients, ``oci://`` of
Helm and Flux, ``docker://`` of skopeo. A path in an object store is a folder. Credentials have no place in a
URL, which is seen by everybody who lists processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from virtiofsd_rafs.backends.config import (
    BackendConfig,
    HttpProxyBackend,
    LocalBackend,
    OssBackend,
    RegistryBackend,
    S3Backend,
)
from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

SPELLINGS = (
    "file:///DIR, s3://BUCKET/FOLDER?region=&endpoint=, oss://BUCKET/FOLDER?endpoint=, http(s)://HOST/PATH, "
    "http+unix:///SOCKET, oci://HOST/REPOSITORY"
)


def parse_blob_source(text: str, *, plain_http: bool = False) -> BackendConfig:
    """The back-end that *text* names. Raises ConfigError.

    *plain_http* concerns registries alone: other schemes say it themselves.
    """
    if not text or any(ord(c) <= 0x20 or ord(c) == 0x7F for c in text):
        raise ConfigError("the blob source is empty or has white space in it", remedy=f"write {SPELLINGS}")
    if text.startswith(("/", "./", "../")):
        return LocalBackend(dirs=(Path(text),))
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as e:
        raise ConfigError("the blob source is no URL", remedy=f"write {SPELLINGS}") from e
    if "@" in parts.netloc:
        raise ConfigError(
            "the blob source has a user in it, which everybody sees who lists processes",
            remedy="credentials go into the environment or the file of --config",
        )
    if parts.fragment:
        raise ConfigError("the blob source has a '#' in it", remedy="write %23 for one that is meant")
    if "://" not in text:
        # host:port/repository looks like a scheme to urlsplit.
        return _registry(text, plain_http=plain_http)
    match parts.scheme:
        case "file":
            return _directory(parts)
        case "s3":
            return _s3(parts)
        case "oss":
            return _oss(parts)
        case "http" | "https":
            _query(parts, ())
            return HttpProxyBackend(
                addr=f"{parts.scheme}://{parts.netloc}", path=unquote(parts.path).rstrip("/")
            )
        case "http+unix" | "unix":
            return _unix(parts)
        case "oci" | "docker":
            _query(parts, ())
            return _registry(parts.netloc + parts.path, plain_http=plain_http)
    raise ConfigError(f"no blob source is called {parts.scheme[:20]}://", remedy=f"write {SPELLINGS}")


def _query(parts: SplitResult, known: Collection[str]) -> dict[str, str]:
    """The query by name. Raises ConfigError for a name that is not *known*, or that is there twice."""
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as e:
        raise ConfigError(
            f"the query of the {parts.scheme}:// blob source is malformed", remedy="write ?name=value&..."
        ) from e
    for name, value in pairs:
        if name not in known:
            fitting = f"known are {', '.join(known)}" if known else "there are none"
            raise ConfigError(
                f"a {parts.scheme}:// blob source has no parameter {name[:40]!r} ({fitting})",
                remedy="secrets go into the environment or the file of --config",
            )
        if name in found:
            raise ConfigError(f"parameter {name} of the blob source is there twice", remedy="remove one")
        found[name] = value
    return found


def _directory(parts: SplitResult) -> LocalBackend:
    _query(parts, ())
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"file://{parts.netloc}... names a host", remedy="write file:///DIR, with three slashes"
        )
    return LocalBackend(dirs=(Path(unquote(parts.path) or "/"),))


def _folder(path: str) -> str:
    """The prefix of all keys in *path*, which begins with '/' or is empty."""
    folder = unquote(path)[1:]
    return folder if not folder or folder.endswith("/") else folder + "/"


def _endpoint(query: dict[str, str]) -> tuple[str, str]:
    """Scheme and host of the endpoint, which may be written with or without a scheme."""
    endpoint = query.get("endpoint", "").rstrip("/")
    scheme, separator, host = endpoint.partition("://")
    if not separator:
        return query.get("scheme", "https"), endpoint
    return query.get("scheme", scheme), host


def _s3(parts: SplitResult) -> S3Backend:
    query = _query(parts, ("region", "endpoint", "scheme", "path_style", "profile"))
    scheme, host = _endpoint(query)
    style = query.get("path_style")
    if style not in (None, "true", "false"):
        raise ConfigError(f"path_style is {style[:20]!r}", remedy="use true or false")
    return S3Backend(
        bucket=parts.netloc,
        prefix=_folder(parts.path),
        region=query.get("region", ""),
        endpoint=host,
        scheme=scheme,  # type: ignore[arg-type]  # checked by the class
        path_style=None if style is None else style == "true",
        profile=query.get("profile", ""),
    )


def _oss(parts: SplitResult) -> OssBackend:
    query = _query(parts, ("endpoint", "region", "scheme", "signature"))
    scheme, host = _endpoint(query)
    if not host:
        region = query.get("region")
        if not region:
            raise ConfigError(
                "an oss:// blob source needs an endpoint or a region",
                remedy="add ?endpoint=oss-cn-hangzhou.aliyuncs.com",
            )
        host = f"oss-{region}.aliyuncs.com"
    return OssBackend(
        bucket=parts.netloc,
        prefix=_folder(parts.path),
        endpoint=host,
        region=query.get("region", ""),
        scheme=scheme,  # type: ignore[arg-type]  # checked by the class
        signature=query.get("signature", "auto"),  # type: ignore[arg-type]  # checked by the class
    )


def _unix(parts: SplitResult) -> HttpProxyBackend:
    """``http+unix:///path/of/socket?path=/a``, or ``http+unix://%2Fpath%2Fof%2Fsocket/a``."""
    query = _query(parts, ("path",))
    if parts.netloc:
        return HttpProxyBackend(
            addr=unquote(parts.netloc), path=query.get("path", unquote(parts.path)).rstrip("/")
        )
    return HttpProxyBackend(addr=unquote(parts.path), path=query.get("path", "").rstrip("/"))


def _registry(name: str, *, plain_http: bool) -> RegistryBackend:
    from virtiofsd_rafs.registry.reference import parse_reference

    try:
        reference = parse_reference(name)
    except ConfigError as e:
        raise ConfigError(
            f"the blob source {name[:80]!r} is no place: {e}", remedy=f"write {SPELLINGS}"
        ) from e
    return RegistryBackend(
        host=reference.host, repository=reference.repository, scheme="http" if plain_http else "https"
    )
