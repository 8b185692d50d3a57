"""The slow link: nothing lost, ends passed on, and as slow as it says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from guest.slowlink import Direction, SlowLinkProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(-1))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def through(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    writer.close()
    return answer


async def test_two_connections_share_the_link(echo_port: int) -> None:
    data = bytes(range(256)) * 1024
    with SlowLinkProcess(echo_port, rate_mbit=16, latency_ms=20) as link:
        start = time.monotonic()
        answers = await asyncio.gather(through(link.port, data), through(link.port, data))
        took = time.monotonic() - start
    assert answers == [data, data]
    # There and back again, 2 * 256 KiB at 16 Mbit/s, after a handshake: a faster link is a wrong one.
    assert took > 2 * 2 * len(data) * 8 / 16e6 + 0.02


async def test_a_target_that_is_gone_ends_the_connection() -> None:
    with SlowLinkProcess(1, rate_mbit=16, latency_ms=0) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        # Closed or reset: what matters is that it ends, and without a byte.
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(-1) == b""
        writer.close()


def test_link_time_adds_up() -> None:
    link = Direction(8000)
    assert link.reserve(500, 10.0) == pytest.approx(10.5)
    assert link.reserve(500, 10.1) == pytest.approx(11.0)
    assert link.reserve(1000, 20.0) == pytest.approx(21.0)
    assert link.carried == 2000
