"""Wakes workers when other daemons have fetched what was left to them, the event loop when they gave it up.

The loop need not hear of what has come: a guest gets it without waiting for this process's interpreter.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtiofsd_rafs.native.store import Store
    from virtiofsd_rafs.runtime.left import Left

_log = logging.getLogger(__name__)


class Watching:
    """Watches what is left to others. Its thread is made when there is something to watch.

    Args:
        store: knows who fetches what.
        wakes: eventfds of the workers.
        gone: called when something of it is not being fetched any more, and has not come.
    """

    def __init__(self, store: Store, wakes: Sequence[int], gone: Callable[[], None]) -> None:
        self._store = store
        self._wakes = wakes
        self._gone = gone
        self._watch: Watch | None = None
        self._version = 0
        self._told = False

    @property
    def has_thread(self) -> bool:
        """Whether there is a thread."""
        return self._watch is not None

    def follow(self, left: Left) -> None:
        """Watches what is in *left* from now on."""
        if left.version == self._version:
            return
        if self._watch is None:
            if not left:
                return
            try:
                self._watch = Watch(self._store, self._wakes)
            except VirtiofsdRafsError as e:
                # They are looked at in the end, when it is too late to leave them to others.
                if not self._told:
                    _log.warning("what other daemons fetch is seen late: %s", e)
                self._told = True
                return
            asyncio.get_running_loop().add_reader(self._watch.fd, self._readable)
        self._version = left.version
        self._watch.set(left.keys)

    def close(self) -> None:
        """Ends the thread."""
        watch, self._watch = self._watch, None
        self._version = 0
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.fd)
            watch.close()

    def _readable(self) -> None:
        if self._watch is None:
            return
        self._watch.seen()
        self._gone()
