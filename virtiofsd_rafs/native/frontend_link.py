"""The test front-end's lower half: handle, guest memory's regions, and vhost-user messages one by one."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Self

import attrs

from virtiofsd_rafs.errors import PeerError, SocketSetupError, VirtiofsdRafsError
from virtiofsd_rafs.native._lib import ffi, last_error, lib, raise_for
from virtiofsd_rafs.native.vhost_user import (
    REPLYING,
    VRING_NO_FD,
    Protocol,
    Request,
    memory_region,
    region_table,
    single_region,
    u64_payload,
    vring_addr,
    vring_state,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

MiB = 1 << 20
PAYLOAD_MAX = 1 << 16
_FDS_MAX = 16


class FrontendTimeout(PeerError, TimeoutError):
    """The back-end did not answer in time."""

    msgid = "frontend.timeout"


class RequestLost(PeerError):
    """The request was in flight when its queue was reset: it has no answer any more."""

    msgid = "frontend.request-lost"


class RingFull(PeerError):
    """The ring has no free descriptor, or the guest's memory no room for the request's buffers."""

    msgid = "frontend.ring-full"


_CODES: dict[int, type[VirtiofsdRafsError]] = {
    -2: SocketSetupError,
    -100: FrontendTimeout,
    -101: RequestLost,
    -102: RingFull,
}


def checked(code: int) -> int:
    """*code* itself when it is not negative; otherwise the exception that it stands for is raised."""
    if code in _CODES:
        raise _CODES[code](last_error())
    return raise_for(code)


def milliseconds(timeout_s: float | None) -> int:
    """A time-out as native code wants it; ``None`` is for ever."""
    return -1 if timeout_s is None else max(0, round(timeout_s * 1000))


@attrs.frozen
class Region:
    """A region of guest memory to be made: *size* bytes at guest-physical *gpa*.

    Regions with the same *file* number share one memfd, each from its *file_offset*; without a number the
    region has a memfd of its own. *huge* takes it from the pool of huge pages.
    """

    gpa: int
    size: int
    file: int | None = None
    file_offset: int = 0
    huge: bool = False


@attrs.frozen
class MappedRegion:
    """A region as the back-end hears of it. The descriptor stays the front-end's."""

    gpa: int
    size: int
    user_address: int
    fd: int
    file_offset: int

    def describe(self) -> bytes:
        """The region's description in a vhost-user message."""
        return memory_region(self.gpa, self.size, self.user_address, self.file_offset)


def pc_layout(size: int, *, huge: bool = False) -> list[Region]:
    """Regions as a PC has them: one file, the hole below 1 MiB, and what exceeds 2 GiB above 4 GiB."""
    low = min(size, 2 << 30)
    regions = [] if huge else [Region(0, 0xA0000, file=0)]
    start = 0 if huge else MiB
    regions.append(Region(start, low - start, file=0, file_offset=start, huge=huge))
    if size > low:
        regions.append(Region(4 << 30, size - low, file=0, file_offset=low, huge=huge))
    return regions


@attrs.frozen
class Message:
    """A message from the back-end. The descriptors are the receiver's to close."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    def u64(self) -> int:
        """The payload as a number.

        Raises:
            PeerError: it is not 8 bytes long.
        """
        if len(self.payload) != 8:
            raise PeerError(f"the reply to request {self.request} has {len(self.payload)} bytes, not 8")
        return int(struct.unpack("<Q", self.payload)[0])


@attrs.frozen
class QueueInfo:
    """Where a queue's parts lie, its indices, and counts since it was made."""

    gpas: tuple[int, int, int]
    user_addresses: tuple[int, int, int]
    avail_idx: int
    used_idx: int
    in_flight: int
    kicks: int
    kicks_suppressed: int
    interrupts: int
    completions: int


class Link:
    """One end of a vhost-user connection and the memory that it shares. Each message can be sent alone."""

    def __init__(self, regions: Sequence[Region], timeout_s: float) -> None:
        self._handle: Any = ffi.gc(lib.vr_frontend_new(), lib.vr_frontend_free)
        self.timeout_s = timeout_s
        self.protocol = Protocol(0)
        """The vhost-user protocol features in use."""
        self.acks: frozenset[Request] | None = frozenset()
        """Requests that are to be acknowledged once REPLY_ACK is in use; ``None`` stands for all."""
        self.regions: list[MappedRegion] = []
        self.told_regions: list[MappedRegion] = []
        """What the back-end has been told of them."""
        self._own_fds: list[int] = []
        self.backend_channel: socket.socket | None = None
        """Our end of the channel for the back-end's own requests."""
        files: dict[int, int] = {}
        for region in sorted(regions, key=lambda r: -(r.file_offset + r.size)):
            self._map(region, files)

    def _map(self, region: Region, files: dict[int, int]) -> None:
        out = ffi.new("uint64_t[2]")
        fd = -1 if region.file is None else files.get(region.file, -1)
        code = lib.vr_frontend_region_add(
            self._handle, region.gpa, region.size, fd, region.file_offset, region.huge, out
        )
        if code < 0 and region.huge:
            remedy = f"reserve {region.size} bytes of huge pages in /proc/sys/vm/nr_hugepages"
            raise SocketSetupError(f"guest memory: {last_error()}", remedy=remedy)
        checked(code)
        if region.file is not None:
            files[region.file] = int(out[1])
        mapped = MappedRegion(region.gpa, region.size, int(out[0]), int(out[1]), region.file_offset)
        self.regions = sorted([*self.regions, mapped], key=lambda r: r.gpa)

    # --- life ---------------------------------------------------------------------------------------------

    def attach(self, where: str | os.PathLike[str] | socket.socket) -> None:
        """Connects to the socket at a path, or takes over a connected socket."""
        if isinstance(where, socket.socket):
            checked(lib.vr_frontend_adopt(self._handle, where.detach()))
            return
        path = os.fsencode(where)
        checked(lib.vr_frontend_connect(self._handle, path, len(path)))

    def detach(self) -> None:
        """Closes the connection, as a VMM that goes away. Memory and queues stay."""
        if self._handle is not None:
            checked(lib.vr_frontend_adopt(self._handle, -1))
        self.forget_back_end()

    def forget_back_end(self) -> None:
        """Another back-end knows nothing of what was agreed with the one before."""
        self.protocol = Protocol(0)
        self.told_regions.clear()
        if self.backend_channel is not None:
            self.backend_channel.close()
            self.backend_channel = None

    def close(self) -> None:
        """Closes the connection and gives up memory and queues."""
        if self._handle is None:
            return
        self.detach()
        for fd in self._own_fds:
            os.close(fd)
        self._own_fds.clear()
        ffi.release(self._handle)
        self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- messages -----------------------------------------------------------------------------------------

    def send_message(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        flags: int | None = None,
        size: int | None = None,
        timeout_s: float | None = None,
    ) -> Message | None:
        """Sends a message; returns the reply if the request has one.

        With *need_reply* that is the acknowledgement, unless REPLY_ACK was not negotiated: then none is asked
        for. *flags* and *size* override the header's fields (and nothing is waited for if *flags* is given).
        """
        wants_ack = need_reply and bool(self.protocol & Protocol.REPLY_ACK)
        word = (1 | (8 if wants_ack else 0)) if flags is None else flags
        array = ffi.new("int32_t[]", list(fds))
        checked(
            lib.vr_frontend_send(
                self._handle,
                request,
                word,
                payload,
                len(payload),
                array,
                len(fds),
                -1 if size is None else size,
            )
        )
        if flags is not None or not (wants_ack or request in REPLYING):
            return None
        reply = self.receive_message(timeout_s)
        if reply.request != request or not reply.flags & 4:
            raise PeerError(
                f"request {request} was answered by message {reply.request}, flags {reply.flags:#x}"
            )
        return reply

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes over the socket as they are."""
        array = ffi.new("int32_t[]", list(fds))
        checked(lib.vr_frontend_send_bytes(self._handle, data, len(data), array, len(fds)))

    def receive_message(self, timeout_s: float | None = None) -> Message:
        """The back-end's next message.

        Raises:
            FrontendTimeout: none came in time.
            PeerError: the back-end closed the connection, or the message is absurd.
        """
        header = ffi.new("uint32_t[3]")
        buf = ffi.new("uint8_t[]", PAYLOAD_MAX)
        fds = ffi.new("int32_t[]", _FDS_MAX)
        wait = milliseconds(self.timeout_s if timeout_s is None else timeout_s)
        n = checked(lib.vr_frontend_recv(self._handle, wait, header, buf, PAYLOAD_MAX, fds, _FDS_MAX))
        n_fds = min(header[2], _FDS_MAX)
        return Message(header[0], header[1], bytes(ffi.buffer(buf, n)), tuple(fds[i] for i in range(n_fds)))

    def _get(self, request: Request, payload: bytes = b"", timeout_s: float | None = None) -> Message:
        reply = self.send_message(request, payload, need_reply=self.acks is None, timeout_s=timeout_s)
        assert reply is not None
        return reply

    def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        wanted = self.acks is None or request in self.acks
        reply = self.send_message(request, payload, fds, need_reply=wanted)
        if reply is not None and reply.u64() != 0:
            raise PeerError(f"{request.name} was refused with {reply.u64()}")

    def get_features(self) -> int:
        """The virtio features that the back-end offers."""
        return self._get(Request.GET_FEATURES).u64()

    def set_features(self, features: int) -> None:
        self._tell(Request.SET_FEATURES, u64_payload(features))

    def get_protocol_features(self) -> Protocol:
        """The vhost-user protocol features that the back-end offers."""
        return Protocol(self._get(Request.GET_PROTOCOL_FEATURES).u64())

    def set_protocol_features(self, features: Protocol) -> None:
        self._tell(Request.SET_PROTOCOL_FEATURES, u64_payload(features))
        self.protocol = features

    def get_queue_num(self) -> int:
        return self._get(Request.GET_QUEUE_NUM).u64()

    def get_max_mem_slots(self) -> int:
        return self._get(Request.GET_MAX_MEM_SLOTS).u64()

    def get_status(self) -> int:
        return self._get(Request.GET_STATUS).u64()

    def set_owner(self) -> None:
        self._tell(Request.SET_OWNER)

    def reset_device(self) -> None:
        if self.protocol & Protocol.RESET_DEVICE:
            self._tell(Request.RESET_DEVICE)
        else:
            self._tell(Request.RESET_OWNER)

    def set_backend_req_fd(self) -> None:
        """Gives the back-end a channel for its own requests; our end is ``backend_channel``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        self.backend_channel = ours

    def add_mem_reg(self, region: MappedRegion) -> None:
        self._tell(Request.ADD_MEM_REG, single_region(region.describe()), [region.fd])
        self.told_regions.append(region)

    def rem_mem_reg(self, region: MappedRegion) -> None:
        self._tell(Request.REM_MEM_REG, single_region(region.describe()))
        with contextlib.suppress(ValueError):
            self.told_regions.remove(region)

    def set_mem_table(self, regions: Sequence[MappedRegion]) -> None:
        payload = region_table([r.describe() for r in regions])
        self._tell(Request.SET_MEM_TABLE, payload, [r.fd for r in regions])
        self.told_regions = list(regions)

    def set_vring_num(self, queue: int, num: int) -> None:
        self._tell(Request.SET_VRING_NUM, vring_state(queue, num))

    def set_vring_base(self, queue: int, base: int) -> None:
        self._tell(Request.SET_VRING_BASE, vring_state(queue, base))

    def set_vring_addr(self, queue: int) -> None:
        desc, avail, used = self.queue_info(queue).user_addresses
        self._tell(Request.SET_VRING_ADDR, vring_addr(queue, desc, used, avail))

    def set_vring_kick(self, queue: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_KICK, queue, fd)

    def set_vring_call(self, queue: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_CALL, queue, fd)

    def set_vring_err(self, queue: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_ERR, queue, fd)

    def _set_vring_fd(self, request: Request, queue: int, fd: int | None) -> None:
        payload = u64_payload(queue | (VRING_NO_FD if fd is None else 0))
        self._tell(request, payload, [] if fd is None else [fd])

    def set_vring_enable(self, queue: int, enable: bool) -> None:
        self._tell(Request.SET_VRING_ENABLE, vring_state(queue, int(enable)))

    def get_vring_base(self, queue: int, timeout_s: float | None = None) -> int:
        """Stops the ring; returns the index from which it goes on."""
        reply = self._get(Request.GET_VRING_BASE, vring_state(queue, 0), timeout_s)
        if len(reply.payload) != 8:
            raise PeerError(f"the reply to GET_VRING_BASE has {len(reply.payload)} bytes, not 8")
        index, base = struct.unpack("<II", reply.payload)
        if index != queue:
            raise PeerError(f"GET_VRING_BASE of queue {queue} was answered for queue {index}")
        return int(base)

    def swap_call(self, queue: int) -> None:
        """Gives the back-end a new call eventfd for a running queue."""
        fd = checked(lib.vr_frontend_queue_swap_call(self._handle, queue))
        self.set_vring_call(queue, fd)

    def queue_info(self, queue: int) -> QueueInfo:
        out = ffi.new("uint64_t[13]")
        checked(lib.vr_frontend_queue_info(self._handle, queue, out))
        v = [int(x) for x in out]
        return QueueInfo((v[0], v[1], v[2]), (v[3], v[4], v[5]), *v[6:])
