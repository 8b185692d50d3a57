"""The HTTP API on the daemon's unix socket: state, status, health, metrics. Read-only.

Imported with the first connection, because aiohttp costs time and memory that most daemons never need.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from virtiofsd_rafs.runtime.view import View

_log = logging.getLogger(__name__)

_dumps = json.JSONEncoder(separators=(",", ":")).encode


def _json(data: Any, *, status: int = 200) -> web.Response:
    return web.json_response(data, status=status, dumps=_dumps)


def make_app(view: View) -> web.Application:
    """The application that shows *view*."""

    async def daemon(_: web.Request) -> web.Response:
        return _json(view.daemon())

    async def status(_: web.Request) -> web.Response:
        nodes = view.nodes()
        if nodes:
            await asyncio.get_running_loop().run_in_executor(None, view.name_nodes, nodes)
        return _json(view.status())

    async def trace(_: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        nodes = view.nodes()
        if nodes:
            await loop.run_in_executor(None, view.name_nodes, nodes)
        gather = view.trace()
        text = await loop.run_in_executor(None, lambda: _dumps(gather()))
        return web.Response(text=text, content_type="application/json")

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if view.ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the image is not mounted yet\n")

    async def metrics(_: web.Request) -> web.Response:
        body = view.prometheus().encode()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application(middlewares=[_errors_as_json])
    app.router.add_get("/api/v1/daemon", daemon)
    app.router.add_get("/api/v1/status", status)
    app.router.add_get("/api/v1/trace", trace)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors in nydusd's form: ``{"code": ..., "message": ...}``."""
    try:
        return await handler(request)
    except web.HTTPException as e:
        return _json({"code": "UNDEFINED", "message": e.reason}, status=e.status)
    except Exception as e:
        _log.exception("%s %s", request.method, request.path)
        return _json({"code": "INTERNAL", "message": type(e).__name__}, status=500)


async def start(listener: socket.socket, view: View) -> Callable[[], Awaitable[None]]:
    """Serves *view* on *listener*; returns what stops it."""
    runner = web.AppRunner(make_app(view), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner.cleanup
