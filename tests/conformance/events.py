"""Notifications: who wants to be told, and when."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from tests.conformance.check import NotOffered, check, ensure
from tests.conformance.rings import start_at
from tests.conformance.subject import SETTLE_S
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.vhost_user import GUEST_FEATURES, Virtio

if TYPE_CHECKING:
    from tests.conformance.subject import Subject, Vm

_USED_EVENT = "virtio 1.3, 2.7.7.2"
_AVAIL_EVENT = "virtio 1.3, 2.7.10.2"


class _Bell:
    """A call eventfd of the check's own on queue 1, and the driver's wishes written by hand."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.node = vm.node("f00")
        vm.fe.set_vring_call(1, self.fd)
        vm.fe.get_features()
        # The old descriptor may still be signalled for what came before.
        time.sleep(0.02)
        self.rings()

    def rings(self) -> int:
        """How often it has rung since the last look (at least: signals add up)."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def used_idx(self) -> int:
        return self.vm.fe.queue_info(1).used_idx

    def want_at(self, index: int) -> None:
        """Writes used_event."""
        avail = self.vm.fe.queue_info(1).gpas[1]
        self.vm.fe.write_memory(avail + 4 + 2 * self.vm.fe.queue_size, struct.pack("<H", index & 0xFFFF))

    def want_flags(self, flags: int) -> None:
        """Writes the available ring's flags."""
        self.vm.fe.write_memory(self.vm.fe.queue_info(1).gpas[1], struct.pack("<H", flags))

    def ask(self, n: int) -> None:
        """*n* requests one after the other, without looking at interrupts."""
        for _ in range(n):
            before = self.used_idx()
            self.vm.fe.request(Opcode.GETATTR, self.node, bytes(16), 104)
            deadline = time.monotonic() + self.vm.subject.timeout_s
            while self.used_idx() == before:
                ensure(time.monotonic() < deadline, "a request was not answered")
                time.sleep(0.0005)

    def rings_soon(self) -> bool:
        deadline = time.monotonic() + self.vm.subject.timeout_s
        while time.monotonic() < deadline:
            if self.rings():
                return True
            time.sleep(0.001)
        return False

    def close(self) -> None:
        """Gives the queue an eventfd of the front-end's again and takes what has come."""
        self.vm.fe.swap_call(1)
        # Until this is answered an interrupt may still go where nobody looks.
        self.vm.fe.get_features()
        self.vm.fe.poll(1)
        os.close(self.fd)


def _used_event(subject: Subject, base: int, *, distance: int, n: int) -> None:
    with subject.vm(start=False, init=False, queue_size=64) as vm:
        start_at(vm, base)
        if not vm.fe.features & Virtio.EVENT_IDX:
            raise NotOffered("EVENT_IDX")
        bell = _Bell(vm)
        event = bell.used_idx() + distance
        bell.want_at(event)
        bell.ask(distance)
        time.sleep(SETTLE_S)
        early = bell.rings()
        bell.ask(n - distance)
        ensure(bell.rings_soon(), f"no interrupt although the used index passed used_event ({event})")
        ensure(not early, f"an interrupt came {distance} or fewer before used_event ({event})")
        bell.close()
        vm.serves()


@check(
    "event.used-event",
    "An interrupt comes when the used index passes used_event, and not before",
    source=_USED_EVENT,
    says="MUST notify when it has filled the entry at used_event; otherwise it SHOULD NOT.",
)
def _at_used_event(subject: Subject) -> None:
    _used_event(subject, 0, distance=5, n=6)


@check(
    "event.used-event-wrap",
    "used_event holds across the wrap of the index",
    source=_USED_EVENT,
    says="Comparison is by 16 bit arithmetic.",
)
def _used_event_wrap(subject: Subject) -> None:
    # INIT and the check's own LOOKUP come first; used_event is 1, five requests further on.
    _used_event(subject, 65536 - 6, distance=5, n=6)


@check(
    "event.used-event-passed",
    "No interrupt comes for an event index that was passed before",
    source=_USED_EVENT,
    says="The device SHOULD NOT notify when used_event was not among the entries just added.",
)
def _used_event_passed(subject: Subject) -> None:
    with subject.vm(queue_size=64) as vm:
        if not vm.fe.features & Virtio.EVENT_IDX:
            raise NotOffered("EVENT_IDX")
        bell = _Bell(vm)
        bell.want_at(bell.used_idx() - 1)
        bell.ask(10)
        time.sleep(SETTLE_S)
        rang = bell.rings()
        bell.want_at(bell.used_idx())
        bell.ask(1)
        ensure(bell.rings_soon(), "no interrupt at used_event")
        ensure(not rang, f"{rang} interrupts that nobody wanted")
        bell.close()
        vm.serves()


@check(
    "event.flags-ignored",
    "With EVENT_IDX the available ring's flags mean nothing",
    source=_USED_EVENT,
    says="With VIRTIO_F_EVENT_IDX the device MUST ignore the lower bit of flags.",
)
def _flags_ignored(subject: Subject) -> None:
    with subject.vm(queue_size=64) as vm:
        if not vm.fe.features & Virtio.EVENT_IDX:
            raise NotOffered("EVENT_IDX")
        bell = _Bell(vm)
        bell.want_flags(1)
        bell.want_at(bell.used_idx())
        bell.ask(1)
        ensure(bell.rings_soon(), "NO_INTERRUPT in flags kept the interrupt at used_event back")
        bell.want_flags(0)
        bell.close()
        vm.serves()


@check(
    "event.no-interrupt-flag",
    "Without EVENT_IDX the driver's NO_INTERRUPT is honoured, and taken back",
    source=_USED_EVENT,
    says="flags 1: the device SHOULD NOT notify. flags 0: it MUST notify.",
)
def _no_interrupt(subject: Subject) -> None:
    with subject.vm(queue_size=64, features=int(GUEST_FEATURES & ~Virtio.EVENT_IDX)) as vm:
        bell = _Bell(vm)
        bell.want_flags(1)
        bell.ask(5)
        time.sleep(SETTLE_S)
        rang = bell.rings()
        bell.want_flags(0)
        bell.ask(1)
        ensure(bell.rings_soon(), "no interrupt with flags 0")
        ensure(not rang, f"{rang} interrupts in spite of NO_INTERRUPT")
        bell.close()
        vm.serves()


@check(
    "event.avail-event-idle",
    "An idle device asks for a kick at the very next request",
    source=_AVAIL_EVENT,
    says="The driver kicks only when it passes avail_event; else it MUST NOT be relied upon to kick.",
)
def _avail_event_idle(subject: Subject) -> None:
    with subject.vm(queue_size=64) as vm:
        if not vm.fe.features & Virtio.EVENT_IDX:
            raise NotOffered("EVENT_IDX")
        for _ in range(5):
            vm.collect(vm.reads(7))
            time.sleep(SETTLE_S)
            info = vm.fe.queue_info(1)
            at = info.gpas[2] + 4 + 8 * vm.fe.queue_size
            event = struct.unpack("<H", vm.fe.read_memory(at, 2))[0]
            ensure(event == info.avail_idx, f"avail_event is {event}, the next index {info.avail_idx}")


@check(
    "event.no-notify-flag",
    "Without EVENT_IDX an idle device has NO_NOTIFY off",
    source=_AVAIL_EVENT,
    says="With flags 1 the driver does not kick; 0 tells it that it must.",
)
def _no_notify(subject: Subject) -> None:
    with subject.vm(queue_size=64, features=int(GUEST_FEATURES & ~Virtio.EVENT_IDX)) as vm:
        for _ in range(5):
            vm.collect(vm.reads(7))
            time.sleep(SETTLE_S)
            flags = struct.unpack("<H", vm.fe.read_memory(vm.fe.queue_info(1).gpas[2], 2))[0]
            ensure(not flags & 1, "an idle device has NO_NOTIFY set")


@check(
    "event.spurious-kicks",
    "Kicks without requests do no harm",
    source="virtio 1.3, 2.3; 2.7.13.4",
    says="A driver may notify needlessly; there is nothing to process then.",
)
def _spurious(subject: Subject) -> None:
    with subject.vm() as vm:
        for _ in range(200):
            vm.fe.kick(0)
            vm.fe.kick(1)
        vm.serves()
        for _ in range(20):
            vm.fe.kick(1)
            vm.serves()


@check(
    "event.one-kick-for-many",
    "One kick is enough for all requests that are there",
    source="virtio 1.3, 2.7.13.4; fs/fuse/virtio_fs.c, virtqueue_kick_prepare",
    says="The driver notifies once for a batch.",
)
def _one_kick(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        vm.fe.set_vring_enable(1, False)
        vm.fe.get_features()
        base = vm.fe.get_vring_base(1)
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Nobody listens to the front-end's own kicks now.
        tokens = [vm.fe.request(Opcode.GETATTR, node, bytes(16), 104) for _ in range(200)]
        vm.fe.set_vring_num(1, vm.fe.queue_size)
        vm.fe.set_vring_base(1, base)
        vm.fe.set_vring_addr(1)
        vm.fe.swap_call(1)
        vm.fe.set_vring_kick(1, fd)
        vm.fe.set_vring_enable(1, True)
        os.eventfd_write(fd, 1)
        ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")
        os.close(fd)


@check(
    "event.kick-in-between",
    "A request that comes while the device falls asleep is not overlooked",
    source="virtio 1.3, 2.7.10.2, 2.7.13.4.1",
    says="After it has asked for a kick, the device looks at the index once more.",
)
def _kick_in_between(subject: Subject) -> None:
    with subject.vm(queue_size=64) as vm:
        node = vm.node("f00")
        for i in range(3000):
            # From no pause at all up to some hundred microseconds.
            end = time.perf_counter() + (i % 30) * 1e-5
            while time.perf_counter() < end:
                pass
            ensure(vm.fe.wait(vm.fe.request(Opcode.GETATTR, node, bytes(16), 104)).error == 0, "failed")
