"""How the scripts tell what they are doing: one changing line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Writes steps with the seconds since the start. Not thread-safe: lines come from one thread."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._tty = stream.isatty()
        self._start = time.monotonic()
        self._pending = False
        self._last = 0.0

    def _stamp(self) -> str:
        return f"[{time.monotonic() - self._start:6.1f} s] "

    def _wipe(self) -> None:
        if self._pending:
            self._stream.write("\r\x1b[K")
            self._pending = False

    def step(self, text: str) -> None:
        """A line that stays."""
        self._wipe()
        self._stream.write(self._stamp() + text + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """What is going on right now: replaced by the next one on a terminal, at most every 5 s elsewhere."""
        now = time.monotonic()
        if self._tty:
            self._wipe()
            self._stream.write(self._stamp() + text)
            self._pending = True
        elif now - self._last > 5:
            self._stream.write(self._stamp() + text + "\n")
            self._last = now
        else:
            return
        self._stream.flush()

    def plain(self, text: str = "") -> None:
        """Text without a time."""
        self._wipe()
        self._stream.write(text + "\n")
        self._stream.flush()
