"""vhost-user messages: replies, acknowledgements, refusals."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from tests.conformance.check import NotOffered, check, ensure
from virtiofsd_rafs.errors import PeerError
from virtiofsd_rafs.native.frontend import FrontendTimeout
from virtiofsd_rafs.native.frontend_link import Region
from virtiofsd_rafs.native.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    Protocol,
    Request,
    single_region,
    u64_payload,
    vring_state,
)

if TYPE_CHECKING:
    from tests.conformance.subject import Subject, Vm

_HEADER = "vhost-user.rst, Message Specification, Header"
_ACK = "vhost-user.rst, VHOST_USER_PROTOCOL_F_REPLY_ACK"


@check(
    "msg.reply-header",
    "A reply has the request's number, version 1 and the reply flag",
    source=_HEADER,
    says="Lower 2 bits are the version (0x01); bit 2 is sent on each reply from the back-end.",
)
def _reply_header(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES):
            vm.fe.send_message(request, flags=1)
            reply = vm.fe.receive_message()
            ensure(reply.request == request, f"{request.name} was answered by message {reply.request}")
            ensure(reply.flags & 7 == 5, f"the reply to {request.name} has the flags {reply.flags:#x}")
            ensure(len(reply.payload) == 8, f"the reply to {request.name} has {len(reply.payload)} bytes")


@check(
    "msg.protocol-features-first",
    "Protocol features can be asked for before SET_FEATURES",
    source="vhost-user.rst, VHOST_USER_GET_PROTOCOL_FEATURES",
    says="Back-ends that report VHOST_USER_F_PROTOCOL_FEATURES must support this even before SET_FEATURES.",
)
def _protocol_features_first(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        features = vm.fe.get_features()
        ensure(features & VHOST_USER_F_PROTOCOL_FEATURES, "bit 30 is not offered")
        first = vm.fe.get_protocol_features()
        ensure(first == vm.fe.get_protocol_features(), "asked twice, it offers different protocol features")


@check(
    "msg.queue-num",
    "GET_QUEUE_NUM tells of the hiprio queue and one request queue at least",
    source="vhost-user.rst, Multiple queue support; virtio 1.3, 5.11.2",
    says="The maximum number of queues can be queried; a file system has hiprio and num_request_queues ≥ 1.",
)
def _queue_num(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        _realize(vm, Protocol.MQ)
        n = vm.fe.get_queue_num()
        ensure(2 <= n <= 0x8000, f"it has {n} queues")


@check(
    "msg.mem-slots",
    "GET_MAX_MEM_SLOTS answers at least 8, and the same each time",
    source="vhost-user.rst, VHOST_USER_GET_MAX_MEM_SLOTS; QEMU vhost-user.c, vhost_user_backend_init",
    says="QEMU refuses a back-end whose limit shrinks from one device or query to the next.",
)
def _mem_slots(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        _realize(vm, Protocol.CONFIGURE_MEM_SLOTS)
        slots = {vm.fe.get_max_mem_slots() for _ in range(3)}
        ensure(len(slots) == 1, f"it told of {sorted(slots)} slots, one after the other")
        ensure(min(slots) >= 8, f"it has {slots} slots only")


@check(
    "msg.need-reply-everything",
    "Every message that asks for a reply gets one, and 0 when it was right",
    source=_ACK,
    says="With need_reply set the back-end must answer: 0 for success, non-zero for failure.",
)
def _need_reply_everything(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        vm.fe.acks = None
        vm.start()
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        vm.fe.init()
        vm.serves()
        reads = vm.reads(16)
        vm.fe.resume(vm.fe.stop())
        vm.collect(reads)


@check(
    "msg.need-reply-once",
    "A request with a reply of its own is answered once, whatever NEED_REPLY says",
    source=_ACK,
    says="The acknowledgement is sent unless the message already has an explicit reply body.",
)
def _need_reply_once(subject: Subject) -> None:
    with subject.vm() as vm:
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        features = vm.fe.send_message(Request.GET_FEATURES, need_reply=True)
        ensure(features is not None and len(features.payload) == 8, "GET_FEATURES has no reply")
        # A second reply to the message above would be taken for this one's.
        queues = vm.fe.send_message(Request.GET_PROTOCOL_FEATURES, need_reply=True)
        ensure(queues is not None and queues.request == Request.GET_PROTOCOL_FEATURES, "answered twice")
        vm.serves()


@check(
    "msg.no-ack-unasked",
    "A message that asks for no reply gets none, even with REPLY_ACK",
    source=_ACK,
    says="Replies are demanded for certain commands only, and by need_reply.",
)
def _no_ack_unasked(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        vm.fe.acks = frozenset()
        vm.start()
        vm.fe.set_vring_enable(1, True)
        # A reply to the message above would be taken for this one's.
        ensure(vm.fe.get_features() == vm.fe.get_features(), "two replies differ")
        vm.fe.init()
        vm.serves()


@check(
    "msg.no-reply-ack",
    "Without REPLY_ACK nothing is acknowledged, and everything works",
    source=_ACK,
    says="Without the feature only requests with a reply of their own are answered.",
)
def _no_reply_ack(subject: Subject) -> None:
    with subject.vm(protocol_features=Protocol(0xFFFFF) & ~Protocol.REPLY_ACK & ~Protocol.CONFIG) as vm:
        vm.serves()
        reads = vm.reads(8)
        vm.fe.resume(vm.fe.stop())
        vm.collect(reads)


@check(
    "msg.refused",
    "What cannot be done is refused by a non-zero reply, and the connection goes on",
    source=_ACK + "; Communication",
    says="Non-zero on failure; closing the connection is for exceptional circumstances.",
)
def _refused(subject: Subject) -> None:
    with subject.vm() as vm:
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        reply = vm.fe.send_message(Request.SET_VRING_NUM, vring_state(5000, 64), need_reply=True)
        ensure(reply is not None and reply.u64() != 0, "SET_VRING_NUM of queue 5000 was accepted")
        vm.serves()


@check(
    "msg.unknown",
    "An unknown message is refused, by a non-zero reply or by the end of the connection",
    source=_ACK + "; Communication",
    says="Failure is a non-zero reply; a back-end that detects an error may also close the connection.",
)
def _unknown(subject: Subject) -> None:
    with subject.vm() as vm:
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        try:
            reply = vm.fe.send_message(999, need_reply=True)
        except FrontendTimeout:
            raise
        except PeerError as e:
            ensure("closed" in str(e), str(e))
            return
        ensure(reply is not None and reply.u64() != 0, "message 999 was accepted")
        vm.serves()


@check(
    "msg.in-pieces",
    "A message may arrive in pieces",
    source="vhost-user.rst, Introduction; unix(7)",
    says="The socket is a stream: a message has no boundary but its own size field.",
)
def _in_pieces(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        message = struct.pack("<III", Request.GET_FEATURES, 1, 0)
        for at in (3, 7, 12):
            vm.fe.send_bytes(message[:at])
            time.sleep(0.02)
            if message[at:]:
                vm.fe.send_bytes(message[at:])
            ensure(vm.fe.receive_message().request == Request.GET_FEATURES, "not answered")
        payload = struct.pack("<IIIQ", Request.SET_FEATURES, 1, 8, vm.fe.get_features() & 1 << 30)
        for piece in (payload[:5], payload[5:13], payload[13:]):
            vm.fe.send_bytes(piece)
            time.sleep(0.02)
        vm.fe.get_features()


@check(
    "msg.back-to-back",
    "Several messages may arrive at once",
    source="vhost-user.rst, Introduction; unix(7)",
    says="The socket is a stream: a front-end that needs no reply need not wait.",
)
def _back_to_back(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        vm.fe.send_bytes(struct.pack("<III", Request.GET_FEATURES, 1, 0) * 20)
        answers = {vm.fe.receive_message().u64() for _ in range(20)}
        ensure(len(answers) == 1, "twenty times the same question had different answers")


@check(
    "msg.vring-fd-absent",
    "Without a call descriptor the device serves, and does not signal",
    source="vhost-user.rst, VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR",
    says="Bit 8 says that there is no file descriptor: polling is used instead of waiting for the call.",
)
def _vring_fd_absent(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        vm.fe.set_vring_call(1, None)
        vm.fe.set_vring_err(1, None)
        vm.fe.get_features()
        tokens = [vm.fe.request(3, node, bytes(16), 104) for _ in range(8)]
        deadline = time.monotonic() + subject.timeout_s
        while len(vm.fe.poll(1)) < len(tokens):
            ensure(time.monotonic() < deadline, "not served without a call descriptor")
            time.sleep(0.002)
        ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")
        vm.fe.swap_call(1)
        vm.serves()


@check(
    "msg.vring-kick-absent",
    "Without a kick descriptor the device looks at the ring by itself",
    source="vhost-user.rst, VHOST_USER_SET_VRING_KICK",
    says="Bit 8 says that there is no descriptor: polling should be used instead of waiting for the kick.",
)
def _vring_kick_absent(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        vm.fe.set_vring_kick(1, None)
        vm.fe.get_features()
        for _ in range(20):
            reply = vm.fe.wait(vm.fe.request(3, node, bytes(16), 104))
            ensure(reply.error == 0, f"GETATTR failed with errno {reply.error}")
        vm.fe.set_vring_kick(1, vm.fe.kick_fd(1))
        vm.fe.kick(1)
        vm.serves()


@check(
    "msg.set-again",
    "Features, size, addresses and the enabled state may be set again while rings run",
    source="vhost-user.rst, Ring states, Migration; QEMU hw/virtio/vhost.c, vhost_dev_set_log",
    says="The back-end must support changing some configuration on the fly; QEMU sends SET_FEATURES again.",
)
def _set_again(subject: Subject) -> None:
    with subject.vm() as vm:
        for _ in range(10):
            reads = vm.reads(12)
            vm.fe.set_features(vm.fe.features)
            vm.fe.set_vring_addr(1)
            vm.fe.set_vring_enable(1, True)
            vm.collect(reads)
        vm.serves()


@check(
    "msg.config",
    "The configuration has a tag and at least one request queue",
    source="vhost-user.rst, VHOST_USER_GET_CONFIG; virtio 1.3, 5.11.4",
    says="tag is 36 bytes of UTF-8, not empty; num_request_queues is at least 1.",
)
def _config(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        _realize(vm, Protocol.CONFIG)
        size = 40
        reply = vm.fe.send_message(Request.GET_CONFIG, struct.pack("<III", 0, size, 0) + bytes(size))
        ensure(reply is not None and len(reply.payload) == 12 + size, "the configuration has another size")
        assert reply is not None
        tag, queues = struct.unpack_from("<36sI", reply.payload, 12)
        ensure(tag.rstrip(b"\0"), "the tag is empty")
        ensure(queues >= 1, f"it has {queues} request queues")


@check(
    "msg.rings-enabled-without-protocol-features",
    "Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled by SET_FEATURES",
    source="vhost-user.rst, Ring states",
    says="Upon SET_FEATURES without bit 30 the back-end must enable all rings immediately.",
)
def _enabled_without_protocol_features(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        fe = vm.fe
        fe.set_owner()
        fe.offered = fe.get_features()
        fe.features = fe.offered & fe.wanted_features & ~VHOST_USER_F_PROTOCOL_FEATURES
        fe.make_empty_rings()
        fe.set_features(fe.features)
        fe.set_mem_table(fe.regions)
        for queue in range(fe.n_queues):
            fe.set_vring_num(queue, fe.queue_size)
            fe.set_vring_base(queue, 0)
            fe.set_vring_addr(queue)
            fe.swap_call(queue)
            fe.set_vring_kick(queue, fe.kick_fd(queue))
        fe.init()
        vm.serves()


@check(
    "msg.backend-channel",
    "A channel for the back-end's requests is taken, and nothing comes over it unasked",
    source="vhost-user.rst, Back-end communication",
    says="The channel is optional; a device without DAX and notifications has nothing to say.",
)
def _backend_channel(subject: Subject) -> None:
    with subject.vm() as vm:
        if vm.fe.backend_channel is None:
            raise NotOffered("BACKEND_REQ")
        vm.serves()
        vm.fe.backend_channel.setblocking(False)
        try:
            said = vm.fe.backend_channel.recv(64)
        except BlockingIOError:
            return
        ensure(False, "the channel was closed" if not said else f"it said {said.hex()}")


@check(
    "msg.stray-descriptor",
    "A descriptor that comes with REM_MEM_REG is closed",
    source="vhost-user.rst, VHOST_USER_REM_MEM_REG",
    says="The back-end MAY accept one, and MUST close it without using it otherwise.",
)
def _unused_descriptor(subject: Subject) -> None:
    with subject.vm() as vm:
        if not vm.fe.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            raise NotOffered("CONFIGURE_MEM_SLOTS")
        region = vm.fe.add_region(Region(gpa=1 << 36, size=1 << 20))
        read, write = os.pipe()
        refused = ""
        try:
            payload = single_region(region.describe())
            reply = vm.fe.send_message(Request.REM_MEM_REG, payload, [write], need_reply=True)
            refused = "by a reply" if reply is not None and reply.u64() else ""
        except FrontendTimeout:
            raise
        except PeerError as e:
            ensure("closed" in str(e), str(e))
            refused = "by the end of the connection"
        finally:
            os.close(write)
        os.set_blocking(read, False)
        ensure(_closes(read, subject.timeout_s), "the descriptor that came with REM_MEM_REG is still open")
        os.close(read)
        if refused:
            raise NotOffered(f"REM_MEM_REG with a descriptor is refused {refused}, as is allowed")
        vm.fe.told_regions.remove(region)
        vm.fe.remove_region(region.gpa)
        vm.serves()


def _closes(pipe: int, timeout_s: float) -> bool:
    """Whether nobody has the other end of a pipe any more, at the latest after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return os.read(pipe, 1) == b""
        except BlockingIOError:
            time.sleep(0.01)
    return False


def _realize(vm: Vm, wanted: Protocol) -> None:
    """Negotiates as far as protocol features."""
    vm.fe.set_owner()
    if not vm.fe.get_features() & VHOST_USER_F_PROTOCOL_FEATURES:
        raise NotOffered("protocol features")
    offered = vm.fe.get_protocol_features()
    if not offered & wanted:
        raise NotOffered(str(wanted.name))
    vm.fe.send_message(Request.SET_PROTOCOL_FEATURES, u64_payload(offered & (wanted | Protocol.REPLY_ACK)))
    vm.fe.protocol = offered & (wanted | Protocol.REPLY_ACK)
