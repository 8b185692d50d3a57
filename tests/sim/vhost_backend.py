"""A vhost-user back-end in Python, slow and obliging: the other side for tests of the front-end.

It runs in a thread on one end of a socket pair, notes all messages, answers requests with ``handler``. What a
bad back-end does is done by the test itself, with ``held`` chains.
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import attrs

from virtiofsd_rafs.native.vhost_user import Protocol, Request, Virtio

Handler = Callable[[bytes], bytes | None]
"""From a request's readable bytes to its reply's, ``None`` for a request without reply."""

PROTOCOL = (
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.BACKEND_REQ
    | Protocol.BACKEND_SEND_FD
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
)
FEATURES = (
    Virtio.VERSION_1 | Virtio.INDIRECT_DESC | Virtio.EVENT_IDX | Virtio.PROTOCOL_FEATURES | Virtio.RING_PACKED
)


@attrs.define
class Ring:
    num: int = 0
    base: int = 0
    used_idx: int = 0
    addresses: tuple[int, int, int] = (0, 0, 0)
    """User addresses of descriptor table, available and used ring."""
    kick: int = -1
    call: int = -1
    enabled: bool = False


@attrs.frozen
class Chain:
    """A request taken from a ring; ``writable`` pieces are (guest-physical address, length)."""

    queue: int
    head: int
    request: bytes
    writable: list[tuple[int, int]]


@attrs.define(slots=False)
class BackendSim:
    handler: Handler
    protocol: Protocol = PROTOCOL
    features: int = int(FEATURES)
    hold: bool = False
    """Take requests but do not answer them: they pile up in ``held``."""
    refuse: set[int] = attrs.field(factory=set)
    """Requests that are acknowledged with an error."""
    messages: list[str] = attrs.field(factory=list)
    """Names of the messages so far; a trailing ``+n`` for n descriptors, ``!`` for NEED_REPLY."""
    held: list[Chain] = attrs.field(factory=list)
    rings: dict[int, Ring] = attrs.field(factory=dict)
    regions: list[tuple[int, int, int, mmap.mmap]] = attrs.field(factory=list)
    """(guest-physical address, size, user address, mapping)"""
    failure: BaseException | None = None

    def __attrs_post_init__(self) -> None:
        self.socket, self._socket = socket.socketpair()
        self._wake_r, self._wake_w = os.pipe()
        self._lock = threading.RLock()
        self._acked_protocol = 0
        self._acked_features = 0
        self._thread = threading.Thread(target=self._run, name="backend-sim")
        self._stop = False

    def __enter__(self) -> BackendSim:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self.wake()
        self._thread.join()
        self.socket.close()
        for fd in [self._wake_r, self._wake_w, *(f for r in self.rings.values() for f in (r.kick, r.call))]:
            if fd >= 0:
                os.close(fd)
        if self.failure is not None and exc[0] is None:
            raise self.failure

    def wake(self) -> None:
        os.write(self._wake_w, b"x")

    def hang_up(self) -> None:
        self._stop = True
        self.wake()
        self._thread.join()

    # --- messages ---

    def _run(self) -> None:
        try:
            with self._socket:
                while not self._stop and self._turn():
                    pass
        except BaseException as e:
            self.failure = e

    def _turn(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ, "socket")
            selector.register(self._wake_r, selectors.EVENT_READ, "wake")
            for index, ring in self.rings.items():
                if ring.enabled and ring.kick >= 0:
                    selector.register(ring.kick, selectors.EVENT_READ, index)
            for key, _ in selector.select():
                if key.data == "socket":
                    if not self._message():
                        return False
                elif key.data == "wake":
                    os.read(self._wake_r, 64)
                elif self.rings[key.data].enabled:
                    os.read(key.fd, 8)
                    with self._lock:
                        self.process(key.data)
        return True

    def _message(self) -> bool:
        header, fds, _, _ = socket.recv_fds(self._socket, 12, 16)
        if not header:
            return False
        number, flags, size = struct.unpack("<III", header)
        payload = b""
        while len(payload) < size:
            payload += self._socket.recv(size - len(payload))
        request = Request(number)
        note = request.name + (f"+{len(fds)}" if fds else "") + ("!" if flags & 8 else "")
        with self._lock:
            self.messages.append(note)
            reply = self._handle(request, payload, fds)
        if reply is None and flags & 8 and self._acknowledges():
            reply = struct.pack("<Q", int(number in self.refuse))
        if reply is not None:
            self._socket.sendall(struct.pack("<III", number, 5, len(reply)) + reply)
        return True

    def _acknowledges(self) -> bool:
        """Whether NEED_REPLY is honoured. This and what follows are for back-ends with defects."""
        return True

    def _asks_for_kick(self) -> bool:
        """Whether a kick is asked for when the ring is empty."""
        return True

    def _wants_interrupt(self, wanted: bool) -> bool:
        """Whether an interrupt is sent, *wanted* by the driver or not."""
        return wanted

    def _handle(self, request: Request, payload: bytes, fds: list[int]) -> bytes | None:
        match request:
            case Request.GET_FEATURES:
                return struct.pack("<Q", self.features)
            case Request.GET_PROTOCOL_FEATURES:
                return struct.pack("<Q", self.protocol)
            case Request.GET_QUEUE_NUM:
                return struct.pack("<Q", 64)
            case Request.GET_MAX_MEM_SLOTS:
                return struct.pack("<Q", 509)
            case Request.SET_FEATURES:
                (self._acked_features,) = struct.unpack("<Q", payload)
                assert not self._acked_features & ~self.features
            case Request.SET_PROTOCOL_FEATURES:
                (self._acked_protocol,) = struct.unpack("<Q", payload)
                assert not self._acked_protocol & ~self.protocol
            case Request.ADD_MEM_REG:
                self._map(payload[8:], fds[0])
            case Request.REM_MEM_REG:
                gpa = struct.unpack_from("<Q", payload, 8)[0]
                self.regions = [r for r in self.regions if r[0] != gpa]
            case Request.SET_MEM_TABLE:
                self.regions = []
                for i, fd in enumerate(fds):
                    self._map(payload[8 + 32 * i : 40 + 32 * i], fd)
            case Request.SET_BACKEND_REQ_FD:
                os.close(fds[0])
            case Request.RESET_DEVICE:
                for ring in self.rings.values():
                    ring.enabled = False
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_fd(request, struct.unpack("<Q", payload)[0], fds)
            case Request.SET_VRING_ADDR:
                index, _, desc, used, avail, _ = struct.unpack("<IIQQQQ", payload)
                self.ring(index).addresses = (desc, avail, used)
            case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.SET_VRING_ENABLE:
                index, value = struct.unpack("<II", payload)
                ring = self.ring(index)
                if request is Request.SET_VRING_NUM:
                    ring.num = value
                elif request is Request.SET_VRING_BASE:
                    ring.base = ring.used_idx = value
                else:
                    ring.enabled = bool(value)
                    if ring.enabled:
                        ring.used_idx = self._u16(self._user(ring.addresses[2] + 2, 2))
            case Request.GET_VRING_BASE:
                index = struct.unpack("<II", payload)[0]
                self.ring(index).enabled = False
                return struct.pack("<II", index, self.ring(index).base)
        return None

    def ring(self, index: int) -> Ring:
        return self.rings.setdefault(index, Ring())

    def _set_fd(self, request: Request, word: int, fds: list[int]) -> None:
        ring = self.ring(word & 0xFF)
        fd = fds[0] if fds else -1
        if request is Request.SET_VRING_ERR:
            os.close(fd)
            return
        name = "kick" if request is Request.SET_VRING_KICK else "call"
        if getattr(ring, name) >= 0:
            os.close(getattr(ring, name))
        setattr(ring, name, fd)

    def _map(self, description: bytes, fd: int) -> None:
        gpa, size, user, offset = struct.unpack("<QQQQ", description)
        self.regions.append((gpa, size, user, mmap.mmap(fd, size, offset=offset)))
        os.close(fd)

    # --- memory and rings ---

    def _place(self, address: int, size: int, key: int) -> tuple[mmap.mmap, int]:
        for region in self.regions:
            start = region[key]
            if start <= address and address + size <= start + region[1]:
                return region[3], address - start
        raise AssertionError(f"{address:#x}+{size:#x} is not in guest memory")

    def _user(self, address: int, size: int) -> tuple[mmap.mmap, int]:
        return self._place(address, size, 2)

    def read(self, gpa: int, size: int) -> bytes:
        memory, at = self._place(gpa, size, 0)
        return memory[at : at + size]

    def write(self, gpa: int, data: bytes) -> None:
        memory, at = self._place(gpa, len(data), 0)
        memory[at : at + len(data)] = data

    @staticmethod
    def _u16(place: tuple[mmap.mmap, int]) -> int:
        return int(struct.unpack_from("<H", place[0], place[1])[0])

    @staticmethod
    def _store_u16(place: tuple[mmap.mmap, int], value: int) -> None:
        """In one store: ``struct.pack_into`` clears the bytes first, which a spinning driver can see."""
        memoryview(place[0]).cast("H")[place[1] // 2] = value

    def process(self, index: int) -> None:
        """Takes all available requests of a ring and, unless they are held, answers them."""
        ring = self.rings[index]
        desc, avail, used = ring.addresses
        while True:
            if self._u16(self._user(avail + 2, 2)) == ring.base:
                # Ask for a kick at the next one, and look again.
                if self._asks_for_kick():
                    self._store_u16(self._user(used + 4 + 8 * ring.num, 2), ring.base)
                if self._u16(self._user(avail + 2, 2)) == ring.base:
                    return
            head = self._u16(self._user(avail + 4 + 2 * (ring.base % ring.num), 2))
            ring.base = (ring.base + 1) & 0xFFFF
            table = self._user(desc, 16 * ring.num)
            chain = self._chain(index, head, table[0][table[1] : table[1] + 16 * ring.num])
            if self.hold:
                self.held.append(chain)
            else:
                self.answer(chain, self.handler(chain.request))

    def _chain(self, queue: int, head: int, table: bytes) -> Chain:
        readable, writable, index = b"", [], head
        while True:
            gpa, size, flags, follower = struct.unpack_from("<QIHH", table, 16 * index)
            if flags & 4:
                table, index = self.read(gpa, size), 0
                continue
            if flags & 2:
                writable.append((gpa, size))
            else:
                readable += self.read(gpa, size)
            if not flags & 1:
                return Chain(queue, head, readable, writable)
            index = follower

    def answer(self, chain: Chain, reply: bytes | None, *, used: int | None = None) -> None:
        """Writes a reply, puts the used element (length *used* if given), and signals if that is wanted."""
        with self._lock:
            data = reply or b""
            done = 0
            for gpa, size in chain.writable:
                part = data[done : done + size]
                if part:
                    self.write(gpa, part)
                done += len(part)
            assert done == len(data), "the reply does not fit"
            self.put_used(chain.queue, chain.head, len(data) if used is None else used)

    def put_used(self, queue: int, head: int, length: int) -> None:
        ring = self.rings[queue]
        _, avail, used = ring.addresses
        memory, at = self._user(used + 4 + 8 * (ring.used_idx % ring.num), 8)
        struct.pack_into("<II", memory, at, head, length)
        old, ring.used_idx = ring.used_idx, (ring.used_idx + 1) & 0xFFFF
        self._store_u16(self._user(used + 2, 2), ring.used_idx)
        if self._wants_interrupt(self._u16(self._user(avail + 4 + 2 * ring.num, 2)) == old):
            os.write(ring.call, struct.pack("<Q", 1))

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Waits until *condition* holds; fails after 10 s."""
        event = threading.Event()
        for _ in range(10_000):
            with self._lock:
                if condition():
                    return
            event.wait(0.001)
        raise AssertionError("the condition did not come true within 10 s")
