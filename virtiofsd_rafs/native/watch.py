"""A thread of the core that looks whether other daemons have fetched something (``vr_watch_*``).

It never takes the interpreter's lock, and a look costs it a hundredth of what it would cost an event loop.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from virtiofsd_rafs.native._lib import ffi, lib, raise_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from virtiofsd_rafs.native.store import Store


class Watch:
    """Watches the states of chunks of *store*, whose blobs are all open.

    When one has come, it writes to *wakes*: eventfds, of which it keeps copies.

    To be closed before the store is. Raises CacheError when no thread can be made.
    """

    def __init__(self, store: Store, wakes: Sequence[int]) -> None:
        self._handle = ffi.NULL
        out = ffi.new("void **")
        fds = ffi.new("int32_t[]", list(wakes))
        self.fd = raise_for(lib.vr_watch_new(store.handle, fds, len(wakes), out))
        """An eventfd that becomes readable once a chunk is not being fetched any more, and has not come."""
        self._handle = out[0]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread."""
        handle, self._handle = self._handle, ffi.NULL
        lib.vr_watch_free(handle)

    def set(self, keys: Iterable[tuple[int, int]]) -> None:
        """Watches these chunks (blob, number) and no others, each until it has come or will not."""
        blobs, chunks = array("I"), array("I")
        for blob, chunk in keys:
            blobs.append(blob)
            chunks.append(chunk)
        with ffi.from_buffer("uint32_t[]", blobs) as first, ffi.from_buffer("uint32_t[]", chunks) as second:
            raise_for(lib.vr_watch_set(self._handle, first, second, len(blobs)))

    def seen(self) -> None:
        """What will not come has been noted."""
        raise_for(lib.vr_watch_seen(self._handle))
