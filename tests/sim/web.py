"""Web servers on loopback that tests drive: they count connections, hold answers, refuse, and come back.

Each one runs in a thread with a loop of its own. ``WebSim`` is the frame; ``ObjectSim`` answers from memory;
``GatewaySim`` stands in front of a real server, so that a test can do to it what it does to the others.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web
from yarl import URL

from tests.sim.server_thread import ServerThread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass
class Seen:
    """One request, and the status of its answer (0: none yet)."""

    method: str
    path: str
    """As it was sent, with the query."""
    headers: dict[str, str]
    connection: int
    status: int = 0


@dataclass
class Hold:
    """Answers that wait. ``hits`` counts them; ``release`` lets them go."""

    loop: asyncio.AbstractEventLoop
    hits: int = 0
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.event.set)


class WebSim(ServerThread):
    """A server that a subclass gives answers to.

    Args:
        unix_socket: where to listen instead of on a TCP port.
    """

    def __init__(self, unix_socket: Path | None = None) -> None:
        super().__init__()
        self.unix_socket = unix_socket
        self.seen: list[Seen] = []
        self._hold: Hold | None = None
        self._answers: list[tuple[int, bytes, dict[str, str]]] = []
        self._connections: list[Any] = []
        self._runner: web.ServerRunner | None = None
        self._site: web.BaseSite | None = None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """What a request gets."""
        raise AssertionError("a subclass answers")

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()

    # what tests do

    def hold(self) -> Hold:
        """Lets all requests from now on wait until the hold is released."""
        self._hold = Hold(self._loop)
        return self._hold

    def next_answers(self, status: int, body: bytes = b"", times: int = 1, **headers: str) -> None:
        """Answers the next *times* requests so, whatever they ask for."""
        self._answers += [(status, body, {k.replace("_", "-"): v for k, v in headers.items()})] * times

    def connections(self) -> int:
        """How many connections brought requests since ``forget``."""
        return len({seen.connection for seen in self.seen})

    def forget(self) -> None:
        """Forgets the requests so far."""
        self.seen.clear()

    # the server

    async def _start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        assert self._runner is not None
        if self.unix_socket is not None:
            self.unix_socket.unlink(missing_ok=True)
            self._site = web.UnixSite(self._runner, self.unix_socket)
        else:
            self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await self._site.start()
        if self.unix_socket is None:
            self.port = self._runner.addresses[0][1]

    async def _refuse(self) -> None:
        assert self._runner is not None
        if self._site is not None:
            await self._site.stop()
            self._site = None
        for connection in list(self._runner.server.connections if self._runner.server else []):
            if connection.transport is not None:
                connection.transport.abort()

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.protocol not in self._connections:
            self._connections.append(request.protocol)
        seen = Seen(
            request.method,
            request.raw_path,
            dict(request.headers),
            self._connections.index(request.protocol),
        )
        self.seen.append(seen)
        if self._hold is not None:
            self._hold.hits += 1
            await self._hold.event.wait()
        if self._answers:
            status, body, headers = self._answers.pop(0)
            response: web.StreamResponse = web.Response(status=status, body=body, headers=headers)
        else:
            response = await self.answer(request)
        seen.status = response.status
        return response


def error(status: int, code: str, **more: str) -> web.Response:
    """An error document as S3 and OSS send it."""
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in {"Code": code, **more}.items())
    return web.Response(
        status=status,
        text=f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inner}</Error>',
        content_type="application/xml",
    )


class ObjectSim(WebSim):
    """Objects by path (as sent, without the query), with correct ranges."""

    def __init__(self, unix_socket: Path | None = None) -> None:
        super().__init__(unix_socket)
        self.objects: dict[str, bytes] = {}
        self.check: Callable[[web.BaseRequest], web.StreamResponse | None] = lambda _: None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        refusal = self.check(request)
        if refusal is not None:
            return refusal
        data = self.objects.get(request.raw_path.partition("?")[0])
        if data is None:
            return self.missing()
        return self.part(request, data)

    def missing(self) -> web.StreamResponse:
        return error(404, "NoSuchKey")

    def part(self, request: web.BaseRequest, data: bytes) -> web.StreamResponse:
        """The part of *data* that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if wanted is None:
            return web.Response(body=data)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return web.Response(status=206, body=data[first : last + 1], headers=headers)


class GatewaySim(WebSim):
    """Passes everything on to the server at *upstream* (``http://host:port``), unless ``check`` answers."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream
        self.check: Callable[[web.BaseRequest], web.StreamResponse | None] = lambda _: None
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        refusal = self.check(request)
        if refusal is not None:
            return refusal
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False)
        async with self._session.request(
            request.method,
            URL(self.upstream + request.raw_path, encoded=True),
            headers={k: v for k, v in request.headers.items() if k.lower() != "connection"},
            data=await request.read(),
            allow_redirects=False,
        ) as got:
            body = b"" if got.status == 416 else await got.read()
            hop = ("connection", "transfer-encoding", "keep-alive", "content-length", "date", "server")
            headers = {k: v for k, v in got.headers.items() if k.lower() not in hop}
            response = web.Response(status=got.status, body=body, headers=headers)
            if request.method == "HEAD":
                response.content_length = int(got.headers.get("Content-Length", 0))
            return response

    async def _stop(self) -> None:
        if self._session is not None:
            await self._session.close()
        await super()._stop()
