"""What a built image is in a registry: the contents to push and the manifest that ties them.

The output of ``build`` is a directory with ``image.boot`` and one file per blob, named by its sha256. What is
pushed is what Nydus' own tools write: blob layers, then the bootstrap layer as the last one, marked by
annotations. The same input gives the same manifest digest.

Source: RAFS: OCI packaging.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.blob.c_blob import CI_HEADER_SIZE
from virtiofsd_rafs.blob.chunk_info import section_to_blob_meta
from virtiofsd_rafs.errors import ConfigError, DigestMismatch, NotFound
from virtiofsd_rafs.image.layer import pack_layer
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.registry.manifest import (
    ANNOTATION_BLOB,
    ANNOTATION_BLOB_IDS,
    ANNOTATION_BOOTSTRAP,
    ANNOTATION_FS_VERSION,
    ANNOTATION_UNCOMPRESSED,
    MAX_BOOTSTRAP_LEN,
    NYDUS_ARTIFACT,
    NYDUS_BLOB,
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    digest_of,
    host_architecture,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from virtiofsd_rafs.rafs.superblock import BlobEntry

BOOTSTRAP_FILE = "image.boot"
_PIECE = 1 << 20


@attrs.frozen
class Upload:
    """Content to push: *data*, or the file *path* when that is not None."""

    digest: str
    size: int
    data: bytes = attrs.field(default=b"", repr=False)
    path: Path | None = None

    @classmethod
    def of(cls, data: bytes) -> Upload:
        """An upload of *data*."""
        return cls(digest_of(data), len(data), data)


@attrs.frozen
class ImageParts:
    """All parts of an image, in the order in which they have to reach the registry; the manifest is last."""

    uploads: tuple[Upload, ...]
    manifest: bytes = attrs.field(repr=False)

    @property
    def digest(self) -> str:
        """The digest that pins this image."""
        return digest_of(self.manifest)


def assemble(out: Path) -> ImageParts:
    """The parts of the image that the build in *out* makes. Every blob is hashed; nothing is sent."""
    try:
        bootstrap = (out / BOOTSTRAP_FILE).read_bytes()
    except OSError as e:
        raise ConfigError(
            f"{out} is no build output: {BOOTSTRAP_FILE}: {e.strerror}",
            remedy="make it with `build DIR -o OUT`",
        ) from e
    if not 0 < len(bootstrap) <= MAX_BOOTSTRAP_LEN:
        raise ConfigError(f"{out / BOOTSTRAP_FILE} has {len(bootstrap)} bytes")
    entries = Tree.parse(bootstrap).blobs
    blobs = [_blob_upload(out / entry.blob_id) for entry in entries]
    metas = {e.blob_id: _blob_meta(out / e.blob_id, e) for e in entries if e.has_chunk_info}
    tar = pack_layer(bootstrap, metas)
    packed = _gzip(tar)
    config = _config(blobs, tar)
    manifest = _manifest(Upload.of(config), blobs, Upload.of(packed), tar)
    return ImageParts((*blobs, Upload.of(packed), Upload.of(config)), manifest)


def _blob_upload(path: Path) -> Upload:
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as f:
            while piece := f.read(_PIECE):
                sha256.update(piece)
                size += len(piece)
    except OSError as e:
        raise NotFound(f"blob {path} cannot be read: {e.strerror}", remedy="build the image again") from e
    if sha256.hexdigest() != path.name:
        raise DigestMismatch(f"{path} has the digest {sha256.hexdigest()}", remedy="build the image again")
    return Upload(f"sha256:{path.name}", size, path=path)


def _blob_meta(path: Path, entry: BlobEntry) -> bytes:
    """The blob's chunk map. The layer carries it, so that who mounts the image need not fetch it."""
    with path.open("rb") as f:
        f.seek(entry.record.ci_offset)
        section = f.read(entry.record.ci_compressed_size + CI_HEADER_SIZE)
    return section_to_blob_meta(entry, section)


def _gzip(data: bytes) -> bytes:
    """*data* as one gzip member without time and name, so that the same bytes come out each time."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflater.compress(data) + deflater.flush()
    trailer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08" + bytes(5) + b"\x00\xff" + body + trailer


def _config(blobs: Sequence[Upload], tar: bytes) -> bytes:
    """An image config; containerd wants one diff id per layer.

    A blob layer's is its own digest, as nydusify writes it.
    """
    return _json(
        {
            "architecture": host_architecture(),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [*(b.digest for b in blobs), digest_of(tar)]},
        }
    )


def _manifest(config: Upload, blobs: Sequence[Upload], layer: Upload, tar: bytes) -> bytes:
    layers = [_descriptor(NYDUS_BLOB, b, {ANNOTATION_BLOB: "true"}) for b in blobs]
    layers.append(
        _descriptor(
            OCI_LAYER_GZIP,
            layer,
            {
                ANNOTATION_BOOTSTRAP: "true",
                ANNOTATION_FS_VERSION: "6",
                ANNOTATION_BLOB_IDS: json.dumps(
                    [b.digest.partition(":")[2] for b in blobs], separators=(",", ":")
                ),
                ANNOTATION_UNCOMPRESSED: digest_of(tar),
            },
        )
    )
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": NYDUS_ARTIFACT,
            "config": _descriptor(OCI_CONFIG, config, {}),
            "layers": layers,
        }
    )


def _descriptor(media_type: str, content: Upload, annotations: Mapping[str, str]) -> dict[str, object]:
    descriptor: dict[str, object] = {"mediaType": media_type, "digest": content.digest, "size": content.size}
    if annotations:
        descriptor["annotations"] = dict(annotations)
    return descriptor


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
