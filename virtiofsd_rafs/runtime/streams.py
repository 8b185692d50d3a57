"""Blobs from servers that send all of them, whatever range is asked for.

One request for the whole blob takes the place of ranges: its chunks are stored as they pass, those that
somebody waits for at once, the others in batches. One stream per blob at a time, so that a blob that is read
to its end comes over the link once. Fetches wait until their chunks have passed; what is behind the stream
already is taken from the next one.

Each stream begins with a request for a range: a server that has learnt to answer it (a cache that was cold)
ends all this.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from virtiofsd_rafs.backends.base import ANSWERED_BY
from virtiofsd_rafs.errors import BadReply, Unreachable, VirtiofsdRafsError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine, Sequence

    from virtiofsd_rafs.backends.base import Streaming, WholeBlob
    from virtiofsd_rafs.runtime.layout import Layout

_log = logging.getLogger(__name__)

# So many bytes are collected before they are stored, unless somebody waits for a chunk of them. Twice that,
# and two chunks, are in memory at most.
BATCH = 1 << 20


class Take(Protocol):
    """Decodes, verifies and stores chunks."""

    async def __call__(
        self, blob: int, base: int, data: bytes, chunks: Sequence[int], awaited: Container[int]
    ) -> bytes:
        """One outcome per chunk of *chunks*; fetches wait for those in *awaited*, and for more meanwhile.

        *data* begins at byte *base* of the blob.
        """
        ...


class Streams:
    """The streams of one image, at most one per blob.

    Args:
        layout: chunks of a blob by place.
        take: stores chunks.
        spawn: runs a stream; whoever gives it ends it as well.
        keeps: whether all chunks may be stored; else only what is waited for.
    """

    def __init__(
        self,
        *,
        layout: Callable[[int], Layout],
        take: Take,
        spawn: Callable[[Coroutine[None, None, None]], None],
        keeps: Callable[[], bool],
    ) -> None:
        self._layout = layout
        self._take = take
        self._spawn = spawn
        self._keeps = keeps
        self._streams: dict[int, _Stream] = {}

    async def bring(self, source: Streaming, blob: int, blob_id: str, chunks: Sequence[int]) -> bytes | None:
        """An outcome for each of *chunks*, when all of them have passed; None when ranges are honoured.

        Raises BackendError when the stream ended before them.
        """
        stream = self._streams.get(blob)
        if stream is None:
            _log.info("blob %s comes as a whole: the server ignores ranges", blob_id)
            layout = self._layout(blob)
            stream = _Stream(source, blob, blob_id, layout, self._take, self._keeps())
            self._streams[blob] = stream
            self._spawn(self._run(stream))
        outcomes = await stream.wait(chunks)
        ANSWERED_BY.set(stream.label)
        return outcomes

    async def _run(self, stream: _Stream) -> None:
        error: Exception = Unreachable("the stream has ended")
        try:
            while stream.waiting:
                if not await stream.run_once():
                    _log.info("blob %s: the server honours ranges by now", stream.blob_id)
                    stream.end(None)
        except VirtiofsdRafsError as e:
            error = e
        finally:
            # Without a pause since the last look at who waits: who comes from now on gets another stream.
            del self._streams[stream.blob]
            stream.end(error)


class _Stream:
    """One blob on its way."""

    def __init__(
        self, source: Streaming, blob: int, blob_id: str, layout: Layout, take: Take, keeps: bool
    ) -> None:
        self._source = source
        self.blob = blob
        self.blob_id = blob_id
        self._layout = layout
        self._chunks = layout.chunks
        self._take = take
        self._keeps = keeps
        self.label = ""
        self.waiting: dict[int, asyncio.Future[int | None]] = {}
        """Chunks that fetches wait for; the outcome, or None when ranges are honoured."""
        self._rank = 0  # the next chunk, by its place
        self._base = 0  # where the window begins
        self._window = bytearray()
        self._batch: list[int] = []
        self._storing: asyncio.Future[None] | None = None

    async def wait(self, chunks: Sequence[int]) -> bytes | None:
        """See Streams.bring."""
        loop = asyncio.get_running_loop()
        futures = {chunk: self.waiting.setdefault(chunk, loop.create_future()) for chunk in chunks}
        try:
            outcomes = await asyncio.gather(*futures.values())
        finally:
            for chunk, future in futures.items():
                if not future.cancel() and not future.cancelled():
                    future.exception()  # one of them has been raised, and the others are told no less
                if self.waiting.get(chunk) is future:
                    del self.waiting[chunk]
        done = [outcome for outcome in outcomes if outcome is not None]
        return bytes(done) if len(done) == len(outcomes) else None

    def end(self, error: Exception | None) -> None:
        """Nothing more comes: who waits gets *error*; None: ranges are honoured."""
        waiting, self.waiting = self.waiting, {}
        for future in waiting.values():
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    async def run_once(self) -> bool:
        """Reads the blob once, as far as anything of it is wanted; False when ranges are honoured."""
        known = set(self.waiting)
        first = min(known, key=self._chunks.offsets.__getitem__)
        whole = await self._source.open_whole(
            self.blob_id, self._chunks.offsets[first], self._chunks.lengths[first]
        )
        if whole is None:
            return False
        self.label = ANSWERED_BY.get()
        self._rank = self._base = 0
        self._window.clear()
        self._batch = []
        try:
            await self._read(whole)
        finally:
            if self._storing is not None:
                await asyncio.gather(self._storing, return_exceptions=True)
                self._storing = None
            await whole.close()
        for chunk in known & set(self.waiting):
            future = self.waiting.pop(chunk)
            if not future.done():
                future.set_exception(BadReply(f"blob {self.blob_id} ends before chunk {chunk}"))
        return True

    async def _read(self, whole: WholeBlob) -> None:
        have = 0
        async for piece in whole.pieces():
            have += len(piece)
            self._window += piece
            urgent = self._advance(have)
            if self._batch and (urgent or len(self._window) >= BATCH):
                await self._flush()
            if not self._batch:
                self._drop(min(self._start(), have))
            if self._rank == len(self._layout) or not (self._keeps or self.waiting):
                break
        if self._batch:
            await self._flush()
        if self._storing is not None:
            await self._storing

    def _advance(self, have: int) -> bool:
        """Takes the chunks that end within the first *have* bytes; whether a fetch waits for one of them."""
        urgent = False
        while self._rank < len(self._layout):
            self._skip_unwanted(have)
            if self._rank == len(self._layout) or self._end() > have:
                break
            chunk = self._layout.at(self._rank)
            self._batch.append(chunk)
            urgent = urgent or chunk in self.waiting
            self._rank += 1
        return urgent

    def _skip_unwanted(self, have: int) -> None:
        """Moves on to a chunk that is wanted, or that may still be when its first byte comes."""
        while self._rank < len(self._layout) and (self._keeps or self._start() < have):
            if self._wanted(self._layout.at(self._rank)):
                break
            self._rank += 1

    def _wanted(self, chunk: int) -> bool:
        if chunk in self.waiting:
            return True
        chunks = self._chunks
        return (
            self._keeps
            and chunks.promised(chunk)
            and not chunks.ready(chunk)
            and not chunks.unverified(chunk)
        )

    def _start(self) -> int:
        """Where the next chunk begins; beyond the end of the blob when there is none."""
        if self._rank == len(self._layout):
            return 1 << 63
        return self._chunks.offsets[self._layout.at(self._rank)]

    def _end(self) -> int:
        chunk = self._layout.at(self._rank)
        return self._chunks.offsets[chunk] + self._chunks.lengths[chunk]

    def _drop(self, offset: int) -> None:
        """Forgets the bytes in front of *offset*."""
        if offset > self._base:
            del self._window[: offset - self._base]
            self._base = offset

    async def _flush(self) -> None:
        """Hands the batch over, when the one before has been stored: meanwhile the next bytes come."""
        if self._storing is not None:
            await self._storing
        chunks, self._batch = self._batch, []
        self._drop(self._chunks.offsets[chunks[0]])
        end = max(self._chunks.offsets[chunk] + self._chunks.lengths[chunk] for chunk in chunks)
        data = bytes(memoryview(self._window)[: end - self._base])
        self._storing = asyncio.ensure_future(self._store(self._base, data, chunks))
        if not self._keeps:
            await self._storing  # it may have been the last one that anybody wants

    async def _store(self, base: int, data: bytes, chunks: list[int]) -> None:
        outcomes = await self._take(self.blob, base, data, chunks, self.waiting)
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            future = self.waiting.pop(chunk, None)
            if future is not None and not future.done():
                future.set_result(outcome)
