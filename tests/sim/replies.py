"""How a simulated registry answers with content: whole, in part, slowly, or bent by faults."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.sim.faults import Fault

_PIECE = 16 << 10


@dataclass
class Record:
    """One request, as it came, and what it got."""

    t: float
    server: str  # registry or storage
    where: str  # blob, manifest, token, upload, storage
    method: str
    path: str
    headers: dict[str, str]
    peer: int = 0  # the client's port, which tells connections apart
    digest: str = ""
    span: tuple[int, int] | None = None
    status: int = 0
    sent: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Link:
    """Between registry and client: *latency_s* before each answer, *bandwidth* bytes per second for all."""

    latency_s: float = 0.0
    bandwidth: float | None = None
    _free_at: float = 0.0

    async def carry(self, size: int) -> None:
        """Until *size* more bytes have gone over the link."""
        if self.bandwidth:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / self.bandwidth
            await asyncio.sleep(self._free_at - now)


async def send_part(
    link: Link, request: web.Request, record: Record, met: list[Fault], data: bytes, headers: dict[str, str]
) -> web.StreamResponse:
    """The part of *data* that was asked for, bent by the faults that were met."""
    names = {f.name: f for f in met}
    status, body = 200, data
    if record.span is not None and "ignore-range" not in names:
        first, last = record.span[0], min(record.span[1], len(data) - 1)
        if first >= len(data) or not names.keys().isdisjoint(("416", "416-wrong-length")):
            return await _unsatisfied(request, record, len(data), "416-wrong-length" in names)
        if "wrong-range" in names:
            by = names["wrong-range"].params.get("by", 1)
            first, last = first + by, min(last + by, len(data) - 1)
        status, body = 206, data[first : last + 1]
        if "no-content-range" not in names:
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
    if "corrupt" in names and body:
        body = corrupt(body, names["corrupt"], 0 if status == 200 or record.span is None else record.span[0])
    if "short-body" in names:
        body = body[: -names["short-body"].params.get("by", 1)]
    if "long-body" in names:
        body += bytes(names["long-body"].params.get("by", 1))
    if "encoded" in names:
        headers = {**headers, "Content-Encoding": "gzip"}
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = len(body)
    record.status = status
    try:
        await response.prepare(request)
    except ConnectionError:
        return response  # the client went away while the answer was held back
    if request.method == "HEAD":
        return response
    if "stall" in names:
        await response.write(body[:1])
        await names["stall"].wait()
        body = body[1:]
    if "cut" in names:
        body = body[: names["cut"].params.get("after_bytes", 1000)]
    try:
        async for piece in _pieces(link, body, names.get("slow-loris")):
            await response.write(piece)
            record.sent += len(piece)
    except (ConnectionError, asyncio.CancelledError):
        return response  # the client went away
    if "cut" in names:
        await asyncio.sleep(0.02)  # the bytes get out before the connection ends
        if request.transport is not None:
            request.transport.close()
    return response


def corrupt(body: bytes, fault: Fault, start: int) -> bytes:
    """*body*, whose first byte is the blob's byte *start*, with one bit flipped where *fault* says."""
    at = fault.params.get("at", len(body) // 2)
    if "blob_at" in fault.params:
        at = fault.params["blob_at"] - start
    if not 0 <= at < len(body):
        return body
    return body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]


async def send_redirect(request: web.Request, record: Record, location: str) -> web.StreamResponse:
    """A 307 whose little body comes in two pieces, the second one late."""
    record.status = 307
    response = web.StreamResponse(status=307, headers={"Location": location})
    text = b"Temporary Redirect"
    response.content_length = len(text)
    await response.prepare(request)
    await response.write(text[:4])
    await asyncio.sleep(0.02)
    with contextlib.suppress(ConnectionError):
        await response.write(text[4:])
    return response


async def _unsatisfied(request: web.Request, record: Record, size: int, lie: bool) -> web.StreamResponse:
    record.status = 416
    response = web.StreamResponse(status=416, headers={"Content-Range": f"bytes */{size}"})
    response.content_length = size if lie else 33
    await response.prepare(request)
    await response.write(b"x" * 33)
    if lie and request.transport is not None:
        await asyncio.sleep(0.02)
        request.transport.close()
    return response


async def _pieces(link: Link, body: bytes, loris: Fault | None) -> AsyncIterator[bytes]:
    if loris is not None:
        for i in range(len(body)):
            yield body[i : i + 1]
            await asyncio.sleep(loris.params.get("interval", 1.0))
        return
    for at in range(0, len(body), _PIECE):
        piece = body[at : at + _PIECE]
        await link.carry(len(piece))
        yield piece
