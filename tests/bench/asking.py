"""Asks the APIs of daemons at a steady pace, beside a process that does nothing but answer.

On a machine whose processors are all busy every process waits for its turn. What the daemons' answers take is
to be held against what two idle answerers and the asker itself (*lag*) take at the same moment: *control*
runs as any process does, *control first* with the preference of a daemon's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from tests.bench.figures import percentile, print_table
from virtiofsd_rafs.runtime.scheduling import loop_first

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnContext
    from pathlib import Path

T = TypeVar("T")
PATHS = ("/api/v1/daemon", "/api/v1/status")
Samples = dict[str, list[float]]
"""Milliseconds by what was asked: a path, ``control``, ``control first`` or ``lag``."""

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


async def _ask(socket: Path, path: str, samples: list[float], due: float) -> None:
    """One question; the time counts from when it was due."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        body = await reader.read()
        if not body.startswith(b"HTTP/1.1 200"):
            raise OSError(f"{socket}: {body[:40]!r}")
        while await reader.read():
            pass
        samples.append(1000 * (time.monotonic() - due))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _control(socket: Path) -> None:
    """Answers every question with nothing, for ever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_ANSWER)
        writer.close()

    server = await asyncio.start_unix_server(answer, str(socket))
    await server.serve_forever()


def _run_control(socket: Path, first: bool) -> None:
    if first:
        loop_first()
    asyncio.run(_control(socket))


def _run_asker(sockets: Sequence[Path], controls: Mapping[str, Path], pace: float, pipe: Connection) -> None:
    # What is measured are the daemons: an answer counts when it is there, not when who asks gets a processor.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    asyncio.run(_keep_asking(sockets, controls, pace, pipe))


async def _keep_asking(
    sockets: Sequence[Path], controls: Mapping[str, Path], pace: float, pipe: Connection
) -> None:
    """Between two words from *pipe* all answers belong to one phase, which is sent back at its end."""
    samples: Samples = {}
    tasks: set[asyncio.Task[None]] = set()
    # In turn: a phase of the load lasts no longer than one round of all sockets.
    pairs = itertools.cycle(
        [(socket, PATHS[(i + k) % len(PATHS)]) for k in range(len(PATHS)) for i, socket in enumerate(sockets)]
    )
    due = time.monotonic()
    while True:
        due += 1 / pace
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if pipe.poll():
            word = pipe.recv()
            await asyncio.gather(*tasks)
            pipe.send(samples)
            if word == "end":
                return
            samples = {}
            due = time.monotonic()
            continue
        samples.setdefault("lag", []).append(1000 * (time.monotonic() - due))
        socket, path = next(pairs)
        questions = [(socket, path, path), *((where, "/", name) for name, where in controls.items())]
        for where, what, name in questions:
            task = asyncio.create_task(_ask(where, what, samples.setdefault(name, []), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


class Asker:
    """The processes; a context manager that ends them."""

    def __init__(self, context: SpawnContext, sockets: Sequence[Path], folder: Path, pace: float) -> None:
        self._pipe, theirs = context.Pipe()
        controls = {"control": folder / "control.sock", "control first": folder / "first.sock"}
        self._processes = [
            context.Process(target=_run_control, args=(socket, name != "control"), daemon=True)
            for name, socket in controls.items()
        ]
        for process in self._processes:
            process.start()
        while not all(socket.exists() for socket in controls.values()):
            time.sleep(0.01)
        arguments = (list(sockets), controls, pace, theirs)
        asker = context.Process(target=_run_asker, args=arguments, daemon=True)
        asker.start()
        self._processes.append(asker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()

    def _phase(self) -> Samples:
        self._pipe.send("next")
        samples: Samples = self._pipe.recv()
        return samples

    def measure_for(self, seconds: float) -> Samples:
        """All answers of so many seconds."""
        return self.measure_until(lambda: time.sleep(seconds))[0]

    def measure_until(self, ended: Callable[[], T]) -> tuple[Samples, T]:
        """All answers until *ended* returns, and what it returned."""
        self._phase()
        result = ended()
        return self._phase(), result


def report(phases: Mapping[str, Samples]) -> None:
    """A row for each phase and question."""
    rows: list[list[Any]] = []
    for phase, samples in phases.items():
        for name, times in sorted(samples.items()):
            cells = [percentile(times, share) for share in (0.5, 0.9, 0.99, 1.0)]
            rows.append([phase, name, len(times), *cells])
    click.echo()
    print_table(["while", "answer of", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"], rows)
