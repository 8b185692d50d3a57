"""Feature subsets: whatever a front-end or a driver does not take, the rest works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tests.conformance.check import checks
from virtiofsd_rafs.native.vhost_user import GUEST_FEATURES, QEMU_PROTOCOL, Protocol, Virtio

if TYPE_CHECKING:
    from tests.conformance.subject import Subject


@attrs.frozen
class _Subset:
    features: int = int(GUEST_FEATURES)
    protocol: int = int(QEMU_PROTOCOL)


def _without(*protocol: Protocol, features: int = 0) -> _Subset:
    taken = QEMU_PROTOCOL
    for feature in protocol:
        taken &= ~feature
    return _Subset(int(GUEST_FEATURES) & ~features, int(taken))


def _exercise(subject: Subject, case: _Subset) -> None:
    options = {"features": case.features, "protocol_features": case.protocol}
    with subject.vm(**options, queue_size=256) as vm:
        vm.serves()
        vm.collect(vm.reads(24))
        vm.fe.forget(vm.node("f00"))
        reads = vm.reads(8)
        vm.fe.resume(vm.fe.stop())
        vm.collect(reads)
        region = vm.plug(1 << 36, 1 << 20)
        vm.collect([vm.read("big", 4096, 16384, region=region)])
        vm.serves()


checks(
    "feature.virtio-",
    "A driver works that takes: {}",
    {
        "no-event-idx": _without(features=Virtio.EVENT_IDX),
        "no-indirect": _without(features=Virtio.INDIRECT_DESC),
        "no-event-idx-no-indirect": _without(features=Virtio.EVENT_IDX | Virtio.INDIRECT_DESC),
    },
    source="virtio 1.3, 2.2, 2.2.1, 6",
    says="The driver accepts a subset of what is offered; VIRTIO_F_VERSION_1 alone it must accept.",
)(_exercise)

checks(
    "feature.protocol-",
    "A front-end works that takes: {}",
    {
        "no-mq": _without(Protocol.MQ),
        "no-reply-ack": _without(Protocol.REPLY_ACK),
        "no-mem-slots": _without(Protocol.CONFIGURE_MEM_SLOTS),
        "no-reset-device": _without(Protocol.RESET_DEVICE),
        "no-backend-req": _without(Protocol.BACKEND_REQ, Protocol.BACKEND_SEND_FD),
        "no-inflight": _without(Protocol.INFLIGHT_SHMFD),
        "no-device-state": _without(Protocol.LOG_SHMFD, Protocol.DEVICE_STATE),
        "none": _Subset(protocol=0),
        "reply-ack-only": _Subset(protocol=int(Protocol.REPLY_ACK)),
    },
    source="vhost-user.rst, Communication, Protocol features; Multiple queue support",
    says="Extensions are gated by feature bits; a device with a fixed number of queues works without MQ.",
)(_exercise)
