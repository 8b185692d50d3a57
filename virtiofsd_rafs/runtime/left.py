"""Wants for chunks that other daemons on the same cache directory say that they are fetching.

They are looked at again and again, at little cost: dozens of daemons may wait for the same bytes. No I/O and
no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from virtiofsd_rafs.runtime.layout import Chunks, Key
    from virtiofsd_rafs.runtime.wants import Want

# For so long a chunk is left to another daemon. It is looked at first after the smaller of these pauses, then
# after half the time that has passed, at most after the larger.
LEFT_S = 1.0
LEFT_LOOK_S = (0.01, 0.1)
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

    def __contains__(self, key: Key) -> bool:
        return key in self._wants

    def __len__(self) -> int:
        return len(self._wants)

    @property
    def wants(self) -> Collection[Want]:
        """All of them."""
        return self._wants.values()

    @property
    def next_look(self) -> float:
        """When to look again; infinity when there is nothing to look at."""
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
        self._look_by(want, now)

    def look(self, now: float) -> list[Want]:
        """Gives those back of which something is to be told: there, given up, or it took too long."""
        if now < self._next_look:
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
        return back

    def _look_by(self, want: Want, now: float) -> None:
        waited = 0.0 if want.left_since is None else now - want.left_since
        self._next_look = min(self._next_look, now + min(max(waited / 2, LEFT_LOOK_S[0]), LEFT_LOOK_S[1]))
