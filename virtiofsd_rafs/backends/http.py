"""The one place that sends HTTP requests to the outside: an aiohttp session with the habits that registries
need.

Bodies are never decompressed behind our back (``Accept-Encoding: identity``; a compressed 206 makes no
sense), redirects are never followed by the library (it would take the Authorization along), URLs are sent as
they were written (a re-quoted signed URL has another signature), and neither cookies nor ~/.netrc take part.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from virtiofsd_rafs import __version__
from virtiofsd_rafs.backends.config import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    TRIES_WITHIN_DEADLINE,
)
from virtiofsd_rafs.errors import (
    BackendError,
    BackendTimeout,
    BadReply,
    ConfigError,
    Unreachable,
    UntrustedServer,
)
from virtiofsd_rafs.registry.protocol import BodyPlan, ReplyHead, Request, without_query

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from virtiofsd_rafs.backends.config import HttpOptions
    from virtiofsd_rafs.registry.secret import Secret

# Bounds for those who configure nothing, by the names that fit here.
CONNECT_TIMEOUT_S = DEFAULT_CONNECT_TIMEOUT_S
PROGRESS_TIMEOUT_S = DEFAULT_TIMEOUT_S
# What must arrive within each PROGRESS_TIMEOUT_S of a body, less where less time is given: a trickle is no
# progress.
MIN_PROGRESS = 32 << 10
# The tiny bodies of redirects and 401 are drained for this long, so that the connection can be used again.
_DRAIN_S = 0.25
_DRAIN_MAX = 16 << 10
_READ_BUFFER = 256 << 10

# What may be sent as a body: called anew for each try.
BodyFactory = Callable[[], Any]


class HttpClient:
    """Connections to any number of hosts, at most *connections* at a time.

    Args:
        ca_file: PEM certificates that are trusted beside the system's.
        connections: bound for all hosts together.
        connect_timeout_s: for TCP and TLS together.
        progress_timeout_s: without (enough) bytes.
        options: more certificates, whether to check any, and time-outs instead of those above.
        unix_socket: where to connect to, whatever host a URL names.
        deadline_s: how long somebody waits for the bytes; shortens both time-outs, so that there is time for
            other tries when a server falls silent.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        connections: int = 8,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        options: HttpOptions | None = None,
        unix_socket: Path | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._ca_files = [] if ca_file is None else [ca_file]
        self._check_certificates = True
        if options is not None:
            self._ca_files += options.ca_files
            self._check_certificates = not options.skip_verify
            connect_timeout_s, progress_timeout_s = options.connect_timeout_s, options.timeout_s
        if deadline_s is not None:
            connect_timeout_s = min(connect_timeout_s, deadline_s / TRIES_WITHIN_DEADLINE)
            progress_timeout_s = min(progress_timeout_s, deadline_s / TRIES_WITHIN_DEADLINE)
        self._unix_socket = unix_socket
        self._connections = connections
        self._progress_timeout_s = progress_timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=connect_timeout_s, sock_read=progress_timeout_s
        )
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None

    async def open(
        self, request: Request, authorization: Secret | None, body: BodyFactory | None = None
    ) -> Reply:
        """Sends *request*; the reply's body is still to be read. Use it as a context manager.

        Raises Unreachable, BackendTimeout, UntrustedServer, BadReply, or ConfigError for the CA file.
        """
        headers = dict(request.headers)
        if request.authorize and authorization is not None:
            headers["Authorization"] = authorization.reveal()
        where = without_query(request.url)
        tls = self._tls_context() if request.url.startswith("https:") else True
        try:
            response = await self._get_session().request(
                request.method,
                URL(request.url, encoded=True),
                headers=headers,
                data=None if body is None else body(),
                allow_redirects=False,
                ssl=tls,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            raise _translate(e, where) from e
        return Reply(response, where, self._progress_timeout_s)

    async def close(self) -> None:
        """Closes all connections."""
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
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        if self._unix_socket is not None:
            return aiohttp.UnixConnector(os.fspath(self._unix_socket), limit=self._connections)
        return aiohttp.TCPConnector(limit=self._connections)

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
        least = max(1, int(MIN_PROGRESS * min(1.0, self._progress_timeout_s / PROGRESS_TIMEOUT_S)))
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
