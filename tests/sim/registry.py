"""A registry on loopback, over memory, that fails in every way that registries fail, on demand and by name.

    with RegistrySimulator() as sim:
        sim.store.add_image("a/b", "1", bootstrap, [blob])
        hold = sim.fault("hold", where="blob", span=(0, 4095))
        ...  # a client of f"{sim.host}/a/b:1", in this process or another one
        hold.release()
        assert sim.ranges(digest) == [(0, 4095)]

The server runs in its own thread with its own loop. ``python -m tests.sim.registry --build OUT --ref a/b:1``
runs it as a process of its own, which is driven over HTTP (``/_sim/``, see ``_control`` below).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import secrets
import signal
import ssl
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.sim.faults import Fault
from tests.sim.gate import Auth, Gate
from tests.sim.replies import Link, Record, send_part, send_redirect
from tests.sim.server_thread import ServerThread
from tests.sim.store import Store, sha256

_BYTES = {"Content-Type": "application/octet-stream"}


class RegistrySimulator(ServerThread):
    """See the module's docstring.

    Args:
        auth: None lets everybody in.
        latency_s: before each answer.
        bandwidth: bytes per second for all connections together; None does not bound it.
        tls: certificate and key files; None speaks plain http.
    """

    def __init__(
        self,
        *,
        auth: Auth | None = None,
        latency_s: float = 0.0,
        bandwidth: float | None = None,
        tls: tuple[Path, Path] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(port)
        self.store = Store()
        self.gate = Gate(auth)
        self.link = Link(latency_s, bandwidth)
        self.log: list[Record] = []
        self.faults: list[Fault] = []
        self.storage_port = 0
        self._tls = tls
        self._signed: dict[str, list[float | None]] = {}  # signature -> [uses left, end]
        self._uploads: dict[str, bytearray] = {}
        self._runners: list[web.AppRunner] = []
        self._site: web.TCPSite | None = None

    def _release(self) -> None:
        for fault in self.faults:
            fault.release()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}"

    # what tests do

    def fault(
        self,
        name: str,
        *,
        where: str | None = None,
        method: str | None = None,
        digest: str | None = None,
        span: tuple[int, int] | None = None,
        skip: int = 0,
        times: int | None = None,
        share: float | None = None,
        **params: Any,
    ) -> Fault:
        """Adds the fault *name* (see faults.FAULTS) and returns it.

        Without *times* it stays until it is released.
        """
        fault = Fault(name, where, method, digest, span, skip, times, share, params)
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
        self.gate.tokens.clear()

    def requests(self, where: str | None = None, method: str | None = None) -> list[Record]:
        """The log's records of a kind."""
        return [r for r in list(self.log) if where in (None, r.where) and method in (None, r.method)]

    def ranges(self, digest: str) -> list[tuple[int, int] | None]:
        """First and last byte of each request for a blob, in order; None for one without a range."""
        return [r.span for r in self.requests("blob", "GET") if r.digest == digest]

    # the server

    async def _start(self) -> None:
        registry = web.Application(client_max_size=1 << 40)
        registry.router.add_route("*", "/_sim/{tail:.*}", self._control)
        registry.router.add_route("*", "/token", self._token)
        registry.router.add_route("*", "/v2/", self._ping)
        registry.router.add_route("*", "/v2/{repo:.+}/manifests/{ref}", self._manifest)
        registry.router.add_route("*", "/v2/{repo:.+}/blobs/uploads/{id:.*}", self._upload)
        registry.router.add_route("*", "/v2/{repo:.+}/blobs/{digest}", self._blob)
        storage = web.Application()
        storage.router.add_route("*", "/signed/{digest}", self._storage)
        for app in (registry, storage):
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            self._runners.append(runner)
        site = web.TCPSite(self._runners[1], "127.0.0.1", 0)
        await site.start()
        self.storage_port = self._runners[1].addresses[0][1]
        await self._listen()

    async def _listen(self) -> None:
        if self._site is not None:
            return
        context = None
        if self._tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
        self._site = web.TCPSite(
            self._runners[0], "127.0.0.1", self.port, ssl_context=context, reuse_address=True
        )
        await self._site.start()
        self.port = self._runners[0].addresses[0][1]
        self.gate.realm = f"{self.url}/token"

    async def _refuse(self) -> None:
        if self._site is not None:
            await self._site.stop()
            self._site = None
        server = self._runners[0].server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def _stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _control(self, request: web.Request) -> web.StreamResponse:
        """Drives a simulator in another process.

        GET log; DELETE log; POST faults {name, where, ..., params}; DELETE faults; POST faults/ID/release;
        POST blobs (body); POST link {latency_s, bandwidth}; POST refuse {seconds}; POST revoke.
        """
        what = (request.method, *request.match_info["tail"].strip("/").split("/"))
        body = await request.read()
        document = json.loads(body) if body and what[1] != "blobs" else {}
        match what:
            case ("GET", "log"):
                return web.json_response([asdict(r) for r in self.log])
            case ("DELETE", "log"):
                self.log.clear()
            case ("POST", "faults"):
                span = document.pop("span", None)
                fault = self.fault(**document, span=None if span is None else (span[0], span[1]))
                return web.json_response({"id": fault.id})
            case ("GET", "faults"):
                return web.json_response([{"id": f.id, "name": f.name, "hits": f.hits} for f in self.faults])
            case ("DELETE", "faults"):
                self.clear_faults()
            case ("POST", "faults", number, "release"):
                for fault in self.faults:
                    if str(fault.id) == number:
                        fault.release()
            case ("POST", "blobs"):
                return web.json_response({"digest": self.store.add_blob(body)})
            case ("POST", "link"):
                self.link.latency_s = document.get("latency_s", self.link.latency_s)
                self.link.bandwidth = document.get("bandwidth", self.link.bandwidth)
            case ("POST", "refuse"):
                self._loop.create_task(self._refuse_for(document["seconds"]))
            case ("POST", "revoke"):
                self.revoke_tokens()
            case _:
                return web.json_response({"error": f"no such thing: {what}"}, status=404)
        return web.json_response({})

    async def _refuse_for(self, seconds: float) -> None:
        await asyncio.sleep(0.05)  # the answer to the request itself has to get out
        await self._refuse()
        await asyncio.sleep(seconds)
        await self._listen()

    async def _ping(self, request: web.Request) -> web.StreamResponse:
        refusal = self.gate.refusal(request)
        return refusal or web.json_response({})

    def _note(
        self, request: web.Request, where: str, digest: str = "", size: int | None = None
    ) -> tuple[Record, list[Fault]]:
        span = None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if match:
            last = int(match[2]) if match[2] else (size or 1) - 1
            span = (int(match[1]), last)
        record = Record(
            time.monotonic(),
            "storage" if where == "storage" else "registry",
            where,
            request.method,
            request.path_qs,
            dict(request.headers),
            request.transport.get_extra_info("peername")[1] if request.transport else 0,
            digest,
            span,
        )
        self.log.append(record)
        met = [f for f in list(self.faults) if f.takes(where, request.method, digest, span)]
        record.faults = [f.name for f in met]
        return record, met

    async def _early(
        self, request: web.Request, record: Record, met: list[Fault]
    ) -> web.StreamResponse | None:
        """Waits and answers that come before any look at the store."""
        if self.link.latency_s:
            await asyncio.sleep(self.link.latency_s)
        for fault in met:
            p = fault.params
            answer: web.StreamResponse | None = None
            match fault.name:
                case "delay":
                    await asyncio.sleep(p.get("seconds", 1.0))
                case "hold":
                    await fault.wait()
                case "reset":
                    self._hang_up(request)
                    answer = web.Response(status=500)
                case "status":
                    headers = {"Retry-After": str(p["retry_after"])} if "retry_after" in p else {}
                    answer = web.Response(status=p.get("code", 500), text="fault", headers=headers)
                case "throttle":
                    answer = web.Response(status=429, headers={"Retry-After": str(p.get("retry_after", 1))})
                case "server-error":
                    answer = web.Response(status=p.get("code", 503), text="fault")
                case "head-403":
                    answer = web.Response(status=403)
                case "not-found":
                    answer = web.Response(status=404)
                case "expire-tokens":
                    self.revoke_tokens()
            if answer is not None:
                record.status = answer.status
                return answer
        return None

    def _hang_up(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()

    # authentication

    async def _token(self, request: web.Request) -> web.StreamResponse:
        record, met = self._note(request, "token")
        early = await self._early(request, record, met)
        if early is not None:
            return early
        return self._answer(record, await self.gate.token(request))

    @staticmethod
    def _answer(record: Record, response: web.Response) -> web.Response:
        record.status = response.status
        return response

    # reading

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        repo, ref = request.match_info["repo"], request.match_info["ref"]
        record, met = self._note(request, "manifest", ref)
        early = await self._early(request, record, met) or self.gate.refusal(
            request, f"repository:{repo}:pull"
        )
        if early is not None:
            record.status = early.status
            return early
        if request.method == "PUT":
            data = await request.read()
            digest = self.store.add_manifest(repo, ref, data, request.headers.get("Content-Type", ""))
            return self._answer(record, web.Response(status=201, headers={"Docker-Content-Digest": digest}))
        found = self.store.manifests.get((repo, ref))
        if found is None:
            return self._answer(
                record, web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, status=404)
            )
        data, kind = found
        headers = {"Content-Type": kind, "Docker-Content-Digest": sha256(data)}
        return await send_part(self.link, request, record, met, data, headers)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        repo, digest = request.match_info["repo"], request.match_info["digest"]
        data = self.store.blobs.get(digest)
        record, met = self._note(request, "blob", digest, None if data is None else len(data))
        early = await self._early(request, record, met) or self.gate.refusal(
            request, f"repository:{repo}:pull"
        )
        if early is not None:
            record.status = early.status
            return early
        if data is None:
            return self._answer(record, web.json_response({"errors": [{"code": "BLOB_UNKNOWN"}]}, status=404))
        for fault in met:
            location = None
            if fault.name == "redirect":
                location = self._sign(digest, fault)
            elif fault.name == "redirect-loop":
                location = str(request.url)
            elif fault.name == "redirect-to":
                location = fault.params["url"]
            if location is not None:
                return await send_redirect(request, record, location)
        return await send_part(
            self.link, request, record, met, data, {"Content-Type": "application/octet-stream"}
        )

    def _sign(self, digest: str, fault: Fault) -> str:
        signature = secrets.token_hex(16)
        uses, ttl = fault.params.get("uses"), fault.params.get("ttl")
        self._signed[signature] = [uses, None if ttl is None else time.monotonic() + ttl]
        # Unquoted characters that a client must not quote again: the signature would not fit any more.
        return f"http://localhost:{self.storage_port}/signed/{digest}?sig={signature}%2F%3D&x=a+b:c"

    async def _storage(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        data = self.store.blobs.get(digest, b"")
        record, met = self._note(request, "storage", digest, len(data))
        early = await self._early(request, record, met)
        if early is not None:
            return early
        left = self._signed.get(request.query.get("sig", "").removesuffix("/="))
        # An object store takes one way of authentication: the query's signature, or the header, but not both.
        if "Authorization" in request.headers:
            return self._answer(record, web.Response(status=400, text="InvalidArgument"))
        if left is None or not request.path_qs.endswith("%2F%3D&x=a+b:c"):
            return self._answer(record, web.Response(status=403, text="SignatureDoesNotMatch"))
        if (left[0] is not None and left[0] <= 0) or (left[1] is not None and time.monotonic() > left[1]):
            return self._answer(record, web.Response(status=403, text="Request has expired"))
        if left[0] is not None:
            left[0] -= 1
        return await send_part(
            self.link, request, record, met, data, {"Content-Type": "application/octet-stream"}
        )

    # writing

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        repo, number = request.match_info["repo"], request.match_info["id"]
        record, met = self._note(request, "upload")
        early = await self._early(request, record, met) or self.gate.refusal(
            request, f"repository:{repo}:pull,push"
        )
        if early is not None:
            record.status = early.status
            return early
        if request.method == "POST":
            number = secrets.token_hex(8)
            self._uploads[number] = bytearray()
        got = self._uploads.get(number)
        if got is None:
            return self._answer(record, web.Response(status=404))
        got += await request.read()
        where = {"Location": f"/v2/{repo}/blobs/uploads/{number}?state={len(got)}"}
        if request.method != "PUT":
            where["Range"] = f"0-{max(len(got) - 1, 0)}"
            return self._answer(record, web.Response(status=202, headers=where))
        digest = request.query.get("digest", "")
        if sha256(bytes(got)) != digest or any(f.name == "no-digest-match" for f in met):
            return self._answer(
                record, web.json_response({"errors": [{"code": "DIGEST_INVALID"}]}, status=400)
            )
        self.store.blobs[digest] = bytes(self._uploads.pop(number))
        return self._answer(record, web.Response(status=201, headers={"Docker-Content-Digest": digest}))


def main() -> None:
    """Runs a simulator until SIGTERM or SIGINT; prints one JSON line with its host when it listens."""
    parser = argparse.ArgumentParser(description="A registry with faults by name.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--build", type=Path, help="output of `virtiofsd-rafs build`")
    parser.add_argument("--ref", default="sim/image:latest", help="repository:tag for --build")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--bandwidth", type=float, help="bytes per second")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the server's thread exists, which inherits it
    with RegistrySimulator(latency_s=args.latency, bandwidth=args.bandwidth, port=args.port) as sim:
        ready: dict[str, str] = {"host": sim.host, "url": sim.url}
        if args.build is not None:
            repository, _, tag = args.ref.partition(":")
            ready["manifest"] = sim.store.add_build(repository, tag or "latest", args.build)
            ready["image"] = f"{sim.host}/{repository}:{tag or 'latest'}"
        print(json.dumps(ready), flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
