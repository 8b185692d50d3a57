"""An HTTP proxy on loopback, as companies have them: CONNECT for https, whole URLs for http.

    with ForwardProxy(auth="me:pw") as proxy:
        ...  # a client with the proxy http://me:pw@{proxy.host}

Every host name leads to loopback, so that tests can use names that no resolver knows.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.sim.server_thread import ServerThread


@dataclass
class ProxyRequest:
    """What came: method, target as it was written, fields of the head."""

    method: str
    target: str
    fields: dict[str, str]


class ForwardProxy(ServerThread):
    """See the module's docstring.

    Args:
        auth: ``user:password`` that is asked for.
        ssl: a server's context, for a proxy that is itself reached by https.
    """

    def __init__(self, *, auth: str | None = None, ssl: Any = None) -> None:
        super().__init__()
        self.auth = auth
        self.log: list[ProxyRequest] = []
        self.status: int | None = None
        """Answered instead of forwarding."""
        self.silent = False
        """Takes connections and says nothing."""
        self._ssl = ssl
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._ssl)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._requests(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        method, target, _ = first.split(" ")
        fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.log.append(ProxyRequest(method, target, fields))
        if self.silent:
            await asyncio.Event().wait()
        if self.auth is not None:
            expected = "Basic " + base64.b64encode(self.auth.encode()).decode()
            if fields.get("proxy-authorization") != expected:
                return await self._answer(writer, 407)
        if self.status is not None:
            return await self._answer(writer, self.status)
        if method == "CONNECT":
            port = int(target.rpartition(":")[2])
            try:
                upstream = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return await self._answer(writer, 502)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            parts = urlsplit(target)
            try:
                upstream = await asyncio.open_connection("127.0.0.1", parts.port or 80)
            except OSError:
                return await self._answer(writer, 502)
            # One request for each connection: the next one has to come by here again.
            kept = [line for line in lines if not line.lower().startswith(("proxy-", "connection:"))]
            kept.append("Connection: close")
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            upstream[1].write("\r\n".join([f"{method} {path} HTTP/1.1", *kept, "", ""]).encode("latin-1"))
        await self._pump(reader, writer, upstream[0], upstream[1])
        return None

    async def _answer(self, writer: asyncio.StreamWriter, status: int) -> None:
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".encode())
        await writer.drain()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()

        tasks = [
            asyncio.ensure_future(copy(reader, up_writer)),
            asyncio.ensure_future(copy(up_reader, writer)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(ConnectionError):
                up_writer.close()
