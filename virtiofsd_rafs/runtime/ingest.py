"""Decoding and verifying for the event loop, which goes on meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native.ingest import IngestThreads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtiofsd_rafs.native.store import Store

# Two keep a fast link busy, and more would only take processors from the guest.
INGEST_THREADS = 2


class Ingest:
    """Waits for jobs of *store*. Its threads are made with the first job, and again after :meth:`close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads: IngestThreads | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    @property
    def has_threads(self) -> bool:
        """Whether there may be threads: those that there are stay until :meth:`close`."""
        return self._threads is not None

    async def ingest(self, index: int, base: int, data: bytes, chunks: Sequence[int]) -> bytes:
        """:meth:`Store.ingest`."""
        outcomes: bytes = await self._result(self._begin().ingest(index, base, data, chunks))
        return outcomes

    async def verify_present(self, index: int, chunk: int, *, force: bool = False) -> bool:
        """:meth:`Store.verify_present`."""
        good: bool = await self._result(self._begin().verify_present(index, chunk, force=force))
        return good

    def close(self) -> None:
        """Ends the threads. Waits for jobs that run; who waits for a job is cancelled."""
        threads, self._threads = self._threads, None
        if threads is None:
            return
        asyncio.get_running_loop().remove_reader(threads.done_fd)
        threads.close()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.cancel()

    def _begin(self) -> IngestThreads:
        if self._threads is None:
            threads = self._threads = IngestThreads(self._store, INGEST_THREADS)
            asyncio.get_running_loop().add_reader(threads.done_fd, self._take, threads)
        return self._threads

    def _result(self, ticket: int) -> asyncio.Future[Any]:
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        return future

    def _take(self, threads: IngestThreads) -> None:
        for ticket, result in threads.take():
            future = self._waiting.pop(ticket)
            if future.done():
                continue  # who waited has been cancelled
            if isinstance(result, VirtiofsdRafsError):
                future.set_exception(result)
            else:
                future.set_result(result)
