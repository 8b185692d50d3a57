"""The test front-end below FUSE: virtqueues and QEMU's message sequences.

Every step can be taken alone, in any order and malformed (``frontend_link``), as conformance tests need;
``realize``, ``driver_ok``, ``stop``, ``resume``, ``reset`` take them as QEMU 10 does. The rings are played by
native code, which checks whatever the back-end does to them: see ``faults``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import PeerError
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
from virtiofsd_rafs.native.vhost_user import (
    GUEST_FEATURES,
    QEMU_PROTOCOL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    Protocol,
    Request,
    Virtio,
    u64_payload,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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
        features: int = GUEST_FEATURES,
        protocol_features: int = QEMU_PROTOCOL,
        layout: Layout | None = None,
        reuse_newest: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        """Maps guest memory; nothing is sent.

        Args:
            queues: Request queues, beside the hiprio queue.
            queue_size: Entries per queue, a power of two.
            memory: Bytes of guest memory, laid out as in a PC, when *regions* does not say otherwise.
            features: Virtio features to take of those offered.
            protocol_features: vhost-user protocol features to take of those offered.
            layout: How requests are cut into descriptors.
            reuse_newest: Take the descriptor freed last, as Linux does, not the one freed first.
            timeout_s: For every wait that is not given its own.
        """
        super().__init__(pc_layout(memory) if regions is None else regions, timeout_s)
        self.n_queues = queues + 1
        self.queue_size = queue_size
        self.wanted_features = int(features)
        self.wanted_protocol = int(protocol_features)
        self.layout = layout or Layout(indirect=bool(features & Virtio.INDIRECT_DESC))
        self.reuse_newest = reuse_newest
        self.features = 0
        """Virtio features that both sides have; known after ``realize``."""
        self._queue_fds: dict[int, tuple[int, int]] = {}
        self._unique = 2

    # --- QEMU's sequences ---------------------------------------------------------------------------------

    def realize(self) -> None:
        """What QEMU 10 sends when it creates the device (and resets the machine)."""
        offered = self.get_features()
        if offered & VHOST_USER_F_PROTOCOL_FEATURES:
            self.set_protocol_features(self.get_protocol_features() & Protocol(self.wanted_protocol))
        if self.protocol & Protocol.MQ:
            n = self.get_queue_num()
            if n < self.n_queues:
                raise PeerError(f"the back-end has {n} queues, {self.n_queues} are wanted")
        elif self.n_queues > 1 and self.wanted_protocol & Protocol.MQ:
            raise PeerError("the back-end has one queue only: it does not offer MQ")
        if self.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            self.get_max_mem_slots()
        if self.protocol & Protocol.BACKEND_REQ:
            self.set_backend_req_fd()
        self.set_owner()
        self.features = self.get_features() & (self.wanted_features | VHOST_USER_F_PROTOCOL_FEATURES)
        for queue in range(self.n_queues):
            self.set_vring_call(queue, self._spare_fd())
            self.set_vring_err(queue, self._spare_fd())
        self.reset_device()

    def _spare_fd(self) -> int:
        self._own_fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._own_fds[-1]

    def driver_ok(self) -> None:
        """What QEMU 10 sends while a guest's driver resets the device and starts it, with empty rings."""
        self.reset_device()
        for queue in range(self.n_queues):
            if queue in self._queue_fds:
                self._control(queue, lib.VR_FRONTEND_RESET, 0)
            else:
                self.make_queue(queue)
        self._start([0] * self.n_queues)

    def make_queue(self, queue: int, *, size: int | None = None, base: int = 0) -> QueueInfo:
        """Lays out an empty ring in guest memory, in place of an earlier one."""
        flags = lib.VR_FRONTEND_EVENT_IDX if self.features & Virtio.EVENT_IDX else 0
        flags |= lib.VR_FRONTEND_REUSE_NEWEST if self.reuse_newest else 0
        out = ffi.new("uint64_t[8]")
        wanted = self.queue_size if size is None else size
        checked(lib.vr_frontend_queue_new(self._handle, queue, wanted, flags, self.layout.word(), base, out))
        self._queue_fds[queue] = (int(out[6]), int(out[7]))
        return self.queue_info(queue)

    def kick_fd(self, queue: int) -> int:
        return self._queue_fds[queue][0]

    def _start(self, bases: Iterable[int]) -> None:
        for queue in range(self.n_queues):
            self.swap_call(queue)
        self.set_features(self.features)
        if self.protocol & Protocol.STATUS:
            self._get(Request.GET_STATUS)
            self.send_message(Request.SET_STATUS, u64_payload(8))
        self._tell_regions()
        for queue, base in enumerate(bases):
            self.set_vring_num(queue, self.queue_size)
            self.set_vring_base(queue, base)
            self.set_vring_addr(queue)
            # QEMU hands out its host notifiers already signalled, so that nothing in the ring is overlooked.
            self.kick(queue)
            self.set_vring_kick(queue, self.kick_fd(queue))
        for queue in range(self.n_queues):
            self.set_vring_enable(queue, True)
        for queue in range(self.n_queues):
            self.swap_call(queue)

    def _tell_regions(self) -> None:
        if self._told == self.regions:
            return
        if not self.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            self.set_mem_table(self.regions)
            return
        for old in [r for r in self._told if r not in self.regions]:
            self.rem_mem_reg(old)
        for new in [r for r in self.regions if r not in self._told]:
            self.add_mem_reg(new)

    def start(self) -> None:
        """Creates the device and starts the driver, as a VM's boot does."""
        self.realize()
        self.driver_ok()

    def stop(self, timeout_s: float | None = None) -> list[int]:
        """Stops the device as QEMU's ``stop`` does; returns the bases from which the rings go on.

        From the last reply on, any write by the back-end into rings or buffers in flight is a fault, which is
        noticed by ``resume``, ``reset`` and ``check``. Load loops wait meanwhile.
        """
        for queue in range(self.n_queues):
            self._control(queue, lib.VR_FRONTEND_PAUSE)
        for queue in range(self.n_queues):
            self.set_vring_enable(queue, False)
        bases = []
        for queue in range(self.n_queues):
            bases.append(self.get_vring_base(queue, timeout_s))
            self._control(queue, lib.VR_FRONTEND_FREEZE)
        for queue in range(self.n_queues):
            self.set_vring_call(queue, self._spare_fd())
        return bases

    def resume(self, bases: Iterable[int]) -> None:
        """Starts the device again with its rings as they are, as QEMU's ``cont`` does."""
        for queue in range(self.n_queues):
            self._control(queue, lib.VR_FRONTEND_THAW)
        self._start(bases)
        for queue in range(self.n_queues):
            self._control(queue, lib.VR_FRONTEND_RESUME)

    def reset(self) -> None:
        """Resets the machine as QEMU's ``system_reset`` does; ``driver_ok`` boots the guest anew.

        Requests in flight are lost (``RequestLost``); writes into their buffers from now on are faults.
        """
        self.stop()
        self.reset_device()
        self.driver_ok()

    # --- memory -------------------------------------------------------------------------------------------

    def add_region(self, region: Region) -> MappedRegion:
        """Maps another region; the back-end is told if the device has been started."""
        self._map(region, {})
        mapped = next(r for r in self.regions if r.gpa == region.gpa)
        if self._told:
            self._tell_regions()
        return mapped

    def remove_region(self, gpa: int) -> None:
        """Takes a region away, from the back-end first. Nothing in it may be in use."""
        self.regions = [r for r in self.regions if r.gpa != gpa]
        if self._told:
            self._tell_regions()
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
        self, descriptors: Sequence[tuple[int, int, bool]], *, queue: int = 1, indirect: bool = False
    ) -> Token:
        """Submits a chain of (guest-physical address, length, writable), well-formed or not.

        Its memory is the caller's. Only that it completes once is checked.
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
