"""Where blobs come from: a registry, a directory, an object store, a web server.

The only modules that speak HTTP to the outside. ``open_source`` imports a back-end when it is first needed,
because aiohttp costs some 100 ms, botocore as much again, and the classes of the configuration some 10 ms.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.base import BlobSource, SourceConfig
    from virtiofsd_rafs.backends.config import BackendConfig
    from virtiofsd_rafs.image.resolve import ResolvedImage

B = TypeVar("B")

# By the class of the configuration.
_MODULES = {
    "RegistryBackend": "virtiofsd_rafs.backends.oci",
    "LocalBackend": "virtiofsd_rafs.backends.localdir",
    "S3Backend": "virtiofsd_rafs.backends.s3",
    "OssBackend": "virtiofsd_rafs.backends.oss",
    "HttpProxyBackend": "virtiofsd_rafs.backends.http_proxy",
}


def module_of(image: ResolvedImage, backend: BackendConfig | None = None) -> str:
    """The module that ``open_source`` will import: worth an executor, where an event loop runs."""
    if backend is not None:
        return _MODULES[type(backend).__name__]
    return _MODULES["LocalBackend" if image.reference is None else "RegistryBackend"]


def check_installed(backend: BackendConfig) -> None:
    """Raises ConfigError when *backend* needs packages that are not installed. Imports none of them."""
    from virtiofsd_rafs.backends.config import S3Backend

    if isinstance(backend, S3Backend) and find_spec("aiobotocore") is None:
        raise ConfigError(
            "S3 needs packages that are not installed", remedy="pip install 'virtiofsd-rafs[s3]'"
        )


def open_source(
    image: ResolvedImage,
    config: SourceConfig,
    backend: BackendConfig | None = None,
    reload: Callable[[], BackendConfig | None] | None = None,
) -> BlobSource:
    """The source of *image*'s blobs. Opens no connection yet; must be called where an event loop runs.

    Args:
        image: says where its blobs are, unless *backend* does.
        config: TLS and connections.
        backend: another place than the image's own.
        reload: what the configuration says now; asked when credentials were refused.

    Raises ConfigError for an image that names no place, or a back-end whose packages are not installed;
    AuthError when docker's config.json is unusable.
    """
    from virtiofsd_rafs.backends.config import (
        DEFAULT_FILE_TIMEOUT_S,
        TRIES_WITHIN_DEADLINE,
        HttpProxyBackend,
        LocalBackend,
        OssBackend,
        RegistryBackend,
        S3Backend,
    )

    if backend is not None:
        check_installed(backend)
    if isinstance(backend, S3Backend):
        from virtiofsd_rafs.backends.s3 import s3_source

        return s3_source(backend, config, _same_kind(reload, S3Backend))
    if isinstance(backend, OssBackend):
        from virtiofsd_rafs.backends.oss import oss_source

        return oss_source(backend, config, _same_kind(reload, OssBackend))
    if isinstance(backend, HttpProxyBackend):
        from virtiofsd_rafs.backends.http_proxy import HttpProxySource

        return HttpProxySource(backend, config, _same_kind(reload, HttpProxyBackend))
    if isinstance(backend, LocalBackend):
        from virtiofsd_rafs.backends.localdir import LocalDirSource

        timeout_s = min(backend.timeout_s, config.io_deadline_s / TRIES_WITHIN_DEADLINE)
        return LocalDirSource(backend.dirs, blob_file=backend.blob_file, timeout_s=timeout_s)
    registry = None
    if isinstance(backend, RegistryBackend):
        registry = backend.plus(config.access)
    elif image.reference is not None:
        registry = config.access.backend(image.reference)
    if registry is not None:
        from virtiofsd_rafs.backends.oci import OciSource

        return OciSource(
            registry,
            connections=config.connections,
            blob_sizes=image.blob_sizes,
            deadline_s=config.io_deadline_s,
            reload=_same_kind(reload, RegistryBackend) if backend is not None else None,
        )
    if image.blob_dir is not None:
        from virtiofsd_rafs.backends.localdir import LocalDirSource

        timeout_s = min(DEFAULT_FILE_TIMEOUT_S, config.io_deadline_s / TRIES_WITHIN_DEADLINE)
        return LocalDirSource(image.blob_dir, timeout_s=timeout_s)
    raise ConfigError(
        f"{image.name}: nothing tells where its blobs are", remedy="give --blob-dir or --blob-source"
    )


def _same_kind(
    reload: Callable[[], BackendConfig | None] | None, kind: type[B]
) -> Callable[[], B | None] | None:
    """*reload* for one kind of back-end: another kind is as good as none."""
    if reload is None:
        return None

    def again() -> B | None:
        fresh = reload()
        return fresh if isinstance(fresh, kind) else None

    return again
