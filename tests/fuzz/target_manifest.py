"""Invariant: any manifest, index, docker configuration or image name is understood or refused.

What is understood holds: digests are digests, sizes fit, and the bootstrap is the last layer.
"""

from __future__ import annotations

import json

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.image.content import _parse_record
from virtiofsd_rafs.registry import manifest as m
from virtiofsd_rafs.registry.docker_config import parse_docker_config
from virtiofsd_rafs.registry.reference import is_sha256, parse_reference


def _manifest(data: bytes, media_type: str) -> None:
    parsed = m.parse_manifest(data, media_type)
    if isinstance(parsed, m.Index):
        assert len(parsed.manifests) <= m.MAX_INDEX_ENTRIES
        for choice in m.choose_manifests(parsed, "amd64"):
            assert is_sha256(choice.digest)
        return
    assert len(parsed.layers) <= m.MAX_LAYERS
    assert all(is_sha256(x.digest) and 0 <= x.size < 1 << 63 for x in (parsed.config, *parsed.layers))
    layers = m.nydus_layers(parsed)
    if layers is not None:
        assert layers.bootstrap is parsed.layers[-1]
        assert all(len(blob) == 64 and blob.isalnum() for blob in layers.blob_sizes)


def _docker_config(data: bytes) -> None:
    config = parse_docker_config(data)
    for host in ("docker.io", "registry.example:5000", ""):
        config.lookup(host, "a/b")
        config.helper(host)


def _reference(data: bytes) -> None:
    reference = parse_reference(data.decode("utf-8", "replace"))
    assert parse_reference(str(reference)) == reference, "a name that changes when it is written down"
    assert reference.api_host
    assert reference.key


def run(data: bytes) -> None:
    """The first byte chooses the reader."""
    kind, data = data[:1], data[1:]
    try:
        match kind[0] % 6 if kind else 0:
            case 0:
                _manifest(data, "")
            case 1:
                _manifest(data, m.OCI_INDEX)
            case 2:
                _manifest(data, m.DOCKER_MANIFEST + "; charset=utf-8")
            case 3:
                _docker_config(data)
            case 4:
                _reference(data)
            case _:
                _parse_record(data)
    except VirtiofsdRafsError as e:
        _ = str(e)


def seeds() -> list[bytes]:
    """A manifest of a Nydus image, an index, a docker configuration, names."""

    def descriptor(digit: str, **more: object) -> dict[str, object]:
        return {"mediaType": m.NYDUS_BLOB, "digest": "sha256:" + digit * 64, "size": 7, **more}

    layers = [descriptor("1"), descriptor("2", annotations={m.ANNOTATION_BOOTSTRAP: "true"})]
    image = {"schemaVersion": 2, "mediaType": m.OCI_MANIFEST, "config": descriptor("3"), "layers": layers}
    platform = {"os": "linux", "architecture": "amd64", "os.features": [m.NYDUS_OS_FEATURE]}
    index = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": [descriptor("4", platform=platform)]}
    docker = {
        "auths": {"registry.example:5000": {"auth": "dXNlcjpwYXNz"}, "https://index.docker.io/v1/": {}},
        "credHelpers": {"a.example": "pass"},
        "credsStore": "x",
    }
    untyped = {name: value for name, value in image.items() if name != "mediaType"}
    documents = [(0, image), (0, index), (2, untyped), (3, docker), (5, {"name": "a", "digest": "b"})]
    names = [
        "busybox",
        "registry.example:5000/team/app:v1",
        "a/b@sha256:" + "5" * 64,
        "localhost/x:tag@sha256:" + "6" * 64,
        "[::1]:5000/a",
    ]
    return [
        *(bytes([kind]) + json.dumps(document).encode() for kind, document in documents),
        *(b"\x04" + name.encode() for name in names),
        b"\x00" + b"[" * 100_000,
    ]
