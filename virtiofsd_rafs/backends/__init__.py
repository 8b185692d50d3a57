"""Where blobs come from: a registry, a directory, an object store, a web server.

The only modules that speak HTTP to the outside.

``open_source`` imports a back-end when it is first needed, because aiohttp costs some 100 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from virtiofsd_rafs.backends.base import BlobSource, SourceConfig
    from virtiofsd_rafs.image.resolve import ResolvedImage


def open_source(image: ResolvedImage, config: SourceConfig) -> BlobSource:
    """The source of *image*'s blobs. Opens no connection yet; must be called where an event loop runs.

    Raises ConfigError for an image that names no place, AuthError when docker's config.json is unusable.
    """
    if image.reference is not None:
        from virtiofsd_rafs.backends.oci import OciSource

        return OciSource(image.reference, config, image.blob_sizes)
    if image.blob_dir is not None:
        from virtiofsd_rafs.backends.localdir import LocalDirSource

        return LocalDirSource(image.blob_dir)
    raise ConfigError(f"{image.name}: nothing tells where its blobs are", remedy="give --blob-dir")
