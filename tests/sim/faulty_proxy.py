"""A proxy in front of a real registry that damages what goes through it, on demand and by name.

    with Registry(folder) as registry, FaultyProxy(registry.port) as proxy:
        proxy.fault("cut", where="blob", times=3, after_bytes=1000)
        ...  # a client of f"{proxy.host}/a/b:1", in this process or another one

It is driven as the simulator (``RegistrySimulator``) is: the same names of faults, the same log. It speaks
HTTP/1.1 on its own, so that it can send what no library would. ``auth=True`` asks for a bearer token that it
hands out to anybody. It carries GET and HEAD; what is pushed goes to the registry itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import struct
import time
from typing import Any

import attrs

from tests.sim.faults import Fault
from tests.sim.replies import Link, Record, corrupt
from tests.sim.server_thread import ServerThread

_PIECE = 16 << 10
_HEAD_MAX = 64 << 10
# What the kernel may take over from a connection that the client has given up: it counts as sent.
_SEND_BUFFER = 32 << 10
_REASONS = {
    200: "OK",
    206: "Partial Content",
    307: "Temporary Redirect",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    416: "Range Not Satisfiable",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class _HangUp(Exception):
    """The connection ends now, by a reset if that was asked for."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


@attrs.define
class _Head:
    """First line and fields of a message."""

    line: list[str]
    fields: dict[str, str]

    @property
    def status(self) -> int:
        return int(self.line[1])


@attrs.define
class _Reply:
    """What goes to the client."""

    status: int
    fields: dict[str, str] = attrs.Factory(dict)
    body: bytes = b""


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return _Head(lines[0].split(" ", 2), {name.strip().lower(): value.strip() for name, _, value in pairs})


class FaultyProxy(ServerThread):
    """See the module's docstring.

    Args:
        target_port: where the registry listens on loopback.
        auth: ask for a bearer token.
    """

    def __init__(self, target_port: int, *, auth: bool = False) -> None:
        super().__init__()
        self._target_port = target_port
        self.auth = auth
        self.link = Link()
        self.log: list[Record] = []
        self.faults: list[Fault] = []
        self.storage_port = 0
        self.tokens: set[str] = set()
        self._signed: dict[str, int | None] = {}  # signature -> uses left
        self._server: asyncio.Server | None = None
        self._storage: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _release(self) -> None:
        self.clear_faults()

    # what tests do: see RegistrySimulator

    def fault(self, name: str, **options: Any) -> Fault:
        """Adds the fault *name* and returns it."""
        known = attrs_of_fault(options)
        fault = Fault(name, **known, params={k: v for k, v in options.items() if k not in known})
        fault.arm(self._loop)
        self.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Releases and forgets all faults."""
        for fault in self.faults:
            fault.release()
        self.faults.clear()

    def revoke_tokens(self) -> None:
        """Ends all bearer tokens now."""
        self.tokens.clear()

    def requests(self, where: str | None = None, method: str | None = None) -> list[Record]:
        """The log's records of a kind."""
        return [r for r in list(self.log) if where in (None, r.where) and method in (None, r.method)]

    # the server

    async def _start(self) -> None:
        self._storage = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=_HEAD_MAX)
        self.storage_port = self._storage.sockets[0].getsockname()[1]
        await self._listen()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._client, "127.0.0.1", self.port, limit=_HEAD_MAX, reuse_address=True
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stop(self) -> None:
        await self._refuse()
        if self._storage is not None:
            self._storage.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = _Connection(self, reader, writer)
        try:
            while True:
                await connection.exchange()
        except _HangUp as end:
            if end.reset:
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # either side went away, or the proxy refuses
        finally:
            self._tasks.discard(task)
            connection.close()

    # what is answered without the registry

    def sign(self, path: str, uses: int | None) -> str:
        """A URL of another origin that is good for so many uses."""
        signature = secrets.token_hex(16)
        self._signed[signature] = uses
        return f"http://localhost:{self.storage_port}/signed{path}?sig={signature}"

    def signed(self, target: str) -> bool:
        """Whether the signature in *target* is good; uses it."""
        signature = target.rpartition("sig=")[2]
        left = self._signed.get(signature, 0)
        if left is not None:
            if left <= 0:
                return False
            self._signed[signature] = left - 1
        return True

    def refusal(self, where: str, head: _Head) -> _Reply | None:
        """What a request gets that brings no good token."""
        token = head.fields.get("authorization", "").removeprefix("Bearer ")
        if not self.auth or where == "storage" or token in self.tokens:
            return None
        challenge = f'Bearer realm="http://{self.host}/token",service="proxy"'
        return _Reply(401, {"www-authenticate": challenge})

    def token(self) -> _Reply:
        """The token service."""
        token = secrets.token_urlsafe(24)
        self.tokens.add(token)
        return _Reply(200, body=json.dumps({"token": token, "expires_in": 300}).encode())


class _Connection:
    """One client's connection, and the one to the registry that belongs to it."""

    def __init__(
        self, proxy: FaultyProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        writer.transport.set_write_buffer_limits(high=_PIECE)
        self._up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        for writer in (self._writer, self._up[1] if self._up is not None else None):
            if writer is not None:
                writer.transport.abort() if writer is not self._writer else writer.close()

    async def exchange(self) -> None:
        """One request and its answer."""
        head = await _read_head(self._reader)
        record, met = self._note(head)
        proxy = self._proxy
        if proxy.link.latency_s:
            await asyncio.sleep(proxy.link.latency_s)
        reply = await self._early(record, met, head)
        if reply is None:
            reply = await self._forward(record, met, head)
        self._bend(reply, record, met)
        await self._answer(reply, record, met)

    def _note(self, head: _Head) -> tuple[Record, list[Fault]]:
        method, target = head.line[0], head.line[1]
        kinds = {
            "/signed": "storage",
            "/v2/.*/blobs/": "blob",
            "/v2/.*/manifests/": "manifest",
            "/token": "token",
        }
        where = next((kind for start, kind in kinds.items() if re.match(start, target)), "other")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", head.fields.get("range", ""))
        span = (int(match[1]), int(match[2])) if match else None
        digest = target.rpartition("/")[2].partition("?")[0]
        peer = self._writer.get_extra_info("peername")[1]
        server = "storage" if where == "storage" else "registry"
        record = Record(time.monotonic(), server, where, method, target, head.fields, peer, digest, span)
        self._proxy.log.append(record)
        met = [f for f in list(self._proxy.faults) if f.takes(where, method, digest, span)]
        record.faults = [f.name for f in met]
        return record, met

    async def _early(self, record: Record, met: list[Fault], head: _Head) -> _Reply | None:
        """Waits and answers that need no registry."""
        if record.where == "token":
            return self._proxy.token()
        for fault in met:
            p = fault.params
            match fault.name:
                case "delay":
                    await asyncio.sleep(p.get("seconds", 1.0))
                case "hold":
                    await fault.wait()
                case "reset":
                    raise _HangUp(reset=True)
                case "throttle":
                    return _Reply(429, {"retry-after": str(p.get("retry_after", 1))})
                case "server-error" | "status":
                    return _Reply(p.get("code", 503), {}, b"fault")
                case "head-403":
                    return _Reply(403)
                case "not-found":
                    return _Reply(404)
                case "416":
                    return _Reply(416, {"content-range": "bytes */1"}, bytes(33))
                case "expire-tokens":
                    self._proxy.revoke_tokens()
        refusal = self._proxy.refusal(record.where, head)
        if refusal is not None:
            return refusal
        for fault in met:
            if fault.name == "redirect":
                location = self._proxy.sign(record.path, fault.params.get("uses"))
                return _Reply(307, {"location": location}, b"Temporary Redirect")
        if record.where == "storage" and not self._proxy.signed(record.path):
            return _Reply(403, {}, b"Request has expired")
        return None

    async def _forward(self, record: Record, met: list[Fault], head: _Head) -> _Reply:
        """What the registry answers."""
        names = {fault.name: fault for fault in met}
        fields = {**head.fields, "host": f"127.0.0.1:{self._proxy._target_port}"}
        fields.pop("authorization", None)
        if "ignore-range" in names:
            fields.pop("range", None)
        if "wrong-range" in names and record.span is not None:
            by = names["wrong-range"].params.get("by", 1)
            fields["range"] = f"bytes={record.span[0] + by}-{record.span[1] + by}"
        target = record.path.removeprefix("/signed")
        if record.where == "storage":
            target = target.partition("?")[0]
        lines = [
            f"{record.method} {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        if self._up is None:
            self._up = await asyncio.open_connection("127.0.0.1", self._proxy._target_port, limit=_HEAD_MAX)
        reader, writer = self._up
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = await _read_head(reader)
        length = int(answer.fields.pop("content-length", "0"))
        body = b""
        if record.method != "HEAD" and answer.status != 416:
            body = await reader.readexactly(length)
        else:
            # A registry may announce more than it sends (see protocol.py): this connection is spent.
            writer.transport.abort()
            self._up = None
        return _Reply(answer.status, answer.fields, body)

    def _bend(self, reply: _Reply, record: Record, met: list[Fault]) -> None:
        """What faults make of an answer with content."""
        if reply.status not in (200, 206):
            return
        for fault in met:
            by = fault.params.get("by", 1)
            match fault.name:
                case "corrupt":
                    whole = reply.status == 200 or record.span is None
                    reply.body = corrupt(
                        reply.body, fault, 0 if whole or record.span is None else record.span[0]
                    )
                case "short-body":
                    reply.body = reply.body[:-by]
                case "long-body":
                    reply.body += bytes(by)
                case "no-content-range":
                    reply.fields.pop("content-range", None)

    async def _answer(self, reply: _Reply, record: Record, met: list[Fault]) -> None:
        names = {fault.name: fault for fault in met}
        record.status = reply.status
        length = len(reply.body)
        skipped = ("transfer-encoding", "connection", "content-length")
        lines = [
            f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Other')}",
            f"content-length: {length}",
        ]
        lines += [f"{name}: {value}" for name, value in reply.fields.items() if name not in skipped]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        body = b"" if record.method == "HEAD" else reply.body
        content = reply.status in (200, 206)
        if content and "stall" in names:
            await self._send(body[:1], record)
            await names["stall"].wait()
            body = body[1:]
        if content and "cut" in names:
            await self._send(body[: names["cut"].params.get("after_bytes", 1000)], record)
            raise _HangUp(reset=names["cut"].params.get("reset", False))
        if content and "slow-loris" in names:
            for at in range(len(body)):
                await self._send(body[at : at + 1], record)
                await asyncio.sleep(names["slow-loris"].params.get("interval", 1.0))
            return
        for at in range(0, len(body), _PIECE):
            piece = body[at : at + _PIECE]
            if content:
                await self._proxy.link.carry(len(piece))
            await self._send(piece, record)
        await self._writer.drain()

    async def _send(self, data: bytes, record: Record) -> None:
        self._writer.write(data)
        await self._writer.drain()
        record.sent += len(data)


def attrs_of_fault(options: dict[str, Any]) -> dict[str, Any]:
    """Those of *options* that say which requests a fault meets; the others are its parameters."""
    return {
        k: v
        for k, v in options.items()
        if k in ("where", "method", "digest", "span", "skip", "times", "share")
    }
