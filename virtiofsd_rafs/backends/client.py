"""A client of one repository: plans come from ``registry/``, connections from ``HttpClient``."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from virtiofsd_rafs.errors import AuthError, BadReply, DigestMismatch, RangeIgnored
from virtiofsd_rafs.registry.auth import MAX_TOKEN_BODY, REFUSED_PAUSE_S, Authenticator, Ready, TokenRequest
from virtiofsd_rafs.registry.manifest import ACCEPT, MAX_MANIFEST_LEN, Descriptor, verify_digest
from virtiofsd_rafs.registry.protocol import (
    BodyPlan,
    Exchange,
    Request,
    Step,
    check_ok,
    plan_range_body,
    range_headers,
)
from virtiofsd_rafs.registry.redirects import RedirectCache
from virtiofsd_rafs.registry.reference import is_sha256

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from virtiofsd_rafs.backends.credentials import CredentialStore
    from virtiofsd_rafs.backends.http import BodyFactory, HttpClient, Reply
    from virtiofsd_rafs.errors import BackendError
    from virtiofsd_rafs.registry.auth import Credentials
    from virtiofsd_rafs.registry.protocol import Endpoint
    from virtiofsd_rafs.registry.secret import Secret

# How much of a 200 reply may be skipped to reach the wanted slice before the reply is given up.
_MAX_SKIP = 1 << 20
# And where this is the server's habit: whoever reads more than a range asks for the whole blob once.
_MAX_SKIP_AGAIN = 64 << 10
# After this many ranges that were answered with the whole blob, the slice is cut out whatever it costs: the
# server will not learn.
_IGNORED_BEFORE_SLICING = 3
# Where credentials came from that are in no file, for messages.
_GIVEN = "the configuration"


class Sink(Protocol):
    """Where a download goes. ``restart`` forgets everything written so far."""

    def write(self, data: bytes, /) -> object: ...

    def restart(self) -> None: ...


class RegistryClient:
    """Requests to ``/v2/<repository>``. All methods raise BackendError subclasses; none tries again.

    Args:
        http: the connections; closed by the owner.
        endpoint: the repository.
        credentials: where credentials are looked up, by the name of the registry; closed by the owner.
        registry: that name, as ``Reference.host`` has it; None: the endpoint's host.
        explicit: credentials that come before those.
        token: a bearer token that is sent as it is.
        headers: sent with each request to the registry itself; they may be credentials.
        push: whether writing is wanted (the scope of tokens).
    """

    def __init__(
        self,
        http: HttpClient,
        endpoint: Endpoint,
        *,
        credentials: CredentialStore,
        registry: str | None = None,
        explicit: Credentials | None = None,
        token: Secret | None = None,
        headers: tuple[tuple[str, Secret], ...] = (),
        push: bool = False,
    ) -> None:
        self._http = http
        self.endpoint = endpoint
        self._registry = registry or endpoint.host
        self.name = f"{self._registry}/{endpoint.repository}"
        actions = "pull,push" if push else "pull"
        self._auth = Authenticator(
            endpoint.base, f"repository:{endpoint.repository}:{actions}", explicit, token=token
        )
        self._store = credentials
        self._explicit = explicit
        self._looked_up = False
        self._refused_until: dict[Credentials, float] = {}
        self._trouble: BackendError | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._headers = headers
        self._redirects = RedirectCache()
        self._ignored: dict[str, int] = {}

    def renew(self, *, explicit: Credentials | None = None, token: Secret | None = None) -> None:
        """Uses these from the next request on, where they are not None; an empty *token* takes it away."""
        if explicit is not None:
            self._explicit = explicit
            self._refused_until.pop(explicit, None)
            self._auth.use(explicit, origin=_GIVEN)
        if token is not None:
            self._auth.use_token(token or None)

    async def close(self) -> None:
        """Ends a renewal that is under way."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)

    @asynccontextmanager
    async def send(self, exchange: Exchange, body: BodyFactory | None = None) -> AsyncIterator[Reply]:
        """The final reply to *exchange*: authenticated, redirects followed."""
        refusals = 0
        forbidden = False
        while True:
            authorization = await self._authorization()
            reply = await self._http.open(exchange.request(), authorization, body, home_headers=self._headers)
            async with reply:
                step = exchange.on_reply(reply.head)
                # Some registries (ECR) answer credentials that have expired so.
                expired = reply.head.status == 403 and not forbidden and authorization is not None
                if step is Step.FINAL and not (expired and exchange.location is None):
                    yield reply
                    return
                await reply.drain()
                if step is Step.FINAL:
                    forbidden = True
                    if self._auth.is_current(authorization) and not await self._other_credentials():
                        yield reply
                        return
                    self._auth.forget_token(authorization)
            if step is Step.REFUSED:
                refusals += 1
                await self._refused(authorization, exchange, refusals)

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
        # As it was known when it was asked: what was under way together has been answered by one habit.
        slices = self._ignored.get(digest, 0) >= _IGNORED_BEFORE_SLICING
        async with self._range(digest, offset, length) as (reply, _):
            plan = self._plan(reply, digest, offset, length, slices=slices)
            exact = await reply.read(plan)
        if reply.head.status == 206:
            self._ignored.pop(digest, None)
        elif offset or not plan.ends:
            self._note_ignored(digest)
        return exact

    def ignores_ranges(self, digest: str) -> bool:
        """Whether the latest range of the blob was answered with all of it."""
        return digest in self._ignored

    async def open_whole(self, digest: str, offset: int, length: int) -> WholeReply | None:
        """The reply that begins at the blob's first byte, whatever is asked for; see Streaming."""
        stack = AsyncExitStack()
        try:
            asked = self._range(digest, offset, length)
            reply, what = await stack.enter_async_context(asked)
            if reply.head.status == 206:
                self._ignored.pop(digest, None)
                await reply.drain()
                await stack.aclose()
                return None
            check_ok(reply.head, (200,), what, now=time.time())
            self._note_ignored(digest)
            return WholeReply(reply, stack)
        except BaseException:
            await stack.aclose()
            raise

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

    def _plan(self, reply: Reply, digest: str, offset: int, length: int, *, slices: bool = False) -> BodyPlan:
        max_skip = _MAX_SKIP_AGAIN if digest in self._ignored else _MAX_SKIP
        if slices:
            max_skip = 1 << 63
        try:
            return plan_range_body(
                reply.head, offset, length, what=self._blob(digest), now=time.time(), max_skip=max_skip
            )
        except RangeIgnored:
            self._note_ignored(digest)
            raise

    def _note_ignored(self, digest: str) -> None:
        self._ignored[digest] = self._ignored.get(digest, 0) + 1

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

    # -- authentication -------------------------------------------------------------------------------------

    async def _authorization(self) -> Secret | None:
        """What to send now. One token request serves all who wait, and nobody waits for one that is early."""
        while True:
            try:
                plan = self._auth.plan(time.monotonic())
            except AuthError:
                if not await self._other_credentials():
                    raise
                continue
            if isinstance(plan, Ready):
                if plan.renew is not None:
                    self._renewing()
                return plan.authorization
            await asyncio.shield(self._renewing())

    def _renewing(self) -> asyncio.Task[None]:
        """The token request that is under way, begun if there was none."""
        if self._renewal is None:
            self._renewal = asyncio.ensure_future(self._renew_token())
            self._renewal.add_done_callback(self._renewed)
        return self._renewal

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewal = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._auth.renewal_failed(time.monotonic())
        # Those who wait get it as well; ahead of time there may be nobody.
        _log.info("%s: no new token: %s", self.name, error)

    async def _renew_token(self) -> None:
        # Nobody waits yet, most of the time: have a look whether the credentials are still the same.
        if self._looked_up:
            await self._choose(refused=None)
        while True:
            plan = self._auth.plan(time.monotonic())
            request = plan.renew if isinstance(plan, Ready) else plan
            if request is None:
                return
            try:
                if await self._fetch_token(request):
                    return
            except AuthError:
                if not await self._other_credentials():
                    raise

    async def _refused(self, used: Secret | None, exchange: Exchange, refusals: int) -> None:
        """Gets ready for another try after a 401. Raises AuthError when there is nothing to try."""
        if not self._looked_up:
            await self._choose(refused=None)
        while True:
            try:
                self._auth.refused(used, exchange.challenges(), refusals=refusals, now=time.monotonic())
            except AuthError as e:
                if await self._other_credentials():
                    continue
                if self._trouble is not None:
                    raise AuthError(e.message, remedy=str(self._trouble)) from e
                raise
            return

    async def _other_credentials(self) -> bool:
        """Looks for other credentials than those in use, which were refused; whether there are any."""
        refused = self._auth.credentials
        if refused is not None:
            self._refused_until[refused] = time.monotonic() + REFUSED_PAUSE_S
        await self._choose(refused=refused)
        # Another request that was refused with them may have been quicker.
        return self._auth.credentials != refused

    async def _choose(self, *, refused: Credentials | None) -> None:
        """Uses the first credentials that were not refused lately: the given ones, then what is found."""
        self._looked_up = True
        now = time.monotonic()
        self._refused_until = {c: until for c, until in self._refused_until.items() if now < until}
        if self._explicit is not None and self._explicit not in self._refused_until:
            self._auth.use(self._explicit, origin=_GIVEN)
            return
        found = await self._store.find(self._registry, self.endpoint.repository, refused=refused)
        self._trouble = found.trouble
        if found.credentials is not None and found.credentials not in self._refused_until:
            self._auth.use(found.credentials, origin=found.origin)

    async def _fetch_token(self, plan: TokenRequest) -> bool:
        headers: tuple[tuple[str, str], ...] = (("Accept-Encoding", "identity"),)
        body: BodyFactory | None = None
        if plan.form is not None:
            headers += (("Content-Type", "application/x-www-form-urlencoded"),)
            body = plan.form.reveal().encode
        request = Request("GET" if plan.form is None else "POST", plan.url, headers, authorize=True)
        async with await self._http.open(request, plan.authorization, body) as reply:
            data = await reply.read_all(MAX_TOKEN_BODY) if reply.head.status == 200 else b""
            return self._auth.token_reply(plan, reply.head, data, now=time.monotonic(), wall=time.time())


class WholeReply:
    """All of a blob, on its way; see WholeBlob."""

    def __init__(self, reply: Reply, stack: AsyncExitStack) -> None:
        self._reply = reply
        self._stack = stack

    def pieces(self) -> AsyncIterator[bytes]:
        """See WholeBlob."""
        return self._reply.chunks()

    async def close(self) -> None:
        """See WholeBlob."""
        await self._stack.aclose()


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
