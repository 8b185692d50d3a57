"""All checks: importing their modules declares them, in the order of the documentation."""

from __future__ import annotations

from tests.conformance import (
    events,  # noqa: F401
    features,  # noqa: F401
    framing,  # noqa: F401
    memory,  # noqa: F401
    messages,  # noqa: F401  (imports are declarations here)
    opcodes,  # noqa: F401
    pauses,  # noqa: F401
    replies,  # noqa: F401
    rings,  # noqa: F401
    sessions,  # noqa: F401
    vmms,  # noqa: F401
)
from tests.conformance.check import CHECKS, Check

AREAS = {
    "msg": "vhost-user messages",
    "vmm": "VMMs' message orders",
    "feature": "Feature subsets",
    "ring": "Rings: sizes, disabled, stopped",
    "wrap": "Wrap-around of indices",
    "event": "Notifications",
    "frame": "Descriptors",
    "pause": "Pauses, restarts, descriptors swapped",
    "memory": "Memory tables",
    "reset": "Reset",
    "connect": "Connections",
    "init": "FUSE_INIT and versions",
    "reply": "Replies",
    "opcode": "FUSE operations",
    "opcode-short": "FUSE operations cut short",
}


def all_checks() -> list[Check]:
    """Every check, in the order of its area and of its declaration.

    Raises:
        ValueError: an area has no title.
    """
    order = list(AREAS)
    return sorted(CHECKS.values(), key=lambda check: order.index(check.area))
