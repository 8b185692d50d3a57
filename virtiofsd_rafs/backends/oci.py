"""Blobs in an OCI registry."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from virtiofsd_rafs.backends.base import CredentialUpdate, check_range, sha256_digest
from virtiofsd_rafs.backends.mirrors import MirroredRegistry
from virtiofsd_rafs.errors import AuthError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from virtiofsd_rafs.backends.base import SourceReport, WholeBlob
    from virtiofsd_rafs.backends.client import RegistryClient
    from virtiofsd_rafs.backends.config import RegistryBackend

T = TypeVar("T")
_log = logging.getLogger(__name__)


class OciSource:
    """A BlobSource over ``/v2/<repository>/blobs/sha256:<blob_id>`` of a registry and its mirrors.

    Args:
        backend: the registry, and how to reach it.
        connections: requests at once.
        blob_sizes: sizes that the manifest tells, by blob id; others are asked for.
        deadline_s: how long somebody waits for an answer.
        reload: what the configuration says now, for credentials from it that were refused.
    """

    def __init__(
        self,
        backend: RegistryBackend,
        *,
        connections: int = 8,
        blob_sizes: Mapping[str, int] | None = None,
        deadline_s: float | None = None,
        reload: Callable[[], RegistryBackend | None] | None = None,
    ) -> None:
        self._registry = MirroredRegistry(backend, connections=connections, deadline_s=deadline_s)
        self._sizes = dict(blob_sizes or {})
        self._reload = reload
        self._found = (backend.auth, backend.registry_token)

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource."""
        check_range(offset, length)
        digest = sha256_digest(blob_id)
        return await self._call(
            lambda client: client.read_range(digest, offset, length), key=digest, span=(offset, length)
        )

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource."""
        known = self._sizes.get(blob_id)
        if known is None:
            digest = sha256_digest(blob_id)
            known = await self._call(lambda client: client.blob_size(digest), key=digest)
            self._sizes[blob_id] = known
        return known

    def ignores_ranges(self, blob_id: str) -> bool:
        """See Streaming."""
        return self._registry.ignores_ranges(sha256_digest(blob_id))

    async def open_whole(self, blob_id: str, offset: int, length: int) -> WholeBlob | None:
        """See Streaming."""
        digest = sha256_digest(blob_id)
        return await self._call(lambda client: client.open_whole(digest, offset, length), key=digest)

    async def _call(
        self,
        call: Callable[[RegistryClient], Awaitable[T]],
        *,
        key: str,
        span: tuple[int, int] | None = None,
    ) -> T:
        """The result of *call*; made again when the configuration has other credentials by now."""
        found = self._found
        try:
            return await self._registry.call(call, key=key, span=span)
        except AuthError:
            if found == self._found and not self._looked_up_again():
                raise
        return await self._registry.call(call, key=key, span=span)

    def _looked_up_again(self) -> bool:
        backend = self._reload() if self._reload is not None else None
        if backend is None or (backend.auth, backend.registry_token) == self._found:
            return False
        self._found = (backend.auth, backend.registry_token)
        update = CredentialUpdate(registry_auth=backend.auth, registry_token=backend.registry_token)
        try:
            self._registry.renew(update)
        except ConfigError as e:
            _log.warning("%s", e)
            return False
        return True

    def renew(self, update: CredentialUpdate) -> None:
        """See Renewable."""
        self._registry.renew(update)

    def wrong_bytes(self, blob_id: str, offset: int, length: int, source: str) -> None:
        """See Distrustful."""
        self._registry.wrong_bytes(sha256_digest(blob_id), offset, length, source)

    def report(self) -> list[SourceReport]:
        """See Reporting."""
        return self._registry.report()

    async def close(self) -> None:
        """See BlobSource."""
        await self._registry.close()
