"""Readers of a VM without a VM: each has one read under way, all of them share one front-end."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import attrs

from tests.faults.patterns import PATTERNS, Read, expected
from virtiofsd_rafs.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.image import Folder
    from virtiofsd_rafs.native.frontend import Frontend
    from virtiofsd_rafs.native.frontend_device import Token

# Without any answer for so long the test fails: more than any deadline of a test.
HANG_S = 120.0
_LOOK_EVERY = 200


@attrs.frozen
class Cell:
    """A pattern and how many readers follow it, each of them from another place on."""

    pattern: str
    readers: int

    @property
    def name(self) -> str:
        return f"{self.pattern}-{self.readers}"

    def reads(self, reader: int) -> list[Read]:
        """What reader number *reader* reads, in order."""
        pattern = PATTERNS[self.pattern]
        start = reader * 7 % len(pattern)
        return pattern[start:] + pattern[:start]


CELLS = [Cell(pattern, readers) for pattern in PATTERNS for readers in (1, 64)]


@attrs.frozen
class Done:
    """An answered read. Times are ``time.monotonic()``; ``right``: without an error, and the right bytes."""

    cell: Cell
    read: Read
    posted: float
    answered: float
    error: int
    right: bool


@attrs.define
class _Reader:
    cell: Cell
    folder: Folder
    reads: list[Read]
    at: int = 0
    token: Token | None = None
    posted: float = 0.0


def resolve(fe: Frontend, folders: dict[str, Folder]) -> dict[tuple[str, str], int]:
    """Node ids by folder and file."""
    return {
        (name, file): fe.resolve(f"{name}/{file}").nodeid
        for name, folder in folders.items()
        for file in folder.files
    }


def drive(
    fe: Frontend,
    nodes: dict[tuple[str, str], int],
    folders: dict[str, Folder],
    cells: list[Cell],
    look: Callable[[], None] | None = None,
    most: int | None = None,
) -> list[Done]:
    """Lets all readers of *cells* read to their end; *look* is called now and then meanwhile.

    *most* bounds how much each of many readers reads; a single one reads everything.
    """
    readers = [
        _Reader(cell, folders[cell.name], cell.reads(number)[: most if cell.readers > 1 else None])
        for cell in cells
        for number in range(cell.readers)
    ]
    under_way: dict[int, _Reader] = {}
    done: list[Done] = []

    def go_on(reader: _Reader) -> None:
        if reader.at == len(reader.reads):
            return
        read = reader.reads[reader.at]
        reader.at += 1
        args = struct.pack("<QQIIQII", 0, read.offset, read.size, 0, 0, 0, 0)
        reader.posted = time.monotonic()
        reader.token = fe.request(Opcode.READ, nodes[reader.folder.name, read.file], args, read.size)
        under_way[reader.token.id] = reader

    for reader in readers:
        go_on(reader)
    last = time.monotonic()
    while under_way:
        answered = fe.poll(timeout_s=1.0)
        if not answered:
            assert time.monotonic() - last < HANG_S, f"{len(under_way)} reads hang"
            continue
        last = time.monotonic()
        for number in answered:
            reader = under_way.pop(number)
            assert reader.token is not None
            read = reader.reads[reader.at - 1]
            reply = fe.wait(reader.token)
            right = not reply.error and reply.data == expected(reader.folder, read)
            done.append(Done(reader.cell, read, reader.posted, last, reply.error, right))
            if look is not None and len(done) % _LOOK_EVERY == 0:
                look()
            go_on(reader)
    return done
