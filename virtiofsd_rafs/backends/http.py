"""The one place that sends HTTP requests to the outside: an aiohttp session with the habits that registries
need.

Bodies are never decompressed behind our back (``Accept-Encoding: identity``; a compressed 206 makes no
sense), redirects are never followed by the library (it would take the Authorization along), URLs are sent as
they were written (a re-quoted signed URL has another signature), and neither cookies nor ~/.netrc take part.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from virtiofsd_rafs import __version__
from virtiofsd_rafs.backends.base import CONNECTIONS
from virtiofsd_rafs.backends.config import DEFAULT_TIMEOUT_S, TRIES_WITHIN_DEADLINE, HttpOptions
from virtiofsd_rafs.backends.proxies import Proxies, Proxy
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BackendTimeout,
    BadReply,
    ConfigError,
    Unreachable,
    UntrustedServer,
)
from virtiofsd_rafs.registry.protocol import BodyPlan, ReplyHead, Request, without_query

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from virtiofsd_rafs.backends.config import ProxyOptions
    from virtiofsd_rafs.registry.secret import Secret

_log = logging.getLogger(__name__)

# What must arrive of a body within each default time-out, less where less time is given: a trickle is no
# progress.
MIN_PROGRESS = 32 << 10
# The tiny bodies of redirects and 401 are drained for this long, so that the connection can be used again.
_DRAIN_S = 0.25
_DRAIN_MAX = 16 << 10
# A guest that runs misses something now and then, and each new connection costs it round trips. Just below
# the minute after which the first servers and load balancers close idle ones.
KEEP_ALIVE_S = 50.0
_READ_BUFFER = 256 << 10

# Statuses by which a proxy says that it could not get an answer; the server itself may send them, too.
_PROXY_STATUS = (502, 503, 504)

# What may be sent as a body: called anew for each try.
BodyFactory = Callable[[], Any]


def _counting() -> aiohttp.TraceConfig:
    """Counts connections in CONNECTIONS."""

    async def opened(*_: object) -> None:
        CONNECTIONS.opened += 1

    async def reused(*_: object) -> None:
        CONNECTIONS.reused += 1

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(opened)
    trace.on_connection_reuseconn.append(reused)
    return trace


class HttpClient:
    """Connections to any number of hosts, at most *connections* at a time.

    Args:
        options: certificates, whether to check any, a proxy, and time-outs.
        connections: bound for all hosts together.
        unix_socket: where to connect to, whatever host a URL names; never through a proxy.
        deadline_s: how long somebody waits for the bytes; shortens both time-outs, so that there is time for
            other tries when a server falls silent.
    """

    def __init__(
        self,
        *,
        options: HttpOptions | None = None,
        connections: int = 8,
        unix_socket: Path | None = None,
        deadline_s: float | None = None,
    ) -> None:
        options = options or HttpOptions()
        self._ca_files = options.ca_files
        self._check_certificates = not options.skip_verify
        connect_timeout_s, progress_timeout_s = options.connect_timeout_s, options.timeout_s
        if deadline_s is not None:
            connect_timeout_s = min(connect_timeout_s, deadline_s / TRIES_WITHIN_DEADLINE)
            progress_timeout_s = min(progress_timeout_s, deadline_s / TRIES_WITHIN_DEADLINE)
        self._unix_socket = unix_socket
        self._proxies = Proxies(options.proxy)
        self._ping: asyncio.Task[None] | None = None
        self._connections = connections
        self._progress_timeout_s = progress_timeout_s
        # Through a proxy, sock_connect ends with the connection to the proxy itself.
        self._proxied_timeout_s = 2 * connect_timeout_s + progress_timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=connect_timeout_s, sock_read=progress_timeout_s
        )
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        if not self._check_certificates:
            _log.warning(
                "CERTIFICATES ARE NOT CHECKED (skip_verify): whoever is on the way to the server can read "
                "the credentials; only content with a digest is still verified"
            )

    async def open(
        self,
        request: Request,
        authorization: Secret | None,
        body: BodyFactory | None = None,
        *,
        home_headers: Iterable[tuple[str, Secret]] = (),
    ) -> Reply:
        """Sends *request*; the reply's body is still to be read. Use it as a context manager.

        *authorization* and *home_headers* go along only if the request may have them. Raises Unreachable,
        BackendTimeout, UntrustedServer, BadReply, AuthError for a proxy that lets nobody in, or ConfigError
        for the CA file.
        """
        headers = dict(request.headers)
        if request.authorize:
            headers |= {name: value.reveal() for name, value in home_headers}
            if authorization is not None:
                headers["Authorization"] = authorization.reveal()
        proxy = None if self._unix_socket is not None else self._proxies.choose(request.url)
        now = time.monotonic()
        if proxy is not None and proxy.ping_due(now):
            self._start_ping(proxy)
        if proxy is None or not proxy.usable(now):
            return await self._send(request, headers, body, None)
        return await self._send_by(proxy, request, headers, body)

    def set_proxy(self, options: ProxyOptions | None) -> None:
        """See Proxies.move."""
        self._proxies.move(options)

    async def _send_by(
        self, proxy: Proxy, request: Request, headers: dict[str, str], body: BodyFactory | None
    ) -> Reply:
        """Through *proxy*; straight if that fails, is allowed, and works."""
        proxy.health.probe()
        began = time.monotonic()
        try:
            reply = await self._send(request, headers, body, proxy)
        except BackendError as e:
            if not proxy.options.fallback:
                raise
            if isinstance(e, _ProxyDown):
                proxy.health.failed(time.monotonic())
            failed: BackendError | None = e
        else:
            # Who failed, the proxy or what is behind it? A straight request tells.
            if not proxy.options.fallback or reply.head.status not in _PROXY_STATUS:
                proxy.health.succeeded(began)
                return reply
            async with reply:
                await reply.drain()
            failed = None
        finally:
            proxy.health.probed()
        straight = await self._send(request, headers, body, None)
        if not isinstance(failed, _ProxyDown):
            proxy.health.failed(time.monotonic())
        _log.warning(
            "going straight to the server, %s: %s",
            f"the proxy {proxy.options.url} rests for {proxy.health.rests_for(time.monotonic()):.0f} s",
            failed if failed is not None else "it answered for the server, which is well",
        )
        return straight

    async def _send(
        self, request: Request, headers: dict[str, str], body: BodyFactory | None, proxy: Proxy | None
    ) -> Reply:
        url, where = request.url, without_query(request.url)
        through: dict[str, Any] = {}
        if self._unix_socket is not None:
            where = f"{self._unix_socket} ({request.method} {urlsplit(where).path})"
        if proxy is not None:
            options = proxy.options
            if options.use_http and url.startswith("https:"):
                url = "http:" + url.removeprefix("https:")
            through["proxy"] = URL(options.url)
            where = f"{where} through the proxy {options.url}"
            if options.auth is not None:
                value = "Basic " + base64.b64encode(options.auth.reveal().encode()).decode()
                if url.startswith("https:"):
                    through["proxy_headers"] = {"Proxy-Authorization": value}
                else:  # aiohttp sends proxy_headers with CONNECT alone
                    headers = {**headers, "Proxy-Authorization": value}
        encrypted = url.startswith("https:") or (proxy is not None and proxy.options.url.startswith("https:"))
        tls = self._tls_context() if encrypted else True
        try:
            async with asyncio.timeout(None if proxy is None else self._proxied_timeout_s):
                response = await self._get_session().request(
                    request.method,
                    URL(url, encoded=True),
                    headers=headers,
                    data=None if body is None else body(),
                    allow_redirects=False,
                    ssl=tls,
                    **through,
                )
        except aiohttp.ClientHttpProxyError as e:
            if e.status == 407:
                raise _proxy_refuses(proxy) from None
            raise _ProxyDown(f"{where}: it refuses to connect ({e.status})") from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            if isinstance(e, aiohttp.ClientProxyConnectionError):
                why = os.strerror(e.errno) if e.errno else "it cannot be reached"
                raise _ProxyDown(
                    f"{where}: no connection: {why}", remedy="does the proxy run at that address?"
                ) from e
            raise _translate(e, where) from e
        if proxy is not None and response.status == 407:
            response.release()
            raise _proxy_refuses(proxy)
        return Reply(response, where, self._progress_timeout_s)

    def _start_ping(self, proxy: Proxy) -> None:
        if self._ping is None or self._ping.done():
            proxy.health.probe()
            self._ping = asyncio.ensure_future(self._send_ping(proxy))

    async def _send_ping(self, proxy: Proxy) -> None:
        """Finds out whether *proxy* is well again, while requests go straight."""
        url = proxy.options.ping_url
        try:
            async with await self._send(Request("GET", url, (), authorize=False), {}, None, None) as reply:
                if reply.head.status < 500:
                    proxy.health.succeeded()
                    _log.info("the proxy %s is well again", proxy.options.url)
                else:
                    proxy.health.failed(time.monotonic())
        except BackendError:
            proxy.health.failed(time.monotonic())
        finally:
            proxy.health.probed()

    async def close(self) -> None:
        """Closes all connections."""
        if self._ping is not None:
            self._ping.cancel()
            await asyncio.gather(self._ping, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                timeout=self._timeout,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": f"virtiofsd-rafs/{__version__}"},
                read_bufsize=_READ_BUFFER,
                trust_env=False,
                trace_configs=[_counting()],
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        if self._unix_socket is not None:
            path = os.fspath(self._unix_socket)
            return aiohttp.UnixConnector(path, limit=self._connections, keepalive_timeout=KEEP_ALIVE_S)
        return aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP_ALIVE_S)

    def _tls_context(self) -> ssl.SSLContext:
        # Loading the system's certificates costs some 20 ms: not for those who speak plain http.
        if self._tls is None:
            context = ssl.create_default_context()
            for ca_file in self._ca_files:
                try:
                    context.load_verify_locations(ca_file)
                except (OSError, ssl.SSLError) as e:
                    raise ConfigError(
                        f"--ca-file {ca_file}: no certificates in it ({e.strerror or e})",
                        remedy="it has to be a PEM file",
                    ) from e
            if not self._check_certificates:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls = context
        return self._tls


class Reply:
    """Head and unread body of a reply."""

    def __init__(self, response: aiohttp.ClientResponse, where: str, progress_timeout_s: float) -> None:
        self._response = response
        self._where = where
        self._progress_timeout_s = progress_timeout_s
        self.head = ReplyHead.of(response.status, response.headers.items())

    async def __aenter__(self) -> Reply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A body that was not read to its end closes the connection; a finished one gives it back to the pool.
        self._response.release()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece.

        Raises Unreachable when it breaks off, BackendTimeout when it trickles.
        """
        content = self._response.content
        loop = asyncio.get_running_loop()
        least = max(1, int(MIN_PROGRESS * min(1.0, self._progress_timeout_s / DEFAULT_TIMEOUT_S)))
        got, mark = 0, least
        end = loop.time() + self._progress_timeout_s
        while True:
            try:
                async with asyncio.timeout_at(end):
                    piece = await content.readany()
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                raise _translate(e, self._where) from e
            if not piece:
                return
            got += len(piece)
            if got >= mark:
                mark, end = got + least, loop.time() + self._progress_timeout_s
            yield piece

    async def slice(self, plan: BodyPlan) -> AsyncIterator[bytes]:
        """The part of the body that *plan* wants, then no further byte is read.

        Raises BadReply when it is short.
        """
        skip, missing = plan.skip, plan.count
        if missing:
            async for received in self.chunks():
                piece = received
                if skip:
                    cut = min(skip, len(piece))
                    skip -= cut
                    piece = piece[cut:]
                if not piece:
                    continue
                if len(piece) > missing:
                    piece = piece[:missing]
                missing -= len(piece)
                yield piece
                if not missing:
                    break
        if missing:
            raise BadReply(f"{self._where}: the body ends {missing} bytes early")

    async def read(self, plan: BodyPlan) -> bytes:
        """The part of the body that *plan* wants, in one piece."""
        return b"".join([piece async for piece in self.slice(plan)])

    async def read_all(self, limit: int) -> bytes:
        """The whole body. Raises BadReply when it is longer than *limit*."""
        pieces: list[bytes] = []
        got = 0
        async for piece in self.chunks():
            got += len(piece)
            if got > limit:
                raise BadReply(f"{self._where}: the body is longer than {limit} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    async def end(self) -> None:
        """Reads the end of a body of which nothing else is left, so that the connection can be used again.

        That is a message of its own for a chunked body. Never fails, never waits long.
        """
        if self._response.content.at_eof():
            return
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return

    async def drain(self) -> None:
        """Reads a small body away, so that the connection can be used again.

        Never fails, never waits long.
        """
        length = self.head.content_length()
        if length is None or length > _DRAIN_MAX:
            return
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._response.content.readexactly(length)
        except (aiohttp.ClientError, asyncio.IncompleteReadError, TimeoutError, OSError):
            return


class _ProxyDown(Unreachable):
    """The proxy is to blame, and not what is behind it."""


def _proxy_refuses(proxy: Proxy | None) -> AuthError:
    shown = "" if proxy is None else f" {proxy.options.url}"
    given = (
        "refuses the user and password" if proxy and proxy.options.auth else "asks for a user and a password"
    )
    return AuthError(
        f"the proxy{shown} {given} (407)",
        remedy="put them into the proxy's URL, in the environment or in the configuration",
    )


def _translate(error: Exception, where: str) -> BackendError:
    """What *error* means for the caller."""
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError)):
        return UntrustedServer(
            f"{where}: the server's certificate is not trusted ({_certificate_reason(error)})",
            remedy="--ca-file FILE adds a certificate authority",
        )
    if isinstance(error, (aiohttp.ClientConnectorSSLError, ssl.SSLError)) and _speaks_plain(error):
        return UntrustedServer(f"{where}: the server does not speak TLS", remedy="--plain-http allows that")
    if isinstance(error, TimeoutError):
        return BackendTimeout(f"{where}: no answer in time")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Unreachable(
            f"{where}: the host name cannot be resolved", remedy="check the image's name and the network"
        )
    if isinstance(error, aiohttp.ClientConnectorError):
        # asyncio puts words of its own, and a Python tuple, where the system's text was.
        why = os.strerror(error.errno) if error.errno else str(error.os_error)
        return Unreachable(f"{where}: no connection: {why}", remedy="does the server run at that address?")
    if isinstance(error, aiohttp.ClientResponseError):
        return BadReply(f"{where}: the server does not speak HTTP as it should")
    if isinstance(error, (aiohttp.InvalidURL, ValueError)):
        return BadReply(f"{where}: the URL is malformed")
    return Unreachable(f"{where}: the connection broke ({type(error).__name__})")


def _speaks_plain(error: Exception) -> bool:
    text = str(error).lower()
    return any(
        sign in text for sign in ("wrong version number", "wrong_version_number", "record layer failure")
    )


def _certificate_reason(error: Exception) -> str:
    inner = getattr(error, "certificate_error", error)
    return str(getattr(inner, "verify_message", "") or type(inner).__name__)
