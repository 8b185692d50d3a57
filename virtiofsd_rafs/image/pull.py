"""Manifests and bootstrap layers from a registry into the content store."""

from __future__ import annotations

import asyncio
import io
import time
from typing import TYPE_CHECKING, TypeVar

from virtiofsd_rafs.backends.client import Download
from virtiofsd_rafs.backends.mirrors import MirroredRegistry
from virtiofsd_rafs.backends.retry import with_retries
from virtiofsd_rafs.image.layer_store import store_layer, stored_layer
from virtiofsd_rafs.registry.manifest import MAX_MANIFEST_LEN, digest_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from virtiofsd_rafs.backends.client import RegistryClient
    from virtiofsd_rafs.backends.config import RegistryAccess
    from virtiofsd_rafs.image.content import ContentStore
    from virtiofsd_rafs.image.layer import LayerFiles
    from virtiofsd_rafs.registry.manifest import Descriptor
    from virtiofsd_rafs.registry.reference import Reference

T = TypeVar("T")


class RemoteContent:
    """Content from the store, and from the registry or a mirror what is not there.

    A context manager: it holds connections.
    """

    def __init__(
        self,
        store: ContentStore,
        reference: Reference,
        *,
        access: RegistryAccess,
        deadline_s: float,
    ) -> None:
        self._store = store
        self._reference = reference
        self._end = time.monotonic() + deadline_s
        self._fresh: tuple[str, bytes] | None = None
        self.registry = MirroredRegistry(access.backend(reference), deadline_s=deadline_s)
        """Takes new credentials while it is used."""

    async def __aenter__(self) -> RemoteContent:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.registry.close()

    async def digest_of_tag(self) -> str:
        """The digest of what the reference's tag names now; the manifest itself is kept for ``manifest``."""
        tag = self._reference.tag
        assert tag is not None
        data = await self._retry(lambda client: client.manifest(tag), tag, str(self._reference))
        digest = digest_of(data)
        self._fresh = (digest, data)
        self._store.put(digest, data)
        return digest

    async def manifest(self, digest: str) -> bytes:
        """See resolve.Content."""
        if self._fresh is not None and self._fresh[0] == digest:
            return self._fresh[1]
        known = self._store.get(digest, limit=MAX_MANIFEST_LEN)
        if known is not None:
            return known

        data = await self._retry(lambda client: client.manifest(digest), digest, f"manifest {digest}")
        self._store.put(digest, data)
        return data

    async def layer(self, descriptor: Descriptor) -> LayerFiles:
        """See resolve.Content."""
        known = stored_layer(self._store, descriptor)
        if known is not None:
            return known
        sink = _Memory()
        download = Download(descriptor, sink)
        digest = descriptor.digest
        await self._retry(lambda client: client.download(download), digest, f"bootstrap layer {digest}")
        # Inflating and syncing a large one takes long enough to starve whatever else runs in the loop.
        return await asyncio.to_thread(store_layer, self._store, descriptor, sink.getvalue())

    async def _retry(self, work: Callable[[RegistryClient], Awaitable[T]], key: str, what: str) -> T:
        """One deadline for all steps. It ends the trying again, not a transfer that makes progress."""

        def attempt() -> Awaitable[T]:
            return self.registry.call(work, key=key)

        return await with_retries(attempt, deadline_s=self._end - time.monotonic(), what=what)


class _Memory(io.BytesIO):
    """A sink for layers: they end up in memory anyway, and grow no further than their descriptor's size."""

    def restart(self) -> None:
        self.seek(0)
        self.truncate()
