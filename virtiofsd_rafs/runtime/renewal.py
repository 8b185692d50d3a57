"""Credentials that come while the daemon runs: ``PUT /api/v1/config``, in nydusd's form.

What came last is kept for sources that are opened later, and, in memory that only keeper and control have,
for a control that takes over. It is never shown: the API answers with the names of what was set.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.backends.base import CredentialUpdate, Renewable, Reporting
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.base import BlobSource, SourceReport

_log = logging.getLogger(__name__)

_SECRETS = ("registry_auth", "registry_token", "proxy_url", "access_key_secret", "security_token")
_PLAIN = ("access_key_id",)
# Known to nydusd alone: its Dragonfly client finds peers there.
_IGNORED = ("dragonfly_scheduler_endpoint",)
_MAX_VALUE = 64 << 10


def parse_update(body: bytes) -> CredentialUpdate:
    """The update that the JSON object *body* asks for. Raises ConfigError, which never shows a value."""
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError("the body is no JSON", remedy='send {"registry_auth": "..."}') from None
    if not isinstance(wanted, dict):
        raise ConfigError("the body is no JSON object", remedy='send {"registry_auth": "..."}')
    values: dict[str, Any] = {}
    for name, value in wanted.items():
        if name not in (*_SECRETS, *_PLAIN, *_IGNORED):
            known = ", ".join((*_SECRETS, *_PLAIN))
            raise ConfigError(f"{name[:40]!r} cannot be set while the daemon runs", remedy=f"known: {known}")
        if not isinstance(value, str) or len(value) > _MAX_VALUE:
            raise ConfigError(f"{name} is no string that could be meant", remedy="send a string")
        if name in _IGNORED:
            _log.warning("%s has no effect: the proxy is asked as it is (proxy_url moves it)", name)
        else:
            values[name] = Secret(value) if name in _SECRETS else value
    update = CredentialUpdate(**values)
    _check(update)
    return update


def _check(update: CredentialUpdate) -> None:
    """Raises ConfigError for what no source could use, also while there is none yet."""
    from virtiofsd_rafs.backends.proxies import proxy_of
    from virtiofsd_rafs.registry.auth import credentials_of

    if update.registry_auth:
        credentials_of(update.registry_auth, "registry_auth")
    if update.proxy_url:
        proxy_of(update.proxy_url.reveal())


class Renewal:
    """Takes updates, and has them used.

    Args:
        source: what is in use now, the source or what asks for the image; None while there is none.
        renewed: called after the source could do better.
        memory: a memfd that outlives this process; None: what came is lost with it.
    """

    def __init__(
        self,
        source: Callable[[], BlobSource | Renewable | None],
        renewed: Callable[[], None],
        memory: int | None = None,
    ) -> None:
        self._source = source
        self._renewed = renewed
        self._memory = memory
        self._latest = CredentialUpdate()
        if memory is not None:
            with contextlib.suppress(ConfigError):
                self._latest = parse_update(_read(memory) or b"{}")

    def take(self, update: CredentialUpdate) -> None:
        """Uses *update* from now on. Raises ConfigError, and changes nothing, for what is malformed."""
        _check(update)
        changes = {name: value for name, value in _values(update).items() if value is not None}
        if not changes:
            return
        source = self._source()
        if isinstance(source, Renewable):
            source.renew(update)
        self._latest = attrs.evolve(self._latest, **changes)
        self._remember()
        _log.info("renewed by the API: %s", ", ".join(changes))
        self._renewed()

    def opened(self, source: BlobSource | Renewable) -> None:
        """Brings a source that was opened just now up to date."""
        if isinstance(source, Renewable) and self._latest != CredentialUpdate():
            source.renew(self._latest)

    def names(self) -> list[str]:
        """What was set so far, by name."""
        return [name for name, value in _values(self._latest).items() if value]

    def report(self) -> list[SourceReport]:
        """What the places of the source did."""
        source = self._source()
        return source.report() if isinstance(source, Reporting) else []

    def _remember(self) -> None:
        if self._memory is None:
            return
        plain = {
            name: value.reveal() if isinstance(value, Secret) else value
            for name, value in _values(self._latest).items()
            if value is not None
        }
        data = json.dumps(plain).encode()
        os.ftruncate(self._memory, 0)
        os.pwrite(self._memory, data, 0)


def _values(update: CredentialUpdate) -> dict[str, Any]:
    return {field.name: getattr(update, field.name) for field in attrs.fields(CredentialUpdate)}


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
