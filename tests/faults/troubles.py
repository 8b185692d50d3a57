"""The troubles of the matrix: what happens to a registry, and what it may cost."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.conftest import World
    from tests.faults.image import Folder

KINDS = ("simulator", "registry")

Hit = tuple[str, dict[str, Any]]
"""A fault and its parameters."""


@attrs.frozen
class Trouble:
    """Something that goes wrong, and can be cured by trying again."""

    name: str
    hits: tuple[Hit, ...] = ()
    """What meets a cell's requests for content: each once, or ``times``, and two requests apart."""
    always: tuple[Hit, ...] = ()
    """What meets all requests, from before the daemon starts."""
    link: dict[str, float] = attrs.Factory(dict)
    """How slow the link is."""
    options: tuple[str, ...] = ()
    auth: bool = False
    """The registry asks for tokens."""
    where: str = "blob"
    """Which requests are met: those to the registry, or those to its object store."""
    on_cell: Callable[[World], None] | None = None
    habit: bool = False
    """The daemon learns from it how the server is, so each cell needs a daemon that does not know yet."""

    def begin(self, world: World) -> None:
        """From now on, for all cells."""
        for name, value in self.link.items():
            setattr(world.link, name, value)
        for name, parameters in self.always:
            world.fault(name, **parameters)

    def meet(self, world: World, folder: Folder) -> list[Any]:
        """For the cell of *folder*; the faults, which all have to be met."""
        faults = []
        for number, (name, parameters) in enumerate(self.hits):
            options = {"times": 1, "skip": 2 * number, **parameters}
            faults.append(world.fault(name, where=self.where, span=folder.span, **options))
        if self.on_cell is not None:
            self.on_cell(world)
        return faults


def away(seconds: float) -> Callable[[World], None]:
    """The registry refuses connections from now on, and is back in *seconds*."""

    def act(world: World) -> None:
        world.refuse()
        threading.Timer(seconds, world.accept).start()

    return act


# What a server that answers nothing may cost is a part of the deadline, so that is short where one does.
_SHORT = ("--io-deadline", "6")

TROUBLES = (
    Trouble("latency", link={"latency_s": 0.01}),
    Trouble("bandwidth", link={"bandwidth": 1e6}),
    Trouble(
        "cut",
        hits=tuple(("cut", {"after_bytes": n}) for n in (0, 1, 1000, -1)),
    ),
    Trouble("5xx", hits=tuple(("status", {"code": code}) for code in (500, 502, 503, 504))),
    Trouble("429", hits=(("throttle", {"retry_after": 1, "times": 2}),)),
    Trouble("token-expiry", hits=(("expire-tokens", {"times": 3}),), auth=True),
    Trouble("signed-url", always=(("redirect", {"where": "blob", "uses": 4}),)),
    Trouble("head-403", always=(("head-403", {}),)),
    Trouble("200-for-206", hits=(("ignore-range", {}),), habit=True),  # for good: test_ranges_ignored.py
    Trouble(
        "length",
        hits=(
            ("short-body", {}),
            ("long-body", {}),
            ("wrong-range", {}),
            ("no-content-range", {}),
        ),
    ),
    Trouble("416", hits=(("416", {"times": 2}),)),
    Trouble("corrupt-once", hits=(("corrupt", {"times": 2}), ("corrupt", {"at": 0}))),
    Trouble("slow-loris", hits=(("slow-loris", {"interval": 0.2}),), options=_SHORT),
    Trouble("stall", hits=(("stall", {}), ("hold", {})), options=_SHORT),
    Trouble("reset", hits=(("reset", {"times": 3}),)),
    Trouble("refused", on_cell=away(0.4)),
)
