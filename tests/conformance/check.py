"""What a check is: a stable id, what is looked at, what the specification says about it, and a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

Body = Callable[..., None]


class Violation(AssertionError):
    """The back-end did something else than the specification says. The text tells what."""


class NotOffered(Exception):
    """The back-end does not have what the check is about, which it need not have."""


@attrs.frozen
class Check:
    """One check.

    Attributes:
        id: ``area.name``; stays the same for ever, since reports are compared by it.
        title: What a conforming back-end does, as a sentence.
        source: Where that is said: a section of virtio 1.3 or vhost-user.rst, or a function of Linux.
        says: What it says there, in short.
        body: Called with a ``Subject``, and with *arguments*.
        fresh: Needs a back-end of its own, which has cached nothing.
        family: The title with dots for what differs from its siblings, which share all else but arguments.
    """

    id: str
    title: str
    source: str
    says: str
    body: Body
    arguments: dict[str, Any] = attrs.field(factory=dict)
    fresh: bool = False
    family: str = ""

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]


CHECKS: dict[str, Check] = {}
"""All declared checks by id, in the order of their declaration."""


def declare(check: Check) -> None:
    """Adds a check.

    Raises:
        ValueError: there is one with this id.
    """
    if check.id in CHECKS:
        raise ValueError(f"two checks have the id {check.id}")
    CHECKS[check.id] = check


def check(id_: str, title: str, *, source: str, says: str, fresh: bool = False) -> Callable[[Body], Body]:
    """Declares the decorated function as a check."""

    def take(body: Body) -> Body:
        declare(Check(id_, title, source, says, body, fresh=fresh))
        return body

    return take


def checks(
    prefix: str, title: str, cases: dict[str, Any], *, source: str, says: str, fresh: bool = False
) -> Callable[[Body], Body]:
    """Declares a check for each of *cases*: ``prefix`` with the key, and the value as the second argument.

    A ``{}`` in *title* stands for the key.
    """

    def take(body: Body) -> Body:
        family = title.format("…")
        for key, value in cases.items():
            case = Check(prefix + key, title.format(key), source, says, body, {"case": value}, fresh, family)
            declare(case)
        return body

    return take


def ensure(condition: object, text: str) -> None:
    """Raises a ``Violation`` that says *text*, unless *condition* holds."""
    if not condition:
        raise Violation(text)
