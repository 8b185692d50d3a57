"""nydusd's configuration file as far as it concerns this daemon: JSON of version 1 and 2, TOML of version 2.

``parse`` takes bytes and does no I/O. Nothing is ignored in silence: a key that nydusd does not know either
is a warning with its path (a misspelt ``ca_cert_files`` must not look like one that works), a key that has no
effect here is in ``ignored``, and one that asks for what cannot be had (an encrypted cache) is an error.
Values are never shown, because half of them are credentials.

Source: docs/backends.md has the table of keys; nydusd's own documentation, docs/nydusd.md.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from virtiofsd_rafs.backends.config import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    BackendConfig,
    HttpOptions,
    HttpProxyBackend,
    LocalBackend,
    Mirror,
    OssBackend,
    ProxyOptions,
    RegistryBackend,
    S3Backend,
    split_user,
)
from virtiofsd_rafs.config import MAX_AMPLIFY
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

# nydusd reads no more than that.
MAX_LEN = 1 << 20

_TYPES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
}


@attrs.frozen(kw_only=True)
class FileConfig:
    """What a configuration file says; None where it says nothing."""

    backend: BackendConfig | None = None
    cache_dir: Path | None = None
    no_cache: bool | None = None
    amplify: int | None = None
    prefetch: str | None = None
    fill: str | None = None
    fill_rate: int | None = None
    warnings: tuple[str, ...] = ()
    """One line each, with the path of the key."""
    ignored: tuple[str, ...] = ()
    """Paths of keys that have no effect here."""

    def options(self) -> dict[str, Any]:
        """Defaults of options of ``serve``, by the name of the parameter."""
        names = ("cache_dir", "no_cache", "amplify", "prefetch", "fill", "fill_rate")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def parse(data: bytes) -> FileConfig:
    """What the file *data* says. Raises ConfigError that names the key and the remedy, and nothing else."""
    if len(data) > MAX_LEN:
        raise ConfigError(f"the configuration is longer than {MAX_LEN} bytes", remedy="is it the right file?")
    notes = _Notes()
    root = _Table(_load(data), "", notes)
    version = root.number("version", 1 if "device" in root else 2, 0, 1 << 31)
    if version == 1:
        parsed = _version_1(root)
    elif version == 2:
        parsed = _version_2(root)
    else:
        raise ConfigError(f"version is {version}", remedy="only 1 and 2 are known")
    root.done()
    return attrs.evolve(parsed, warnings=tuple(notes.warnings), ignored=tuple(notes.ignored))


def _load(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"the configuration is no UTF-8 at byte {e.start}", remedy="write JSON or TOML"
        ) from e
    is_json = text.lstrip().startswith("{")
    try:
        loaded = json.loads(text, object_pairs_hook=_unique) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        # Only the place: the parser's text may quote the line.
        at = f" at line {e.lineno}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else _place(e)
        kind = "JSON" if is_json else "TOML"
        raise ConfigError(
            f"the configuration is no valid {kind}{at}", remedy="write nydusd's JSON, or TOML of version 2"
        ) from None
    assert isinstance(loaded, dict)
    return loaded


def _place(error: Exception) -> str:
    """Where tomllib found the fault, as far as it says."""
    if isinstance(error, _TwiceError):
        return f": {error}"
    match = re.search(r"\(at (line \d+, column \d+)\)$", str(error))
    return f" at {match[1]}" if match else ""


class _TwiceError(ValueError):
    """A key stands twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"{twice[:40]!r} is there twice")
    return found


@attrs.define
class _Notes:
    warnings: list[str] = attrs.Factory(list)
    ignored: list[str] = attrs.Factory(list)


class _Table:
    """A table of the file, whose values are taken out by name and type. JSON's null is as good as absent."""

    def __init__(self, values: Mapping[str, Any], path: str, notes: _Notes) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._notes = notes
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        """The full name of a key."""
        return f"{self._path}.{name}" if self._path else name

    def wrong(self, name: str, why: str, remedy: str) -> NoReturn:
        """Raises ConfigError about a key."""
        raise ConfigError(f"configuration: {self.path(name)} {why}", remedy=remedy)

    def _get(self, name: str, kind: type) -> Any:
        self._seen.add(name)
        value = self._values.get(name)
        if value is None:
            return None
        fits = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
        if not fits:
            got = next((words for t, words in _TYPES.items() if type(value) is t), "something else")
            self.wrong(name, f"is {got}", f"it has to be {_TYPES[kind]}")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A string without control characters."""
        value = self._get(name, str)
        if value is None:
            return default
        if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
            self.wrong(name, "has a control character in it", "remove it")
        assert isinstance(value, str)
        return value

    def needed(self, name: str) -> str:
        """A string that has to be there."""
        return self.text(name) or self.wrong(name, "is missing or empty", "write it")

    def secret(self, name: str) -> Secret | None:
        """A credential; None when it is absent or empty."""
        value = self.text(name)
        return Secret(value) if value else None

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self._get(name, bool)
        return default if value is None else bool(value)

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from *low* to *high*."""
        value = self._get(name, int)
        if value is None:
            return default
        if not low <= value <= high:
            self.wrong(name, "is out of range", f"it has to be between {low} and {high}")
        return int(value)

    def seconds(self, name: str, default: float) -> float:
        """A time; nydusd's 0 means that nobody has set it."""
        value = self.number(name, 0, 0, 3600)
        return float(value) or default

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._get(name, list) or []
        if not all(isinstance(value, str) and value and value.isprintable() for value in values):
            self.wrong(name, "holds something else than strings", "write a list of strings")
        return tuple(values)

    def table(self, name: str) -> _Table:
        """A table; an empty one when it is absent."""
        return _Table(self._get(name, dict) or {}, self.path(name), self._notes)

    def tables(self, name: str) -> list[_Table]:
        """A list of tables."""
        values = self._get(name, list) or []
        if not all(isinstance(value, dict) for value in values):
            self.wrong(name, "holds something else than tables", "write a list of tables")
        return [_Table(v, f"{self.path(name)}[{i}]", self._notes) for i, v in enumerate(values)]

    def names(self, name: str) -> dict[str, str]:
        """A table of strings."""
        table = self.table(name)
        return {key: table.text(key) for key in table._values}

    def without_effect(self, *names: str) -> None:
        """Keys that nydusd knows and that change nothing here."""
        for name in names:
            self._seen.add(name)
            if name in self._values:
                self._notes.ignored.append(self.path(name))

    def warn(self, name: str, why: str) -> None:
        """Adds a warning about a key."""
        self._notes.warnings.append(f"{self.path(name)} {why}")

    def done(self) -> None:
        """Warns of keys that nobody has taken."""
        for name in self._values:
            if name not in self._seen:
                shown = name if name.isprintable() and len(name) <= 60 else repr(name[:60])
                self._notes.warnings.append(f"{self.path(shown)} is no key of nydusd's: ignored")


# -- version 1 ----------------------------------------------------------------------------------------------


def _version_1(root: _Table) -> FileConfig:
    device = root.table("device")
    if "backend" not in device:
        device.wrong("backend", "is missing", "write its type and config")
    device.without_effect("id")
    if device.tables("external_backends"):
        device.wrong("external_backends", "is not served", "remove it")
    place = device.table("backend")
    kind = place.needed("type")
    backend = _backend(kind, place.table("config"), place.path("type"))
    place.done()
    cache = device.table("cache")
    folder = cache.table("config")
    parsed = _cache(cache, folder)
    device.done()
    root.without_effect(
        "mode", "digest_validate", "iostats_files", "enable_xattr", "access_pattern", "latest_read_files"
    )
    prefetch = root.table("fs_prefetch")
    cached = not parsed.get("no_cache")
    settings = _prefetch(prefetch, given="fs_prefetch" in root, cached=cached)
    of_cache = _prefetch(cache.table("prefetch"), given="prefetch" in cache, cached=cached)
    if settings.get("prefetch") in (None, "none"):
        settings = of_cache or settings
    cache.done()
    return FileConfig(backend=backend, amplify=_amplify(root, "amplify_io"), **parsed, **settings)


# -- version 2 ----------------------------------------------------------------------------------------------


def _version_2(root: _Table) -> FileConfig:
    root.without_effect("id")
    if root.tables("external_backends"):
        root.wrong("external_backends", "is not served", "remove it")
    if "overlay" in root:
        root.wrong("overlay", "asks for a writable file system", "mount an overlay in the guest")
    backend = None
    if "backend" in root:
        place = root.table("backend")
        kind = place.needed("type")
        if kind not in place:
            place.wrong(kind[:20] if kind.isprintable() else "type", "is missing", "write its settings")
        backend = _backend(kind, place.table(kind), place.path("type"))
        # The settings of the other kinds lie ready in many files.
        place.without_effect(*(other for other in _KINDS if other != kind))
        place.done()
    cache = root.table("cache")
    parsed = _cache(cache, None)
    rafs = root.table("rafs")
    rafs.without_effect(
        "mode", "validate", "enable_xattr", "iostats_files", "access_pattern", "latest_read_files"
    )
    amplify = _amplify(rafs, "batch_size")
    cached = not parsed.get("no_cache")
    settings = _prefetch(rafs.table("prefetch"), given="prefetch" in rafs, cached=cached)
    of_cache = _prefetch(cache.table("prefetch"), given="prefetch" in cache, cached=cached)
    if settings.get("prefetch") in (None, "none"):
        settings = of_cache or settings
    cache.done()
    rafs.done()
    return FileConfig(backend=backend, amplify=amplify, **parsed, **settings)


# -- parts --------------------------------------------------------------------------------------------------

_KINDS = ("localfs", "localdisk", "oss", "s3", "registry", "http-proxy")


def _backend(kind: str, table: _Table, where: str) -> BackendConfig:
    """The back-end of *kind* that *table* describes."""
    try:
        backend = _backend_of_kind(kind, table, where)
    except ConfigError as e:
        if e.message.startswith("configuration:"):
            raise
        # From the class itself, which does not know where its values come from.
        raise ConfigError(f"configuration: {table.path('')[:-1]}: {e.message}", remedy=e.remedy) from None
    table.done()
    return backend


def _backend_of_kind(kind: str, table: _Table, where: str) -> BackendConfig:
    match kind:
        case "localfs":
            return _localfs(table)
        case "registry":
            return _registry(table)
        case "s3":
            return _s3(table)
        case "oss":
            return _oss(table)
        case "http-proxy":
            return _http_proxy(table)
        case "localdisk":
            raise ConfigError(
                f"configuration: {where} is localdisk, which is not served",
                remedy="copy the blobs into a directory, and use localfs",
            )
        case _:
            raise ConfigError(
                f"configuration: {where} is no kind of back-end", remedy=f"use one of {', '.join(_KINDS)}"
            )


def _localfs(table: _Table) -> LocalBackend:
    file, folder = table.text("blob_file"), table.text("dir")
    dirs = ([folder] if folder else []) + list(table.texts("alt_dirs"))
    table.without_effect("readahead", "readahead_sec")
    if not dirs and not file:
        table.wrong("dir", "is missing", "name the directory of the blobs")
    return LocalBackend(dirs=tuple(map(Path, dirs)), blob_file=Path(file) if file else None)


def _http_proxy(table: _Table) -> HttpProxyBackend:
    addr, auth = table.needed("addr"), None
    if "://" in addr:
        addr, auth = split_user(addr, f"configuration: {table.path('addr')}")
    return HttpProxyBackend(addr=addr, path=table.text("path").rstrip("/"), auth=auth, http=_http(table))


def _registry(table: _Table) -> RegistryBackend:
    for name in ("blob_url_scheme", "blob_redirected_host"):
        if table.text(name):
            table.warn(name, "has no effect: redirects are followed as the registry sends them")
    return RegistryBackend(
        host=table.needed("host"),
        repository=table.needed("repo"),
        scheme=table.text("scheme", "https"),  # type: ignore[arg-type]  # checked by the class
        auth=table.secret("auth"),
        registry_token=table.secret("registry_token"),
        mirrors=_mirrors(table),
        http=_http(table),
    )


def _mirrors(table: _Table) -> tuple[Mirror, ...]:
    mirrors = []
    for entry in table.tables("mirrors"):
        headers = tuple((name, Secret(value)) for name, value in entry.names("headers").items())
        mirrors.append(
            Mirror(
                url=entry.needed("host").rstrip("/"),
                headers=headers,
                ping_url=entry.text("ping_url"),
                check_interval_s=entry.seconds("health_check_interval", 5.0),
                failure_limit=entry.number("failure_limit", 5, 1, 255),
            )
        )
        entry.without_effect("auth_through")
        entry.done()
    return tuple(mirrors)


def _s3(table: _Table) -> S3Backend:
    _no_mirrors(table)
    endpoint = table.text("endpoint")
    return S3Backend(
        bucket=table.needed("bucket_name"),
        prefix=table.text("object_prefix"),
        region=table.text("region"),
        # What nydusd takes when nobody says anything; as an endpoint it would mean another style of URLs.
        endpoint="" if endpoint == "s3.amazonaws.com" else endpoint,
        scheme=table.text("scheme", "https"),  # type: ignore[arg-type]  # checked by the class
        access_key_id=table.text("access_key_id"),
        access_key_secret=table.secret("access_key_secret"),
        session_token=table.secret("session_token"),
        http=_http(table),
    )


def _oss(table: _Table) -> OssBackend:
    _no_mirrors(table)
    return OssBackend(
        bucket=table.needed("bucket_name"),
        prefix=table.text("object_prefix"),
        endpoint=table.needed("endpoint"),
        region=table.text("region"),
        scheme=table.text("scheme", "https"),  # type: ignore[arg-type]  # checked by the class
        access_key_id=table.text("access_key_id"),
        access_key_secret=table.secret("access_key_secret"),
        security_token=table.secret("security_token"),
        http=_http(table),
    )


def _no_mirrors(table: _Table) -> None:
    if table.tables("mirrors"):
        table.warn("mirrors", "has no effect: only a registry has mirrors")


def _http(table: _Table) -> HttpOptions:
    table.without_effect("retry_limit")  # reads are tried again until the guest's deadline
    return HttpOptions(
        ca_files=tuple(map(Path, table.texts("ca_cert_files"))),
        skip_verify=table.flag("skip_verify"),
        timeout_s=table.seconds("timeout", DEFAULT_TIMEOUT_S),
        connect_timeout_s=table.seconds("connect_timeout", DEFAULT_CONNECT_TIMEOUT_S),
        proxy=_proxy(table.table("proxy")),
    )


def _proxy(table: _Table) -> ProxyOptions | None:
    url = table.text("url")
    options = {
        "ping_url": table.text("ping_url"),
        "fallback": table.flag("fallback", True),
        "check_interval_s": table.seconds("check_interval", 5.0),
        "use_http": table.flag("use_http"),
    }
    table.without_effect("check_pause_elapsed")
    if table.text("dragonfly_scheduler_endpoint"):
        table.warn("dragonfly_scheduler_endpoint", "has no effect: the proxy is asked as it is")
    table.done()
    if not url:
        return None
    return ProxyOptions.of(url if "://" in url else f"http://{url}", **options)  # type: ignore[arg-type]


def _cache(cache: _Table, folder: _Table | None) -> dict[str, Any]:
    """cache_dir and no_cache. *folder* has the settings of version 1; version 2 names them by kind."""
    kind = cache.text("type")
    if kind not in ("", "blobcache", "filecache", "fscache", "dummycache"):
        cache.wrong("type", "is no kind of cache", "use filecache, or dummycache for none")
    if cache.flag("compressed"):
        cache.warn("compressed", "has no effect: the cache holds data as it is read")
    cache.without_effect("validate")  # everything is verified, always
    tables = [folder] if folder is not None else [cache.table("filecache"), cache.table("fscache")]
    for table in [cache, *tables]:
        for name in ("enable_encryption", "enable_convergent_encryption"):
            if table.flag(name):
                table.wrong(name, "asks for an encrypted cache", "put the cache on an encrypted disk")
        table.secret("encryption_key")
    work_dir = ""
    for table in tables:
        table.without_effect("disable_indexed_map")
        work_dir = table.text("work_dir") or work_dir
        table.done()
    if kind in ("", "dummycache"):
        # No section at all is not the wish to go without.
        return {"no_cache": True} if kind or "type" in cache else {}
    return {"cache_dir": Path(work_dir)} if work_dir else {}


def _amplify(table: _Table, name: str) -> int | None:
    if name not in table:
        return None
    value = table.number(name, 0, 0, 1 << 40)
    if value > MAX_AMPLIFY:
        table.warn(name, f"is cut to {MAX_AMPLIFY}")
    return min(value, MAX_AMPLIFY)


def _prefetch(table: _Table, *, given: bool, cached: bool) -> dict[str, Any]:
    """prefetch, fill and fill_rate.

    Prefetching all of an image with a bound on the bandwidth is what ``fill`` does, after the table.
    """
    enabled = table.flag("enable")
    everything = table.flag("prefetch_all", True)
    rate = table.number("bandwidth_rate", 0, 0, 1 << 40) or table.number("bandwidth_limit", 0, 0, 1 << 40)
    table.without_effect("threads_count", "threads", "merging_size", "batch_size", "stream_prefetch")
    table.done()
    if not given:
        return {}
    if not enabled:
        return {"prefetch": "none"}
    if not everything:
        return {"prefetch": "table"}
    if not cached:
        table.warn("prefetch_all", "has no effect without a cache: only the image's table is prefetched")
        return {"prefetch": "table"}
    if rate:
        return {"prefetch": "table", "fill": "after-start", "fill_rate": rate}
    return {"prefetch": "all"}
