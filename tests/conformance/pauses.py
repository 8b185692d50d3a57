"""Pauses: GET_VRING_BASE under load, with requests that wait for data, and where rings go on."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from tests.conformance.check import check, checks, ensure
from virtiofsd_rafs.native.frontend import Load, LoadResult, Op, RequestLost, Target
from virtiofsd_rafs.native.frontend_vmm import VMMS

if TYPE_CHECKING:
    from tests.conformance.subject import Read, Subject, Vm
    from virtiofsd_rafs.native.frontend_vmm import Vmm

_BASE = "vhost-user.rst, VHOST_USER_GET_VRING_BASE"
_SUSPENDED = "vhost-user.rst, Suspended device state"


def _restart(vm: Vm, bases: list[int]) -> None:
    """Starts the rings at *bases*, whatever they were before."""
    vm.fe.vmm.start(vm.fe, bases)


@check(
    "pause.base-idle",
    "With nothing under way the base is the available index, which is the used index",
    source=_BASE,
    says="The base is the next entry of the available ring to be processed.",
)
def _base_idle(subject: Subject) -> None:
    with subject.vm() as vm:
        for n in (1, 5, 16):
            vm.collect(vm.reads(n))
            info = vm.fe.queue_info(1)
            bases = vm.fe.stop()
            ensure(bases[1] == info.avail_idx, f"base {bases[1]}, available index {info.avail_idx}")
            ensure(bases[1] == vm.fe.queue_info(1).used_idx, "the used index is another one")
            time.sleep(0.05)
            vm.fe.resume(bases)
        vm.serves()


@check(
    "pause.twice",
    "A ring that is stopped already answers the same base",
    source=_BASE,
    says="Stops the ring and answers its base, in whatever state it was.",
)
def _twice(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.collect(vm.reads(5))
        bases = vm.fe.stop()
        again = [vm.fe.get_vring_base(queue) for queue in range(vm.fe.n_queues)]
        ensure(again == bases, f"first {bases}, then {again}")
        vm.fe.resume(bases)
        vm.serves()


@check(
    "pause.never-started",
    "GET_VRING_BASE of a ring that never ran answers the base that was set",
    source=_BASE + ", VHOST_USER_SET_VRING_BASE",
    says="Sets and gets the base offset in the available ring.",
)
def _never_started(subject: Subject) -> None:
    with subject.vm(start=False, init=False) as vm:
        vm.fe.realize()
        vm.fe.set_features(vm.fe.features)
        vm.fe.set_vring_num(1, 64)
        vm.fe.set_vring_base(1, 77)
        base = vm.fe.get_vring_base(1)
        ensure(base == 77, f"base {base}")


@check(
    "pause.under-load",
    "A load that is paused at any moment loses nothing, and finds nothing changed",
    source=_SUSPENDED + "; " + _BASE,
    says="From the reply on the device writes no guest memory and sends no notification.",
)
def _under_load(subject: Subject) -> None:
    with subject.vm(queue_size=128) as vm:
        targets = [
            Target(vm.node(name), len(vm.tree.files[name]), fh=vm.handle(name), content=vm.tree.root / name)
            for name in vm.tree.small[:6]
        ]
        load = Load([Op("read", targets, 16384), Op("getattr", targets)], depth=32, duration_s=1.0)
        results: list[LoadResult] = []
        thread = threading.Thread(target=lambda: results.append(vm.fe.load(load)))
        thread.start()
        pauses = 0
        try:
            while thread.is_alive():
                bases = vm.fe.stop()
                vm.fe.check()
                vm.fe.resume(bases)
                pauses += 1
                time.sleep(0.005)
        finally:
            vm.fe.stop_loads()
            thread.join(subject.timeout_s * 7)
        ensure(results, "the load did not end")
        result = results[0]
        faults = {kind: n for kind, n in result.faults.items() if kind != "used_length"}
        ensure(not faults, f"{faults} in {pauses} pauses: {'; '.join(vm.fe.fault_texts()[:1])}")
        ensure(not result.lost, f"{result.lost} requests were lost in {pauses} pauses")
        ensure(not result.total.errors and not result.total.wrong, "requests failed")
        vm.serves()


@checks(
    "pause.waiting-",
    "Paused in the order of {} while requests wait for data, it answers at once and keeps still",
    {vmm.name: vmm for vmm in VMMS},
    source=_SUSPENDED + "; " + _BASE + "; QEMU hw/virtio/vhost.c, vhost_virtqueue_stop",
    says="Stopping a ring is part of a VM's pause: it waits for nothing, and nothing is written afterwards.",
    fresh=True,
)
def _waiting(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm, vm.stall() as release:
        reads = vm.cold_reads(24)
        waiting = vm.unanswered(reads)
        ensure(waiting, "the check itself is wrong: no request waits for data")
        bases = vm.fe.stop(subject.timeout_s)
        release()
        time.sleep(0.3)
        vm.fe.check()
        vm.fe.resume(bases)
        vm.collect(reads)


@check(
    "pause.waiting-long",
    "Requests that wait for data survive several pauses before the data come",
    source=_SUSPENDED,
    says="What was taken from the ring and not answered is answered after the restart, once.",
    fresh=True,
)
def _waiting_long(subject: Subject) -> None:
    with subject.vm() as vm, vm.stall() as release:
        reads = vm.cold_reads(24)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        for _ in range(10):
            vm.fe.resume(vm.fe.stop(subject.timeout_s))
        vm.serves()
        release()
        vm.collect(reads)


@check(
    "pause.other-base",
    "A ring that is made anew goes on at whatever base it is given",
    source=_BASE + ", VHOST_USER_SET_VRING_BASE; virtio 1.3, 2.6.1",
    says="The base is the front-end's to set; a new driver begins where it says.",
)
def _other_base(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.collect(vm.reads(9))
        for base in (0, 1000, 65535, 9):
            vm.fe.stop()
            for queue in range(vm.fe.n_queues):
                vm.fe.make_queue(queue, base=base)
            _restart(vm, [base] * vm.fe.n_queues)
            vm.serves()
            vm.collect(vm.reads(9))


@check(
    "pause.other-base-waiting",
    "At another base the requests of the former rings are forgotten: no late write",
    source=_SUSPENDED + "; vhost-user.rst, VHOST_USER_SET_VRING_BASE",
    says="After a restart elsewhere the buffers of former requests are the guest's own again.",
    fresh=True,
)
def _other_base_waiting(subject: Subject) -> None:
    with subject.vm() as vm, vm.stall() as release:
        reads = vm.cold_reads(16)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        vm.fe.stop(subject.timeout_s)
        for queue in range(vm.fe.n_queues):
            vm.fe._control(queue, 6, 500)
        _restart(vm, [500] * vm.fe.n_queues)
        vm.serves()
        release()
        time.sleep(0.3)
        vm.fe.check()
        vm.collect(vm.cold_reads(16))


@check(
    "pause.other-size",
    "Stopped, a ring may be given another size and place",
    source="vhost-user.rst, VHOST_USER_SET_VRING_NUM, VHOST_USER_SET_VRING_ADDR",
    says="Size and addresses are set before a start, each time.",
)
def _other_size(subject: Subject) -> None:
    with subject.vm(queue_size=256) as vm:
        vm.serves()
        for size in (16, 1024, 4):
            vm.fe.stop()
            vm.fe.queue_size = size
            for queue in range(vm.fe.n_queues):
                vm.fe.make_queue(queue)
            _restart(vm, [0] * vm.fe.n_queues)
            vm.collect(vm.reads(size))
            vm.serves()


@check(
    "pause.call-swapped",
    "The call descriptor is swapped under load, and no interrupt is lost",
    source="vhost-user.rst, Ring states; QEMU hw/virtio/virtio-pci.c, virtio_pci_set_guest_notifiers",
    says="While rings run the back-end must support changing some configuration on the fly.",
)
def _call_swapped(subject: Subject) -> None:
    with subject.vm(queue_size=128) as vm:
        for _ in range(40):
            reads = vm.reads(8)
            vm.fe.swap_call(1)
            vm.collect(reads)
        vm.serves()


@check(
    "pause.call-swapped-waiting",
    "Requests that waited for data are signalled over the call descriptor that counts then",
    source="vhost-user.rst, Ring states; QEMU hw/virtio/virtio-pci.c, virtio_pci_set_guest_notifiers",
    says="While rings run the back-end must support changing some configuration on the fly.",
    fresh=True,
)
def _call_swapped_waiting(subject: Subject) -> None:
    with subject.vm() as vm, vm.stall() as release:
        reads = vm.cold_reads(16)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        for _ in range(20):
            vm.fe.swap_call(1)
        release()
        vm.collect(reads)


@check(
    "pause.disabled-waiting",
    "A ring that is disabled while requests wait for data answers them once it is enabled again",
    source="vhost-user.rst, Ring states; Cloud Hypervisor vhost_user_common, pause",
    says="Disabled rings have no side effects; Cloud Hypervisor pauses a VM by this alone.",
    fresh=True,
)
def _disabled_waiting(subject: Subject) -> None:
    with subject.vm() as vm, vm.stall() as release:
        reads = vm.cold_reads(16)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        vm.fe.set_vring_enable(1, False)
        vm.fe.get_features()
        vm.fe.freeze(1)
        release()
        time.sleep(0.3)
        vm.fe.thaw(1)
        vm.check_faults()
        vm.fe.set_vring_enable(1, True)
        vm.collect(reads)


@check(
    "pause.kick-swapped",
    "The kick descriptor is swapped while the ring runs",
    source="vhost-user.rst, Ring states, VHOST_USER_SET_VRING_KICK",
    says="While rings run the back-end must support changing some configuration on the fly.",
)
def _kick_swapped(subject: Subject) -> None:
    with subject.vm(queue_size=128) as vm:
        vm.serves()
        fds = []
        for _ in range(10):
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            vm.fe.set_vring_kick(1, fds[-1])
            vm.fe.set_vring_kick(1, vm.fe.kick_fd(1))
            vm.fe.kick(1)
            vm.serves()
        for fd in fds:
            os.close(fd)


def lost(vm: Vm, reads: list[Read]) -> int:
    """How many of *reads* have no answer and never will; the others must be right."""
    n = 0
    for token, want in reads:
        try:
            vm.expect(vm.fe.wait(token), want)
        except RequestLost:
            n += 1
    return n
