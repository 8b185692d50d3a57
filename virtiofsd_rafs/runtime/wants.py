"""What the planner keeps account of: chunks that somebody waits for, fetches, counters."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Literal, NamedTuple

import attrs

if TYPE_CHECKING:
    from virtiofsd_rafs.runtime.layout import Key

# Requests of one chunk whose ends are known apart: the worker may send posts as it likes.
_MAX_DUES = 256

Reason = Literal["demand", "prefetch", "fill"]
"""Why a fetch was started."""


class Posted(Enum):
    """What became of a post."""

    READY = "ready"  # wake the workers: it is there
    QUEUED = "queued"
    JOINED = "joined"  # somebody waits for it already, or it was read ahead
    LEFT = "left"  # another daemon is fetching it
    VERIFY = "verify"  # stored, to be verified: see Planner.next_verifications
    INVALID = "invalid"  # the image has no such chunk


class Origin(NamedTuple):
    """Who asked first, for the log of fetches."""

    nodeid: int
    file_offset: int


NOBODY = Origin(0, 0)


@attrs.define(eq=False)
class Want:
    """A chunk that somebody waits for."""

    key: Key
    origin: Origin
    first_posted: float
    deadline: float
    """When the last request that waits for it fails."""
    attempts: int = 0
    alone: bool = False
    """Its bytes were bad: fetch it by itself."""
    left_since: float | None = None
    """Since when it has been left to another daemon that fetches it."""
    _dues: set[float] = attrs.Factory(set)

    def wait(self, deadline: float) -> None:
        """A request waits for it until *deadline*."""
        if len(self._dues) < _MAX_DUES:
            self._dues.add(deadline)
        self.deadline = max(self.deadline, deadline)

    def next_due(self, now: float) -> float:
        """When the next of the requests fails, after *now*; the deadline when nobody waits any more."""
        if len(self._dues) > 1:
            self._dues = {due for due in self._dues if due > now}
        return min(self._dues, default=self.deadline)


@attrs.define(eq=False)
class Fetch:
    """A range of a blob to fetch, and the chunks to take from it."""

    fetch_id: int
    blob: int
    offset: int
    length: int
    chunks: tuple[int, ...]
    """By their place in the blob."""
    wants: dict[int, Want]
    """Those chunks of it that somebody waits for; grows while the fetch runs."""
    started: float
    attempt: int
    """1 for the first try."""
    reason: Reason = "demand"
    demanded: frozenset[int] = frozenset()
    """Chunks that somebody waited for when it was planned."""

    about: Origin = NOBODY
    """The file that was prefetched, while nobody waits for it."""

    def reasons(self) -> list[tuple[int, str]]:
        """Why each of its chunks was fetched."""
        others = "read-ahead" if self.reason == "demand" else self.reason
        return [(chunk, "demand" if chunk in self.demanded else others) for chunk in self.chunks]

    @property
    def origin(self) -> Origin:
        """Who asked first; for a fetch in the background that nobody has joined, what it is about."""
        return next((want.origin for want in self.wants.values()), self.about)


@attrs.define
class Counters:
    """What happened since the start."""

    posts: int = 0
    invalid_posts: int = 0
    fetches: int = 0
    background_fetches: int = 0
    retries: int = 0
    chunks_wanted: int = 0
    chunks_read_ahead: int = 0
    read_ahead_used: int = 0
    """Chunks that were posted while a fetch that read them ahead was under way."""
    chunks_prefetched: int = 0
    prefetch_used: int = 0
    """Chunks that were posted while they were being prefetched, and joined that."""
    chunks_filled: int = 0
    given_up: int = 0
    """Chunks whose bytes were bad each time they were fetched in the background."""
    expired: int = 0
    left_to_others: int = 0
    """Chunks that another daemon was fetching when they were wanted, and delivered in time."""


class Wait(NamedTuple):
    """A chunk that somebody waits for, for people."""

    key: Key
    origin: Origin
    since: float
    attempts: int
    """Tries that have failed."""
    doing: str
    """"fetching", "queued", "left to another daemon", "backing off", "verifying"."""
