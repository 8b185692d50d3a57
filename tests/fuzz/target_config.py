"""Invariant: any nydusd configuration, renewal or blob location is taken or refused; no secret is shown."""

from __future__ import annotations

import json

from virtiofsd_rafs.backends.location import parse_blob_source
from virtiofsd_rafs.config_file import parse
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.runtime.renewal import parse_update

# Stands in every place where seeds have a secret.
SECRET = "c2VjcmV0OmZvciBub2JvZHk="


def run(data: bytes) -> None:
    """The first byte chooses the reader."""
    kind, data = data[:1], data[1:]
    shown = ""
    try:
        match kind[0] % 3 if kind else 0:
            case 0:
                config = parse(data)
                shown = repr(config)
                config.options()
            case 1:
                shown = repr(parse_update(data))
            case _:
                shown = repr(parse_blob_source(data.decode("utf-8", "replace")))
    except ConfigError as e:
        shown = str(e)
        assert shown
    # Only whole: a fuzzer that cuts it makes other values of it, in places that are none of a secret.
    if b'auth": "' + SECRET.encode() + b'"' in data:
        assert SECRET not in shown


def seeds() -> list[bytes]:
    """One file per back-end and version, a renewal, locations."""
    registry = {
        "scheme": "https",
        "host": "registry.example",
        "repo": "team/app",
        "auth": SECRET,
        "mirrors": [
            {"host": "http://mirror.example", "headers": {"X": "y"}, "ping_url": "http://mirror.example/p"}
        ],
        "proxy": {"url": "http://proxy.example:3128", "fallback": True, "ping_url": "http://proxy.example/p"},
        "timeout": 5,
        "connect_timeout": 5,
        "retry_limit": 2,
        "skip_verify": True,
    }
    v1 = {
        "device": {
            "backend": {"type": "registry", "config": registry},
            "cache": {"type": "blobcache", "compressed": False, "config": {"work_dir": "/cache"}},
        },
        "mode": "direct",
        "digest_validate": True,
        "iostats_files": False,
        "enable_xattr": True,
        "amplify_io": 1048576,
        "fs_prefetch": {"enable": True, "threads_count": 4, "merging_size": 131072, "prefetch_all": True},
    }
    backends: dict[str, dict[str, object]] = {
        "registry": {**registry},
        "oss": {
            "endpoint": "oss.example",
            "bucket_name": "bucket",
            "object_prefix": "p/",
            "access_key_id": "i",
            "access_key_secret": SECRET,
        },
        "s3": {
            "endpoint": "s3.example",
            "region": "r",
            "bucket_name": "bucket",
            "access_key_id": "i",
            "access_key_secret": SECRET,
        },
        "localfs": {"dir": "/blobs", "alt_dirs": ["/more"]},
        "http-proxy": {"addr": "/run/proxy.sock", "path": "/blobs"},
    }
    v2 = [
        {
            "version": 2,
            "backend": {"type": kind, kind: config},
            "cache": {"type": "filecache", "filecache": {"work_dir": "/cache"}, "prefetch": {"enable": True}},
            "rafs": {"mode": "direct", "validate": True},
        }
        for kind, config in backends.items()
    ]
    lines = [
        "version = 2",
        "[backend]",
        'type = "registry"',
        "[backend.registry]",
        'host = "h"',
        'repo = "r"',
    ]
    toml = "\n".join([*lines, f'auth = "{SECRET}"', ""])
    locations = [
        "s3://bucket/prefix?region=r&endpoint=http://h",
        "oss://bucket/p?endpoint=https://e",
        "file:///d",
        "/d",
        "unix:///s?path=/x",
        "https://h/p/",
        "registry.example/team/app",
        "http://u:p@h/",
    ]
    return [
        *(b"\x00" + json.dumps(document).encode() for document in (v1, *v2)),
        b"\x00" + toml.encode(),
        b"\x01" + json.dumps({"registry_auth": SECRET}).encode(),
        b"\x01"
        + json.dumps({"access_key_id": "i", "access_key_secret": SECRET, "security_token": "t"}).encode(),
        *(b"\x02" + location.encode() for location in locations),
    ]
