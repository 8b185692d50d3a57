"""What a simulated registry holds, and the images that tests put into it."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.image.layer import pack_layer
from virtiofsd_rafs.registry import manifest as m

if TYPE_CHECKING:
    from pathlib import Path


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Store:
    """Blobs by digest (one pool for all repositories), manifests by repository and tag or digest."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}

    def add_blob(self, data: bytes) -> str:
        digest = sha256(data)
        self.blobs[digest] = data
        return digest

    def add_manifest(
        self, repository: str, tag: str | None, document: dict[str, Any] | bytes, kind: str = m.OCI_MANIFEST
    ) -> str:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = sha256(data)
        for name in filter(None, (tag, digest)):
            self.manifests[repository, name] = (data, kind)
        return digest

    def add_image(
        self,
        repository: str,
        tag: str | None,
        bootstrap: bytes,
        blobs: list[bytes],
        *,
        metas: dict[str, bytes] | None = None,
        tar: bytes | None = None,
        compress: bool = True,
        annotate_uncompressed: bool = True,
        artifact_type: str = m.NYDUS_ARTIFACT,
    ) -> str:
        """A Nydus image; returns the manifest's digest. *tar* replaces the bootstrap layer's content."""
        tar = pack_layer(bootstrap, metas or {}) if tar is None else tar
        layer = gzip.compress(tar, mtime=0) if compress else tar
        annotations = {m.ANNOTATION_BOOTSTRAP: "true", m.ANNOTATION_FS_VERSION: "6"}
        if annotate_uncompressed:
            annotations[m.ANNOTATION_UNCOMPRESSED] = sha256(tar)
        layers = [self._layer(m.NYDUS_BLOB, b, {m.ANNOTATION_BLOB: "true"}) for b in blobs]
        layers.append(self._layer(m.OCI_LAYER_GZIP, layer, annotations))
        document = {
            "schemaVersion": 2,
            "mediaType": m.OCI_MANIFEST,
            "config": self._layer(m.OCI_CONFIG, b'{"architecture":"amd64","os":"linux"}', {}),
            "layers": layers,
        }
        if artifact_type:
            document["artifactType"] = artifact_type
        return self.add_manifest(repository, tag, document)

    def add_build(self, repository: str, tag: str, out: Path) -> str:
        """The image that `virtiofsd-rafs build` left in *out*, exactly as `push` would write it."""
        from virtiofsd_rafs.image.assemble import assemble

        parts = assemble(out)
        for upload in parts.uploads:
            self.blobs[upload.digest] = upload.data if upload.path is None else upload.path.read_bytes()
        return self.add_manifest(repository, tag, parts.manifest)

    def _layer(self, kind: str, data: bytes, annotations: dict[str, str]) -> dict[str, Any]:
        return {
            "mediaType": kind,
            "digest": self.add_blob(data),
            "size": len(data),
            "annotations": annotations,
        }
