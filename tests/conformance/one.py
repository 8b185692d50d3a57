"""One check in a process of its own, so that a check that hangs or breaks takes nothing with it.

Speaks JSON lines: ``{"stall": true}`` asks for data to be held back, and is answered by an empty line; the
last line is the verdict.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tests.conformance.catalogue import all_checks
from tests.conformance.subject import Subject
from tests.conformance.tree import load_tree
from tests.conformance.verdict import judge
from virtiofsd_rafs.native.frontend import Frontend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Remote(Subject):
    """A back-end that somebody else started; what they can do is asked of them."""

    def __init__(self, socket: Path, tree: Path, timeout_s: float, can_stall: bool) -> None:
        self.tree = load_tree(tree)
        self.timeout_s = timeout_s
        self._socket = socket
        self._can_stall = can_stall

    def connect(self, **options: Any) -> Frontend:
        return Frontend.connect(self._socket, **options)

    def check_alive(self) -> None:
        """Who started it looks after it."""

    @contextmanager
    def stall(self) -> Iterator[Callable[[], None]]:
        if not self._can_stall:
            with super().stall() as release:
                yield release
            return
        self._ask(True)
        try:
            yield lambda: self._ask(False)
        finally:
            self._ask(False)

    @staticmethod
    def _ask(stall: bool) -> None:
        print(json.dumps({"stall": stall}), flush=True)
        sys.stdin.readline()


def main(arguments: list[str]) -> None:
    name, socket, tree, timeout_s, can_stall = arguments
    check = next(check for check in all_checks() if check.id == name)
    subject = Remote(Path(socket), Path(tree), float(timeout_s), can_stall == "1")
    verdict = judge(check, subject)
    print(json.dumps(attrs.asdict(verdict)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
