"""``--blob-source URL``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.backends.config import (
    BackendConfig,
    HttpProxyBackend,
    LocalBackend,
    OssBackend,
    RegistryBackend,
    S3Backend,
)
from virtiofsd_rafs.backends.location import parse_blob_source
from virtiofsd_rafs.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "backend"),
    [
        ("file:///srv/blobs", LocalBackend(dirs=(Path("/srv/blobs"),))),
        ("file://localhost/a%20b", LocalBackend(dirs=(Path("/a b"),))),
        ("/srv/blobs", LocalBackend(dirs=(Path("/srv/blobs"),))),
        ("./blobs", LocalBackend(dirs=(Path("blobs"),))),
        ("s3://bucket", S3Backend(bucket="bucket")),
        ("s3://bucket/", S3Backend(bucket="bucket")),
        ("s3://bucket/a/b?region=eu-west-1", S3Backend(bucket="bucket", prefix="a/b/", region="eu-west-1")),
        ("s3://bucket/a%2Bb/?profile=p", S3Backend(bucket="bucket", prefix="a+b/", profile="p")),
        (
            "s3://bucket?endpoint=http://minio:9000/&path_style=false",
            S3Backend(bucket="bucket", endpoint="minio:9000", scheme="http", path_style=False),
        ),
        (
            "s3://bucket?endpoint=minio&scheme=http",
            S3Backend(bucket="bucket", endpoint="minio", scheme="http"),
        ),
        (
            "oss://bucket/x?endpoint=oss-cn-hangzhou-internal.aliyuncs.com",
            OssBackend(bucket="bucket", prefix="x/", endpoint="oss-cn-hangzhou-internal.aliyuncs.com"),
        ),
        (
            "oss://bucket?region=cn-hangzhou&signature=v1",
            OssBackend(
                bucket="bucket", endpoint="oss-cn-hangzhou.aliyuncs.com", region="cn-hangzhou", signature="v1"
            ),
        ),
        ("http://host:81/a/b/", HttpProxyBackend(addr="http://host:81", path="/a/b")),
        ("https://host", HttpProxyBackend(addr="https://host")),
        ("http+unix:///run/p.sock", HttpProxyBackend(addr="/run/p.sock")),
        ("http+unix:///run/p.sock?path=/a", HttpProxyBackend(addr="/run/p.sock", path="/a")),
        ("http+unix://%2Frun%2Fp.sock/a/b", HttpProxyBackend(addr="/run/p.sock", path="/a/b")),
        ("unix:///run/p.sock", HttpProxyBackend(addr="/run/p.sock")),
        ("oci://reg.example/a/b", RegistryBackend(host="reg.example", repository="a/b")),
        ("docker://reg.example/a/b", RegistryBackend(host="reg.example", repository="a/b")),
        ("reg.example:5000/a/b", RegistryBackend(host="reg.example:5000", repository="a/b")),
        ("localhost:5000/a", RegistryBackend(host="localhost:5000", repository="a")),
    ],
)
def test_spellings(url: str, backend: BackendConfig) -> None:
    assert parse_blob_source(url) == backend


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "empty"),
        ("s3://a b", "white space"),
        ("ftp://host/x", "no blob source is called ftp"),
        ("file://host/x", "names a host"),
        ("s3://bucket?regoin=x", "no parameter 'regoin'"),
        ("s3://bucket?region=x&region=y", "there twice"),
        ("s3://bucket?region", "malformed"),
        ("s3://bucket?path_style=maybe", "path_style"),
        ("s3://b", "bucket"),
        ("s3://bucket?region=EU!", "region"),
        ("s3://bucket?endpoint=host/path", "endpoint"),
        ("s3://bucket/a#b", "%23"),
        ("oss://bucket", "needs an endpoint"),
        ("oss://bucket?endpoint=x.example&signature=v2", "signature"),
        ("http://host/x?y=z", "no parameter 'y'"),
        ("http://[::1", "no URL"),
        ("https:///x", "no http"),
        ("http+unix://relative.sock", "neither a URL nor an absolute path"),
        ("oci://reg.example/UPPER", "no place"),
    ],
)
def test_errors(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as e:
        parse_blob_source(url)
    assert e.value.remedy


@pytest.mark.parametrize(
    "url", ["s3://id:hunter2@bucket", "https://me:hunter2@host/x", "oss://bucket?access_key_secret=hunter2"]
)
def test_no_credentials_in_it(url: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_blob_source(url)
    assert "hunter2" not in str(e.value)
    assert "--config" in e.value.remedy


SCHEMES = ["", "file://", "s3://", "oss://", "http://", "https://", "http+unix://", "unix://", "oci://"]


@given(st.sampled_from(SCHEMES), st.text(max_size=40))
def test_any_text(scheme: str, rest: str) -> None:
    try:
        parse_blob_source(scheme + rest)
    except ConfigError as e:
        remedy = e.remedy
        assert remedy
