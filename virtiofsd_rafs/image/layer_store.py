"""Bootstrap layers in the content store, in the form that is quickest to start from."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from virtiofsd_rafs.image.layer import LayerFiles, decompress, extract_layer
from virtiofsd_rafs.registry.manifest import ANNOTATION_UNCOMPRESSED, MAX_BOOTSTRAP_LEN, digest_of
from virtiofsd_rafs.registry.reference import is_sha256

if TYPE_CHECKING:
    from virtiofsd_rafs.image.content import ContentStore
    from virtiofsd_rafs.registry.manifest import Descriptor


def stored_layer(store: ContentStore, descriptor: Descriptor) -> LayerFiles | None:
    """The bootstrap layer in the store.

    Where the manifest also promises the digest of the uncompressed tar, the tar itself is kept under that
    digest: hashing is ten times faster than inflating, and the chain of digests stays whole.
    """
    uncompressed = uncompressed_digest(descriptor)
    tar = store.get(uncompressed, limit=MAX_BOOTSTRAP_LEN) if uncompressed else None
    if tar is None:
        packed = store.get(descriptor.digest, limit=MAX_BOOTSTRAP_LEN)
        if packed is None:
            return None
        tar = decompress(io.BytesIO(packed))
    return extract_layer(tar)


def store_layer(store: ContentStore, descriptor: Descriptor, packed: bytes) -> LayerFiles:
    """Keeps the layer *packed*, which the caller has verified, in the form that ``stored_layer`` likes best.

    Raises BadImage before anything is kept when there is no bootstrap in it.
    """
    tar = decompress(io.BytesIO(packed))
    files = extract_layer(tar)
    uncompressed = uncompressed_digest(descriptor)
    # The annotation may come from a sloppy tool; the layer's own digest was right, so the image is served all
    # the same.
    if uncompressed and digest_of(tar) == uncompressed:
        store.put(uncompressed, tar)
    else:
        store.put(descriptor.digest, packed)
    return files


def uncompressed_digest(descriptor: Descriptor) -> str | None:
    """The digest of the layer's uncompressed tar, if its descriptor promises one."""
    digest = descriptor.annotations.get(ANNOTATION_UNCOMPRESSED, "")
    return digest if is_sha256(digest) else None
