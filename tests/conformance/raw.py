"""A request whose descriptors a check lays out itself."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING

import attrs

from tests.conformance.check import ensure
from virtiofsd_rafs.fuse import build_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conformance.subject import Vm
    from virtiofsd_rafs.native.frontend_device import Token

Piece = tuple[int, int, int]
"""Address, length, flags (``DESC_WRITE``, ``DESC_TABLE``) of a descriptor."""

_GUARD = 64
_FILL = 0xA5


@attrs.frozen
class Raw:
    """A request at ``request``, and room for ``room`` bytes of reply at ``reply`` between guards."""

    vm: Vm
    data: bytes
    request: int
    reply: int
    room: int

    @classmethod
    def place(
        cls, vm: Vm, opcode: int, nodeid: int, payload: bytes, room: int, *, region: int | None = None
    ) -> Raw:
        """Puts the request into guest memory; *room* counts the out header."""
        data = build_request(opcode, nodeid, payload, unique=vm.fe.next_unique())
        request = vm.fe.alloc(len(data), region=region)
        reply = vm.fe.alloc(room + 2 * _GUARD, region=region) + _GUARD
        raw = cls(vm, data, request, reply, room)
        vm.fe.write_memory(request, data)
        vm.fe.write_memory(reply - _GUARD, bytes([_FILL]) * (room + 2 * _GUARD))
        return raw

    def request_pieces(self, *cuts: int) -> list[Piece]:
        """The request, cut at these offsets."""
        return self._cut(self.request, len(self.data), cuts, 0)

    def reply_pieces(self, *cuts: int) -> list[Piece]:
        """The room for the reply, cut at these offsets."""
        return self._cut(self.reply, self.room, cuts, 1)

    @staticmethod
    def _cut(start: int, size: int, cuts: Sequence[int], flags: int) -> list[Piece]:
        edges = [0, *cuts, size]
        return [(start + a, b - a, flags) for a, b in itertools.pairwise(edges)]

    def submit(self, pieces: Sequence[Piece], *, queue: int = 1, indirect: bool = False) -> Token:
        return self.vm.fe.submit_raw(pieces, queue=queue, indirect=indirect)

    def answer(self, token: Token) -> tuple[int, bytes]:
        """Waits for the request: errno and data. The used length must hold, unless it is 0 for everything."""
        used = self.vm.fe.wait(token).used_len
        length, error, unique = struct.unpack("<IiQ", self.vm.fe.read_memory(self.reply, 16))
        ensure(unique == int.from_bytes(self.data[8:16], "little"), f"answered with unique {unique:#x}")
        ensure(16 <= length <= self.room, f"the out header says {length} of {self.room} bytes")
        ensure(used in (0, length), f"used length {used}, out header {length}")
        self.check_guards(length)
        return -error, self.vm.fe.read_memory(self.reply + 16, length - 16)

    def check_guards(self, written: int) -> None:
        """Nothing but the first *written* bytes of the reply may have changed."""
        found = self.vm.fe.read_memory(self.reply - _GUARD, self.room + 2 * _GUARD)
        around = found[:_GUARD] + found[_GUARD + written :]
        ensure(around == bytes([_FILL]) * len(around), "memory around the reply was written")
        ensure(self.vm.fe.read_memory(self.request, len(self.data)) == self.data, "the request was written")


def table(vm: Vm, pieces: Sequence[Piece], order: Sequence[int] | None = None) -> Piece:
    """A descriptor of a new indirect table with *pieces*, which lie in it in *order*, its first one first."""
    places = list(range(len(pieces))) if order is None else list(order)
    size = 16 * len(pieces)
    where = vm.fe.alloc(size, align=16)
    data = bytearray(size)
    for i, (at, length, flags) in enumerate(pieces):
        last = i + 1 == len(pieces)
        word = (2 if flags & 1 else 0) | (0 if last else 1)
        struct.pack_into("<QIHH", data, 16 * places[i], at, length, word, 0 if last else places[i + 1])
    vm.fe.write_memory(where, bytes(data))
    return where, size, 2
