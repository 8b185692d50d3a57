"""A client of one repository: plans come from ``registry/``, connections from ``HttpClient``."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from virtiofsd_rafs.errors import BadReply, DigestMismatch
from virtiofsd_rafs.registry.auth import MAX_TOKEN_BODY, Authenticator, Ready, TokenRequest
from virtiofsd_rafs.registry.manifest import ACCEPT, MAX_MANIFEST_LEN, Descriptor, verify_digest
from virtiofsd_rafs.registry.protocol import (
    DEFAULT_MAX_SKIP,
    BodyPlan,
    Endpoint,
    Exchange,
    RangeIgnored,
    Request,
    Step,
    check_ok,
    plan_range_body,
    range_headers,
)
from virtiofsd_rafs.registry.redirects import RedirectCache
from virtiofsd_rafs.registry.reference import is_sha256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from virtiofsd_rafs.backends.http import BodyFactory, HttpClient, Reply
    from virtiofsd_rafs.registry.auth import DockerConfig
    from virtiofsd_rafs.registry.reference import Reference
    from virtiofsd_rafs.registry.secret import Secret

# After this many ranges that were answered with the whole blob, the slice is cut out whatever it costs: the
# server will not learn.
_IGNORED_BEFORE_SLICING = 3


class Sink(Protocol):
    """Where a download goes. ``restart`` forgets everything written so far."""

    def write(self, data: bytes, /) -> object: ...

    def restart(self) -> None: ...


class RegistryClient:
    """Requests to ``/v2/<repository>``. All methods raise BackendError subclasses; none tries again.

    Args:
        http: the connections; closed by the owner.
        reference: names host and repository.
        plain_http: no TLS, by the user's wish.
        config: the user's credentials.
        push: whether writing is wanted (the scope of tokens).
    """

    def __init__(
        self,
        http: HttpClient,
        reference: Reference,
        *,
        plain_http: bool,
        config: DockerConfig,
        push: bool = False,
    ) -> None:
        self._http = http
        self.endpoint = Endpoint.of(reference, plain_http=plain_http)
        self.name = f"{reference.host}/{reference.repository}"
        actions = "pull,push" if push else "pull"
        self._auth = Authenticator(
            self.endpoint.base,
            f"repository:{reference.repository}:{actions}",
            config.lookup(reference.host),
            helper=config.helper(reference.host),
        )
        self._token_lock = asyncio.Lock()
        self._redirects = RedirectCache()
        self._ignored: dict[str, int] = {}

    @asynccontextmanager
    async def send(self, exchange: Exchange, body: BodyFactory | None = None) -> AsyncIterator[Reply]:
        """The final reply to *exchange*: authenticated, redirects followed."""
        refusals = 0
        while True:
            authorization = await self._authorization()
            reply = await self._http.open(exchange.request(), authorization, body)
            async with reply:
                step = exchange.on_reply(reply.head)
                if step is Step.FINAL:
                    yield reply
                    return
                await reply.drain()
            if step is Step.REFUSED:
                refusals += 1
                self._auth.refused(authorization, exchange.challenges(), refusals=refusals)

    async def manifest(self, target: str) -> bytes:
        """The manifest called *target*, a tag or a digest.

        Raises DigestMismatch when it is not what *target* promises, or what the registry itself says that it
        sends (Docker-Content-Digest): a tag promises nothing, and would let a flipped bit through.
        """
        exchange = Exchange(
            self.endpoint, "GET", self.endpoint.manifest_url(target), headers=(("Accept", ACCEPT),)
        )
        async with self.send(exchange) as reply:
            check_ok(reply.head, (200,), f"manifest {self.name}:{target}", now=time.time())
            data = await reply.read_all(MAX_MANIFEST_LEN)
            for promised in (target, reply.head.get("docker-content-digest") or ""):
                if is_sha256(promised):
                    verify_digest(data, promised, f"manifest {self.name}:{target}")
            return data

    async def read_range(self, digest: str, offset: int, length: int) -> bytes:
        """Exactly *length* bytes of a blob at *offset*."""
        async with self._range(digest, offset, length) as (reply, _):
            exact = await reply.read(self._plan(reply, digest, offset, length))
        self._ignored.pop(digest, None)
        return exact

    async def blob_size(self, digest: str) -> int:
        """The length of a blob, from the reply to a request for its first byte.

        Not by HEAD: where a blob is redirected to a URL signed for GET, HEAD is refused.
        """
        async with self._range(digest, 0, 1) as (reply, _):
            if reply.head.status == 416:
                return 0
            total = self._plan(reply, digest, 0, 1).total
        if total is None:
            raise BadReply(f"{self.name}: the server does not tell the size of blob {digest}")
        return total

    async def has_blob(self, digest: str) -> bool:
        """Whether the registry has the blob, as far as it tells: any other answer than yes counts as no."""
        exchange = Exchange(self.endpoint, "HEAD", self.endpoint.blob_url(digest))
        async with self.send(exchange) as reply:
            return reply.head.status == 200

    async def download(self, download: Download) -> None:
        """Goes on with *download* until it is complete and verified.

        Raises DigestMismatch, after which the download starts at its beginning again.
        """
        digest, size = download.descriptor.digest, download.descriptor.size
        offset, length = download.done, size - download.done
        if length:
            async with self._range(digest, offset, length) as (reply, what):
                plan = plan_range_body(reply.head, offset, length, what=what, now=time.time(), max_skip=size)
                async for piece in reply.slice(plan):
                    download.take(piece)
        download.finish()

    def _plan(self, reply: Reply, digest: str, offset: int, length: int) -> BodyPlan:
        max_skip = DEFAULT_MAX_SKIP
        if self._ignored.get(digest, 0) >= _IGNORED_BEFORE_SLICING:
            max_skip = 1 << 63
        try:
            return plan_range_body(
                reply.head, offset, length, what=self._blob(digest), now=time.time(), max_skip=max_skip
            )
        except RangeIgnored:
            self._ignored[digest] = self._ignored.get(digest, 0) + 1
            raise

    def _blob(self, digest: str) -> str:
        return f"blob {digest[:19]} of {self.name}"

    @asynccontextmanager
    async def _range(self, digest: str, offset: int, length: int) -> AsyncIterator[tuple[Reply, str]]:
        exchange = Exchange(
            self.endpoint,
            "GET",
            self.endpoint.blob_url(digest),
            headers=range_headers(offset, length),
            location=self._redirects.get(digest, now=time.time()),
        )
        try:
            async with self.send(exchange) as reply:
                if reply.head.status in (200, 206) and exchange.location is not None:
                    self._redirects.put(digest, exchange.location, now=time.time())
                elif exchange.location is None:
                    self._redirects.drop(digest)
                yield reply, self._blob(digest)
        except Exception:
            # Whatever went wrong at the target, the next try asks the registry again.
            self._redirects.drop(digest)
            raise

    async def _authorization(self) -> Secret | None:
        plan = self._auth.plan(time.monotonic())
        if isinstance(plan, Ready):
            return plan.authorization
        async with self._token_lock:  # one of many waiting requests fetches the token for all
            while True:
                plan = self._auth.plan(time.monotonic())
                if isinstance(plan, Ready):
                    return plan.authorization
                await self._fetch_token(plan)

    async def _fetch_token(self, plan: TokenRequest) -> None:
        headers: tuple[tuple[str, str], ...] = (("Accept-Encoding", "identity"),)
        body: BodyFactory | None = None
        if plan.form is not None:
            headers += (("Content-Type", "application/x-www-form-urlencoded"),)
            body = plan.form.reveal().encode
        request = Request("GET" if plan.form is None else "POST", plan.url, headers, authorize=True)
        async with await self._http.open(request, plan.authorization, body) as reply:
            data = await reply.read_all(MAX_TOKEN_BODY) if reply.head.status == 200 else b""
            self._auth.token_reply(plan, reply.head, data, now=time.monotonic(), wall=time.time())


class Download:
    """A blob on its way into *sink*: goes on where a connection broke off, verified when it is complete."""

    def __init__(self, descriptor: Descriptor, sink: Sink) -> None:
        self.descriptor = descriptor
        self.done = 0
        self._sink = sink
        self._hash = hashlib.sha256()

    def take(self, piece: bytes) -> None:
        """Takes the next bytes."""
        self._sink.write(piece)
        self._hash.update(piece)
        self.done += len(piece)

    def finish(self) -> None:
        """Raises DigestMismatch, and starts anew, unless the digest is the promised one."""
        got = "sha256:" + self._hash.hexdigest()
        if got == self.descriptor.digest:
            return
        self.done = 0
        self._hash = hashlib.sha256()
        self._sink.restart()
        raise DigestMismatch(f"the registry sent {got} for {self.descriptor.digest}")
