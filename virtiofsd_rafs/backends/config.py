"""What each back-end can be told: one frozen class for each kind of place, all of them a ``BackendConfig``.

The values come from ``--config`` (config_file.py), from ``--blob-source`` (backends/location.py), or from the
image's own name. Whatever is a credential is a ``Secret``; no class here does any I/O. URLs never carry a
user name: it would end up in logs.
"""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003  (attrs resolves annotations for converters and docs)
from typing import TYPE_CHECKING, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import attrs

from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.registry.reference import Reference

Scheme = Literal["https", "http"]
SCHEMES: tuple[Scheme, ...] = ("https", "http")

# For TCP and TLS together: two lost SYNs (1 s + 2 s) may pass.
DEFAULT_CONNECT_TIMEOUT_S = 5.0
# Without enough bytes: a pull-through cache may need this long to its first one.
DEFAULT_TIMEOUT_S = 15.0
# A NAS that has hung this long is away; the planner's deadline is several times that.
DEFAULT_FILE_TIMEOUT_S = 15.0
# So many servers in a row that answer nothing fit into the deadline of whoever waits.
TRIES_WITHIN_DEADLINE = 6

# RFC 1123 names, addresses, [v6], and a port: enough to keep a path or a user name out of a host.
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z](?:[0-9A-Za-z._-]{0,252}[0-9A-Za-z])?)(?::\d{1,5})?"
)
# S3 and OSS: 3 to 63 of a-z 0-9 - (S3 also '.'); old S3 buckets in us-east-1 may have capitals and '_'.
_BUCKET = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{1,253}[0-9A-Za-z]")
_REGION = re.compile(r"[0-9a-z-]{0,64}")


def _matches(
    pattern: re.Pattern[str], what: str, *, or_empty: bool = False
) -> Callable[[object, attrs.Attribute[str], str], None]:
    def check(_: object, field: attrs.Attribute[str], value: str) -> None:
        if not pattern.fullmatch(value) and (value or not or_empty):
            raise ConfigError(f"{field.name} {value[:80]!r} is no {what}", remedy="mend the configuration")

    return check


def _scheme(_: object, field: attrs.Attribute[str], value: str) -> None:
    if value not in SCHEMES:
        raise ConfigError(f"{field.name} is {value[:80]!r}", remedy="use https or http")


def _signature(_: object, field: attrs.Attribute[str], value: str) -> None:
    if value not in ("auto", "v1", "v4"):
        raise ConfigError(f"{field.name} is {value[:80]!r}", remedy="use v4, v1 or auto")


def _positive(_: object, field: attrs.Attribute[float], value: float) -> None:
    if not 0.05 <= value <= 3600:
        raise ConfigError(f"{field.name} is {value}", remedy="it must be between 0.05 and 3600 seconds")


def split_user(url: str, what: str) -> tuple[str, Secret | None]:
    """*url* without a user in it, and ``user:password`` if there was one. Raises ConfigError.

    *what* names the URL in the error, which never shows it: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        # Without the cause, whose text shows a part of the URL.
        raise ConfigError(f"{what} is no URL", remedy="write scheme://host[:port]") from None
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ConfigError(f"{what} is no http(s) URL", remedy="write http://host[:port]")
    user, at, host = parts.netloc.rpartition("@")
    bare = SplitResult(parts.scheme, host, parts.path, parts.query, "").geturl()
    return bare, Secret(unquote(user)) if at else None


@attrs.frozen(kw_only=True)
class ProxyOptions:
    """An HTTP proxy in front of the back-end; names as nydusd's (``proxy`` in its configuration)."""

    url: str
    """``http(s)://host:port``, without a user."""
    auth: Secret | None = None
    """``user:password``."""
    ping_url: str = ""
    """Asked every ``check_interval_s`` to see whether the proxy is well; empty: not asked."""
    fallback: bool = True
    """Go without the proxy while it is unwell."""
    check_interval_s: float = attrs.field(default=5.0, validator=_positive)
    use_http: bool = False
    """Speak http to the proxy's target (the proxy adds TLS)."""

    @classmethod
    def of(
        cls,
        url: str,
        *,
        ping_url: str = "",
        fallback: bool = True,
        check_interval_s: float = 5.0,
        use_http: bool = False,
    ) -> ProxyOptions:
        """Options for *url*, which may name user and password. Raises ConfigError."""
        bare, auth = split_user(url, "the proxy")
        parts = urlsplit(bare)
        if parts.path not in ("", "/") or parts.query:
            # Not shown: it may be something else that was pasted here.
            raise ConfigError("the proxy has a path", remedy="write http://host[:port]")
        return cls(
            url=f"{parts.scheme}://{parts.netloc}",
            auth=auth,
            ping_url=ping_url,
            fallback=fallback,
            check_interval_s=check_interval_s,
            use_http=use_http,
        )


@attrs.frozen(kw_only=True)
class HttpOptions:
    """How to speak HTTP to a back-end."""

    ca_files: tuple[Path, ...] = ()
    """PEM certificates to trust beside the system's."""
    skip_verify: bool = False
    """Trust any certificate."""
    timeout_s: float = attrs.field(default=DEFAULT_TIMEOUT_S, validator=_positive)
    """Without (enough) bytes."""
    connect_timeout_s: float = attrs.field(default=DEFAULT_CONNECT_TIMEOUT_S, validator=_positive)
    proxy: ProxyOptions | None = None

    def plus(self, other: HttpOptions) -> HttpOptions:
        """These options, and what *other* (the command line's) adds to them; its proxy comes first."""
        return attrs.evolve(
            self,
            ca_files=(*self.ca_files, *(f for f in other.ca_files if f not in self.ca_files)),
            skip_verify=self.skip_verify or other.skip_verify,
            proxy=other.proxy or self.proxy,
        )


@attrs.frozen(kw_only=True)
class Mirror:
    """A place that has the same blobs under the same path, asked before the registry itself."""

    url: str
    """``http(s)://host[:port][/prefix]``, without a user."""
    auth: Secret | None = None
    """``user:password``; None: what config.json has for that host."""
    headers: tuple[tuple[str, Secret], ...] = ()
    """Sent with each request; they may be credentials."""
    ping_url: str = ""
    check_interval_s: float = attrs.field(default=5.0, validator=_positive)
    failure_limit: int = 1
    """Failures in a row after which it is left alone until it is well."""

    @classmethod
    def of(cls, url: str) -> Mirror:
        """The mirror at *url*, as containerd's hosts.toml writes it, with or without ``/v2`` at its end.

        Raises ConfigError, also for a user in it: there would be no secret place for it.
        """
        bare, user = split_user(url if "://" in url else f"https://{url}", "the mirror")
        parts = urlsplit(bare)
        if user is not None:
            raise ConfigError(
                f"the mirror {parts.netloc} has a user in its URL",
                remedy="put it under `auths` of config.json",
            )
        if parts.query:
            raise ConfigError(f"the mirror {bare} has a query", remedy="write http(s)://host[:port][/prefix]")
        return cls(url=bare.rstrip("/").removesuffix("/v2"))


@attrs.frozen(kw_only=True)
class RegistryBackend:
    """``<scheme>://<host>/v2/<repository>/blobs/sha256:<blob id>``."""

    host: str = attrs.field(validator=_matches(_HOST, "host[:port]"))
    repository: str
    scheme: Scheme = attrs.field(default="https", validator=_scheme)
    auth: Secret | None = None
    """base64 of ``user:password``; None: docker's config.json."""
    registry_token: Secret | None = None
    """A bearer token that is sent as it is."""
    mirrors: tuple[Mirror, ...] = ()
    http: HttpOptions = HttpOptions()
    auth_file: Path | None = None
    """Holds the credentials of registries; None: the usual files."""

    def plus(self, access: RegistryAccess) -> RegistryBackend:
        """This back-end, and what *access* (the command line's) adds to it; its mirrors come first."""
        return attrs.evolve(
            self,
            scheme="http" if access.plain_http else self.scheme,
            mirrors=(*access.mirrors, *self.mirrors),
            http=self.http.plus(access.http),
            auth_file=access.auth_file or self.auth_file,
        )


@attrs.frozen(kw_only=True)
class RegistryAccess:
    """How registries are reached, whatever the image."""

    plain_http: bool = False
    """No TLS. Mirrors say it themselves."""
    mirrors: tuple[Mirror, ...] = ()
    http: HttpOptions = HttpOptions()
    auth_file: Path | None = None
    """Holds the credentials of registries; None: the usual files."""

    @classmethod
    def of(cls, access: RegistryAccess | None, *, plain_http: bool) -> RegistryAccess:
        """*access*, and no TLS if *plain_http* says so."""
        access = access or cls()
        return attrs.evolve(access, plain_http=True) if plain_http else access

    def backend(self, reference: Reference) -> RegistryBackend:
        """Where *reference*'s blobs are."""
        return RegistryBackend(host=reference.host, repository=reference.repository).plus(self)


@attrs.frozen(kw_only=True)
class LocalBackend:
    """``<dir>/<blob id>``, in the first directory that has it."""

    dirs: tuple[Path, ...]
    blob_file: Path | None = None
    """Holds the image's only blob, whatever its id."""
    timeout_s: float = attrs.field(default=DEFAULT_FILE_TIMEOUT_S, validator=_positive)
    """How long a read may hang: the directory may be on a NAS."""

    def __attrs_post_init__(self) -> None:
        if not self.dirs and self.blob_file is None:
            raise ConfigError("the local back-end has no directory", remedy="name one")


@attrs.frozen(kw_only=True)
class S3Backend:
    """``s3://<bucket>/<prefix><blob id>``."""

    bucket: str = attrs.field(validator=_matches(_BUCKET, "bucket name"))
    prefix: str = ""
    """Put before the blob's id as it is: a folder ends with '/'."""
    region: str = attrs.field(default="", validator=_matches(_REGION, "region"))
    """Empty: what the environment or the profile says, else us-east-1."""
    endpoint: str = attrs.field(default="", validator=_matches(_HOST, "host[:port]", or_empty=True))
    """``host[:port]`` of a store that is not Amazon's; empty: Amazon's for the region."""
    scheme: Scheme = attrs.field(default="https", validator=_scheme)
    path_style: bool | None = None
    """``host/bucket/key`` instead of ``bucket.host/key``; None: exactly when there is an endpoint."""
    access_key_id: str = ""
    access_key_secret: Secret | None = None
    session_token: Secret | None = None
    """None of the three: the usual chain of AWS (environment, profile, web identity, instance metadata)."""
    profile: str = ""
    http: HttpOptions = HttpOptions()

    def __attrs_post_init__(self) -> None:
        _check_keys(self.access_key_id, self.access_key_secret)


@attrs.frozen(kw_only=True)
class OssBackend:
    """``https://<bucket>.<endpoint>/<prefix><blob id>`` at Alibaba Cloud."""

    bucket: str = attrs.field(validator=_matches(_BUCKET, "bucket name"))
    endpoint: str = attrs.field(validator=_matches(_HOST, "host[:port]"))
    """``oss-cn-hangzhou.aliyuncs.com``, or with ``-internal``; an address gets ``host/bucket/key`` URLs."""
    prefix: str = ""
    scheme: Scheme = attrs.field(default="https", validator=_scheme)
    region: str = attrs.field(default="", validator=_matches(_REGION, "region"))
    """``cn-hangzhou``; empty: taken from the endpoint. Without a region only version 1 can sign."""
    signature: Literal["auto", "v1", "v4"] = attrs.field(default="auto", validator=_signature)
    """auto: v4 when the region is known, else v1."""
    access_key_id: str = ""
    access_key_secret: Secret | None = None
    security_token: Secret | None = None
    """Of temporary keys from STS. None of the three: OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET and
    OSS_SESSION_TOKEN, else a public bucket."""
    http: HttpOptions = HttpOptions()

    def __attrs_post_init__(self) -> None:
        _check_keys(self.access_key_id, self.access_key_secret)


@attrs.frozen(kw_only=True)
class HttpProxyBackend:
    """``<addr><path>/<blob id>``: nydusd's ``http-proxy``, or any web server with files."""

    addr: str
    """Path of a unix socket, or ``http(s)://host[:port][/path]`` without a user."""
    path: str = ""
    """Begins with '/', unless it is empty; has no query."""
    auth: Secret | None = None
    """``user:password`` for a URL."""
    http: HttpOptions = HttpOptions()

    def __attrs_post_init__(self) -> None:
        if self.is_url:
            _, user = split_user(self.addr, "the address of the http-proxy")
            if user is not None:
                raise ConfigError("the address of the http-proxy has a user in it", remedy="put it into auth")
        elif not self.addr.startswith("/"):
            raise ConfigError(
                f"the address of the http-proxy, {self.addr[:80]!r}, is neither a URL nor an absolute path",
                remedy="write http://host[:port] or /path/of/socket",
            )
        if re.search(r"[?#\s\x00-\x1f\x7f]", self.path) or (self.path and not self.path.startswith("/")):
            raise ConfigError(f"the path of the http-proxy, {self.path[:80]!r}, is none", remedy="write /a/b")

    @property
    def is_url(self) -> bool:
        """Whether ``addr`` is no unix socket."""
        return self.addr.startswith(("http://", "https://"))


BackendConfig = RegistryBackend | LocalBackend | S3Backend | OssBackend | HttpProxyBackend


def _check_keys(key_id: str, secret: Secret | None) -> None:
    if bool(key_id) != bool(secret):
        given, lacks = ("id", "secret") if key_id else ("secret", "id")
        raise ConfigError(
            f"there is an access key {given}, but no access key {lacks}", remedy="give both, or neither"
        )
