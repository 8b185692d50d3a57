"""nydusd's configuration: what it says, what is warned of, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from virtiofsd_rafs.backends.config import (
    HttpOptions,
    HttpProxyBackend,
    LocalBackend,
    Mirror,
    OssBackend,
    ProxyOptions,
    RegistryBackend,
    S3Backend,
)
from virtiofsd_rafs.backends.reload import load_config_file
from virtiofsd_rafs.config_file import MAX_LEN, FileConfig, parse
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

# As nydus-snapshotter writes it for a registry.
SNAPSHOTTER = {
    "device": {
        "backend": {
            "type": "registry",
            "config": {
                "readahead": False,
                "host": "reg.example:5000",
                "repo": "library/app",
                "auth": "bWU6aHVudGVyMg==",
                "scheme": "https",
                "proxy": {"fallback": False},
                "timeout": 7,
                "connect_timeout": 3,
                "retry_limit": 2,
                "skip_verify": True,
                "ca_cert_files": ["/etc/a.pem", "/etc/b.pem"],
            },
        },
        "cache": {
            "type": "blobcache",
            "config": {"work_dir": "/var/lib/cache", "disable_indexed_map": False},
        },
    },
    "mode": "direct",
    "digest_validate": False,
    "iostats_files": False,
    "enable_xattr": True,
    "amplify_io": 262144,
    "fs_prefetch": {"enable": True, "threads_count": 8, "merging_size": 1048576, "prefetch_all": True},
    "id_mapping": ["0", "1000", "10"],
}

TOML = """
version = 2
id = "mine"
[backend]
type = "localfs"
[backend.localfs]
dir = "/tmp/blobs"
alt_dirs = ["/mnt/nas"]
[backend.oss]
bucket_name = "not-used"
[cache]
type = "filecache"
[cache.filecache]
work_dir = "cache"
[cache.prefetch]
enable = true
bandwidth_limit = 1000000
[rafs]
mode = "direct"
batch_size = 0
"""


def read(document: Any) -> FileConfig:
    return parse(json.dumps(document).encode())


def v1(kind: str, **settings: Any) -> dict[str, Any]:
    return {"device": {"backend": {"type": kind, "config": settings}}, "mode": "direct"}


def v2(kind: str, **settings: Any) -> dict[str, Any]:
    return {"version": 2, "backend": {"type": kind, kind: settings}}


def test_what_the_snapshotter_writes() -> None:
    config = read(SNAPSHOTTER)
    assert config.backend == RegistryBackend(
        host="reg.example:5000",
        repository="library/app",
        auth=Secret("bWU6aHVudGVyMg=="),
        http=HttpOptions(
            ca_files=(Path("/etc/a.pem"), Path("/etc/b.pem")),
            skip_verify=True,
            timeout_s=7.0,
            connect_timeout_s=3.0,
        ),
    )
    assert config.options() == {
        "cache_dir": Path("/var/lib/cache"),
        "amplify": 262144,
        "prefetch": "all",
    }
    assert config.warnings == (
        "device.backend.config.readahead is no key of nydusd's: ignored",
        "id_mapping is no key of nydusd's: ignored",
    )
    assert "enable_xattr" in config.ignored
    assert "device.backend.config.retry_limit" in config.ignored
    assert "aHVudGVyMg" not in repr(config)


def test_toml() -> None:
    config = parse(TOML.encode())
    assert config.backend == LocalBackend(dirs=(Path("/tmp/blobs"), Path("/mnt/nas")))
    assert config.options() == {
        "cache_dir": Path("cache"),
        "amplify": 0,
        "prefetch": "table",
        "fill": "after-start",
        "fill_rate": 1_000_000,
    }
    assert config.warnings == ()
    assert "backend.oss" in config.ignored


@pytest.mark.parametrize("version", [v1, v2])
def test_kinds(version: Any) -> None:
    assert read(version("localfs", blob_file="/b")).backend == LocalBackend(dirs=(), blob_file=Path("/b"))
    assert read(version("http-proxy", addr="/run/p.sock", path="/x/")).backend == HttpProxyBackend(
        addr="/run/p.sock", path="/x"
    )
    assert read(version("http-proxy", addr="http://me:pw%40@host:1")).backend == HttpProxyBackend(
        addr="http://host:1", auth=Secret("me:pw@")
    )
    s3 = {"bucket_name": "b-1", "region": "eu-west-1", "object_prefix": "p_", "scheme": "http"}
    keys = {"access_key_id": "id", "access_key_secret": "key"}
    assert read(version("s3", **s3, endpoint="minio:9000", **keys)).backend == S3Backend(
        bucket="b-1",
        region="eu-west-1",
        prefix="p_",
        scheme="http",
        endpoint="minio:9000",
        access_key_id="id",
        access_key_secret=Secret("key"),
    )
    amazon = read(version("s3", **s3, endpoint="s3.amazonaws.com")).backend
    assert isinstance(amazon, S3Backend)
    assert amazon.endpoint == ""
    oss = read(version("oss", bucket_name="b-1", endpoint="oss-x.example", **keys)).backend
    assert oss == OssBackend(
        bucket="b-1", endpoint="oss-x.example", access_key_id="id", access_key_secret=Secret("key")
    )
    mirror = {"host": "http://m:1/", "headers": {"X-Key": "k"}, "failure_limit": 2, "ping_url": "http://m/p"}
    proxy = {"url": "dragonfly:65001", "ping_url": "http://d/p", "fallback": False, "use_http": True}
    registry = read(version("registry", host="h", repo="r", mirrors=[mirror], proxy=proxy)).backend
    assert isinstance(registry, RegistryBackend)
    assert registry.mirrors == (
        Mirror(url="http://m:1", headers=(("X-Key", Secret("k")),), ping_url="http://m/p", failure_limit=2),
    )
    assert registry.http.proxy == ProxyOptions(
        url="http://dragonfly:65001", ping_url="http://d/p", fallback=False, use_http=True
    )


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (v1("localfs", dir=5), "device.backend.config.dir is a whole number"),
        (v1("localfs", dir="/x", alt_dirs=["a", 1]), "device.backend.config.alt_dirs holds"),
        (v1("localfs"), "device.backend.config.dir is missing"),
        (v1("registry", host="h"), "device.backend.config.repo is missing"),
        (v1("registry", host="h/../x", repo="r"), "device.backend.config: host"),
        (v1("registry", host="h", repo="r", scheme="ftp"), "device.backend.config: scheme"),
        (v1("registry", host="h", repo="r", timeout=True), "timeout is true or false"),
        (v1("registry", host="h", repo="r", timeout=-1), "timeout is out of range"),
        (v1("registry", host="h", repo="r", timeout=0.5), "timeout is a number"),
        (v1("registry", host="h", repo="r", skip_verify="no"), "skip_verify is a string"),
        (v1("registry", host="h", repo="r", proxy={"url": 1}), "config.proxy.url is a whole number"),
        (v1("registry", host="h", repo="r", mirrors=[{"host": []}]), "mirrors[0].host is a list"),
        (v1("registry", host="h", repo="r", mirrors=["m"]), "config.mirrors holds"),
        (v1("registry", host="h\n", repo="r"), "host has a control character"),
        (v1("s3", bucket_name="b-1", access_key_id="x"), "no access key secret"),
        (v1("oss", bucket_name="b-1"), "device.backend.config.endpoint is missing"),
        (v1("localdisk", device_path="/dev/x"), "device.backend.type is localdisk"),
        (v1("floppy"), "device.backend.type is no kind"),
        (v1("http-proxy", addr="relative"), "device.backend.config: the address"),
        (v1("http-proxy", addr="http://[x"), "config.addr is no URL"),
        ({"device": {}}, "device.backend is missing"),
        ({"device": 3}, "device is a whole number"),
        ({"version": 3}, "version is 3"),
        ({"version": "2"}, "version is a string"),
        (v2("localfs", dir="/x") | {"overlay": {}}, "overlay asks"),
        (v2("localfs", dir="/x") | {"external_backends": [{}]}, "external_backends is not served"),
        ({"version": 2, "backend": {"type": "s3"}}, "backend.s3 is missing"),
        (v2("localfs", dir="/x") | {"cache": {"type": "odd"}}, "cache.type is no kind"),
        (
            v2("localfs", dir="/x") | {"cache": {"filecache": {"enable_encryption": True}}},
            "cache.filecache.enable_encryption asks",
        ),
        (v2("localfs", dir="/x") | {"rafs": {"batch_size": "1M"}}, "rafs.batch_size is a string"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_name_the_key_and_the_remedy(document: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(document)
    assert named in e.value.message
    assert e.value.remedy


def test_values_are_not_in_errors() -> None:
    for settings in ({"auth": ["hunter2"]}, {"registry_token": {"a": "hunter2"}}, {"proxy": "hunter2"}):
        with pytest.raises(ConfigError) as e:
            read(v1("registry", host="h", repo="r", **settings))
        assert "hunter2" not in str(e.value)
    for data in (b'{"device": hunter2}', b"version = 2\nauth = hunter2", b'{"hunter2": 1'):
        with pytest.raises(ConfigError) as e:
            parse(data)
        assert "hunter2" not in str(e.value)
        assert e.value.__cause__ is None
    with pytest.raises(ConfigError) as e:
        read(v1("registry", host="h", repo="r", proxy={"url": "ftp://me:hunter2@proxy"}))
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", None),
        (b"\xff", "no UTF-8 at byte 0"),
        (b"{", "no valid JSON at line 1"),
        (b"[]", "no valid TOML at line 1"),
        (b"x", "no valid TOML"),
        (b'{"version": 2, "version": 2}', "'version' is there twice"),
        (b"[" * 100_000, "no valid TOML"),
        (b'{"a":' * 100_000, "no valid JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b" " * (MAX_LEN + 1), "longer than"),
    ],
)
def test_bytes_that_are_no_configuration(data: bytes, told: str | None) -> None:
    if told is None:
        assert parse(data) == FileConfig()
        return
    with pytest.raises(ConfigError, match=told):
        parse(data)


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ({}, {}),
        ({"type": "dummycache"}, {"no_cache": True}),
        ({"type": ""}, {"no_cache": True}),
        ({"type": "filecache", "filecache": {"work_dir": "/c"}}, {"cache_dir": Path("/c")}),
        ({"type": "fscache", "fscache": {"work_dir": "/c"}}, {"cache_dir": Path("/c")}),
        ({"type": "filecache", "filecache": {}}, {}),
    ],
)
def test_cache(cache: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(v2("localfs", dir="/x") | {"cache": cache}).options() == options


@pytest.mark.parametrize(
    ("prefetch", "options"),
    [
        ({"enable": False}, {"prefetch": "none"}),
        ({"enable": True}, {"prefetch": "all"}),
        ({"enable": True, "prefetch_all": False}, {"prefetch": "table"}),
        (
            {"enable": True, "bandwidth_rate": 5000},
            {"prefetch": "table", "fill": "after-start", "fill_rate": 5000},
        ),
    ],
)
def test_prefetch(prefetch: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(v1("localfs", dir="/x") | {"fs_prefetch": prefetch}).options() == options
    of_device = v1("localfs", dir="/x")
    of_device["device"]["cache"] = {"type": "filecache", "prefetch": prefetch}
    assert read(of_device).options() == options


def test_prefetch_of_all_needs_a_cache() -> None:
    document = v2("localfs", dir="/x") | {
        "cache": {"type": "dummycache"},
        "rafs": {"prefetch": {"enable": True}},
    }
    config = read(document)
    assert config.options() == {"no_cache": True, "prefetch": "table"}
    assert config.warnings == (
        "rafs.prefetch.prefetch_all has no effect without a cache: only the image's table is prefetched",
    )


def test_what_has_no_effect_is_told() -> None:
    config = read(v1("registry", host="h", repo="r", blob_redirected_host="x", ca_cert_file=["misspelt"]))
    assert [w.split(" ")[0] for w in config.warnings] == [
        "device.backend.config.blob_redirected_host",
        "device.backend.config.ca_cert_file",
    ]


def test_a_long_amplification_is_cut() -> None:
    config = read(v1("localfs", dir="/x") | {"amplify_io": 1 << 28})
    assert config.amplify == 64 << 20
    assert config.warnings == ("amplify_io is cut to 67108864",)


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nydusd.json"
    with pytest.raises(ConfigError, match="No such file"):
        load_config_file(path)
    path.write_text(json.dumps(SNAPSHOTTER))
    backend = load_config_file(path, {"IMAGE_PULL_AUTH": "b3RoZXI6b25l"}).backend
    assert isinstance(backend, RegistryBackend)
    assert backend.auth == Secret("b3RoZXI6b25l")
    path.write_text(json.dumps(v1("localfs", dir=1)))
    with pytest.raises(ConfigError, match=r"nydusd\.json: configuration: device\.backend\.config\.dir"):
        load_config_file(path)
