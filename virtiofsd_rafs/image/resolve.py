"""From what a user types to a verified bootstrap.

IMAGE is a bootstrap file, or a reference whose manifest leads to the bootstrap layer
(docs/adr/0005-trust-chain.md). A tag that is known in the cache starts without the network, and then neither
aiohttp nor asyncio is imported here: the coroutine never waits.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

from virtiofsd_rafs.errors import BadImage, ConfigError, NotFound, UnsupportedFeature
from virtiofsd_rafs.image.content import ContentStore
from virtiofsd_rafs.image.layer_store import stored_layer
from virtiofsd_rafs.registry.manifest import (
    MAX_BOOTSTRAP_LEN,
    MAX_MANIFEST_LEN,
    Descriptor,
    Index,
    Manifest,
    NydusLayers,
    choose_manifests,
    host_architecture,
    no_nydus_image,
    nydus_layers,
    parse_manifest,
)
from virtiofsd_rafs.registry.reference import Reference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtiofsd_rafs.backends.base import Renewable
    from virtiofsd_rafs.backends.config import RegistryAccess
    from virtiofsd_rafs.image.layer import LayerFiles

_log = logging.getLogger(__name__)

# What `build` calls the bootstrap.
BOOTSTRAP_NAME = "image.boot"

Pull = Literal["missing", "always", "never"]
# An index of indexes is allowed by the image-spec; more depth is a loop in disguise.
_MAX_INDEX_DEPTH = 2


@attrs.frozen
class ResolvedImage:
    """An image that can be served: its bootstrap, and where its blobs are.

    ``bootstrap`` was verified against its layer's digest when it comes from a registry; a bootstrap file is
    trusted as it is. ``blob_metas`` (blob id -> chunk map) and ``blob_sizes`` (blob id -> stored length) are
    what the image told; both may be empty. ``manifest_digest`` is the image manifest's, not that of an index
    around it.
    """

    name: str
    bootstrap: bytes = attrs.field(repr=False)
    blob_metas: Mapping[str, bytes] = attrs.field(factory=dict, repr=False)
    manifest_digest: str | None = None
    reference: Reference | None = None
    blob_dir: Path | None = None
    blob_sizes: Mapping[str, int] = attrs.field(factory=dict)


async def resolve_image(
    image: str,
    *,
    cache_dir: Path | None,
    blob_dir: Path | None,
    pull: Pull = "missing",
    plain_http: bool = False,
    access: RegistryAccess | None = None,
    deadline: float = 90.0,
    asking: Callable[[Renewable], None] = lambda _: None,
) -> ResolvedImage:
    """The image that *image* names.

    Args:
        image: path of a bootstrap (an existing file, anything that begins with ``/`` or ``.``, or a name that
            ends in ``.boot`` and has no tag), or a reference.
        cache_dir: where content and tags are kept; None keeps them in memory only.
        blob_dir: for a bootstrap file: where its blobs are; None: beside it.
        pull: ``missing`` asks the registry for what is not in the cache, ``always`` asks what the tag names
            now, ``never`` asks nothing. As docker's.
        plain_http: no TLS.
        access: how else to reach the registry, and its mirrors. A mirror is asked for a tag as well, and
            decides what the tag names then; a reference with a digest decides that itself.
        deadline: seconds to try again in while the registry is away. What trying again cannot cure ends at
            once.
        asking: told what takes new credentials, before the registry is asked.

    Raises:
        ConfigError: no path, no reference, or options that do not fit.
        NotFound, AuthError, Unreachable, ...: the registry does not deliver.
        ImageError: what it delivers is wrong.
    """
    if _is_file(image):
        return _read_file(Path(image), blob_dir)
    reference = parse_reference(image)
    if blob_dir is not None:
        raise ConfigError(
            f"--blob-dir goes with a bootstrap file, and there is no file {image}",
            remedy="leave it out for an image in a registry",
        )
    store = ContentStore(cache_dir)
    known = reference.digest or store.manifest_of(reference)
    if pull != "always" and known is not None:
        resolved = await _Walk(reference, _CachedContent(store)).resolve(known)
        if resolved is not None:
            return resolved
    if pull == "never":
        raise NotFound(
            f"{reference} is not in the cache, and --pull=never forbids to ask for it",
            remedy="use --pull=missing, or check --cache-dir",
        )
    from virtiofsd_rafs.backends.config import RegistryAccess
    from virtiofsd_rafs.image.pull import RemoteContent

    access = RegistryAccess.of(access, plain_http=plain_http)
    async with RemoteContent(store, reference, access=access, deadline_s=deadline) as remote:
        asking(remote.registry)
        walk = _Walk(reference, remote)
        if pull == "missing" and known is not None:
            # Damaged or cleared content of a known tag: what it named stays what it names.
            try:
                resolved = await walk.resolve(known)
            except NotFound:
                if reference.digest is not None:
                    raise
                _log.warning("%s is gone from the registry, asking for the tag again", known)
            else:
                assert resolved is not None
                return resolved
        target = reference.digest or await remote.digest_of_tag()
        resolved = await walk.resolve(target)
        assert resolved is not None
        if reference.tag is not None and reference.digest is None:
            store.remember(reference, target)
        return resolved


def _is_file(image: str) -> bool:
    """Is it a path? Raises ConfigError for the folder of a build."""
    # os.path.isfile says False where Path's raises: for a name that is too long to be a file's.
    if os.path.isfile(os.path.join(image, BOOTSTRAP_NAME)):
        raise ConfigError(
            f"{image} is a folder", remedy=f"name the bootstrap in it, {Path(image, BOOTSTRAP_NAME)}"
        )
    if image.startswith(("/", "./", "../")) or os.path.isfile(image):
        return True
    # Somebody who mistypes a file's name wants to hear that, and not what a registry far away thinks of it.
    return image.endswith(Path(BOOTSTRAP_NAME).suffix) and ":" not in image


def _read_file(path: Path, blob_dir: Path | None) -> ResolvedImage:
    try:
        with path.open("rb") as f:
            bootstrap = f.read(MAX_BOOTSTRAP_LEN + 1)
    except OSError as e:
        raise NotFound(
            f"the bootstrap {path} cannot be read: {e.strerror}",
            remedy="write host/repository:tag for a reference",
        ) from e
    if len(bootstrap) > MAX_BOOTSTRAP_LEN:
        raise BadImage("bootstrap", f"{path} is longer than {MAX_BOOTSTRAP_LEN} bytes")
    return ResolvedImage(name=str(path), bootstrap=bootstrap, blob_dir=blob_dir or path.parent)


class Content(Protocol):
    """Where manifests and layers come from; None = not there, and nobody to ask."""

    async def manifest(self, digest: str) -> bytes | None:
        """The verified manifest or index called *digest*."""
        ...

    async def layer(self, descriptor: Descriptor) -> LayerFiles | None:
        """What is in the verified bootstrap layer."""
        ...


class _CachedContent:
    """Content from the store alone. Its coroutines never wait."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    async def manifest(self, digest: str) -> bytes | None:
        return self._store.get(digest, limit=MAX_MANIFEST_LEN)

    async def layer(self, descriptor: Descriptor) -> LayerFiles | None:
        return stored_layer(self._store, descriptor)


class _Walk:
    """The way from a manifest digest to the image, over whatever *content* offers."""

    def __init__(self, reference: Reference, content: Content) -> None:
        self._reference = reference
        self._content = content

    async def resolve(self, digest: str) -> ResolvedImage | None:
        """The image; None when the content has not all of it."""
        found = await self._find(digest, depth=0)
        if found is None:
            return None
        manifest_digest, layers = found
        files = await self._content.layer(layers.bootstrap)
        if files is None:
            return None
        return ResolvedImage(
            name=str(self._reference),
            bootstrap=files.bootstrap,
            blob_metas=files.blob_metas,
            manifest_digest=manifest_digest,
            reference=self._reference,
            blob_sizes=layers.blob_sizes,
        )

    async def _find(self, digest: str, *, depth: int) -> tuple[str, NydusLayers] | None:
        """Digest and layers of the first Nydus manifest at or below *digest*."""
        data = await self._content.manifest(digest)
        if data is None:
            return None
        parsed = parse_manifest(data)
        if isinstance(parsed, Manifest):
            layers = nydus_layers(parsed)
            if layers is None:
                raise no_nydus_image(str(self._reference))
            return digest, layers
        return await self._find_in_index(parsed, depth=depth)

    async def _find_in_index(self, index: Index, *, depth: int) -> tuple[str, NydusLayers] | None:
        if depth >= _MAX_INDEX_DEPTH:
            raise BadImage("index", f"nested deeper than {_MAX_INDEX_DEPTH}")
        reason: UnsupportedFeature | None = None
        for candidate in choose_manifests(index, host_architecture()):
            try:
                return await self._find(candidate.digest, depth=depth + 1)
            except UnsupportedFeature as e:
                reason = reason or e  # no Nydus image: the next one may be
        assert reason is not None
        raise reason
