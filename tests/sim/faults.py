"""Faults that a registry can have, by name, and which requests they meet."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

# name -> what the client sees; parameters with their defaults in brackets
FAULTS = {
    "delay": "the answer comes after seconds [1.0]",
    "hold": "no answer until the fault is released",
    "stall": "the head and a byte come, then nothing until the fault is released",
    "status": "code [500], with retry_after [none] if given, and a small body",
    "throttle": "429 with Retry-After: retry_after [1]",
    "server-error": "code [503] without Retry-After",
    "head-403": "403, for HEAD only",
    "not-found": "404",
    "ignore-range": "200 with the whole blob instead of 206",
    "wrong-range": "206, but of the bytes by [1] further on",
    "no-content-range": "206 without Content-Range",
    "short-body": "206 with the right Content-Range, and a body that is by [1] shorter and says so",
    "long-body": "206 with the right Content-Range, and a body that is by [1] longer and says so",
    "cut": "the connection ends after_bytes [1000] into the body",
    "reset": "the connection ends before any answer",
    "416": "416 for a range that the blob has",
    "416-wrong-length": "416 that announces the blob's length and sends 33 bytes",
    "slow-loris": "the body comes byte by byte, one each interval [1.0] seconds",
    "corrupt": "one bit of the body is flipped, at its byte at [middle], or at the blob's byte blob_at",
    "encoded": "the body is said to be gzip",
    "redirect": "307 to a signed URL on another origin, refused after uses [none] or ttl [none] seconds",
    "redirect-loop": "307 to the same URL",
    "redirect-to": "307 to url",
    "expire-tokens": "all tokens end, and the request is answered 401",
    "no-digest-match": "an upload is finished with 400 DIGEST_INVALID",
}

_ids = itertools.count(1)


@dataclass
class Fault:
    """A fault and the requests that it meets.

    ``where`` is the kind of request (blob, manifest, token, upload, storage), ``digest`` the blob's or the
    start of it, ``span`` (first, last) bytes that a range must touch. The first ``skip`` matching requests
    are spared, then ``times`` (None: all) are met.
    """

    name: str
    where: str | None = None
    method: str | None = None
    digest: str | None = None
    span: tuple[int, int] | None = None
    skip: int = 0
    times: int | None = None
    share: float | None = None
    params: dict[str, Any] = field(default_factory=dict)
    id: int = field(default_factory=lambda: next(_ids))
    seen: int = 0
    hits: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(20))
    _loop: asyncio.AbstractEventLoop | None = None
    _released: asyncio.Event | None = None

    def __post_init__(self) -> None:
        if self.name not in FAULTS:
            raise ValueError(f"no fault is called {self.name!r}; known: {', '.join(FAULTS)}")

    def arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Binds the fault to the simulator's loop."""
        self._loop, self._released = loop, asyncio.Event()

    def release(self) -> None:
        """Lets held answers go, and ends the fault. Any thread may call it."""
        self.times = self.hits
        if self._loop is not None and self._released is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._released.set)

    async def wait(self) -> None:
        """Until ``release``."""
        assert self._released is not None
        await self._released.wait()

    def takes(self, where: str, method: str, digest: str, span: tuple[int, int] | None) -> bool:
        """Whether the fault meets this request; counts it if so."""
        if self.where not in (None, where) or self.method not in (None, method):
            return False
        if self.name == "head-403" and method != "HEAD":
            return False
        if self.digest is not None and not digest.removeprefix("sha256:").startswith(
            self.digest.removeprefix("sha256:")
        ):
            return False
        if self.span is not None and (span is None or span[0] > self.span[1] or span[1] < self.span[0]):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        if self.share is not None and self.rng.random() >= self.share:
            return False
        self.hits += 1
        return True
