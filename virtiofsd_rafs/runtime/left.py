"""Wants for chunks that other daemons on the same cache directory say that they are fetching. No I/O and no
clock.

Workers are woken by others when such a chunk has come (:mod:`~virtiofsd_rafs.runtime.watching`). Here that is
noted when something else is to be done, or a little later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from virtiofsd_rafs.runtime.layout import Chunks, Key
    from virtiofsd_rafs.runtime.wants import Want

# For so long a chunk is left to another daemon.
LEFT_S = 1.0
# So late it is noted that one has come, at most: what runs in the background waits for those that somebody
# waits for.
LEFT_LOOK_S = 0.25
# After one that did not come, for so long nothing is left to others.
LEFT_MISTRUST_S = 30.0


class Left:
    """The wants, all of which are looked at together.

    Args:
        blobs: states of all chunks.
    """

    def __init__(self, blobs: Mapping[int, Chunks]) -> None:
        self._blobs = blobs
        self._wants: dict[Key, Want] = {}
        self._next_look = float("inf")
        self._mistrust_until = float("-inf")
        self.version = 0
        """Another number for each set of wants, never below 1 once there was one."""

    def __contains__(self, key: Key) -> bool:
        return key in self._wants

    def __len__(self) -> int:
        return len(self._wants)

    @property
    def wants(self) -> Collection[Want]:
        """All of them."""
        return self._wants.values()

    @property
    def keys(self) -> Collection[Key]:
        """Their chunks."""
        return self._wants.keys()

    @property
    def next_look(self) -> float:
        """When to look, if nothing happens before; infinity when there is nothing to look at."""
        return self._next_look

    def get(self, key: Key) -> Want | None:
        """The want for chunk *key*, if it is here."""
        return self._wants.get(key)

    def may_take(self, want: Want, now: float) -> bool:
        """Whether another daemon fetches what is wanted, and it is too early to mistrust that."""
        if want.attempts or now < self._mistrust_until or not self._blobs[want.key[0]].hinted(want.key[1]):
            return False
        if want.left_since is None:
            want.left_since = now
        if now - want.left_since >= LEFT_S:
            self._mistrust_until = now + LEFT_MISTRUST_S
            return False
        return True

    def put(self, want: Want, now: float) -> None:
        """Takes *want* in, for which :meth:`may_take` is true."""
        self._wants[want.key] = want
        self.version += 1
        self._look_by(want, now)

    def look(self, now: float) -> list[Want]:
        """Gives those back of which something is to be told: there, given up, or it took too long."""
        if not self._wants:
            return []
        self._next_look = float("inf")
        back = []
        for key, want in self._wants.items():
            ready = self._blobs[key[0]].ready(key[1])
            if ready or want.deadline <= now or not self.may_take(want, now):
                back.append(want)
            else:
                self._look_by(want, now)
        for want in back:
            del self._wants[want.key]
        self.version += bool(back)
        return back

    def _look_by(self, want: Want, now: float) -> None:
        since = now if want.left_since is None else want.left_since
        self._next_look = min(self._next_look, now + LEFT_LOOK_S, since + LEFT_S, want.deadline)
