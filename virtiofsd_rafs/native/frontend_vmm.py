"""How VMMs speak vhost-user to a virtio-fs back-end: one profile each, in the order of their own sources.

A profile says what a VMM acknowledges, of which messages it wants an answer, and in which order it creates,
starts, stops, resets and goes on. Everything is played on a ``Device``; what differs is worth a test:

=================  ==================================  ==================================================
VMM                memory                              pause
=================  ==================================  ==================================================
QEMU               regions added and removed           all rings disabled, then all stopped
Cloud Hypervisor   SET_MEM_TABLE at each start         all rings disabled, none stopped
crosvm             SET_MEM_TABLE at each start         ring after ring disabled and stopped
=================  ==================================  ==================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from virtiofsd_rafs.errors import PeerError
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
    from collections.abc import Sequence

    from virtiofsd_rafs.native.frontend_device import Device


class Vmm(ABC):
    """What all have in common. Without state: a profile may be shared by devices."""

    name: ClassVar[str]
    features: ClassVar[int] = GUEST_FEATURES
    """Virtio features that the VMM passes on to the guest, of those that a Linux guest takes."""
    protocol: ClassVar[Protocol]
    """vhost-user protocol features that it takes of those offered."""
    acks: ClassVar[frozenset[Request] | None]
    """Requests that it wants acknowledged if it can; ``None`` stands for all."""

    @abstractmethod
    def realize(self, device: Device) -> None:
        """Creates the device."""

    @abstractmethod
    def start(self, device: Device, bases: Sequence[int]) -> None:
        """The guest's driver is ready, or goes on: the rings start at *bases*."""

    def driver_ok(self, device: Device) -> None:
        """A driver sets the device up and starts it, with empty rings."""
        device.make_empty_rings()
        self.start(device, [0] * device.n_queues)

    @abstractmethod
    def stop(self, device: Device, timeout_s: float | None) -> list[int]:
        """The VM is paused; where its rings go on."""

    def resume(self, device: Device, bases: Sequence[int]) -> None:
        """The VM goes on."""
        self.start(device, bases)

    def reset(self, device: Device) -> None:
        """The guest's machine, or its driver, resets the device and sets it up anew."""
        self.stop_rings(device, None)
        self.driver_ok(device)

    def reconnect(self, device: Device) -> None:
        """Goes on with the rings as they are at another back-end, after the one before went away."""
        raise PeerError(f"{self.name} does not reconnect")

    def tell_memory(self, device: Device) -> None:
        """Memory has changed under rings that run."""
        device.set_mem_table(device.regions)

    def stop_rings(self, device: Device, timeout_s: float | None) -> list[int]:
        """Disables and stops each ring; the bases. From each reply on, writes are faults."""
        bases = []
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, False)
            bases.append(device.get_vring_base(queue, timeout_s))
            device.freeze(queue)
        return bases

    def negotiate(self, device: Device) -> None:
        """Asks for protocol features and takes those of the profile, if there are any."""
        if device.offered & VHOST_USER_F_PROTOCOL_FEATURES:
            device.set_protocol_features(device.get_protocol_features() & Protocol(device.wanted_protocol))

    def check_queues(self, device: Device) -> None:
        """Asks for the number of queues, with MQ."""
        if device.protocol & Protocol.MQ:
            n = device.get_queue_num()
            if n < device.n_queues:
                raise PeerError(f"the back-end has {n} queues, {device.n_queues} are wanted")
        elif device.n_queues > 1 and device.wanted_protocol & Protocol.MQ:
            raise PeerError("the back-end has one queue only: it does not offer MQ")


class Qemu10(Vmm):
    """QEMU 10 (recorded with 10.0.2; ``hw/virtio/vhost-user-fs.c``, ``vhost-user.c``, ``vhost.c``)."""

    name = "qemu-10"
    protocol = QEMU_PROTOCOL
    acks = frozenset(
        {
            Request.SET_MEM_TABLE,
            Request.ADD_MEM_REG,
            Request.REM_MEM_REG,
            Request.SET_VRING_ENABLE,
            Request.SET_BACKEND_REQ_FD,
        }
    )

    def realize(self, device: Device) -> None:
        device.offered = device.get_features()
        self.negotiate(device)
        self.check_queues(device)
        if device.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            device.get_max_mem_slots()
        if device.protocol & Protocol.BACKEND_REQ:
            device.set_backend_req_fd()
        device.set_owner()
        device.offered = device.get_features()
        device.features = device.offered & (device.wanted_features | VHOST_USER_F_PROTOCOL_FEATURES)
        for queue in range(device.n_queues):
            device.set_vring_call(queue, device.spare_fd())
            device.set_vring_err(queue, device.spare_fd())
        device.reset_device()

    def driver_ok(self, device: Device) -> None:
        device.reset_device()
        super().driver_ok(device)

    def start(self, device: Device, bases: Sequence[int]) -> None:
        for queue in range(device.n_queues):
            device.swap_call(queue)
        device.set_features(device.features)
        if device.protocol & Protocol.STATUS:
            device.get_status()
            device.send_message(Request.SET_STATUS, u64_payload(8))
        self.tell_memory(device)
        for queue, base in enumerate(bases):
            device.set_vring_num(queue, device.queue_size)
            device.set_vring_base(queue, base)
            device.set_vring_addr(queue)
            # QEMU hands out its host notifiers already signalled, so that nothing in the ring is overlooked.
            device.kick(queue)
            device.set_vring_kick(queue, device.kick_fd(queue))
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, True)
        for queue in range(device.n_queues):
            device.swap_call(queue)

    def tell_memory(self, device: Device) -> None:
        told = device.told_regions
        if told == device.regions:
            return
        if not device.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            device.set_mem_table(device.regions)
            return
        for old in [r for r in told if r not in device.regions]:
            device.rem_mem_reg(old)
        for new in [r for r in device.regions if r not in told]:
            device.add_mem_reg(new)

    def stop(self, device: Device, timeout_s: float | None) -> list[int]:
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, False)
        bases = []
        for queue in range(device.n_queues):
            bases.append(device.get_vring_base(queue, timeout_s))
            device.freeze(queue)
        for queue in range(device.n_queues):
            device.set_vring_call(queue, device.spare_fd())
        return bases

    def reset(self, device: Device) -> None:
        self.stop(device, None)
        device.reset_device()
        self.driver_ok(device)


class Qemu11(Qemu10):
    """QEMU 11 (recorded with 11.1.3): the same order, and descriptors of rings are acknowledged too."""

    name = "qemu-11"
    acks = Qemu10.acks | {Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK}


class CloudHypervisor(Vmm):
    """Cloud Hypervisor 54 (``virtio-devices/src/vhost_user``, front-end of the ``vhost`` crate 0.17).

    Everything behind the negotiation is acknowledged. A pause is SET_VRING_ENABLE alone: the back-end keeps
    the rings, and must leave the memory alone, which may be saved meanwhile. It offers IN_ORDER and
    notification data, and wants an in-flight log, all of which a back-end may do without.
    """

    name = "cloud-hypervisor"
    features = (
        Virtio.VERSION_1
        | Virtio.INDIRECT_DESC
        | Virtio.EVENT_IDX
        | Virtio.IN_ORDER
        | Virtio.ORDER_PLATFORM
        | Virtio.NOTIFICATION_DATA
    )
    protocol = (
        Protocol.MQ
        | Protocol.CONFIGURE_MEM_SLOTS
        | Protocol.REPLY_ACK
        | Protocol.INFLIGHT_SHMFD
        | Protocol.LOG_SHMFD
        | Protocol.DEVICE_STATE
    )
    acks = None

    def realize(self, device: Device) -> None:
        device.set_owner()
        device.offered = device.get_features()
        self.negotiate(device)
        self.check_queues(device)
        device.features = device.offered & (device.wanted_features | VHOST_USER_F_PROTOCOL_FEATURES)

    def start(self, device: Device, bases: Sequence[int]) -> None:
        device.set_features(device.features)
        device.set_mem_table(device.regions)
        for queue in range(device.n_queues):
            device.set_vring_num(queue, device.queue_size)
        for queue, base in enumerate(bases):
            device.set_vring_addr(queue)
            device.set_vring_base(queue, base)
            device.swap_call(queue)
            device.set_vring_kick(queue, device.kick_fd(queue))
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, True)

    def stop(self, device: Device, timeout_s: float | None) -> list[int]:
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, False)
            device.freeze(queue)
        return []

    def resume(self, device: Device, bases: Sequence[int]) -> None:
        for queue in range(device.n_queues):
            device.set_vring_enable(queue, True)

    def tell_memory(self, device: Device) -> None:
        # Hot-plugged memory is added with slots; nothing is ever taken away one by one.
        new = [r for r in device.regions if r not in device.told_regions]
        gone = any(r not in device.regions for r in device.told_regions)
        if gone or not device.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            super().tell_memory(device)
            return
        for region in new:
            device.add_mem_reg(region)

    def reconnect(self, device: Device) -> None:
        # It does not ask again what it took before. Without an in-flight log the rings go on behind what was
        # offered: requests that the former back-end had taken are lost.
        protocol = device.protocol
        device.forget_back_end()
        device.set_owner()
        device.offered = device.get_features()
        if device.features & VHOST_USER_F_PROTOCOL_FEATURES:
            device.set_protocol_features(protocol)
        self.start(device, [device.queue_info(queue).avail_idx for queue in range(device.n_queues)])


class Crosvm(Vmm):
    """crosvm (``devices/src/virtio/vhost_user_frontend``): asks for no acknowledgement.

    It reads tag and number of queues from the back-end (CONFIG), so with one that offers none only the rings
    can be played. Features are sent once; the driver uses as many queues as it wants of all that are there.
    """

    name = "crosvm"
    features = GUEST_FEATURES
    protocol = (
        Protocol.CONFIG | Protocol.MQ | Protocol.BACKEND_REQ | Protocol.DEVICE_STATE | Protocol.REPLY_ACK
    )
    acks = frozenset()

    def realize(self, device: Device) -> None:
        device.set_owner()
        device.offered = device.get_features()
        self.negotiate(device)
        if device.protocol & Protocol.BACKEND_REQ:
            device.set_backend_req_fd()
        self.check_queues(device)
        device.features = 0

    def start(self, device: Device, bases: Sequence[int]) -> None:
        features = device.offered & (device.wanted_features | VHOST_USER_F_PROTOCOL_FEATURES)
        if device.features != features:
            device.features = features
            device.set_features(features)
        device.set_mem_table(device.regions)
        for queue, base in enumerate(bases):
            device.set_vring_num(queue, device.queue_size)
            device.set_vring_addr(queue)
            device.set_vring_base(queue, base)
            device.swap_call(queue)
            device.set_vring_kick(queue, device.kick_fd(queue))
            device.set_vring_enable(queue, True)

    def stop(self, device: Device, timeout_s: float | None) -> list[int]:
        return self.stop_rings(device, timeout_s)


QEMU_10 = Qemu10()
QEMU_11 = Qemu11()
CLOUD_HYPERVISOR = CloudHypervisor()
CROSVM = Crosvm()
VMMS = (QEMU_10, QEMU_11, CLOUD_HYPERVISOR, CROSVM)
