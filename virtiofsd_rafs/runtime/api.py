"""The HTTP API on the daemon's unix socket: state, status, health, metrics, and new credentials.

Imported with the first connection, because aiohttp costs time and memory that most daemons never need.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.runtime.renewal import parse_update
from virtiofsd_rafs.runtime.scheduling import AnswersFirst

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from virtiofsd_rafs.runtime.view import View

    _Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)

# A timer this short is late when the loop is busy, and nobody notices the wait for it.
_LAG_PROBE_S = 0.005
# Connections that wait until the loop takes them.
_BACKLOG = 128
# Of the only request that has one.
_MAX_BODY = 256 << 10

_dumps = json.JSONEncoder(separators=(",", ":")).encode


def _json(data: Any, *, status: int = 200) -> web.Response:
    return web.json_response(data, status=status, dumps=_dumps)


def make_app(view: View, asked: Callable[[], None]) -> web.Application:
    """The application that shows *view*, and calls *asked* with each question."""
    naming: list[asyncio.Future[None]] = []

    def name_later(nodes: list[int]) -> None:
        # Who asks often does not wait for a walk through the image: the next answer has the names.
        if not naming or naming[0].done():
            naming[:] = [asyncio.get_running_loop().run_in_executor(None, view.name_nodes, nodes)]

    async def daemon(_: web.Request) -> web.Response:
        return _json(view.daemon())

    async def status(request: web.Request) -> web.Response:
        full = request.query.get("full", "0") not in ("", "0")
        nodes = view.trace_nodes() if full else []
        if nodes:
            await asyncio.get_running_loop().run_in_executor(None, view.name_nodes, nodes)
        answer = _json(view.status(full=full))
        if nodes := view.take_nameless():
            name_later(nodes)
        return answer

    async def trace(_: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        nodes = view.trace_nodes()
        if nodes:
            await loop.run_in_executor(None, view.name_nodes, nodes)
        gather = view.trace()
        text = await loop.run_in_executor(None, lambda: _dumps(gather()))
        return web.Response(text=text, content_type="application/json")

    async def accessed(_: web.Request) -> web.Response:
        body = await asyncio.get_running_loop().run_in_executor(None, view.accessed())
        return web.Response(body=body, content_type="text/plain")

    async def healthz(_: web.Request) -> web.Response:
        return _json({"status": "ok", "loop_lag_s": await _loop_lag()})

    async def readyz(_: web.Request) -> web.Response:
        reason = view.unready()
        return _json({"ready": not reason, "reason": reason}, status=503 if reason else 200)

    async def metrics(_: web.Request) -> web.Response:
        body = view.prometheus(await _loop_lag()).encode()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def renew(request: web.Request) -> web.Response:
        if "id" not in request.query:
            raise ConfigError("the query has no id", remedy="name the mountpoint: ?id=/")
        view.renewal.take(parse_update(await request.read()))
        return web.Response(status=204)

    async def renewed(_: web.Request) -> web.Response:
        # nydusd answers with the values.
        return _json(dict.fromkeys(view.renewal.names(), "***"))

    @web.middleware
    async def told(request: web.Request, handler: _Handler) -> web.StreamResponse:
        asked()
        return await handler(request)

    app = web.Application(middlewares=[told, _errors_as_json], client_max_size=_MAX_BODY)
    app.router.add_get("/api/v1/daemon", daemon)
    app.router.add_get("/api/v1/status", status)
    app.router.add_get("/api/v1/trace", trace)
    app.router.add_get("/api/v1/accessed", accessed)
    app.router.add_put("/api/v1/config", renew)
    app.router.add_get("/api/v1/config", renewed)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


async def _loop_lag() -> float:
    """Seconds by which the event loop is late: what everything that it does now has to wait for its turn."""
    start = time.monotonic()
    await asyncio.sleep(_LAG_PROBE_S)
    return round(max(0.0, time.monotonic() - start - _LAG_PROBE_S), 6)


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Errors in nydusd's form: ``{"code": ..., "message": ...}``."""
    try:
        return await handler(request)
    except ConfigError as e:
        return _json({"code": "UNDEFINED", "message": str(e)}, status=400)
    except (ConnectionError, web.RequestPayloadError, HttpProcessingError):
        # Malformed, or who sent it has gone in the middle: then nobody reads this.
        return _json({"code": "UNDEFINED", "message": "the body did not come"}, status=400)
    except web.HTTPException as e:
        return _json({"code": "UNDEFINED", "message": e.reason}, status=e.status)
    except Exception as e:
        _log.exception("%s %s", request.method, request.path)
        return _json({"code": "INTERNAL", "message": type(e).__name__}, status=500)


class _NoHttp(logging.Filter):
    """One line for a request that is no HTTP. aiohttp logs a trace for each, with what was sent in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything else through."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        _log.info("a request is no HTTP: %s", type(error).__name__)
        return False


def _server_logger() -> logging.Logger:
    logger = _log.getChild("server")
    if not logger.filters:
        logger.addFilter(_NoHttp())
    return logger


async def start(listener: socket.socket, view: View) -> Callable[[], Awaitable[None]]:
    """Serves *view* on *listener*; returns what stops it."""
    loop = asyncio.get_running_loop()
    preference = AnswersFirst(loop)
    app = make_app(view, preference.asked)
    runner = web.AppRunner(app, access_log=None, logger=_server_logger(), shutdown_timeout=0.5)
    await runner.setup()
    protocol = runner.server
    assert protocol is not None

    def connected() -> asyncio.Protocol:
        preference.asked()  # a third of an answer's work is done before there is a request
        return protocol()

    server = await loop.create_server(connected, sock=listener, backlog=_BACKLOG)

    async def stop() -> None:
        server.close()
        await runner.cleanup()
        preference.close()

    return stop
