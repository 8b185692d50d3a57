"""Fixed-size little-endian structures as frozen attrs classes, packed and unpacked by ``struct``.

A field's annotation is one of the types below; its width follows from that. Nested structures are flattened.
FUSE aligns by hand with explicit padding fields, so there is no implicit padding to reproduce.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeAlias, get_args, get_type_hints

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

u8: TypeAlias = Annotated[int, "B"]
u16: TypeAlias = Annotated[int, "H"]
u32: TypeAlias = Annotated[int, "I"]
u64: TypeAlias = Annotated[int, "Q"]
i32: TypeAlias = Annotated[int, "i"]
i64: TypeAlias = Annotated[int, "q"]

Buffer: TypeAlias = bytes | bytearray | memoryview


@attrs.frozen
class Wire:
    """Base of all wire structures."""

    C_NAME: ClassVar[str] = ""
    """Name of the structure in C."""
    SIZE: ClassVar[int] = 0
    """Its size in bytes."""
    OFFSETS: ClassVar[dict[str, tuple[int, int]]] = {}
    """Byte offset and width of each field, in order."""
    _FORMAT: ClassVar[str] = ""
    _NESTED: ClassVar[tuple[tuple[str, type[Wire] | None], ...]] = ()

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        nested: list[tuple[str, type[Wire] | None]] = []
        offsets: dict[str, tuple[int, int]] = {}
        format_ = ""
        for name in cls.__annotations__:
            hint = hints[name]
            if str(hint).startswith("typing.ClassVar"):
                continue
            inner = hint if isinstance(hint, type) and issubclass(hint, Wire) else None
            part = inner._FORMAT if inner else get_args(hint)[1]
            offsets[name] = (struct.calcsize("<" + format_), struct.calcsize("<" + part))
            format_ += part
            nested.append((name, inner))
        cls._NESTED = tuple(nested)
        cls._FORMAT = format_
        cls.OFFSETS = offsets
        cls.SIZE = struct.calcsize("<" + format_)

    def pack(self) -> bytes:
        """The structure's ``SIZE`` bytes."""
        return struct.pack("<" + self._FORMAT, *self._values())

    def _values(self) -> Iterator[Any]:
        for name, nested in self._NESTED:
            value = getattr(self, name)
            if nested is None:
                yield value
            else:
                yield from value._values()

    @classmethod
    def unpack(cls, data: Buffer, offset: int = 0) -> Self:
        """The structure that stands at byte *offset* of *data*; what follows it is not looked at.

        Raises:
            ValueError: *data* ends before the structure does.
        """
        if offset < 0 or len(data) - offset < cls.SIZE:
            raise ValueError(f"{cls.C_NAME}: {len(data) - offset} bytes are left, {cls.SIZE} needed")
        return cls._from_values(iter(struct.unpack_from("<" + cls._FORMAT, data, offset)))

    @classmethod
    def _from_values(cls, values: Iterator[Any]) -> Self:
        return cls(*[nested._from_values(values) if nested else next(values) for _, nested in cls._NESTED])
