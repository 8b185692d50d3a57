"""The back-end that is judged, and a VM on it as checks use it."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.conformance.check import NotOffered, Violation, ensure
from virtiofsd_rafs.errors import PeerError
from virtiofsd_rafs.fuse import ROOT_ID, Opcode
from virtiofsd_rafs.fuse.structs import ReadIn
from virtiofsd_rafs.native.frontend import Frontend, FrontendTimeout, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.conformance.tree import Tree
    from virtiofsd_rafs.native.frontend_device import Layout, Reply, Token

SETTLE_S = 0.15
"""How long something that must not happen is waited for."""

Read = tuple["Token", bytes]
"""A READ under way, and what it must bring."""


class Subject(ABC):
    """A running back-end."""

    name: str
    tree: Tree
    timeout_s: float = 5.0
    """Whatever takes longer hangs."""

    @abstractmethod
    def connect(self, **options: Any) -> Frontend:
        """A connected front-end, to which nothing has been said; *options* as for ``Frontend``."""

    @abstractmethod
    def check_alive(self) -> None:
        """Raises a ``Violation`` when the back-end has died."""

    def stall(self) -> AbstractContextManager[Callable[[], None]]:
        """Data that are not cached do not come until the context is left, or the function given is called.

        Raises:
            NotOffered: the back-end has its data at hand always.
        """
        raise NotOffered("its data cannot be held back")

    @contextmanager
    def vm(
        self, *, start: bool = True, init: bool = True, strict: bool = False, **options: Any
    ) -> Iterator[Vm]:
        """A VM on the back-end, booted as far as *start* and *init* say.

        At the end what it did with rings and buffers is looked at. Wrong used lengths count only when
        *strict*: a back-end that reports none at all would fail every check, and it is judged by checks of
        its own for that.

        Raises:
            Violation: it wrote where it must not, or completed what was not in flight.
        """
        options.setdefault("memory", 32 << 20)
        with self.connect(timeout_s=self.timeout_s, **options) as fe:
            vm = Vm(self, fe)
            if start:
                vm.start()
            if init:
                fe.init()
            yield vm
            vm.check_faults(strict=strict)
        self.check_alive()


class Vm:
    """A front-end and what checks ask of it again and again."""

    def __init__(self, subject: Subject, fe: Frontend) -> None:
        self.subject = subject
        self.tree = subject.tree
        self.fe = fe
        self.rng = random.Random(4)
        self._nodes: dict[str, int] = {}

    def start(self) -> None:
        """Boots the VM as far as its driver.

        Raises:
            NotOffered: the back-end has fewer queues than are wanted.
        """
        try:
            self.fe.start()
        except PeerError as e:
            if "queues" in str(e) or "does not offer MQ" in str(e):
                raise NotOffered(str(e)) from e
            raise

    def start_ring(self, queue: int, base: int, *, enable: bool = True) -> None:
        """Sets a stopped ring up again, all of it, as VMMs do: some back-ends drop descriptors at a stop."""
        self.fe.set_vring_num(queue, self.fe.queue_size)
        self.fe.set_vring_base(queue, base)
        self.fe.set_vring_addr(queue)
        self.fe.swap_call(queue)
        # Handed out already signalled, so that nothing in the ring is overlooked.
        self.fe.kick(queue)
        self.fe.set_vring_kick(queue, self.fe.kick_fd(queue))
        if enable:
            self.fe.set_vring_enable(queue, True)

    def plug(self, gpa: int, size: int) -> int:
        """Adds memory, of which the back-end knows when this returns; its address."""
        region = self.fe.add_region(Region(gpa=gpa, size=size))
        # A new table may go unacknowledged; this reply says that it was read.
        self.fe.get_features()
        return region.gpa

    def unplug(self, gpa: int) -> None:
        """Takes memory away again, in which nothing is under way."""
        # Completed buffers in it are looked at before they are gone.
        self.fe.check()
        self.fe.remove_region(gpa)
        self.fe.get_features()

    def node(self, name: str) -> int:
        """Node id of a file in the root."""
        if name not in self._nodes:
            self._nodes[name] = self.fe.lookup(ROOT_ID, name).nodeid
            ensure(self._nodes[name], f"{name} is not there")
        return self._nodes[name]

    def forget_nodes(self) -> None:
        """Another FUSE session: node ids mean nothing any more."""
        self._nodes.clear()

    def handle(self, name: str) -> int:
        """A handle for reading a file, 0 where none is needed."""
        return self.fe.open(self.node(name))

    def read(
        self,
        name: str,
        offset: int = 0,
        size: int = 4096,
        *,
        queue: int = 1,
        layout: Layout | None = None,
        region: int | None = None,
        fh: int | None = None,
    ) -> Read:
        """A READ on its way."""
        handle = self.handle(name) if fh is None else fh
        args = ReadIn(fh=handle, offset=offset, size=size).pack()
        token = self.fe.request(
            Opcode.READ, self.node(name), args, size, queue=queue, layout=layout, region=region
        )
        return token, self.tree.files[name][offset : offset + size]

    def reads(self, n: int, *, queue: int = 1, sizes: tuple[int, ...] = (512, 4096, 16384)) -> list[Read]:
        """*n* READs at random places of files that any check may read."""
        names = [self.rng.choice(self.tree.small) for _ in range(n)]
        handles = {name: self.handle(name) for name in dict.fromkeys(names)}
        found = []
        for name in names:
            offset = self.rng.randrange(len(self.tree.files[name]))
            found.append(self.read(name, offset, self.rng.choice(sizes), queue=queue, fh=handles[name]))
        return found

    def cold_reads(self, n: int, *, queue: int = 1) -> list[Read]:
        """*n* READs of files that nobody has read before."""
        names = self.tree.cold[:n]
        handles = [self.handle(name) for name in names]
        return [
            self.read(name, 0, 32768, queue=queue, fh=fh) for name, fh in zip(names, handles, strict=True)
        ]

    def collect(self, reads: list[Read]) -> None:
        """Waits for READs; each must bring the right bytes."""
        for token, want in reads:
            self.expect(self.fe.wait(token), want)

    @staticmethod
    def expect(reply: Reply, want: bytes) -> None:
        ensure(not reply.error, f"a READ failed with errno {reply.error}")
        ensure(
            reply.data == want, f"a READ brought {len(reply.data)} bytes, not the {len(want)} expected ones"
        )

    def serves(self, *, queue: int = 1) -> None:
        """Whether a lookup, an open, attributes and data come as they should, over *queue*."""
        name = self.rng.choice(self.tree.small)
        entry = self.fe.lookup(ROOT_ID, name, queue=queue)
        ensure(entry.nodeid, f"{name} is not there")
        size = self.fe.getattr(entry.nodeid, queue=queue).size
        ensure(size == len(self.tree.files[name]), f"{name} has {size} bytes, says the back-end")
        self._nodes[name] = entry.nodeid
        self.collect([self.read(name, 0, 4096, queue=queue)])

    @contextmanager
    def stall(self) -> Iterator[Callable[[], None]]:
        """As the subject's; files that any check may read are read before, and do not wait."""
        self.collect([self.read(name, 0, 65536) for name in self.tree.small])
        with self.subject.stall() as release:
            yield release

    def unanswered(self, reads: list[Read], settle_s: float = SETTLE_S) -> list[Read]:
        """Those that have no answer after a while."""
        time.sleep(settle_s)
        queues = {token.queue for token, _ in reads}
        done = {(queue, token) for queue in queues for token in self.fe.poll(queue)}
        return [read for read in reads if (read[0].queue, read[0].id) not in done]

    def check_faults(self, *, strict: bool = False) -> None:
        """What the back-end did wrong with rings and buffers since the last look.

        Raises:
            Violation: there is something.
        """
        self.fe.check()
        texts = self.fe.fault_texts()
        faults = self.fe.faults(clear=True)
        if not strict:
            faults.pop("used_length", None)
            texts = [text for text in texts if not text.startswith("used_length:")]
        if faults:
            raise Violation(f"{', '.join(f'{n} {kind}' for kind, n in faults.items())}: {texts[0]}")


def hangs(error: BaseException) -> bool:
    """Whether an exception says that something did not come in time."""
    return isinstance(error, FrontendTimeout)
