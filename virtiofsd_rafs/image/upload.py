"""Uploads to a registry: what is there already is not sent, what breaks off is sent again."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.backends.client import RegistryClient
from virtiofsd_rafs.backends.credentials import CredentialStore
from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.retry import with_retries
from virtiofsd_rafs.errors import AuthError, BadReply
from virtiofsd_rafs.registry.manifest import OCI_MANIFEST
from virtiofsd_rafs.registry.protocol import Endpoint, Exchange, check_ok
from virtiofsd_rafs.registry.upload import closing_url, upload_location

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from virtiofsd_rafs.backends.config import RegistryAccess
    from virtiofsd_rafs.image.assemble import Upload
    from virtiofsd_rafs.registry.reference import Reference

# Larger blobs go in pieces of this size: a broken connection then costs one piece, and proxies that bound a
# request's body (often at 100 MB and more) do not mind.
PIECE = 64 << 20
_READ = 256 << 10


class Pusher:
    """An upload session to one repository. A context manager: it holds connections."""

    def __init__(
        self,
        reference: Reference,
        *,
        access: RegistryAccess,
        deadline_s: float,
        piece: int = PIECE,
    ) -> None:
        self._deadline_s = deadline_s
        self._piece = piece
        self._credentials = CredentialStore(access.auth_file)
        self._http = HttpClient(options=access.http)
        self._client = RegistryClient(
            self._http,
            Endpoint.of(reference, plain_http=access.plain_http),
            credentials=self._credentials,
            registry=reference.host,
            push=True,
        )

    async def __aenter__(self) -> Pusher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()
        await self._credentials.close()
        await self._http.close()

    async def push_blob(self, upload: Upload) -> bool:
        """Brings *upload* into the registry. Returns whether it was there already."""
        known = await self._retry(lambda: self._has(upload), upload.digest)
        if known:
            return True
        await self._retry(lambda: self._send(upload), upload.digest)
        return False

    async def push_manifest(self, tag: str, manifest: bytes) -> None:
        """Puts *manifest* under *tag*: from here on the image is visible."""
        await self._retry(lambda: self._put_manifest(tag, manifest), f"manifest {tag}")

    async def _retry(self, attempt: Any, what: str) -> Any:
        return await with_retries(attempt, deadline_s=self._deadline_s, what=what)

    async def _has(self, upload: Upload) -> bool:
        try:
            return await self._client.has_blob(upload.digest)
        except AuthError:
            # Some registries refuse HEAD to those who may push; the upload itself tells whether it may be.
            return False

    async def _send(self, upload: Upload) -> None:
        client = self._client
        location = await self._step("POST", client.endpoint.uploads_url(), (202,), upload, 0, 0)
        offset = 0
        while upload.size - offset > self._piece:
            location = await self._step("PATCH", location, (202,), upload, offset, self._piece)
            offset += self._piece
        await self._step(
            "PUT", closing_url(location, upload.digest), (201,), upload, offset, upload.size - offset
        )

    async def _step(
        self, method: str, url: str, expected: tuple[int, ...], upload: Upload, offset: int, length: int
    ) -> str:
        """Sends *length* bytes from *offset*; returns where the upload goes on ("" after its end)."""
        headers = [("Content-Length", str(length))]
        if length:
            headers.append(("Content-Type", "application/octet-stream"))
        if method == "PATCH":
            headers.append(("Content-Range", f"{offset}-{offset + length - 1}"))
        exchange = Exchange(self._client.endpoint, method, url, headers=headers)
        body = (lambda: _body(upload, offset, length)) if length else None
        async with self._client.send(exchange, body) as reply:
            check_ok(
                reply.head, expected, f"upload of {upload.digest} to {self._client.name}", now=time.time()
            )
            await reply.drain()
            return "" if method == "PUT" else upload_location(self._client.endpoint, url, reply.head)

    async def _put_manifest(self, tag: str, manifest: bytes) -> None:
        endpoint = self._client.endpoint
        headers = (("Content-Type", OCI_MANIFEST), ("Content-Length", str(len(manifest))))
        exchange = Exchange(endpoint, "PUT", endpoint.manifest_url(tag), headers=headers)
        async with self._client.send(exchange, lambda: manifest) as reply:
            check_ok(reply.head, (201,), f"manifest {self._client.name}:{tag}", now=time.time())
            await reply.drain()


async def _body(upload: Upload, offset: int, length: int) -> AsyncIterator[bytes]:
    if upload.path is None:
        yield upload.data[offset : offset + length]
        return
    with await asyncio.to_thread(upload.path.open, "rb") as f:
        f.seek(offset)
        while length:
            piece = await asyncio.to_thread(f.read, min(_READ, length))
            if not piece:
                raise BadReply(f"{upload.path} became shorter while it was sent")
            length -= len(piece)
            yield piece
