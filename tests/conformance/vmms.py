"""The lives of VMs, each in the message order of its VMM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conformance.check import checks, ensure
from virtiofsd_rafs.native.frontend_vmm import VMMS

if TYPE_CHECKING:
    from tests.conformance.subject import Subject
    from virtiofsd_rafs.native.frontend_vmm import Vmm

_BY_NAME = {vmm.name: vmm for vmm in VMMS}
_SOURCES = "QEMU hw/virtio/vhost.c, vhost-user-fs.c; Cloud Hypervisor vhost_user; crosvm vhost_user_frontend"


@checks(
    "vmm.start-",
    "A VM boots in the message order of {}",
    _BY_NAME,
    source="vhost-user.rst, Communication, Ring states; " + _SOURCES,
    says="Messages have no order but that of their meaning; a ring starts with its kick, enabled or not.",
)
def _starts(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm:
        vm.serves()
        vm.collect(vm.reads(16))
        vm.fe.forget(vm.node("f00"))


@checks(
    "vmm.pause-",
    "A VM that is paused and goes on in the message order of {} loses nothing",
    _BY_NAME,
    source="vhost-user.rst, Suspended device state; " + _SOURCES,
    says="A suspended device writes no guest memory; it goes on where it was stopped.",
)
def _pauses(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm:
        for _ in range(5):
            reads = vm.reads(24)
            bases = vm.fe.stop()
            vm.fe.check()
            vm.fe.resume(bases)
            vm.collect(reads)
        vm.serves()


@checks(
    "vmm.memory-",
    "Memory is plugged in and out in the message order of {}",
    _BY_NAME,
    source="vhost-user.rst, Memory access, VHOST_USER_SET_MEM_TABLE, VHOST_USER_ADD_MEM_REG; " + _SOURCES,
    says="The table may change while rings run; addresses of what stays are still good.",
)
def _memory(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm:
        for _ in range(3):
            reads = vm.reads(16)
            region = vm.plug(1 << 36, 2 << 20)
            vm.collect(reads)
            vm.collect([vm.read("big", 65536, 65536, region=region)])
            reads = vm.reads(16)
            vm.unplug(region)
            vm.collect(reads)


@checks(
    "vmm.reset-",
    "A guest that resets its device in the message order of {} boots anew",
    _BY_NAME,
    source="virtio 1.3, 2.1, 2.4; vhost-user.rst, VHOST_USER_RESET_DEVICE; " + _SOURCES,
    says="A reset device has forgotten its driver; the next one sets it up from nothing.",
)
def _resets(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm:
        for _ in range(2):
            vm.reads(16)
            vm.fe.reset()
            vm.forget_nodes()
            ensure(vm.fe.init().major == 7, "FUSE_INIT after the reset failed")
            vm.serves()
