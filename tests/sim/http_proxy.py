"""A server of blobs as nydusd's ``http-proxy`` back-end expects one, with the habits of nydus-backend-proxy.

Range requests get 200 instead of 206, and a Content-Range whose total is the length of the part, sent in
pieces of 4 KiB without a length: odd, and yet enough for a reader who knows what it asked for.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

from aiohttp import web

from tests.sim.web import ObjectSim

if TYPE_CHECKING:
    from pathlib import Path

_PIECE = 4096


class ProxySim(ObjectSim):
    """Blobs at ``<path>/<blob id>``.

    ``style``: ``plain`` (a proper server), ``nydus`` (as above), ``no-head`` (405 for HEAD), ``whole`` (no
    ranges). ``user``: ``name:password`` that is asked for, or None.
    """

    def __init__(self, path: str = "/", unix_socket: Path | None = None) -> None:
        super().__init__(unix_socket)
        self.path = path.rstrip("/")
        self.style = "nydus"
        self.user: str | None = None
        self.check = self._check

    def put(self, name: str, data: bytes) -> None:
        """Stores a blob."""
        self.objects[f"{self.path}/{name}"] = data

    def missing(self) -> web.StreamResponse:
        return web.Response(status=404)

    def _check(self, request: web.BaseRequest) -> web.StreamResponse | None:
        if self.user is not None:
            wanted = "Basic " + base64.b64encode(self.user.encode()).decode()
            if request.headers.get("Authorization") != wanted:
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="blobs"'})
        return None

    def part(self, request: web.BaseRequest, data: bytes) -> web.StreamResponse:
        if request.method == "HEAD":
            if self.style == "no-head":
                return web.Response(status=405)
            return web.Response(body=data)
        if self.style == "whole":
            return web.Response(body=data)
        if self.style != "nydus":
            return super().part(request, data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if wanted is None:
            return _Pieces(data, {})
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            return web.Response(status=416)
        part = data[first : last + 1]
        return _Pieces(part, {"Content-Range": f"bytes {first}-{last}/{len(part)}"})


class _Pieces(web.StreamResponse):
    """200 with a chunked body."""

    def __init__(self, data: bytes, headers: dict[str, str]) -> None:
        super().__init__(status=200, headers=headers)
        self._data = data
        self.enable_chunked_encoding()

    async def write_eof(self, data: bytes = b"") -> None:
        for at in range(0, len(self._data), _PIECE):
            await self.write(self._data[at : at + _PIECE])
        self._data = b""
        await super().write_eof(data)
