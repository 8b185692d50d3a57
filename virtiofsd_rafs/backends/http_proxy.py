"""Blobs behind a web server: nydusd's ``http-proxy`` back-end, over TCP or a unix socket.

Servers of that kind are simple. nydus-backend-proxy answers a range request with 200 instead of 206, with the
right part as body and a Content-Range whose total is the length of that part. What is in the range is still
checked by digest, so here only its position has to be right.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.objects import ObjectSource, Plan, Refusal
from virtiofsd_rafs.errors import BadReply
from virtiofsd_rafs.registry.protocol import (
    DEFAULT_MAX_SKIP,
    BodyPlan,
    ReplyHead,
    plan_range_body,
    range_headers,
)
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.base import CredentialUpdate, SourceConfig
    from virtiofsd_rafs.backends.config import HttpProxyBackend

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})(?:/(\d{1,19}|\*))?")
# Answers of servers that know no HEAD.
_NO_HEAD = (400, 403, 405, 501)


def plan_proxy_body(
    head: ReplyHead, offset: int, length: int, *, what: str, now: float, max_skip: int = DEFAULT_MAX_SKIP
) -> BodyPlan:
    """As plan_range_body, but a Content-Range counts whatever the status and its total.

    The total of the returned plan is None then: it cannot be trusted.
    """
    told = _CONTENT_RANGE.fullmatch((head.get("content-range") or "").strip())
    exact = told is not None and int(told[1]) == offset and int(told[2]) == offset + length - 1
    encoded = head.get("content-encoding") not in (None, "identity", "")
    if head.status in (200, 206) and exact and not encoded and head.content_length() in (None, length):
        return BodyPlan(0, length, ends=True, total=None)
    if head.status == 200 and told is not None:
        # It sent a part, and the wrong one: not the whole blob, out of which another part could be cut.
        head = ReplyHead(206, head.fields)
    return plan_range_body(head, offset, length, what=what, now=now, max_skip=max_skip)


class _Plain:
    """Signs nothing, or with a fixed user and password."""

    kind = "http-proxy"

    def __init__(
        self, backend: HttpProxyBackend, reload: Callable[[], HttpProxyBackend | None] | None
    ) -> None:
        self._reload = reload
        self._found = backend.auth
        self._base = (backend.addr.rstrip("/") if backend.is_url else "http://localhost") + quote(
            backend.path.rstrip("/"), safe="/%:@!$&'()*+,;=~"
        )
        self._label = backend.addr if not backend.is_url else self._base
        self._authorization: Secret | None = None
        self._stamp = 0
        if backend.auth is not None:
            self._use(backend.auth)

    @property
    def label(self) -> str:
        return self._label

    async def plan(self, name: str) -> Plan:
        return Plan(f"{self._base}/{name}", (), self._authorization, self._stamp)

    async def refused(self, plan: Plan, refusal: Refusal) -> bool:
        if plan.stamp != self._stamp:
            return True
        backend = self._reload() if self._reload is not None else None
        if backend is None or backend.auth is None or backend.auth == self._found:
            return False
        self._found = backend.auth
        self._use(backend.auth)
        return True

    def explain(self) -> str:
        if self._authorization is None:
            return "there were no credentials: put them into the configuration"
        return "check user and password"

    def renew(self, update: CredentialUpdate) -> None:
        if update.registry_auth is not None:
            self._authorization = Secret(f"Basic {update.registry_auth.reveal()}")
            self._stamp += 1

    def _use(self, auth: Secret) -> None:
        encoded = base64.b64encode(auth.reveal().encode()).decode()
        self._authorization = Secret(f"Basic {encoded}")
        self._stamp += 1


class HttpProxySource(ObjectSource):
    """A BlobSource over ``<addr><path>/<blob id>``."""

    def __init__(
        self,
        backend: HttpProxyBackend,
        config: SourceConfig,
        reload: Callable[[], HttpProxyBackend | None] | None = None,
    ) -> None:
        http = HttpClient(
            options=backend.http.plus(config.access.http),
            connections=config.connections,
            deadline_s=config.io_deadline_s,
            unix_socket=None if backend.is_url else Path(backend.addr),
        )
        super().__init__(_Plain(backend, reload), http, plan_body=plan_proxy_body)

    async def _size(self, name: str) -> int:
        """By HEAD, as nydusd asks: the total of a Content-Range may be wrong."""
        plan = await self._signer.plan(name)
        async with await self._follow(plan, "HEAD", ()) as reply:
            length = reply.head.content_length()
            if reply.head.status == 200 and length is not None:
                return length
            if reply.head.status not in (200, *_NO_HEAD):
                raise self._error(Refusal(reply.head), name)
        async with self._get(name, "GET", range_headers(0, 1)) as reply:
            head = reply.head
            if head.status == 416 or (head.status == 200 and head.content_length() == 0):
                return 0
            told = _CONTENT_RANGE.fullmatch((head.get("content-range") or "").strip())
            total = int(told[3]) if told and told[3] and told[3] != "*" else None
            if head.status == 200 and told is None:
                total = head.content_length()
        if total is None or total == 1:  # 1 may be the length of the part that was asked for
            raise BadReply(
                f"{self._what(name)}: the server does not tell its size",
                remedy="it has to answer HEAD, or ranges with the right total",
            )
        return total
