"""Nothing crashes the configuration's parser: it returns, or raises ConfigError with a remedy."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_config_file import SNAPSHOTTER, TOML, v1, v2
from virtiofsd_rafs.config_file import FileConfig, parse
from virtiofsd_rafs.errors import ConfigError

SETTINGS = {
    "localfs": {"dir": "/x", "alt_dirs": ["/y"], "blob_file": "/z"},
    "registry": {"host": "h", "repo": "r", "mirrors": [{"host": "http://m", "headers": {"a": "b"}}]},
    "s3": {
        "bucket_name": "abc",
        "region": "r",
        "endpoint": "e",
        "access_key_id": "i",
        "access_key_secret": "s",
    },
    "oss": {"bucket_name": "abc", "endpoint": "e", "proxy": {"url": "http://u:p@h"}, "ca_cert_files": ["/c"]},
    "http-proxy": {"addr": "http://me:x@h", "path": "/p"},
}
DOCUMENTS = [
    SNAPSHOTTER,
    *(make(kind, **settings) for kind, settings in SETTINGS.items() for make in (v1, v2)),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=8,
)


def outcome(data: bytes) -> FileConfig | None:
    try:
        return parse(data)
    except ConfigError as e:
        remedy = e.remedy
    assert remedy
    return None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    outcome(data)


@given(st.text(max_size=200), st.integers(0, len(TOML)), st.integers(0, 30))
def test_toml_with_a_piece_replaced(piece: str, at: int, length: int) -> None:
    outcome((TOML[:at] + piece + TOML[at + length :]).encode("utf-8", "replace"))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in a document."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*path, key))
    return found


@given(st.data())
def test_documents_with_a_value_replaced_or_added(data: st.DataObject) -> None:
    document = json.loads(json.dumps(data.draw(st.sampled_from(DOCUMENTS))))
    path = data.draw(st.sampled_from(paths(document)[1:]))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = data.draw(VALUES)
    if isinstance(inner, dict):
        name = data.draw(st.text(min_size=1, max_size=8).filter(lambda s: s not in inner))
        inner[f"unknown {name}"] = 1
    config = outcome(json.dumps(document).encode("utf-8", "surrogatepass"))
    if config is not None and isinstance(inner, dict) and "headers" not in path:
        told = [*config.warnings, *config.ignored]
        # Never in silence: the unknown key, or a table around it, is told.
        assert told, document
