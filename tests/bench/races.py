"""Starts in which the guest's first request races the messages that make its ring run."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs
import click

from guest.daemon import Daemon
from tests.bench.figures import percentile, print_table, write_json
from tests.bench.kit import contenders
from tests.bench.kit.contenders import Contender
from tests.bench.material import prepare
from tests.bench.options import json_option, nydusd_option, virtiofsd_option, work_option
from virtiofsd_rafs.errors import PeerError
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.fuse.structs import InitIn, InitOut
from virtiofsd_rafs.native.frontend import GUEST_INIT, GUEST_MINOR, Frontend, FrontendTimeout
from virtiofsd_rafs.native.frontend_vmm import CLOUD_HYPERVISOR, CROSVM, QEMU_10

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest.daemon import BackEnd
    from virtiofsd_rafs.native.frontend import Token

When = Literal["before the kick fd", "before the enable", "with the enable", "after the enable"]
WHENS: tuple[When, ...] = ("before the kick fd", "before the enable", "with the enable", "after the enable")
VMMS = (QEMU_10, CLOUD_HYPERVISOR, CROSVM)
_LATEST_S = 0.001
"""How much later than the enable message a racing request is sent, at most."""
_GONE_S = 2.0
OWN = "rafs"
HEAD = ["side", "request", "starts", "fresh", "hangs", "faults", "p50", "p99", "max"]


class Racer(Frontend):
    """A front-end whose guest sends FUSE_INIT at a chosen moment of the first ring's start."""

    when: When = "after the enable"
    later_s = 0.0
    _token: Token | None = None
    _sending: threading.Thread | None = None

    def _send(self) -> None:
        flags = int(GUEST_INIT)
        init = InitIn(7, GUEST_MINOR, 131072, flags & 0xFFFFFFFF, flags >> 32)
        self._token = self.request(Opcode.INIT, 0, init.pack(), InitOut.SIZE)

    def _send_later(self) -> None:
        time.sleep(self.later_s)
        self._send()

    def set_vring_kick(self, queue: int, fd: int | None) -> None:
        if queue == 1 and self.when == "before the kick fd":
            self._send()
        super().set_vring_kick(queue, fd)

    def set_vring_enable(self, queue: int, enable: bool) -> None:
        if queue == 1 and enable and self.when == "before the enable":
            self._send()
        if queue == 1 and enable and self.when == "with the enable":
            self._sending = threading.Thread(target=self._send_later)
            self._sending.start()
        super().set_vring_enable(queue, enable)

    def race(self, guard_s: float) -> float:
        """Starts the device; how long the request took, in seconds from when the start was over.

        Raises:
            FrontendTimeout: it was not answered.
        """
        self.start()
        begun = time.monotonic()
        if self._sending is not None:
            self._sending.join()
        if self._token is None:
            self._send()
        assert self._token is not None
        reply = self.wait(self._token, guard_s)
        if reply.error or InitOut.unpack(reply.data).major != 7:
            raise PeerError(f"FUSE_INIT was answered with {reply}")
        return time.monotonic() - begun


@attrs.frozen
class Start:
    """One start. ``answer_ms`` is ``None`` when the request was never answered."""

    side: str
    fresh: bool
    """The first connection of a process, made as soon as it listens."""
    vmm: str
    when: When
    answer_ms: float | None
    faults: int


def connect_at_once(back_end: BackEnd, racer: Racer, guard_s: float) -> None:
    """Connects the moment that somebody listens.

    Raises:
        DaemonError: the back-end has ended, or does not listen in time.
    """
    deadline = time.monotonic() + guard_s
    while True:
        try:
            racer.attach(back_end.socket)
        except OSError:
            if back_end.process.poll() is not None or time.monotonic() > deadline:
                raise back_end.failure(f"{back_end.name} does not listen") from None
        else:
            return


def one_start(name: str, back_end: BackEnd, number: int, *, fresh: bool, guard_s: float) -> Start:
    """The start with that number: the moments, and the VMMs whose orders are played, take turns."""
    vmm, when = VMMS[number // len(WHENS) % len(VMMS)], WHENS[number % len(WHENS)]
    with Racer(vmm=vmm, memory=16 << 20, timeout_s=guard_s) as racer:
        racer.when, racer.later_s = when, random.Random(number).uniform(0, _LATEST_S)
        connect_at_once(back_end, racer, guard_s)
        try:
            answer_ms = racer.race(guard_s) * 1000
        except FrontendTimeout:
            answer_ms = None
        return Start(name, fresh, vmm.name, when, answer_ms, sum(racer.check().values()))


def run(contender: Contender, starts: int, fresh: int, guard_s: float) -> list[Start]:
    """*starts* starts: the first *fresh* with a process each, the others with one that listens again.

    A process that does not, or has ended, or left a request unanswered, is followed by another.
    """
    done: list[Start] = []
    listens_again: bool | None = None
    while len(done) < starts:
        with tempfile.TemporaryDirectory(prefix="vr-") as folder, contender.start(Path(folder)) as back_end:
            first = True
            while len(done) < starts:
                done.append(one_start(contender.name, back_end, len(done), fresh=first, guard_s=guard_s))
                first = False
                if len(done) < fresh or done[-1].answer_ms is None:
                    break
                if listens_again is None:
                    listens_again = _listens_again(back_end)
                if not listens_again or back_end.process.poll() is not None:
                    break
    return done


def _listens_again(back_end: BackEnd) -> bool:
    """Whether another VM may come after the one that has just gone."""
    try:
        with Frontend.connect(back_end.socket, memory=16 << 20, timeout_s=_GONE_S) as fe:
            fe.get_features()
    except (OSError, PeerError, FrontendTimeout):
        return False
    return True


def keeping(name: str, bootstrap: Path, image: Path) -> Contender:
    """This project's daemon, which listens again when its VM has gone."""
    options = ["--blob-dir", str(image), "--no-cache", "--keep", "--log-level", "warning"]
    return Contender(name, lambda work: Daemon(str(bootstrap), work, work / "log", options))


def rows(results: Sequence[Start]) -> list[list[object]]:
    """A table with the columns ``HEAD``: counts, and answers in milliseconds."""
    found: list[list[object]] = []
    for side in dict.fromkeys(each.side for each in results):
        for when in WHENS:
            some = [each for each in results if (each.side, each.when) == (side, when)]
            answers = [each.answer_ms for each in some if each.answer_ms is not None]
            shares = [percentile(answers, share) if answers else "" for share in (0.5, 0.99, 1.0)]
            counts = [len(some), sum(each.fresh for each in some), len(some) - len(answers)]
            found.append([side, when, *counts, sum(each.faults for each in some), *shares])
    return found


@click.command()
@virtiofsd_option
@nydusd_option
@click.option("--starts", type=click.IntRange(1), default=1000, show_default=True, help="Of each side.")
@click.option(
    "--fresh",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="So many of them by a process that has just begun to listen.",
)
@click.option(
    "--guard",
    "guard_s",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="Who has not answered after so many seconds hangs.",
)
@work_option
@json_option
def races(
    virtiofsd: str | None,
    nydusd: str | None,
    starts: int,
    fresh: int,
    guard_s: float,
    work: Path,
    json_path: Path | None,
) -> None:
    """Starts whose first request races the messages that start its ring: how many are never answered.

    A front-end connects as soon as somebody listens, and its guest sends FUSE_INIT, with a kick, before the
    ring has a kick descriptor, before it is enabled, while it is (up to a millisecond after that message is
    sent), or when all is done; in the orders of QEMU, Cloud Hypervisor and crosvm. The first starts have a
    process each; the others go to one that listens again, where there is such. Answers in milliseconds after
    the start.
    """
    material = prepare(work)
    peers = contenders.find(
        material,
        work,
        own=False,
        virtiofsd_program=virtiofsd or contenders.NONE,
        nydusd_program=nydusd,
        with_floor=False,
    )
    results: list[Start] = []
    for contender in [keeping(OWN, material.bootstrap, material.image), *peers]:
        results += run(contender, starts, fresh, guard_s)
    print_table(HEAD, rows(results))
    write_json(json_path, [attrs.asdict(each) for each in results])
    if any(each.answer_ms is None or each.faults for each in results if each.side == OWN):
        raise click.ClickException("a start of the daemon hangs, or breaks rules of rings")
