"""A slow network link as a TCP proxy: ``python -m guest.slowlink PORT [--host HOST] [--rate MBIT] [--latency
MS]``.

All connections share the rate, one budget for each direction, as they share a real line. Every byte arrives
half the latency later than it could, and opening a connection costs one whole round trip. It prints the port
that it listens on as its first line and runs until it is ended. The product knows nothing of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
from typing import Self

# One read is at most this long, so that connections take turns on the link in small steps.
_STEP = 16 * 1024
# What one direction of one connection may have under way. More than any link worth
# simulating holds.
_WINDOW_STEPS = 64
# Seconds by which a connection may book the link in advance.
_AHEAD = 0.01


class Direction:
    """One direction of the link: the time at which it will have carried everything accepted so far."""

    def __init__(self, bits_per_s: float) -> None:
        self._seconds_per_byte = 8 / bits_per_s
        self._free_at = 0.0
        self.carried = 0

    def reserve(self, size: int, now: float) -> float:
        """The time at which *size* bytes that are there *now* have gone over the link."""
        self._free_at = max(self._free_at, now) + size * self._seconds_per_byte
        self.carried += size
        return self._free_at


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Direction, delay: float
) -> None:
    """Moves bytes from *reader* to *writer* until the sender closes its side; then closes the other."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WINDOW_STEPS)

    async def send() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        while True:
            data = await reader.read(_STEP)
            arrived = link.reserve(len(data), loop.time()) if data else loop.time()
            await under_way.put((arrived + delay, data))
            if not data:
                return
            # A sender that is faster than the link waits, so that the others get their turn; not to the last
            # moment, or the link would stand idle when the timer is late.
            await asyncio.sleep(max(0.0, arrived - _AHEAD - loop.time()))


class SlowLink:
    """The proxy itself, from a free port on loopback to *target* (host and port)."""

    def __init__(self, target: tuple[str, int], bits_per_s: float, latency_s: float) -> None:
        self._target = target
        self._latency = latency_s
        self._up = Direction(bits_per_s)
        self._down = Direction(bits_per_s)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The handshake of TCP and the first bytes behind it.
        ends = [writer]
        try:
            await asyncio.sleep(self._latency)
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            ends.append(far_writer)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_carry(reader, far_writer, self._up, self._latency / 2))
                tasks.create_task(_carry(far_reader, writer, self._down, self._latency / 2))
        except* (OSError, asyncio.CancelledError):
            pass  # either side went away, so does the other; or the link is being ended
        finally:
            for end in ends:
                end.transport.abort()

    async def serve(self) -> None:
        """Listens, prints the port, and goes on until cancelled."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()


class SlowLinkProcess:
    """The proxy as a process of its own, so that it takes no time from the one that uses it."""

    def __init__(
        self, target_port: int, *, host: str = "127.0.0.1", rate_mbit: float, latency_ms: float
    ) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "guest.slowlink", str(target_port), "--host", host),
                *("--rate", str(rate_mbit), "--latency", str(latency_ms)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            self.close()
            raise RuntimeError("the slow link did not start")
        self.port = int(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the proxy and with it all connections."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


async def _main(arguments: argparse.Namespace) -> None:
    task = asyncio.create_task(
        SlowLink((arguments.host, arguments.port), arguments.rate * 1e6, arguments.latency / 1e3).serve(),
        name="slow link",
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="guest.slowlink", description="A slow link to a TCP port.")
    parser.add_argument("port", type=int, help="where the link ends")
    parser.add_argument("--host", default="127.0.0.1", help="where the link ends, default %(default)s")
    parser.add_argument("--rate", type=float, default=30, metavar="MBIT", help="Mbit/s, default %(default)s")
    parser.add_argument(
        "--latency", type=float, default=20, metavar="MS", help="round trip, default %(default)s"
    )
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
