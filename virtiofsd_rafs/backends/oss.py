"""Blobs in Alibaba Cloud OSS: our own signatures, our own connections."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.objects import ObjectSource, Plan, Refusal
from virtiofsd_rafs.backends.oss_sign import Keys, object_url, region_of, sign_v1, sign_v4
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtiofsd_rafs.backends.base import CredentialUpdate, SourceConfig
    from virtiofsd_rafs.backends.config import OssBackend

# The names that OSS's own SDK looks for, then those of Alibaba Cloud's other tools.
_VARIABLES = (
    ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"),
    ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN"),
)


class OssSigner:
    """Signs requests for one bucket.

    Args:
        config: bucket, endpoint and keys.
        reload: what the configuration says now, for keys that were refused; None: it does not change.
        environment: where keys are looked for that the configuration does not have.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        config: OssBackend,
        *,
        reload: Callable[[], OssBackend | None] | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._reload = reload
        self._environment = environment
        self._clock = clock
        self._region = config.region or region_of(config.endpoint)
        if config.signature == "v4" and not self._region:
            raise ConfigError(
                f"{config.endpoint} does not tell its region, which signatures of version 4 need",
                remedy="name the region",
            )
        self._v4 = config.signature == "v4" or (config.signature == "auto" and bool(self._region))
        self._keys, self._origin = _keys(config, environment)
        # What was found where keys are looked for: only a change there is news, and the API's keys stay.
        self._found = self._keys
        self._stamp = 0

    kind = "oss"

    @property
    def label(self) -> str:
        """See Signer."""
        return f"oss://{self._config.bucket}"

    async def plan(self, name: str) -> Plan:
        """See Signer."""
        config = self._config
        key = config.prefix + name
        url = object_url(config.scheme, config.endpoint, config.bucket, key)
        if self._keys is None:
            return Plan(url, stamp=self._stamp)
        if self._v4:
            signed = sign_v4(config.bucket, key, self._keys, region=self._region, now=self._clock())
        else:
            signed = sign_v1(config.bucket, key, self._keys, now=self._clock())
        return Plan(url, *signed, stamp=self._stamp)

    async def refused(self, plan: Plan, refusal: Refusal) -> bool:
        """See Signer. Looks at the configuration again: temporary keys may have been renewed there."""
        if plan.stamp != self._stamp:
            return True
        config = self._reload() if self._reload is not None else None
        found, where = _keys(config or self._config, self._environment)
        if found is None or found in (self._found, self._keys):
            return False
        self._found = found
        self._use(found, where)
        return True

    def explain(self) -> str:
        """See Signer."""
        if self._keys is None:
            return "there were no credentials: set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET"
        return f"the credentials came from {self._origin}: check key, secret, token and the bucket's policy"

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable."""
        old = self._keys
        key_id = update.access_key_id or (old.key_id if old else "")
        secret = update.access_key_secret or (old.secret if old else None)
        token = old.token if old and update.security_token is None else update.security_token
        if key_id and secret and (old is None or Keys(key_id, secret, token) != old):
            self._use(Keys(key_id, secret, token or None), "the API")

    def _use(self, keys: Keys, origin: str) -> None:
        self._keys, self._origin = keys, origin
        self._stamp += 1


def _keys(config: OssBackend, environment: Mapping[str, str]) -> tuple[Keys | None, str]:
    """The keys to sign with, and where they came from."""
    if config.access_key_secret:
        return Keys(
            config.access_key_id, config.access_key_secret, config.security_token
        ), "the configuration"
    for names in _VARIABLES:
        key_id, secret, token = (environment.get(name, "") for name in names)
        if key_id and secret:
            return Keys(
                key_id, Secret(secret), Secret(token) if token else None
            ), f"the environment ({names[0]})"
    return None, "nowhere"


def oss_source(
    backend: OssBackend, config: SourceConfig, reload: Callable[[], OssBackend | None] | None = None
) -> ObjectSource:
    """A BlobSource over the bucket of *backend*."""
    http = HttpClient(
        options=backend.http.plus(config.access.http),
        connections=config.connections,
        deadline_s=config.io_deadline_s,
    )
    return ObjectSource(OssSigner(backend, reload=reload), http)
