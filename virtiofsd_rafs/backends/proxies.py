"""Which HTTP proxy a request takes, if any, and whether that proxy is well. No I/O.

A proxy that was configured takes every request but those to hosts in ``NO_PROXY``. Else the environment
decides, as for curl and Go: ``https_proxy`` or ``http_proxy`` by the target's scheme, then ``all_proxy``, in
lower case first; loopback is never proxied then, and a proxy of the environment is never gone around.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from virtiofsd_rafs.backends.config import ProxyOptions
from virtiofsd_rafs.backends.health import REST_CAP_S, Health, State
from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Proxy:
    """A proxy that is in use."""

    def __init__(self, options: ProxyOptions) -> None:
        self.options = options
        self.health = Health(
            first_s=options.check_interval_s, cap_s=max(REST_CAP_S, options.check_interval_s)
        )

    def usable(self, now: float) -> bool:
        """Whether a request goes through it at *now*: always when nothing else is allowed."""
        return not self.options.fallback or self.health.state(now) is not State.RESTING

    def ping_due(self, now: float) -> bool:
        """Whether it has rested and is to be pinged before it gets a request."""
        return bool(self.options.ping_url) and self.health.state(now) is State.DUE


class Proxies:
    """The proxies of one client.

    Args:
        options: the configured one, or None.
        environ: None: the process's environment.
    """

    def __init__(self, options: ProxyOptions | None = None, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        self._configured = None if options is None else Proxy(options)
        self._by_scheme: dict[str, Proxy] = {}
        self._bypass = Bypass(_env(env, "no_proxy"))
        known: dict[str, Proxy] = {}
        for scheme in ("http", "https"):
            for name in (f"{scheme}_proxy", "all_proxy"):
                value = _env(env, name)
                if not value:
                    continue
                options = _from_env(name, value)
                if options is not None:
                    self._by_scheme[scheme] = known.setdefault(value, Proxy(options))
                    break

    def move(self, options: ProxyOptions | None) -> None:
        """Uses the proxy of *options* from now on, on the terms of its predecessor if there was one.

        None: what the environment says.
        """
        if options is not None and self._configured is not None:
            options = attrs.evolve(self._configured.options, url=options.url, auth=options.auth)
        self._configured = None if options is None else Proxy(options)

    def choose(self, url: str) -> Proxy | None:
        """The proxy for *url*; None: go straight."""
        if self._configured is None and not self._by_scheme:
            return None
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        if self._bypass.matches(host, port):
            return None
        if self._configured is not None:
            return self._configured
        return None if _is_loopback(host) else self._by_scheme.get(parts.scheme)


class Bypass:
    """``NO_PROXY``: hosts, domains (with all below them), addresses, networks; with a port or without."""

    def __init__(self, text: str) -> None:
        self._all = False
        self._hosts: list[tuple[str, int | None]] = []
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in text.replace(" ", ",").split(","):
            if entry == "*":
                self._all = True
            elif entry:
                self._add(entry.lower())

    def matches(self, host: str, port: int) -> bool:
        """Whether *host* is reached without a proxy."""
        if self._all:
            return True
        host = host.lower().rstrip(".")
        address = _address(host)
        if address is not None and any(address in network for network in self._networks):
            return True
        return any(
            (host == name or (address is None and host.endswith(f".{name}"))) and wanted in (None, port)
            for name, wanted in self._hosts
        )

    def _add(self, entry: str) -> None:
        if "/" in entry:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                _log.warning("NO_PROXY: %s is no network", entry[:80])
            return
        port: int | None = None
        name = entry
        if entry.startswith("["):
            name, _, rest = entry[1:].partition("]")
            port = int(rest[1:]) if rest[1:].isdecimal() else None
        elif entry.count(":") == 1:
            name, _, digits = entry.partition(":")
            port = int(digits) if digits.isdecimal() else None
        self._hosts.append((name.removeprefix("*").lstrip(".").rstrip("."), port))


def proxy_of(url: str) -> ProxyOptions:
    """A configured proxy at *url*, which may name user and password. Raises ConfigError, without the URL."""
    return ProxyOptions.of(url if "://" in url else f"http://{url}")


def _from_env(name: str, value: str) -> ProxyOptions | None:
    if "://" in value and not value.lower().startswith(("http://", "https://")):
        _log.warning("%s names a proxy that does not speak HTTP: it is not used", name)
        return None
    try:
        return ProxyOptions.of(value if "://" in value else f"http://{value}", fallback=False)
    except ConfigError as e:
        raise ConfigError(f"{name}: {e.message}", remedy="write http://host:port") from None


def _env(env: Mapping[str, str], name: str) -> str:
    return env.get(name) or env.get(name.upper()) or ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address is not None else host in ("localhost", "localhost.localdomain")
