"""Threads of the core that decode and verify for a store (``vr_ingest_*``).

They never take the interpreter's lock. A thread of Python's would take it to come back with its result, and
while it held it and waited for a processor, everybody else in this process would wait as well.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native._lib import ffi, lib, raise_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtiofsd_rafs.native.store import Store


class Done(NamedTuple):
    """A job that has ended."""

    ticket: int
    result: bytes | bool | VirtiofsdRafsError
    """What :meth:`Store.ingest` or :meth:`Store.verify_present` returns or raises."""


class IngestThreads:
    """At most *n_threads* threads for *store*, started when they are needed.

    To be closed before the store is. Its methods are for one thread at a time.
    """

    def __init__(self, store: Store, n_threads: int) -> None:
        self._handle = ffi.NULL
        self._ticket = 0
        # What a job reads and writes has to stay where it is.
        self._lent: dict[int, tuple[Any, ...]] = {}
        out = ffi.new("void **")
        self.done_fd = raise_for(lib.vr_ingest_new(store.handle, n_threads, out))
        """An eventfd that is readable while there are jobs to take."""
        self._handle = out[0]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the jobs that run, and forgets the others."""
        handle, self._handle = self._handle, ffi.NULL
        lib.vr_ingest_free(handle)
        self._lent.clear()

    def ingest(self, index: int, base: int, data: bytes, chunks: Sequence[int]) -> int:
        """Begins :meth:`Store.ingest`; the job's ticket. Raises CacheError when no thread can be made."""
        wanted = array("I", chunks)
        outcomes = bytearray(len(wanted))
        lent = ffi.from_buffer(data), ffi.from_buffer("uint32_t[]", wanted), ffi.from_buffer(outcomes)
        ticket = self._next()
        self._lent[ticket] = (outcomes, *lent)
        try:
            raise_for(
                lib.vr_ingest_submit(
                    self._handle, ticket, index, base, lent[0], len(data), lent[1], len(wanted), lent[2]
                )
            )
        except VirtiofsdRafsError:
            del self._lent[ticket]
            raise
        return ticket

    def verify_present(self, index: int, chunk: int, *, force: bool = False) -> int:
        """Begins :meth:`Store.verify_present`; the ticket of the job. Raises as :meth:`ingest`."""
        ticket = self._next()
        raise_for(lib.vr_ingest_submit_verify(self._handle, ticket, index, chunk, int(force)))
        return ticket

    def take(self) -> Iterator[Done]:
        """The jobs that have ended since the last call, in that order."""
        ticket, result = ffi.new("uint64_t *"), ffi.new("int64_t *")
        while raise_for(lib.vr_ingest_take(self._handle, ticket, result)):
            lent = self._lent.pop(ticket[0], None)
            try:
                good = raise_for(result[0])
            except VirtiofsdRafsError as e:
                yield Done(ticket[0], e)
                continue
            yield Done(ticket[0], bool(good) if lent is None else bytes(lent[0]))

    def _next(self) -> int:
        self._ticket += 1
        return self._ticket
