"""One repository in several places: mirrors in their order, the registry itself last.

Each call asks the places one after the other until one answers as it should (docs/adr, "Source order and
health"). A mirror that fails rests, and is then probed by one real request; whoever sends the probe does not
wait for it longer than a second before the next place is asked as well. Resting mirrors are asked once more
when the registry itself fails: nothing is worse than no answer.

A mirror gets neither the registry's credentials nor its tokens: what it may get is in its own configuration,
or stands in config.json under its own host.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import attrs

from virtiofsd_rafs.backends.base import ANSWERED_BY, SourceReport
from virtiofsd_rafs.backends.client import RegistryClient
from virtiofsd_rafs.backends.credentials import CredentialStore
from virtiofsd_rafs.backends.health import Health, State
from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.proxies import proxy_of
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    DigestMismatch,
    NotFound,
    RangeIgnored,
    Throttled,
    UntrustedServer,
)
from virtiofsd_rafs.registry.auth import Credentials, credentials_of
from virtiofsd_rafs.registry.protocol import Endpoint
from virtiofsd_rafs.registry.reference import api_host
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from virtiofsd_rafs.backends.base import CredentialUpdate
    from virtiofsd_rafs.backends.config import Mirror, RegistryBackend

T = TypeVar("T")
_log = logging.getLogger(__name__)

ORIGIN = "registry"
# How long a probe may keep its reader waiting.
PROBE_PATIENCE_S = 1.0
# What waiting seldom cures.
REFUSED_REST_S = 60.0
UNTRUSTED_REST_S = 300.0
# How long a mirror is not asked again for a blob that it does not have.
MISSING_S = 60.0
_MAX_MISSING = 1024
# Ranges whose bytes were wrong; each is fetched again within seconds.
_MAX_WRONG = 256
# The rest after wrong bytes doubles each time, up to this.
WRONG_REST_CAP_S = 300.0


@attrs.define(eq=False)
class Place:
    """The registry, or a mirror of it."""

    label: str
    client: RegistryClient
    health: Health
    is_origin: bool = False
    requests: int = 0
    errors: int = 0
    bytes: int = 0
    wrong: int = 0
    missing: OrderedDict[str, float] = attrs.field(factory=OrderedDict)

    def lacks(self, key: str, now: float) -> bool:
        """Whether it said lately that it does not have *key*."""
        return now < self.missing.get(key, 0.0)

    def note_missing(self, key: str, now: float) -> None:
        """It does not have *key*."""
        self.missing[key] = now + MISSING_S
        while len(self.missing) > _MAX_MISSING:
            self.missing.popitem(last=False)


class MirroredRegistry:
    """See the module's comment. Opens no connection yet.

    Raises AuthError when a file with credentials is unusable, ConfigError for a malformed ``auth``.

    Args:
        backend: the repository, its mirrors, and how to reach them.
        connections: requests at once.
        credentials: where credentials are looked up; None: made from the backend's ``auth_file``.
        deadline_s: how long somebody waits for an answer.
    """

    def __init__(
        self,
        backend: RegistryBackend,
        *,
        connections: int = 8,
        credentials: CredentialStore | None = None,
        deadline_s: float | None = None,
    ) -> None:
        store = CredentialStore(backend.auth_file) if credentials is None else credentials
        self._store = store
        # A probe that hangs must not take a connection away from those who wait.
        self.http = HttpClient(
            options=backend.http, connections=connections + len(backend.mirrors), deadline_s=deadline_s
        )
        self._places = [self._mirror(backend, mirror) for mirror in backend.mirrors]
        self._places.append(
            Place(
                ORIGIN,
                RegistryClient(
                    self.http,
                    Endpoint(api_host(backend.host), backend.repository, backend.scheme == "http"),
                    credentials=store,
                    registry=backend.host,
                    explicit=credentials_of(backend.auth, "auth") if backend.auth else None,
                    token=backend.registry_token,
                ),
                Health(),
                is_origin=True,
            )
        )
        self._wrong: OrderedDict[tuple[str, int, int, str], None] = OrderedDict()
        self._probes: set[asyncio.Task[object]] = set()

    def _mirror(self, backend: RegistryBackend, mirror: Mirror) -> Place:
        parts = urlsplit(mirror.url)
        prefix = parts.path.rstrip("/").removesuffix("/v2")
        endpoint = Endpoint(parts.netloc, backend.repository, parts.scheme == "http", prefix, backend.host)
        explicit = None
        if mirror.auth is not None:
            user, _, password = mirror.auth.reveal().partition(":")
            explicit = Credentials(user, Secret(password))
        client = RegistryClient(
            self.http, endpoint, credentials=self._store, explicit=explicit, headers=mirror.headers
        )
        health = Health(failure_limit=mirror.failure_limit)
        return Place(parts.netloc, client, health)

    @property
    def origin(self) -> RegistryClient:
        """The registry itself."""
        return self._places[-1].client

    async def call(
        self,
        work: Callable[[RegistryClient], Awaitable[T]],
        *,
        key: str = "",
        span: tuple[int, int] | None = None,
    ) -> T:
        """What *work* returns for the first place where it does not fail.

        Args:
            work: a request; may be called for several places, one after the other, or two at a time.
            key: the blob or manifest that it is about.
            span: offset and length, when it is a range of a blob.

        Raises the error of the registry itself, or of a mirror if only that one may pass.
        """
        errors: list[tuple[Place, BackendError | DigestMismatch]] = []
        late: list[tuple[Place, asyncio.Task[T]]] = []
        for place in self._order(key, span):
            probe = not place.is_origin and place.health.state(time.monotonic()) is State.DUE
            try:
                if not probe:
                    return await self._ask(place, work, key)
                task = self._start_probe(place, work, key)
                done, _ = await asyncio.wait({task}, timeout=PROBE_PATIENCE_S)
                if done:
                    return self._answer(place, task.result())
                late.append((place, task))
            except (BackendError, DigestMismatch) as e:
                errors.append((place, e))
        for place, task in late:
            try:
                return self._answer(place, await asyncio.shield(task))
            except (BackendError, DigestMismatch) as e:
                errors.append((place, e))
        raise _worst(errors)

    def ignores_ranges(self, key: str) -> bool:
        """See Streaming: whether all places do that may be asked for *key* now."""
        now = time.monotonic()
        return all(
            place.client.ignores_ranges(key)
            for place in self._places
            if place.is_origin or (place.health.state(now) is State.WELL and not place.lacks(key, now))
        )

    def wrong_bytes(self, key: str, offset: int, length: int, label: str) -> None:
        """The bytes that *label* sent for this range were wrong: another place is asked for them next."""
        for place in self._places:
            if place.label == label:
                place.errors += 1
                now = time.monotonic()
                if place.health.state(now) is not State.RESTING:
                    # Answers that were under way together are wrong together.
                    place.wrong += 1
                    rest = min(WRONG_REST_CAP_S, 2.0 ** min(place.wrong, 30))
                    place.health.failed(now, at_least_s=rest)
                self._wrong[key, offset, length, label] = None
                while len(self._wrong) > _MAX_WRONG:
                    self._wrong.popitem(last=False)

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable. Raises ConfigError, and changes nothing, for what is malformed."""
        explicit = credentials_of(update.registry_auth, "registry_auth") if update.registry_auth else None
        proxy = update.proxy_url
        options = proxy_of(proxy.reveal()) if proxy else None
        self.origin.renew(explicit=explicit, token=update.registry_token)
        if proxy is not None:
            self.http.set_proxy(options)
            for place in self._places:
                place.health.succeeded()  # the old proxy may have been to blame

    def report(self) -> list[SourceReport]:
        """See Reporting."""
        now = time.monotonic()
        return [
            SourceReport(
                source=place.label,
                url=place.client.endpoint.base,
                requests=place.requests,
                errors=place.errors,
                bytes=place.bytes,
                state="well" if place.is_origin else place.health.state(now).value,
                rests_for_s=0.0 if place.is_origin else place.health.rests_for(now),
            )
            for place in self._places
        ]

    async def close(self) -> None:
        """Ends what is under way, and closes connections."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        for place in self._places:
            await place.client.close()
        await self._store.close()
        await self.http.close()

    # -- how ------------------------------------------------------------------------------------------------

    def _order(self, key: str, span: tuple[int, int] | None) -> list[Place]:
        """The places to ask, first one first."""
        now = time.monotonic()
        distrusted = self._distrusted(key, span)
        first: list[Place] = []
        resting: list[Place] = []
        last: list[Place] = []
        for place in self._places:
            if place.label in distrusted:
                last.append(place)
            elif place.is_origin:
                first.append(place)
            elif place.lacks(key, now):
                continue
            elif place.health.state(now) is State.RESTING:
                resting.append(place)
            else:
                first.append(place)
        return first + resting + last

    def _distrusted(self, key: str, span: tuple[int, int] | None) -> set[str]:
        if span is None or not self._wrong:
            return set()
        begin, end = span[0], span[0] + span[1]
        return {
            label
            for name, offset, length, label in self._wrong
            if name == key and offset < end and begin < offset + length
        }

    def _start_probe(
        self, place: Place, work: Callable[[RegistryClient], Awaitable[T]], key: str
    ) -> asyncio.Task[T]:
        place.health.probe()
        task: asyncio.Task[T] = asyncio.ensure_future(self._ask(place, work, key))
        self._probes.add(task)
        task.add_done_callback(lambda t: self._probe_done(place, t))
        return task

    def _probe_done(self, place: Place, task: asyncio.Task[T]) -> None:
        place.health.probed()
        self._probes.discard(task)
        if not task.cancelled():
            task.exception()  # told by _ask; whoever waits gets it, too

    def _answer(self, place: Place, result: T) -> T:
        ANSWERED_BY.set(place.label)
        return result

    async def _ask(self, place: Place, work: Callable[[RegistryClient], Awaitable[T]], key: str) -> T:
        place.requests += 1
        began = time.monotonic()
        try:
            result = await work(place.client)
        except (BackendError, DigestMismatch) as e:
            place.errors += 1
            if not place.is_origin:
                self._mirror_failed(place, e, key, began)
            raise
        place.health.succeeded(began)
        if isinstance(result, bytes):
            place.bytes += len(result)
        return self._answer(place, result)

    def _mirror_failed(
        self, place: Place, error: BackendError | DigestMismatch, key: str, began: float
    ) -> None:
        now = time.monotonic()
        if isinstance(error, NotFound):
            place.note_missing(key, now)
            place.health.succeeded(began)
            return
        if isinstance(error, RangeIgnored):
            return  # a cache that is cold: it learns from that request
        rest = 0.0
        if isinstance(error, Throttled):
            rest = error.retry_after_s
        elif isinstance(error, AuthError):
            rest = REFUSED_REST_S
        elif isinstance(error, UntrustedServer):
            rest = UNTRUSTED_REST_S
        was = place.health.state(now)
        place.health.failed(now, at_least_s=rest)
        if was is State.WELL and place.health.state(now) is not State.WELL:
            _log.warning("mirror %s rests for %.0f s: %s", place.label, place.health.rests_for(now), error)


def _worst(errors: list[tuple[Place, BackendError | DigestMismatch]]) -> BackendError | DigestMismatch:
    """The error that tells the most: the registry's own, unless only a mirror may recover."""

    def cures(error: BackendError | DigestMismatch) -> bool:
        return not isinstance(error, BackendError) or error.retryable

    own = next((error for place, error in errors if place.is_origin), None)
    if own is not None and (cures(own) or not any(cures(error) for _, error in errors)):
        return own
    return next(error for _, error in reversed(errors) if cures(error) or own is None)
