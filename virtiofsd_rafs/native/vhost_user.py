"""Numbers and payloads of vhost-user, front-end's side (QEMU docs/interop/vhost-user.rst), sans-IO."""

from __future__ import annotations

import enum
import struct

VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
"""In the virtio feature word: the back-end speaks GET_PROTOCOL_FEATURES."""
VRING_NO_FD = 1 << 8
"""In the payload of SET_VRING_KICK, _CALL and _ERR: no descriptor comes along."""


class Request(enum.IntEnum):
    """``VhostUserRequest``, front-end to back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


REPLYING = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.GET_SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
    }
)
"""Requests that have a reply of their own, whatever NEED_REPLY says."""


class Protocol(enum.IntFlag):
    """``VHOST_USER_PROTOCOL_F_*``."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


QEMU_PROTOCOL = Protocol(0xFFDFF)
"""What QEMU 10 acknowledges for vhost-user-fs when everything is offered: all but CONFIG."""


class Virtio(enum.IntFlag):
    """Feature bits of virtio that a virtio-fs device may have, and vhost's own two."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = VHOST_USER_F_PROTOCOL_FEATURES
    VERSION_1 = 1 << 32
    IOMMU_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


GUEST_FEATURES = Virtio.VERSION_1 | Virtio.INDIRECT_DESC | Virtio.EVENT_IDX
"""What a Linux guest takes of what is offered."""


def u64_payload(value: int) -> bytes:
    return struct.pack("<Q", value)


def vring_state(index: int, num: int) -> bytes:
    """``struct vhost_vring_state``."""
    return struct.pack("<II", index, num)


def vring_addr(index: int, desc: int, used: int, avail: int, *, flags: int = 0, log: int = 0) -> bytes:
    """``struct vhost_vring_addr``, with user addresses."""
    return struct.pack("<IIQQQQ", index, flags, desc, used, avail, log)


def memory_region(gpa: int, size: int, user_address: int, mmap_offset: int) -> bytes:
    """A memory region description."""
    return struct.pack("<QQQQ", gpa, size, user_address, mmap_offset)


def single_region(region: bytes) -> bytes:
    """Payload of ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding and the description."""
    return bytes(8) + region


def region_table(regions: list[bytes]) -> bytes:
    """Payload of SET_MEM_TABLE."""
    return struct.pack("<II", len(regions), 0) + b"".join(regions)
