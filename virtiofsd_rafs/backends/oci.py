"""Blobs in an OCI registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.base import check_range, sha256_digest
from virtiofsd_rafs.backends.mirrors import MirroredRegistry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtiofsd_rafs.backends.base import CredentialUpdate, SourceReport
    from virtiofsd_rafs.backends.config import RegistryBackend


class OciSource:
    """A BlobSource over ``/v2/<repository>/blobs/sha256:<blob_id>`` of a registry and its mirrors.

    Args:
        backend: the registry, and how to reach it.
        connections: requests at once.
        blob_sizes: sizes that the manifest tells, by blob id; others are asked for.
        deadline_s: how long somebody waits for an answer.
    """

    def __init__(
        self,
        backend: RegistryBackend,
        *,
        connections: int = 8,
        blob_sizes: Mapping[str, int] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._registry = MirroredRegistry(backend, connections=connections, deadline_s=deadline_s)
        self._sizes = dict(blob_sizes or {})

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource."""
        check_range(offset, length)
        digest = sha256_digest(blob_id)
        return await self._registry.call(
            lambda client: client.read_range(digest, offset, length), key=digest, span=(offset, length)
        )

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource."""
        known = self._sizes.get(blob_id)
        if known is None:
            digest = sha256_digest(blob_id)
            known = await self._registry.call(lambda client: client.blob_size(digest), key=digest)
            self._sizes[blob_id] = known
        return known

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
