"""Parsing of ``WWW-Authenticate`` (RFC 9110, 11.6.1): one header may hold several challenges, separated by
the same comma that separates their parameters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=\s*(?:,|$))")
_SPACE = re.compile(r"[ \t]*")
_SEPARATORS = re.compile(r"[ \t,]*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
# More than any registry sends; the rest of an endless header is ignored.
_MAX_HEADER_LEN = 8192


@attrs.frozen
class Challenge:
    """One challenge. ``scheme`` and the names in ``params`` are lower-case."""

    scheme: str
    params: dict[str, str] = attrs.field(factory=dict)


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges in all *headers*, in order. Total: what cannot be parsed ends its header."""
    found: list[Challenge] = []
    for header in headers:
        found.extend(_parse_header(header[:_MAX_HEADER_LEN]))
    return found


def _parse_header(text: str) -> list[Challenge]:
    found: list[Challenge] = []
    at = _skip(_SEPARATORS, text, 0)
    while at < len(text):
        scheme = _TOKEN.match(text, at)
        if scheme is None:
            return found
        challenge = Challenge(scheme[0].lower())
        found.append(challenge)
        at = _skip(_SPACE, text, scheme.end())
        token68 = _TOKEN68.match(text, at)
        if token68 is not None and at > scheme.end():
            at = _skip(_SEPARATORS, text, token68.end())
            continue
        at = _parse_params(text, at, challenge.params)
    return found


def _parse_params(text: str, at: int, params: dict[str, str]) -> int:
    """Fills *params*; returns where the next challenge starts (a token that no ``=`` follows)."""
    while True:
        at = _skip(_SEPARATORS, text, at)
        name = _TOKEN.match(text, at)
        if name is None:
            return len(text)
        equals = _skip(_SPACE, text, name.end())
        if equals >= len(text) or text[equals] != "=":
            return at
        at = _skip(_SPACE, text, equals + 1)
        quoted = _QUOTED.match(text, at)
        if quoted is not None:
            params.setdefault(name[0].lower(), re.sub(r"\\(.)", r"\1", quoted[1]))
            at = quoted.end()
            continue
        plain = _TOKEN.match(text, at)
        if plain is None:
            return len(text)
        params.setdefault(name[0].lower(), plain[0])
        at = plain.end()


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
