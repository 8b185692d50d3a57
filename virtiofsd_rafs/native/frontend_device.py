"""The test front-end below FUSE: virtqueues and the message sequences of VMMs.

Every step can be taken alone, in any order and malformed (``frontend_link``), as conformance tests need;
``realize``, ``driver_ok``, ``stop``, ``resume``, ``reset`` take them as a VMM does (``frontend_vmm``; QEMU 10
unless told otherwise). The rings are played by native code, which checks whatever the back-end does to them:
see ``faults``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.native._lib import ffi, lib
from virtiofsd_rafs.native.frontend_link import (
    PAYLOAD_MAX,
    Link,
    MappedRegion,
    MiB,
    QueueInfo,
    Region,
    checked,
    milliseconds,
    pc_layout,
)
from virtiofsd_rafs.native.frontend_vmm import QEMU_10, Vmm
from virtiofsd_rafs.native.vhost_user import Virtio

if TYPE_CHECKING:
    from collections.abc import Sequence


DESC_WRITE = 1
"""The device writes the buffer."""
DESC_TABLE = 2
"""The buffer is an indirect table of descriptors."""


@attrs.frozen
class Layout:
    """How requests are cut into descriptors, chained or through an indirect table.

    ``linux``: headers, arguments, one per page of the answer. ``compact``: one readable, one writable.
    ``pieces``: of at most *pieces* bytes.
    """

    framing: str = "linux"
    indirect: bool = True
    pieces: int = 0

    def word(self) -> int:
        """The layout as native code wants it."""
        kinds = {"linux": 0, "compact": 1, "pieces": 2}
        return kinds[self.framing] | (4 if self.indirect else 0) | self.pieces << 32


@attrs.frozen
class Token:
    """A request under way."""

    queue: int
    id: int
    unique: int
    out_size: int


@attrs.frozen
class Reply:
    """The answer to a request. ``error`` is 0 or a positive errno; ``data`` what follows the out header.

    ``length`` is the out header's own length, ``used_len`` what the used ring said; both are 0 for a request
    without reply.
    """

    error: int
    unique: int
    data: bytes
    used_len: int
    length: int
    latency_us: float


class Device(Link):
    """The front-end's half of one vhost-user connection, with its memory and queues."""

    def __init__(
        self,
        *,
        queues: int = 1,
        queue_size: int = 1024,
        memory: int = 256 * MiB,
        regions: Sequence[Region] | None = None,
        vmm: Vmm = QEMU_10,
        features: int | None = None,
        protocol_features: int | None = None,
        layout: Layout | None = None,
        reuse_newest: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        """Maps guest memory; nothing is sent.

        Args:
            queues: Request queues, beside the hiprio queue.
            queue_size: Entries per queue, a power of two.
            memory: Bytes of guest memory, laid out as in a PC, when *regions* does not say otherwise.
            vmm: In whose order messages are sent.
            features: Virtio features to take of those offered, instead of the VMM's.
            protocol_features: vhost-user protocol features to take of those offered, instead of the VMM's.
            layout: How requests are cut into descriptors.
            reuse_newest: Take the descriptor freed last, as Linux does, not the one freed first.
            timeout_s: For every wait that is not given its own.
        """
        super().__init__(pc_layout(memory) if regions is None else regions, timeout_s)
        self.n_queues = queues + 1
        self.queue_size = queue_size
        self.vmm = vmm
        self.acks = vmm.acks
        self.wanted_features = int(vmm.features if features is None else features)
        self.wanted_protocol = int(vmm.protocol if protocol_features is None else protocol_features)
        self.layout = layout or Layout(indirect=bool(self.wanted_features & Virtio.INDIRECT_DESC))
        self.reuse_newest = reuse_newest
        self.offered = 0
        """Virtio features that the back-end has; known after ``realize``."""
        self.features = 0
        """Virtio features that both sides have; known after ``realize``."""
        self._queue_fds: dict[int, tuple[int, int]] = {}
        self._unique = 2

    # --- the VMM's sequences ------------------------------------------------------------------------------

    def realize(self) -> None:
        """Creates the device."""
        self.vmm.realize(self)

    def driver_ok(self) -> None:
        """What a guest's driver makes the VMM send when it starts the device, with empty rings."""
        self.vmm.driver_ok(self)

    def start(self) -> None:
        """Creates the device and starts the driver, as a VM's boot does."""
        self.realize()
        self.driver_ok()

    def stop(self, timeout_s: float | None = None) -> list[int]:
        """Pauses the VM; returns the bases from which the rings go on, if the VMM asks for them.

        From the last reply on, any write by the back-end into rings or buffers in flight is a fault, which is
        noticed by ``resume``, ``reset`` and ``check``. Load loops wait meanwhile.
        """
        self._pause_queues()
        return self.vmm.stop(self, timeout_s)

    def resume(self, bases: Sequence[int]) -> None:
        """Lets the VM go on with its rings as they are; *bases* are those of ``stop``."""
        for queue in range(self.n_queues):
            self.thaw(queue)
        self.vmm.resume(self, bases)
        for queue in range(self.n_queues):
            self.go_on(queue)

    def reset(self) -> None:
        """Resets the device and boots the guest anew.

        Requests in flight are lost (``RequestLost``); writes into their buffers from now on are faults.
        """
        self._pause_queues()
        self.vmm.reset(self)

    def reconnect(self, where: str | os.PathLike[str]) -> None:
        """Goes on with another back-end at the socket *where*, as a VMM does that has lost the one before.

        Raises:
            PeerError: this VMM does not do that.
        """
        self.attach(where)
        self.vmm.reconnect(self)

    def _pause_queues(self) -> None:
        for queue in range(self.n_queues):
            self._control(queue, lib.VR_FRONTEND_PAUSE)

    def freeze(self, queue: int) -> None:
        """From now on nothing may change in the queue's used ring and the buffers in flight."""
        self._control(queue, lib.VR_FRONTEND_FREEZE)

    def thaw(self, queue: int) -> None:
        """Ends what ``freeze`` began: the back-end may write again."""
        self._control(queue, lib.VR_FRONTEND_THAW)

    def go_on(self, queue: int) -> None:
        """Submits to and takes from the queue again, after ``stop``."""
        self._control(queue, lib.VR_FRONTEND_RESUME)

    def spare_fd(self) -> int:
        """An eventfd that nobody listens to."""
        self._own_fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._own_fds[-1]

    def make_empty_rings(self) -> None:
        """Lays out all queues, in place of those of an earlier driver."""
        for queue in range(self.n_queues):
            if queue in self._queue_fds:
                self._control(queue, lib.VR_FRONTEND_RESET, 0)
            else:
                self.make_queue(queue)

    def make_queue(self, queue: int, *, size: int | None = None, base: int = 0) -> QueueInfo:
        """Lays out an empty ring in guest memory, in place of an earlier one."""
        flags = lib.VR_FRONTEND_EVENT_IDX if self.features_of_rings() & Virtio.EVENT_IDX else 0
        flags |= lib.VR_FRONTEND_REUSE_NEWEST if self.reuse_newest else 0
        out = ffi.new("uint64_t[8]")
        wanted = self.queue_size if size is None else size
        checked(lib.vr_frontend_queue_new(self._handle, queue, wanted, flags, self.layout.word(), base, out))
        self._queue_fds[queue] = (int(out[6]), int(out[7]))
        return self.queue_info(queue)

    def features_of_rings(self) -> int:
        """What the driver takes of what is offered."""
        return self.offered & self.wanted_features

    def kick_fd(self, queue: int) -> int:
        return self._queue_fds[queue][0]

    # --- memory -------------------------------------------------------------------------------------------

    def add_region(self, region: Region) -> MappedRegion:
        """Maps another region; the back-end is told if the device has been started."""
        self._map(region, {})
        mapped = next(r for r in self.regions if r.gpa == region.gpa)
        if self.told_regions:
            self.vmm.tell_memory(self)
        return mapped

    def remove_region(self, gpa: int) -> None:
        """Takes a region away, from the back-end first. Nothing in it may be in use."""
        self.regions = [r for r in self.regions if r.gpa != gpa]
        if self.told_regions:
            self.vmm.tell_memory(self)
        checked(lib.vr_frontend_region_remove(self._handle, gpa))

    def alloc(self, size: int, *, align: int = 8, region: int | None = None, at: int | None = None) -> int:
        """The address of new guest memory, from the region that begins at *region* or exactly *at*."""
        where = (-1 if region is None else region, -1 if at is None else at)
        return checked(lib.vr_frontend_alloc(self._handle, size, align, *where))

    def dealloc(self, gpa: int) -> None:
        checked(lib.vr_frontend_dealloc(self._handle, gpa))

    def write_memory(self, gpa: int, data: bytes) -> None:
        checked(lib.vr_frontend_write(self._handle, gpa, data, len(data)))

    def read_memory(self, gpa: int, size: int) -> bytes:
        buf = ffi.new("uint8_t[]", size)
        checked(lib.vr_frontend_read(self._handle, gpa, buf, size))
        return bytes(ffi.buffer(buf, size))

    # --- queues -------------------------------------------------------------------------------------------

    def _control(self, queue: int, what: int, value: int = 0) -> None:
        checked(lib.vr_frontend_queue_control(self._handle, queue, what, value))

    def kick(self, queue: int) -> None:
        """Signals the queue's kick eventfd, needed or not."""
        self._control(queue, lib.VR_FRONTEND_KICK)

    def submit(
        self,
        request: bytes,
        out_size: int | None,
        *,
        queue: int = 1,
        layout: Layout | None = None,
        region: int | None = None,
        timeout_s: float | None = None,
    ) -> Token:
        """Submits a request that begins with a FUSE in header and kicks if the back-end wants that.

        The reply has room for the out header and *out_size* bytes; with ``None`` there is no writable buffer.
        Waits for free descriptors.

        Raises:
            RingFull: none became free in time.
        """
        room = 0 if out_size is None else 16 + out_size
        word = (layout or self.layout).word()
        wait = milliseconds(self.timeout_s if timeout_s is None else timeout_s)
        where = -1 if region is None else region
        token = checked(
            lib.vr_frontend_submit(self._handle, queue, request, len(request), room, word, where, wait)
        )
        unique = int.from_bytes(request[8:16], "little")
        return Token(queue, token, unique, out_size or 0)

    def submit_raw(
        self, descriptors: Sequence[tuple[int, int, int]], *, queue: int = 1, indirect: bool = False
    ) -> Token:
        """Submits a chain of (guest-physical address, length, flags), well-formed or not.

        Flags are ``DESC_WRITE`` (or ``True``) and ``DESC_TABLE`` for a descriptor that refers to an indirect
        table. All memory is the caller's. Only that it completes once is checked.
        """
        words = ffi.new("uint64_t[]", [int(x) for d in descriptors for x in d])
        token = checked(lib.vr_frontend_submit_raw(self._handle, queue, words, len(descriptors), indirect))
        return Token(queue, token, 0, 0)

    def wait(self, token: Token, timeout_s: float | None = None) -> Reply:
        """The answer to a request, which is forgotten then.

        Raises:
            FrontendTimeout: it is still under way.
            RequestLost: the queue was reset meanwhile.
            PeerError: the back-end closed the connection.
        """
        out = ffi.new("int64_t[6]")
        wait = milliseconds(self.timeout_s if timeout_s is None else timeout_s)
        checked(lib.vr_frontend_wait(self._handle, token.queue, token.id, wait, out))
        used, has_header, error, unique, length, latency_ns = (int(x) for x in out)
        # A back-end that completes with used length 0 is at fault, but its reply can be read.
        written = used if used >= 16 else length
        size = max(0, min(written - 16, token.out_size)) if has_header else 0
        buf = ffi.new("uint8_t[]", max(size, 1))
        checked(lib.vr_frontend_take(self._handle, token.queue, token.id, buf, size))
        data = bytes(ffi.buffer(buf, size))
        return Reply(-error, unique & (2**64 - 1), data, used, length, latency_ns / 1000)

    def poll(self, queue: int = 1, timeout_s: float = 0.0) -> set[int]:
        """Ids of tokens that are answered and not yet waited for; waits up to *timeout_s* for the first."""
        tokens = ffi.new("uint64_t[]", 4096)
        n = checked(
            lib.vr_frontend_completed(self._handle, queue, milliseconds(timeout_s), tokens, len(tokens))
        )
        return {int(tokens[i]) for i in range(n)}

    def next_unique(self) -> int:
        """A number for a request's ``unique``: even, as the kernel's are."""
        self._unique += 2
        return self._unique

    # --- faults -------------------------------------------------------------------------------------------

    def check(self) -> dict[str, int]:
        """Looks at all completed buffers and stopped rings for late writes; returns ``faults()``."""
        for queue in self._queue_fds:
            self._control(queue, lib.VR_FRONTEND_CHECK)
        return self.faults()

    def faults(self, *, clear: bool = False) -> dict[str, int]:
        """What the back-end did wrong so far: kind → count, without zeros."""
        return {name: n for name, n in zip(_fault_names(), self._faults(clear)[0], strict=True) if n}

    def fault_texts(self) -> list[str]:
        """Descriptions of the first faults."""
        return self._faults(False)[1]

    def _faults(self, clear: bool) -> tuple[list[int], list[str]]:
        n = len(_fault_names())
        counts = ffi.new("uint64_t[]", n)
        buf = ffi.new("uint8_t[]", PAYLOAD_MAX)
        size = checked(lib.vr_frontend_faults(self._handle, clear, counts, n, buf, PAYLOAD_MAX))
        text = bytes(ffi.buffer(buf, min(size, PAYLOAD_MAX))).decode(errors="replace")
        return [int(c) for c in counts], text.splitlines()


def _fault_names() -> list[str]:
    buf = ffi.new("uint8_t[]", 1024)
    return bytes(ffi.buffer(buf, checked(lib.vr_frontend_fault_names(buf, 1024)))).decode().split("\n")
