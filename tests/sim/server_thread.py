"""The life of a server that a test drives: it runs in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

# A guard against hanging.
_GUARD_S = 30


class ServerThread:
    """A server as a context manager. Subclasses listen.

    Args:
        port: where it listens on loopback; 0: any port, which is kept then.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def host(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """Closes all connections and refuses new ones until ``accept``."""
        self._run(self._refuse())

    def accept(self) -> None:
        """Listens again, at the same address."""
        self._run(self._listen())

    def _run(self, work: Coroutine[object, object, T]) -> T:
        """The result of *work*, which runs in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_GUARD_S)

    def _release(self) -> None:
        """Lets everything go that is held back; before the end."""

    async def _start(self) -> None:
        """Makes what is needed, and listens."""
        await self._listen()

    async def _listen(self) -> None:
        """Takes connections from now on; sets ``port``."""
        raise AssertionError("a subclass listens")

    async def _refuse(self) -> None:
        """Ends all connections, and takes no more."""
        raise AssertionError("a subclass refuses")

    async def _stop(self) -> None:
        """Ends everything."""
        await self._refuse()
