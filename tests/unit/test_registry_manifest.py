"""Manifests and indexes: what a Nydus image looks like, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.errors import BadImage, DigestMismatch, ImageError, UnsupportedFeature
from virtiofsd_rafs.registry import manifest as m

D1, D2, D3 = ("sha256:" + c * 64 for c in "123")


def descriptor(digest: str = D1, size: int = 7, **more: Any) -> dict[str, Any]:
    return {"mediaType": "x", "digest": digest, "size": size, **more}


def image(*layers: dict[str, Any], **more: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": m.OCI_MANIFEST,
        "config": descriptor(),
        "layers": list(layers),
    }
    return json.dumps({**document, **more}).encode()


def index(*manifests: dict[str, Any], **more: Any) -> bytes:
    return json.dumps(
        {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": list(manifests), **more}
    ).encode()


def bootstrap(digest: str = D2, size: int = 100) -> dict[str, Any]:
    return descriptor(digest, size, annotations={m.ANNOTATION_BOOTSTRAP: "true"})


def test_a_nydus_manifest() -> None:
    parsed = m.parse_manifest(image(descriptor(D1, 11), bootstrap(D2)))
    assert isinstance(parsed, m.Manifest)
    layers = m.nydus_layers(parsed)
    assert layers is not None
    assert layers.bootstrap.digest == D2
    assert layers.blob_sizes == {"1" * 64: 11}


def test_only_the_last_layer_is_the_bootstrap() -> None:
    parsed = m.parse_manifest(image(bootstrap(D3), descriptor(D1, 11), bootstrap(D2)))
    assert isinstance(parsed, m.Manifest)
    layers = m.nydus_layers(parsed)
    assert layers is not None
    assert layers.bootstrap.digest == D2
    assert "3" * 64 not in layers.blob_sizes
    plain = m.parse_manifest(image(bootstrap(D2), descriptor(D1)))
    assert isinstance(plain, m.Manifest)
    assert m.nydus_layers(plain) is None


def test_a_manifest_without_layers_is_no_nydus_image() -> None:
    parsed = m.parse_manifest(image())
    assert isinstance(parsed, m.Manifest)
    assert m.nydus_layers(parsed) is None


def test_a_bootstrap_that_is_too_large_is_refused() -> None:
    parsed = m.parse_manifest(image(bootstrap(size=m.MAX_BOOTSTRAP_LEN + 1)))
    assert isinstance(parsed, m.Manifest)
    with pytest.raises(BadImage):
        m.nydus_layers(parsed)


def platform(arch: str, **more: Any) -> dict[str, Any]:
    return {"platform": {"os": "linux", "architecture": arch, **more}}


def test_the_marked_manifest_comes_first() -> None:
    parsed = m.parse_manifest(
        index(
            descriptor(D1, **platform("amd64")),
            descriptor(D3, **platform("arm64")),
            descriptor(D2, artifactType=m.NYDUS_ARTIFACT, **platform("amd64")),
        )
    )
    assert isinstance(parsed, m.Index)
    assert [x.digest for x in m.choose_manifests(parsed, "amd64")] == [D2, D1]
    assert [x.digest for x in m.choose_manifests(parsed, "arm64")] == [D3]


def test_older_images_are_marked_by_an_os_feature() -> None:
    parsed = m.parse_manifest(
        index(
            descriptor(D1, **platform("amd64")),
            descriptor(D2, **platform("amd64", **{"os.features": [m.NYDUS_OS_FEATURE]})),
        )
    )
    assert isinstance(parsed, m.Index)
    assert [x.digest for x in m.choose_manifests(parsed, "amd64")] == [D2, D1]


def test_another_platform_is_named() -> None:
    parsed = m.parse_manifest(index(descriptor(D1, **platform("s390x"))))
    assert isinstance(parsed, m.Index)
    with pytest.raises(UnsupportedFeature, match="linux/s390x"):
        m.choose_manifests(parsed, "amd64")


def test_the_content_type_decides_for_documents_without_one() -> None:
    assert isinstance(m.parse_manifest(image(mediaType=None), m.DOCKER_MANIFEST + "; charset=x"), m.Manifest)
    assert isinstance(m.parse_manifest(index(mediaType=None), ""), m.Index)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        image(layers="x"),
        image(layers=[1]),
        image(config=None),
        image(manifests=[]),
        index(layers=[]),
        image(descriptor("sha256:../../x")),
        image(descriptor("sha512:" + "0" * 128)),
        image(descriptor(size=-1)),
        image(descriptor(size=True)),
        image(descriptor(size=1 << 63)),
        image(descriptor(size="1")),
        image(descriptor(annotations={"a": 1})),
        image(descriptor(annotations=[])),
        image(descriptor(mediaType=7)),
        image(*[descriptor()] * (m.MAX_LAYERS + 1)),
        index(*[descriptor()] * (m.MAX_INDEX_ENTRIES + 1)),
        b" " * (m.MAX_MANIFEST_LEN + 1),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(BadImage):
        m.parse_manifest(data)


def test_schema_1_is_named() -> None:
    with pytest.raises(UnsupportedFeature):
        m.parse_manifest(b'{"schemaVersion": 1}')


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from([D1, m.OCI_INDEX, m.OCI_MANIFEST]),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["mediaType", "config", "layers", "manifests", "digest", "size", "annotations", "platform"]
            ),
            x,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_manifest_or_an_image_error(value: Any) -> None:
    document = {"schemaVersion": 2, **value} if isinstance(value, dict) else value
    try:
        m.parse_manifest(json.dumps(document).encode())
    except ImageError:
        return


def test_verify_digest() -> None:
    m.verify_digest(b"x", m.digest_of(b"x"), "it")
    with pytest.raises(DigestMismatch):
        m.verify_digest(b"y", m.digest_of(b"x"), "it")
