"""Tells the event loop when other daemons have fetched, or given up, what was left to them."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.native.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.native.store import Store
    from virtiofsd_rafs.runtime.left import Left

_log = logging.getLogger(__name__)


class Watching:
    """Watches what is left to others. Its thread is made when there is something to watch.

    Args:
        store: knows who fetches what.
        changed: called when something of it is not being fetched any more.
    """

    def __init__(self, store: Store, changed: Callable[[], None]) -> None:
        self._store = store
        self._changed = changed
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
                self._watch = Watch(self._store)
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
        self._version = 0  # nothing is watched
        self._changed()
