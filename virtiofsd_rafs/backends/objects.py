"""Ranges of objects by GET, for every store that needs a signature but no dialogue: S3, OSS, plain web
servers.

A ``Signer`` says what to send for a blob and what a refusal means; everything else (redirects, slicing,
classifying replies, naming errors) is here, once. Status decides first: the body of a refusal is looked at
only for the store's error code, for a short while, and never waited for.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import attrs

from virtiofsd_rafs.backends.base import ANSWERED_BY, check_range, file_name
from virtiofsd_rafs.backends.proxies import proxy_of
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BadReply,
    CredentialsExpired,
    NotFound,
    RangeIgnored,
    Throttled,
    Unreachable,
)
from virtiofsd_rafs.registry.protocol import (
    MAX_REDIRECTS,
    BodyPlan,
    ReplyHead,
    Request,
    join_url,
    origin,
    plan_range_body,
    range_headers,
    status_error,
    without_query,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from virtiofsd_rafs.backends.base import CredentialUpdate
    from virtiofsd_rafs.backends.http import HttpClient, Reply
    from virtiofsd_rafs.registry.secret import Secret

# As first sent, after new credentials, after another region.
_MAX_SIGNINGS = 3
# After this many ranges that were answered with the whole blob, the slice is cut out whatever it costs.
_IGNORED_BEFORE_SLICING = 3
# An error document of S3 or OSS has some 500 bytes.
_MAX_ERROR_BODY = 16 << 10
_ERROR_BODY_S = 2.0

_CODE = re.compile(rb"<Code>([0-9A-Za-z.]{1,64})</Code>")
_REGION = re.compile(rb"<Region>([0-9a-z-]{1,64})</Region>")
# A presigned URL that has ended is told from other refusals by this text alone (S3), or by Expires (OSS).
_URL_EXPIRED = re.compile(rb"<Message>Request has expired|<Expires>")

# Codes of S3 and OSS: the credentials were good once.
EXPIRED_CODES = frozenset(
    {"ExpiredToken", "TokenRefreshRequired", "SecurityTokenExpired", "InvalidSecurityToken", "RequestExpired"}
)
_SKEW_CODES = frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"})
_BAD_KEY_CODES = {
    "InvalidAccessKeyId": "the store does not know the access key id",
    "InvalidToken": "the session token is not valid",
    "SignatureDoesNotMatch": "the secret does not fit the access key id",
    "AccessDenied": "the credentials do not allow to read it, or it is not there",
}
_BUSY_CODES = frozenset({"SlowDown", "TooManyRequests", "RequestLimitExceeded"})


@attrs.frozen
class Plan:
    """What to send for one blob, without the range."""

    url: str = attrs.field(repr=without_query)
    headers: tuple[tuple[str, str], ...] = attrs.field(default=(), repr=False)
    authorization: Secret | None = None
    stamp: int = 0
    """Which state of the credentials it was signed with."""


@attrs.frozen
class Refusal:
    """A reply that brings no data."""

    head: ReplyHead
    code: str = ""
    """The store's name for what went wrong; empty when it told none."""
    region: str = ""
    """Where the store says that the bucket is."""
    url_expired: bool = False

    @property
    def about_credentials(self) -> bool:
        """Whether other credentials or another signature may be let in."""
        return self.head.status in (401, 403) or self.code in EXPIRED_CODES or self.code in _BAD_KEY_CODES


class Signer(Protocol):
    """Knows where a blob is and how requests for it are signed. Any number of calls may run at once."""

    @property
    def kind(self) -> str:
        """The kind of store, for the log of fetches."""
        ...

    @property
    def label(self) -> str:
        """The place, for people; never a secret."""
        ...

    async def plan(self, name: str) -> Plan:
        """What to send for the blob *name*. Raises BackendError or ConfigError."""
        ...

    async def refused(self, plan: Plan, refusal: Refusal) -> bool:
        """Whether another plan may be let in after *plan* was not. Called at most twice for one read."""
        ...

    def explain(self) -> str:
        """A remedy for refused credentials: where they came from."""
        ...

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable."""
        ...


class ObjectSource:
    """A BlobSource over a Signer.

    Args:
        signer: plans the requests.
        http: the connections; closed with the source.
        plan_body: how to read the wanted bytes out of a reply; takes what plan_range_body takes.
    """

    def __init__(
        self, signer: Signer, http: HttpClient, *, plan_body: Callable[..., BodyPlan] = plan_range_body
    ) -> None:
        self._signer = signer
        self._http = http
        self._plan_body = plan_body
        self._ignored: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    @property
    def label(self) -> str:
        """The place, for people."""
        return self._signer.label

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable. Raises ConfigError, and changes nothing, for what is malformed."""
        proxy = proxy_of(update.proxy_url.reveal()) if update.proxy_url else None
        self._signer.renew(update)
        if update.proxy_url is not None:
            self._http.set_proxy(proxy)

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource."""
        check_range(offset, length)
        name = file_name(blob_id)
        async with self._get(name, "GET", range_headers(offset, length)) as reply:
            plan = self._plan_of(reply, name, offset, length)
            exact = await reply.read(plan)
            if plan.ends:
                await reply.end()
        self._ignored.pop(name, None)
        ANSWERED_BY.set(self._signer.kind)
        return exact

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource. From a range, because what is signed for GET does not hold for HEAD."""
        name = file_name(blob_id)
        if name not in self._sizes:
            self._sizes[name] = await self._size(name)
        return self._sizes[name]

    async def close(self) -> None:
        """See BlobSource."""
        await self._http.close()

    async def _size(self, name: str) -> int:
        async with self._get(name, "GET", range_headers(0, 1)) as reply:
            if reply.head.status == 416:
                return 0
            if reply.head.status == 200 and reply.head.content_length() == 0:
                return 0
            total = self._plan_of(reply, name, 0, 1).total
        if total is None:
            raise BadReply(f"{self._what(name)}: the server does not tell its size")
        return total

    def _what(self, name: str) -> str:
        return f"blob {name[:12]} of {self.label}"

    def _plan_of(self, reply: Reply, name: str, offset: int, length: int) -> BodyPlan:
        extra = {"max_skip": 1 << 63} if self._ignored.get(name, 0) >= _IGNORED_BEFORE_SLICING else {}
        try:
            return self._plan_body(
                reply.head, offset, length, what=self._what(name), now=time.time(), **extra
            )
        except RangeIgnored:
            self._ignored[name] = self._ignored.get(name, 0) + 1
            raise

    @asynccontextmanager
    async def _get(
        self, name: str, method: str, headers: tuple[tuple[str, str], ...]
    ) -> AsyncIterator[Reply]:
        """The reply that brings the blob, or says that it has no such range; raises what any other means."""
        for _ in range(_MAX_SIGNINGS):
            plan = await self._signer.plan(name)
            reply = await self._follow(plan, method, headers)
            async with reply:
                if reply.head.status in (200, 206, 416):
                    yield reply
                    return
                refusal = await _refusal(reply)
            if not (refusal.about_credentials or refusal.region):
                break  # nothing that another signature could cure
            if not await self._signer.refused(plan, refusal):
                break
        raise self._error(refusal, name)

    async def _follow(self, plan: Plan, method: str, headers: tuple[tuple[str, str], ...]) -> Reply:
        """The reply to *plan* behind any redirects; to another origin goes nothing but the range."""
        common = (("Accept-Encoding", "identity"), *headers)
        url, home = plan.url, origin(plan.url)
        for _ in range(MAX_REDIRECTS + 1):
            at_home = origin(url) == home
            sent = common + plan.headers if at_home else common
            reply = await self._http.open(Request(method, url, sent, authorize=at_home), plan.authorization)
            location = reply.head.get("location")
            if reply.head.status not in (301, 302, 303, 307, 308) or location is None:
                return reply
            async with reply:
                target = join_url(url, location)
                if home[0] == "https" and origin(target)[0] == "http":
                    raise BadReply(f"{without_query(url)} redirects to unencrypted {without_query(target)}")
                await reply.drain()
            url = target
        raise BadReply(f"more than {MAX_REDIRECTS} redirects for {without_query(plan.url)}")

    def _error(self, refusal: Refusal, name: str) -> BackendError:
        what, code, status = self._what(name), refusal.code, refusal.head.status
        told = f"{code}, {status}" if code else str(status)
        if code in EXPIRED_CODES or refusal.url_expired:
            return CredentialsExpired(f"{what}: the credentials have expired ({told})", remedy=_RENEW)
        if code in _SKEW_CODES:
            return AuthError(
                f"{what}: the store's clock differs from this machine's ({told}): the store says "
                f"{(refusal.head.get('date') or 'nothing')[:40]}",
                remedy="set this machine's clock",
            )
        if code == "NoSuchBucket":
            return NotFound(
                f"{what}: there is no such bucket ({told})", remedy="check its name, region and endpoint"
            )
        if code == "NoSuchKey":
            return NotFound(f"{what} is not there ({told})", remedy="check bucket and folder, or upload it")
        if code in _BUSY_CODES:
            return Throttled(f"{what}: the store asks to slow down ({told})")
        if status in (401, 403) or code in _BAD_KEY_CODES:
            reason = _BAD_KEY_CODES.get(code, "access refused")
            return AuthError(f"{what}: {reason} ({told})", remedy=self._signer.explain())
        if refusal.region:
            return BadReply(f"{what}: the bucket is in region {refusal.region} ({told})")
        error = status_error(refusal.head, what, now=time.time())
        return Unreachable(f"{what}: the server failed with {told}") if status >= 500 and code else error


_RENEW = "give new ones: through the API, in the configuration file, or where they come from"


async def _refusal(reply: Reply) -> Refusal:
    """What *reply* says, and its connection ready for the next request where that costs nothing."""
    head = reply.head
    region = head.get("x-amz-bucket-region") or ""
    body = b""
    length = head.content_length()
    if 300 <= head.status < 600 and (length is None or length <= _MAX_ERROR_BODY):
        try:
            async with asyncio.timeout(_ERROR_BODY_S):
                body = await reply.read_all(_MAX_ERROR_BODY)
        except (BackendError, TimeoutError):
            body = b""  # the status has to be enough
    code, named = _CODE.search(body), _REGION.search(body)
    if named:
        region = named[1].decode()
    # Elsewhere the header only repeats where the request was sent.
    misplaced = head.status in (301, 400) and re.fullmatch(r"[0-9a-z-]{1,64}", region)
    return Refusal(
        head,
        code=code[1].decode() if code else "",
        region=region if misplaced else "",
        url_expired=head.status == 403 and bool(_URL_EXPIRED.search(body)),
    )
