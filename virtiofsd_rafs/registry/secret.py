"""A string that must not be seen."""

from __future__ import annotations

import hmac
from typing import Any, NoReturn


class Secret:
    """A password or token. ``repr``, ``str`` and ``format`` show stars, so that no log line or traceback can
    leak it.

    ``reveal()`` is the only way to the value; its callers are the places to review.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one header or form field that it is meant for."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(("Secret", self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not written anywhere")

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self
