"""OCI and docker manifests and indexes, and what a Nydus image looks like in them. Pure: bytes in, values
out.

Source: OCI image-spec 1.1 (manifest, index, descriptor); RAFS packaging: blob layers, then one bootstrap
layer as the last, marked by annotations; in an index a Nydus manifest is marked by ``artifactType``, in older
images by ``os.features``.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.errors import BadImage, DigestMismatch, UnsupportedFeature
from virtiofsd_rafs.registry.reference import is_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

# The distribution-spec's own limit for manifests.
MAX_MANIFEST_LEN = 4 << 20
# A bootstrap has a 32-bit block address space in use; more than this is no image but an attack.
MAX_BOOTSTRAP_LEN = 2 << 30
MAX_LAYERS = 512
MAX_INDEX_ENTRIES = 1024

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST))

OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_ARTIFACT = "application/vnd.nydus.image.manifest.v1+json"
NYDUS_OS_FEATURE = "nydus.remoteimage.v1"

ANNOTATION_BLOB = "containerd.io/snapshot/nydus-blob"
ANNOTATION_BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"
ANNOTATION_FS_VERSION = "containerd.io/snapshot/nydus-fs-version"
ANNOTATION_BLOB_IDS = "containerd.io/snapshot/nydus-reference-blob-ids"
ANNOTATION_UNCOMPRESSED = "containerd.io/uncompressed"

# Python's names of machines -> the names in images (GOARCH).
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
}


@attrs.frozen
class Descriptor:
    """A promise of content: *size* bytes whose sha256 is in *digest*."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    artifact_type: str = ""
    os: str = ""
    architecture: str = ""
    os_features: tuple[str, ...] = ()

    @property
    def hex(self) -> str:
        """The digest without ``sha256:``, which is also the blob id of a RAFS blob."""
        return self.digest.partition(":")[2]

    @property
    def is_nydus(self) -> bool:
        """Whether an index marks this manifest as a Nydus image."""
        return self.artifact_type == NYDUS_ARTIFACT or NYDUS_OS_FEATURE in self.os_features


@attrs.frozen
class Manifest:
    """An image manifest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = ""
    annotations: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Index:
    """A list of manifests, one per platform or kind."""

    manifests: tuple[Descriptor, ...]


@attrs.frozen
class NydusLayers:
    """What a RAFS mount needs from a manifest. ``blob_sizes``: blob id -> length in the registry."""

    bootstrap: Descriptor
    blob_sizes: Mapping[str, int]


def digest_of(data: bytes) -> str:
    """``sha256:`` and the hex digest of *data*."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def verify_digest(data: bytes, digest: str, what: str) -> None:
    """Raises DigestMismatch unless *data* is what *digest* promises."""
    got = digest_of(data)
    if got != digest:
        raise DigestMismatch(f"{what}: expected {digest}, got {got}")


def parse_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """The manifest or index in *data*. *media_type* (a Content-Type) decides where the document itself does
    not say.

    Raises BadImage with the field that is wrong, UnsupportedFeature for docker's schema 1.
    """
    if len(data) > MAX_MANIFEST_LEN:
        raise BadImage("manifest", f"longer than {MAX_MANIFEST_LEN} bytes")
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BadImage("manifest", "no JSON") from e
    if not isinstance(doc, dict):
        raise BadImage("manifest", "no JSON object")
    if doc.get("schemaVersion") != 2:
        raise UnsupportedFeature(
            "the manifest is not of schema version 2", remedy="push the image with a newer tool"
        )
    kind = _str(doc, "mediaType", "manifest") or media_type.partition(";")[0].strip()
    is_list = kind in (OCI_INDEX, DOCKER_LIST) or (
        kind not in (OCI_MANIFEST, DOCKER_MANIFEST) and "manifests" in doc
    )
    # A document that is both would mean one thing to us and another to the next reader (CVE-2021-41190).
    if is_list and ("layers" in doc or "config" in doc):
        raise BadImage("manifest", "an index with layers")
    if not is_list and "manifests" in doc:
        raise BadImage("manifest", "an image manifest with manifests")
    if is_list:
        return Index(_descriptors(doc, "manifests", MAX_INDEX_ENTRIES))
    return Manifest(
        config=_descriptor(doc.get("config"), "manifest.config"),
        layers=_descriptors(doc, "layers", MAX_LAYERS),
        artifact_type=_str(doc, "artifactType", "manifest"),
        annotations=_annotations(doc, "manifest"),
    )


def host_architecture() -> str:
    """This machine's architecture as images name it."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def choose_manifests(index: Index, architecture: str) -> list[Descriptor]:
    """The manifests of *index* worth trying on linux/*architecture*, the best first.

    Those marked as Nydus come first; unmarked ones may still be Nydus images (nydusify marks them only when
    it merges), so they follow in the order of the index. Raises UnsupportedFeature when there is none.
    """
    fitting = [m for m in index.manifests if m.os in ("", "linux") and m.architecture in ("", architecture)]
    if not fitting:
        offered = ", ".join(sorted({f"{m.os}/{m.architecture}" for m in index.manifests})) or "nothing"
        raise UnsupportedFeature(f"the image is not made for linux/{architecture}, but for {offered}")
    return sorted(fitting, key=lambda m: not m.is_nydus)


def nydus_layers(manifest: Manifest) -> NydusLayers | None:
    """The bootstrap layer and the blobs of *manifest*; None when it is no Nydus image.

    The bootstrap must be the last layer, as for Nydus' own tools: earlier ones are of intermediate images.
    Raises BadImage when the bootstrap layer promises more than MAX_BOOTSTRAP_LEN bytes.
    """
    if not manifest.layers or manifest.layers[-1].annotations.get(ANNOTATION_BOOTSTRAP) != "true":
        return None
    bootstrap = manifest.layers[-1]
    if bootstrap.size > MAX_BOOTSTRAP_LEN:
        raise BadImage("manifest.layers", f"the bootstrap layer has {bootstrap.size} bytes")
    blobs = {x.hex: x.size for x in manifest.layers[:-1] if x.annotations.get(ANNOTATION_BOOTSTRAP) != "true"}
    return NydusLayers(bootstrap, blobs)


def no_nydus_image(name: str) -> UnsupportedFeature:
    """The error for an image without a bootstrap layer."""
    return UnsupportedFeature(
        f"{name} has no RAFS bootstrap layer: it is a plain OCI image",
        remedy="build one with `virtiofsd-rafs build` and `push`, or convert it with nydusify",
    )


def _descriptors(doc: dict[str, Any], field: str, limit: int) -> tuple[Descriptor, ...]:
    items = doc.get(field)
    if not isinstance(items, list):
        raise BadImage(f"manifest.{field}", "not a list")
    if len(items) > limit:
        raise BadImage(f"manifest.{field}", f"more than {limit} entries")
    return tuple(_descriptor(item, f"manifest.{field}[{i}]") for i, item in enumerate(items))


def _descriptor(item: Any, where: str) -> Descriptor:
    if not isinstance(item, dict):
        raise BadImage(where, "no descriptor")
    digest = _str(item, "digest", where)
    if not is_sha256(digest):
        raise BadImage(f"{where}.digest", "not sha256: and 64 hex digits")
    size = item.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise BadImage(f"{where}.size", "no size")
    wanted = item.get("platform")
    platform = wanted if isinstance(wanted, dict) else {}
    features = platform.get("os.features")
    return Descriptor(
        media_type=_str(item, "mediaType", where),
        digest=digest,
        size=size,
        annotations=_annotations(item, where),
        artifact_type=_str(item, "artifactType", where),
        os=_str(platform, "os", f"{where}.platform"),
        architecture=_str(platform, "architecture", f"{where}.platform"),
        os_features=tuple(x for x in features if isinstance(x, str)) if isinstance(features, list) else (),
    )


def _annotations(item: dict[str, Any], where: str) -> dict[str, str]:
    annotations = item.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, dict) or not all(isinstance(v, str) for v in annotations.values()):
        raise BadImage(f"{where}.annotations", "not a map of strings")
    return annotations


def _str(item: dict[str, Any], field: str, where: str) -> str:
    value = item.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadImage(f"{where}.{field}", "not a string")
    return value
