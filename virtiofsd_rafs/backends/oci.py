"""Blobs in an OCI registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.base import ANSWERED_BY, check_range, sha256_digest
from virtiofsd_rafs.backends.client import RegistryClient
from virtiofsd_rafs.backends.credentials import load_docker_config
from virtiofsd_rafs.backends.http import PROGRESS_TIMEOUT_S, HttpClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtiofsd_rafs.backends.base import SourceConfig
    from virtiofsd_rafs.registry.reference import Reference


class OciSource:
    """A BlobSource over ``/v2/<repository>/blobs/sha256:<blob_id>``.

    Args:
        reference: names host and repository.
        config: TLS, connections, and how long somebody waits.
        blob_sizes: sizes that the manifest tells, by blob id; others are asked for.
        progress_timeout_s: how long a server may send nothing, or a trickle.
    """

    def __init__(
        self,
        reference: Reference,
        config: SourceConfig,
        blob_sizes: Mapping[str, int] | None = None,
        *,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
    ) -> None:
        self._http = HttpClient(
            ca_file=config.ca_file,
            connections=config.connections,
            progress_timeout_s=progress_timeout_s,
            deadline_s=config.io_deadline_s,
        )
        self._client = RegistryClient(
            self._http, reference, plain_http=config.plain_http, config=load_docker_config()
        )
        self._sizes = dict(blob_sizes or {})

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource."""
        check_range(offset, length)
        data = await self._client.read_range(sha256_digest(blob_id), offset, length)
        ANSWERED_BY.set("registry")
        return data

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource."""
        known = self._sizes.get(blob_id)
        if known is None:
            known = self._sizes[blob_id] = await self._client.blob_size(sha256_digest(blob_id))
        return known

    async def close(self) -> None:
        """See BlobSource."""
        await self._http.close()
