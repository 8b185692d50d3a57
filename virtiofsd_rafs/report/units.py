"""Numbers for people."""

from __future__ import annotations


def amount(size: float) -> str:
    """*size* bytes: ``30.7 MB`` (powers of 1000, as network rates are)."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5 if unit == "B" else size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def duration(seconds: float) -> str:
    """``12 ms``, ``4.21 s``, ``75.0 s``."""
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 20 else f"{seconds:.1f} s"


def percent(part: float, whole: float) -> str:
    """``6 %``; ``<1 %`` is not nothing, and ``>99 %`` is not all."""
    if whole <= 0 or part <= 0:
        return "0 %"
    share = 100 * part / whole
    if share < 1:
        return "<1 %"
    return ">99 %" if 99.5 <= share < 100 else f"{share:.0f} %"


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 request``, ``2 requests``."""
    return f"{n} {one if n == 1 else many or one + 's'}"
