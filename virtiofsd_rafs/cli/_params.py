"""Types of options that several commands share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([kmgt]i?b?|b)?", re.IGNORECASE | re.ASCII)
_PREFIXES = "kmgt"
# More than any file can have: a longer number is a slip of the keyboard.
_MAX_SIZE = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes that *text* stands for: ``4096``, ``64MiB``, ``1.5G``, ``1GB``.

    ``KB`` is 1 000 bytes; ``KiB``, and ``K`` alone, are 1 024. Raises ValueError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write 4096, 64MiB, 1GB")
    digits, unit = match[2] or "", (match[3] or "").lower()
    factor: int = 1
    if unit and unit != "b":
        base = 1000 if len(unit) == 2 and unit[1] == "b" else 1024
        factor = base ** (_PREFIXES.index(unit[0]) + 1)
    # Not with fractions.Fraction: its import costs the start of `serve` milliseconds.
    size: int
    size, rest = divmod(int(match[1] + digits) * factor, 10 ** len(digits))
    if rest:
        raise ValueError(f"{text!r} is no whole number of bytes")
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is more than any file can have")
    return size


def format_size(size: int) -> str:
    """*size* as :func:`parse_size` reads it, in the largest binary unit that divides it."""
    for power in range(len(_PREFIXES), 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_PREFIXES[power - 1].upper()}iB"
    return str(size)


class Size(click.ParamType[int]):
    """A number of bytes with an optional suffix; see :func:`parse_size`.

    Bounds are inclusive; None: unbounded.
    """

    name = "size"

    def __init__(self, low: int = 0, high: int | None = None) -> None:
        self._low = low
        self._high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; integers (defaults) pass."""
        if isinstance(value, int):
            size = value
        else:
            try:
                size = parse_size(str(value))
            except ValueError as e:
                self.fail(str(e), param, ctx)
        if size < self._low:
            self.fail(f"{value} is less than {format_size(self._low)}", param, ctx)
        if self._high is not None and size > self._high:
            self.fail(f"{value} is more than {format_size(self._high)}", param, ctx)
        return size

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Units behind a number."""
        from click.shell_completion import CompletionItem

        if not incomplete.isdigit():
            return []
        return [CompletionItem(f"{incomplete}{unit}") for unit in ("KiB", "MiB", "GiB")]
