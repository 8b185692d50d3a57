"""Blobs in S3: credentials as botocore finds them, one presigned URL for each blob, bytes by our own client.

aiobotocore is asked for nothing but credentials: a range that it fetched itself would cost ten times the CPU
of ours. ``Range`` is not signed, so that one URL serves every range of a blob until shortly before it ends.
The package is an extra (``virtiofsd-rafs[s3]``), and imported when the first URL is signed.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import attrs

from virtiofsd_rafs.backends.config import split_user
from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.objects import ObjectSource, Plan, Refusal
from virtiofsd_rafs.errors import AuthError, CredentialsExpired
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.base import CredentialUpdate, SourceConfig
    from virtiofsd_rafs.backends.config import S3Backend

DEFAULT_REGION = "us-east-1"
# How long a presigned URL holds: it is as good as a password for one blob, so not for days.
PRESIGN_S = 3600
# A URL is not used in its last seconds: the request has to reach a server whose clock may be ahead.
PRESIGN_MARGIN_S = 120
# Credentials that were looked up this recently are not looked up again because they were refused.
_RELOAD_PAUSE_S = 5.0


@attrs.frozen
class _Credentials:
    """What one request is signed with; comparing tells whether a URL is still of these."""

    key_id: str
    secret: Secret
    token: Secret | None


@attrs.frozen
class _Signed:
    plan: Plan
    credentials: _Credentials | None
    until: float


class S3Signer:
    """Presigns a URL for each blob of one bucket.

    Args:
        config: bucket, endpoint and, if given, keys.
        reload: what the configuration says now, for keys that were refused; None: it does not change.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        config: S3Backend,
        *,
        reload: Callable[[], S3Backend | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._reload = reload
        self._clock = clock
        self._given = self._found = _given(config)  # only a change of what is found is news
        self._given_by = "the configuration"
        self._chain: Any = None
        self._chain_loaded = False
        self._loaded_at = 0.0
        self._region = config.region
        self._endpoint_url = ""
        self._base = ""
        self._lock = asyncio.Lock()
        self._stamp = 0
        self._urls: dict[str, _Signed] = {}

    kind = "s3"

    @property
    def label(self) -> str:
        """See Signer."""
        return f"s3://{self._config.bucket}"

    async def plan(self, name: str) -> Plan:
        """See Signer."""
        now = self._clock()
        credentials = await self._credentials()
        known = self._urls.get(name)
        # A clock that was set back makes a URL of the future: not to be kept for longer than it holds.
        if known is not None and known.credentials == credentials and 0 < known.until - now <= PRESIGN_S:
            return known.plan
        key = quote(self._config.prefix + name, safe="/~")
        url = f"{self._base}/{key}"
        if credentials is not None:
            url = _presign(url, credentials, self._region)
        plan = Plan(url, stamp=self._stamp)
        self._urls[name] = _Signed(plan, credentials, now + PRESIGN_S - PRESIGN_MARGIN_S)
        return plan

    async def refused(self, plan: Plan, refusal: Refusal) -> bool:
        """See Signer. Asks the whole chain anew, once for all requests that were signed alike."""
        async with self._lock:
            if plan.stamp != self._stamp:
                return True
            if refusal.region not in ("", self._region):
                self._region = refusal.region
                self._base = base_url(self._config, self._region, self._endpoint_url)
            elif not (
                refusal.about_credentials
                and (self._given_again(refusal) or await self._looked_up_again(refusal))
            ):
                return False
            self._stamp += 1
            self._urls.clear()
            return True

    def explain(self) -> str:
        """See Signer."""
        if self._given is not None:
            return f"the credentials came from {self._given_by}: check key, secret, token and bucket policy"
        if self._chain is None:
            return (
                "there were no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                "or give the machine a role"
            )
        method = str(getattr(self._chain, "method", "AWS"))[:40]
        return f"the credentials came from {method}: check them and the bucket's policy"

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable."""
        old = self._given
        key_id = update.access_key_id or (old.key_id if old else "")
        secret = update.access_key_secret or (old.secret if old else None)
        token = old.token if old and update.security_token is None else update.security_token
        if key_id and secret:
            self._given = _Credentials(key_id, secret, token or None)
            self._given_by = "the API"
            self._stamp += 1
            self._urls.clear()

    def _given_again(self, refusal: Refusal) -> bool:
        """Whether the configuration has other keys now, or the same ones are worth another URL."""
        if self._given is None:
            return False
        config = self._reload() if self._reload is not None else None
        fresh = _given(config) if config is not None else None
        if fresh is not None and fresh not in (self._found, self._given):
            self._given = self._found = fresh
            self._given_by = "the configuration"
            return True
        return refusal.url_expired

    async def _looked_up_again(self, refusal: Refusal) -> bool:
        if self._given is not None:
            return False
        if time.monotonic() - self._loaded_at < _RELOAD_PAUSE_S and not refusal.url_expired:
            return False
        await self._load()
        return True

    async def _credentials(self) -> _Credentials | None:
        """What to sign with now; None: a public bucket, as far as anybody knows."""
        if not self._chain_loaded:
            async with self._lock:
                if not self._chain_loaded:
                    await self._load()
        if self._given is not None:
            return self._given
        if self._chain is None:
            return None
        from botocore.exceptions import BotoCoreError

        try:
            # Renews temporary credentials some minutes before they end, and costs nothing otherwise.
            frozen = await self._chain.get_frozen_credentials()
        except BotoCoreError as e:
            raise CredentialsExpired(
                f"{self.label}: the credentials cannot be renewed ({type(e).__name__})",
                remedy="check the role, or what it is fetched from",
            ) from e
        token = Secret(frozen.token) if frozen.token else None
        return _Credentials(frozen.access_key, Secret(frozen.secret_key), token)

    async def _load(self) -> None:
        """Runs the chain. Raises AuthError when a part of it is broken."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, _import_aws)
        from aiobotocore.session import AioSession
        from botocore.exceptions import BotoCoreError, ClientError

        session = AioSession(profile=self._config.profile or None)
        try:
            self._endpoint_url = _configured_endpoint(session)
            self._region = self._region or session.get_config_variable("region") or DEFAULT_REGION
            if self._given is None:
                self._chain = await session.get_credentials()
        except (BotoCoreError, ClientError) as e:
            raise AuthError(
                f"{self.label}: no credentials: {_reason(e)}",
                remedy="mend the AWS configuration (AWS_PROFILE, ~/.aws), or choose another profile",
            ) from e
        self._base = base_url(self._config, self._region, self._endpoint_url)
        self._chain_loaded = True
        self._loaded_at = time.monotonic()


def base_url(config: S3Backend, region: str, endpoint_url: str = "") -> str:
    """What stands before ``/key``. *endpoint_url*, from the environment, yields to the configuration."""
    scheme, host = config.scheme, config.endpoint
    if not host and endpoint_url:
        bare, _ = split_user(endpoint_url, "the AWS endpoint URL")
        parts = urlsplit(bare)
        scheme, host = ("http" if parts.scheme == "http" else "https"), parts.netloc
    # One certificate covers *.s3.region.amazonaws.com, but no bucket with a dot in its name.
    path_style = bool(host) or ("." in config.bucket and scheme == "https")
    if config.path_style is not None:
        path_style = config.path_style
    if not host:
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        host = f"s3.{region}.{suffix}"
    if path_style or _is_address(host):
        return f"{scheme}://{host}/{config.bucket}"
    return f"{scheme}://{config.bucket}.{host}"


def s3_source(
    backend: S3Backend, config: SourceConfig, reload: Callable[[], S3Backend | None] | None = None
) -> ObjectSource:
    """A BlobSource over the bucket of *backend*."""
    http = HttpClient(
        options=backend.http.plus(config.access.http),
        connections=config.connections,
        deadline_s=config.io_deadline_s,
    )
    return ObjectSource(S3Signer(backend, reload=reload), http)


def _given(config: S3Backend) -> _Credentials | None:
    if not config.access_key_secret:
        return None
    return _Credentials(config.access_key_id, config.access_key_secret, config.session_token)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(re.sub(r":\d+$", "", host).strip("[]"))
    except ValueError:
        return False
    return True


def _import_aws() -> None:
    # At debug level botocore logs what it signs, token and signature included.
    for name in ("botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in ("aiobotocore.session", "botocore.auth", "botocore.configprovider"):
        importlib.import_module(module)


def _configured_endpoint(session: Any) -> str:
    """AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or the profile's, as botocore's own clients look for it."""
    from botocore.configprovider import ConfiguredEndpointProvider

    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return ""
    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    return provider.provide() or ""


def _presign(url: str, credentials: _Credentials, region: str) -> str:
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials

    token = credentials.token.reveal() if credentials.token else None
    keys = ReadOnlyCredentials(credentials.key_id, credentials.secret.reveal(), token)
    request = AWSRequest(method="GET", url=url)
    S3SigV4QueryAuth(keys, "s3", region, expires=PRESIGN_S).add_auth(request)
    return str(request.url)


def _reason(error: Exception) -> str:
    """An error of botocore's in one line; its texts name files, profiles and roles, never secrets."""
    return " ".join(str(error).split())[:200]
