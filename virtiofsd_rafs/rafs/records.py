"""Fixed-size little-endian records declared once: a NamedTuple whose annotations carry the struct format.

A layout module lists ``class X(NamedTuple)`` with the field types below, and makes ``X_LAYOUT = Layout(X,
"x")``. Parsing, building, field offsets for error messages and dumps all come from that one declaration.
Nothing here does I/O.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from virtiofsd_rafs.errors import BadImage

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Bytes4 = Annotated[bytes, "4s"]
Bytes8 = Annotated[bytes, "8s"]
Bytes16 = Annotated[bytes, "16s"]
Bytes32 = Annotated[bytes, "32s"]
Bytes64 = Annotated[bytes, "64s"]

Buffer = bytes | bytearray | memoryview

R = TypeVar("R", bound=tuple[Any, ...])


class Layout(Generic[R]):
    """The byte layout of one record type.

    ``size`` is the length in bytes, ``offsets`` maps a field to its offset inside the record.
    """

    def __init__(self, record: type[R], where: str) -> None:
        self.record = record
        self.where = where
        self.offsets: dict[str, int] = {}
        formats = []
        size = 0
        for name, hint in get_type_hints(record, include_extras=True).items():
            (fmt,) = hint.__metadata__
            self.offsets[name] = size
            formats.append(fmt)
            size += struct.calcsize("<" + fmt)
        self.size = size
        self._struct = struct.Struct("<" + "".join(formats))

    def parse(self, buf: Buffer, offset: int = 0) -> R:
        """The record at byte *offset* of *buf*; BadImage if it does not lie inside."""
        if offset < 0 or offset + self.size > len(buf):
            raise BadImage(
                self.where, f"{self.size} bytes do not fit, the data ends at {len(buf)}", offset=offset
            )
        return self.record(*self._struct.unpack_from(buf, offset))

    def build(self, record: R) -> bytes:
        """The ``size`` bytes of *record*; byte fields shorter than their room are padded with NUL."""
        return self._struct.pack(*record)

    def bad(self, field: str, message: str, base: int = 0) -> BadImage:
        """The error about *field* of a record that starts at byte *base*."""
        return BadImage(f"{self.where}.{field}", message, offset=base + self.offsets[field])


def in_range(buf: Buffer, where: str, offset: int, length: int) -> None:
    """Return when *buf* holds ``[offset, offset + length)``, else raise BadImage."""
    if offset < 0 or length < 0 or offset + length > len(buf):
        raise BadImage(where, f"{length} bytes do not fit, the data ends at {len(buf)}", offset=offset)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of *alignment* that is not below *value*."""
    return -(-value // alignment) * alignment
