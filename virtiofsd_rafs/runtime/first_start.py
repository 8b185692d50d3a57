"""Brings chunks before anybody waits for them: prefetch after the mount, later the fill of the whole image.

Decides when each of them begins; what is fetched when is the planner's
(:mod:`virtiofsd_rafs.runtime.background`). All methods are for the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import struct
import time
from typing import TYPE_CHECKING, Any, Literal

from virtiofsd_rafs.errors import VirtiofsdRafsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from virtiofsd_rafs.config import ServeConfig
    from virtiofsd_rafs.native.store import BlobInfo, StateCounts, Store
    from virtiofsd_rafs.runtime.planner import Planner
    from virtiofsd_rafs.runtime.prefetch import Resolved

_log = logging.getLogger(__name__)

# The start of a guest is over when its kernel has come and nobody has waited for data for so long.
START_QUIET_S = 5.0
# How often that is looked at.
_TICK_S = 1.0
# A fill that had to give chunks up tries them again after this.
_NEW_PASS_S = 60.0
# What other daemons were fetching at the end of a pass is fetched here after this, should it still be absent.
_OTHERS_S = 5.0
# Where a bootstrap says how long its prefetch table is (rafs/c_rafs_v6.py): most have none, and then nothing
# has to be parsed.
_TABLE = struct.Struct("<QI")
_TABLE_AT = 1024 + 128 + 40

FillState = Literal["off", "waiting", "running", "done", "incomplete"]


def has_table(bootstrap_fd: int | None) -> bool:
    """Whether the image has a prefetch table."""
    if bootstrap_fd is None:
        return False
    with mmap.mmap(bootstrap_fd, 0, prot=mmap.PROT_READ) as image:
        if len(image) < _TABLE_AT + _TABLE.size:
            return False
        offset, size = _TABLE.unpack_from(image, _TABLE_AT)
        return bool(offset and size)


def is_stored(blob: BlobInfo, states: StateCounts, *, on_disk: bool) -> bool:
    """Whether all chunks of a blob are on the disk, verified or to be verified without the network."""
    return on_disk and states.present + states.verified >= blob.n_known


def is_complete(store: Store, blobs: Iterable[int]) -> bool:
    """Whether all of the image is on the disk."""
    return all(
        is_stored(store.blob(index), store.states(index), on_disk=store.chunks(index).has_data)
        for index in blobs
    )


class FirstStart:
    """Prefetch and fill of one mounted image.

    Args:
        config: what the user wants.
        store: the chunks.
        blobs: numbers of its blobs.
        planner: gets what is to be fetched.
        bootstrap_fd: the mounted bootstrap.
        pump: makes the planner's new work begin.
        started_ns: when FUSE_INIT was answered (CLOCK_MONOTONIC), 0 before.
        completed: called when the registry is not needed any more, each time that becomes true.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: Store,
        blobs: Iterable[int],
        planner: Planner,
        *,
        bootstrap_fd: int | None,
        pump: Callable[[], None],
        started_ns: Callable[[], int],
        completed: Callable[[], None],
    ) -> None:
        self._config = config
        self._store = store
        self._blobs = list(blobs)
        self._planner = planner
        self._bootstrap_fd = bootstrap_fd
        self._pump = pump
        self._started_ns = started_ns
        self._completed = completed
        self._fill: FillState = "off"
        self._given_up = 0
        self._left_to_others = False
        self._complete = False
        self._listed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins what is to begin with the mount."""
        self.check_complete()
        if self._complete:
            return
        config = self._config
        on_disk = all(self._store.chunks(index).has_data for index in self._blobs)
        table = config.prefetch == "table" and has_table(self._bootstrap_fd)
        if not on_disk:
            if config.prefetch_files or config.prefetch == "all" or table or config.fill != "never":
                _log.warning("nothing is fetched in advance: there is no cache disk that could keep it")
            return
        if self._bootstrap_fd is not None and (config.prefetch_files is not None or table):
            task = asyncio.ensure_future(self._prefetch(table))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not self._fits():
            return
        if config.prefetch == "all":
            self._planner.background.prefetch_all()
        if config.fill == "now":
            self._begin_fill()
        elif config.fill == "after-start":
            self._fill = "waiting"
            self._later(_TICK_S)

    @property
    def _size(self) -> int:
        """Of the image, as the cache holds it."""
        return sum(self._store.blob(index).uncompressed_size for index in self._blobs)

    @property
    def keeps_all(self) -> bool:
        """Whether all of the image may stay in the cache: else the end of it would push out its beginning."""
        on_disk = all(self._store.chunks(index).has_data for index in self._blobs)
        return on_disk and (not self._config.cache_size or self._size <= self._config.cache_size)

    def _fits(self) -> bool:
        """Whether what is asked for would stay; told if not."""
        whole = self._config.prefetch == "all" or self._config.fill != "never"
        fits = self.keeps_all
        if whole and not fits:
            _log.warning(
                "the image has %d bytes, above --cache-size: it is fetched on demand only", self._size
            )
        return fits

    async def close(self) -> None:
        """Ends it: nothing is begun any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._planner.background.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> dict[str, Any]:
        """For the status."""
        background = self._planner.background
        return {
            "listed_chunks": self._listed,
            "prefetching": background.prefetching,
            "fill": self._fill,
        }

    # -- prefetch -------------------------------------------------------------------------------------------

    async def _prefetch(self, table: bool) -> None:
        """The list of the user first, then the image's."""
        loop = asyncio.get_running_loop()
        if self._config.prefetch_files is not None:
            await self._add(loop.run_in_executor(None, self._resolve_list))
        if table:
            await self._add(loop.run_in_executor(None, self._resolve_table))

    async def _add(self, work: asyncio.Future[Resolved]) -> None:
        try:
            resolved = await work
        except (VirtiofsdRafsError, OSError) as e:
            _log.warning("a prefetch list cannot be used: %s", e)
            return
        self._listed += resolved.runs.n_chunks
        self._planner.background.prefetch(resolved.runs)
        if resolved.everything:
            self._planner.background.prefetch_all()
        _log.info("prefetch of %d chunks%s", self._listed, " and all others" if resolved.everything else "")
        self._pump()

    def _resolve_list(self) -> Resolved:
        """In a thread."""
        from virtiofsd_rafs.runtime.prefetch import iterate_list, resolve

        path = self._config.prefetch_files
        assert path is not None
        bad: list[int] = []
        with self._bootstrap() as image:
            resolved = resolve(image, iterate_list(path.read_bytes(), bad))
        if bad:
            _log.warning(
                "%s: %d lines are no paths of the image (the first: line %d)", path, len(bad), bad[0]
            )
        if resolved.missing:
            first = resolved.missing[0].decode("utf-8", "backslashreplace")
            _log.warning("%s: the image lacks %d paths (the first: %s)", path, len(resolved.missing), first)
        return resolved

    def _resolve_table(self) -> Resolved:
        """In a thread."""
        from virtiofsd_rafs.runtime.prefetch import resolve_table

        with self._bootstrap() as image:
            return resolve_table(image)

    def _bootstrap(self) -> mmap.mmap:
        assert self._bootstrap_fd is not None
        return mmap.mmap(self._bootstrap_fd, 0, prot=mmap.PROT_READ)

    # -- fill -----------------------------------------------------------------------------------------------

    def _later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _tick(self) -> None:
        """Begins the fill when its time has come."""
        self._timer = None
        if self._fill == "waiting":
            started = self._started_ns() / 1e9
            quiet_since = max(started, self._planner.last_demand)
            if not started or self._planner.waiting or time.monotonic() < quiet_since + START_QUIET_S:
                self._later(_TICK_S)
                return
        self._begin_fill()

    def _begin_fill(self) -> None:
        self._fill = "running"
        self._given_up = self._planner.counters.given_up
        # Whoever was fetching the rest when the last pass ended has had time: it may be dead.
        self._planner.background.fill(leaves=not self._left_to_others)
        self._left_to_others = False
        self._pump()

    # -- completeness ---------------------------------------------------------------------------------------

    def settled(self) -> None:
        """Nothing is under way any more."""
        if self._fill == "running" and self._timer is None and not self._planner.background.filling:
            if self._planner.counters.given_up > self._given_up:
                self._fill = "incomplete"
                _log.warning("chunks with wrong bytes are missing: tried again in %g s", _NEW_PASS_S)
                self._later(_NEW_PASS_S)
            elif any(self._store.states(index).fetching for index in self._blobs):
                self._left_to_others = True  # other daemons are busy with the rest, and may fail
                self._later(_OTHERS_S)
            else:
                self._fill = "done"
        self.check_complete()

    def check_complete(self) -> None:
        """Notes whether all of the image is here; says so when that is new."""
        complete = is_complete(self._store, self._blobs)
        if complete and not self._complete:
            _log.info("all of %s is in the cache: it needs no registry any more", self._config.image)
            self._completed()
        self._complete = complete
