"""Memory tables that change while requests run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conformance.check import NotOffered, check, checks, ensure
from virtiofsd_rafs.native.frontend_link import MiB
from virtiofsd_rafs.native.frontend_vmm import CROSVM, VMMS
from virtiofsd_rafs.native.vhost_user import Protocol, Request, single_region

if TYPE_CHECKING:
    from tests.conformance.subject import Subject
    from virtiofsd_rafs.native.frontend_vmm import Vmm

_ADD = "vhost-user.rst, VHOST_USER_ADD_MEM_REG, VHOST_USER_REM_MEM_REG"
_TABLE = "vhost-user.rst, Memory access, VHOST_USER_SET_MEM_TABLE"


def _needs_slots(protocol: Protocol) -> None:
    if not protocol & Protocol.CONFIGURE_MEM_SLOTS:
        raise NotOffered("CONFIGURE_MEM_SLOTS")


@check(
    "memory.slots-under-load",
    "Regions come and go while requests run in others",
    source=_ADD,
    says="A region is mapped and unmapped; nothing else changes.",
)
def _slots_under_load(subject: Subject) -> None:
    with subject.vm() as vm:
        _needs_slots(vm.fe.protocol)
        for i in range(20):
            reads = vm.reads(12)
            region = vm.plug((1 << 36) + (i << 24), 1 << 20)
            vm.collect([vm.read("f00", region=region)])
            vm.unplug(region)
            vm.collect(reads)


@check(
    "memory.many-slots",
    "As many regions as the back-end promises, up to 64, can be used",
    source=_ADD + ", VHOST_USER_GET_MAX_MEM_SLOTS",
    says="The reply is how many regions the back-end can hold.",
)
def _many_slots(subject: Subject) -> None:
    with subject.vm() as vm:
        _needs_slots(vm.fe.protocol)
        n = min(64, vm.fe.get_max_mem_slots()) - len(vm.fe.regions)
        gpas = [(1 << 36) + (i << 24) for i in range(n)]
        for gpa in gpas:
            vm.plug(gpa, 1 << 18)
        handle = vm.handle("f00")
        vm.collect([vm.read("f00", region=gpa, fh=handle) for gpa in gpas])
        for gpa in gpas[::2]:
            vm.unplug(gpa)
        vm.collect([vm.read("f00", region=gpa, fh=handle) for gpa in gpas[1::2]])


@check(
    "memory.table-under-load",
    "SET_MEM_TABLE with more, less and the same regions while requests run",
    source=_TABLE,
    says="The table is replaced; what both have in common stays usable.",
)
def _table_under_load(subject: Subject) -> None:
    with subject.vm(vmm=CROSVM) as vm:
        for _ in range(10):
            reads = vm.reads(12)
            region = vm.plug(1 << 36, 1 << 20)
            reads.append(vm.read("f00", region=region))
            vm.fe.set_mem_table(vm.fe.regions)
            vm.collect(reads)
            reads = vm.reads(12)
            vm.unplug(region)
            vm.collect(reads)


@check(
    "memory.table-stopped",
    "A new table while the rings are stopped, as at every start of Cloud Hypervisor and crosvm",
    source=_TABLE,
    says="The front-end sends the table at any time; rings that start afterwards lie in the new one.",
)
def _table_stopped(subject: Subject) -> None:
    with subject.vm(vmm=CROSVM) as vm:
        for i in range(3):
            reads = vm.reads(12)
            bases = vm.fe.stop()
            region = vm.plug((1 << 36) + (i << 24), 1 << 20)
            vm.fe.check()
            vm.fe.resume(bases)
            vm.collect([*reads, vm.read("f00", region=region)])


@check(
    "memory.table-refused",
    "A region that overlaps one that is there is refused, and the old ones stay",
    source=_ADD + "; Memory access",
    says="An address maps to the region that contains it, so no two may contain it.",
)
def _overlap(subject: Subject) -> None:
    with subject.vm() as vm:
        _needs_slots(vm.fe.protocol)
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        region = vm.fe.regions[-1]
        reply = vm.fe.send_message(
            Request.ADD_MEM_REG, single_region(region.describe()), [region.fd], need_reply=True
        )
        ensure(reply is not None and reply.u64() != 0, "the same region was added twice")
        vm.serves()


@check(
    "memory.unknown-region",
    "Removing a region that is not there is refused, and nothing else happens",
    source=_ADD,
    says="The region is identified by guest address, user address and size.",
)
def _unknown_region(subject: Subject) -> None:
    with subject.vm() as vm:
        _needs_slots(vm.fe.protocol)
        if not vm.fe.protocol & Protocol.REPLY_ACK:
            raise NotOffered("REPLY_ACK")
        vm.plug(1 << 36, MiB)
        region = next(r for r in vm.fe.regions if r.gpa == 1 << 36)
        vm.unplug(region.gpa)
        reply = vm.fe.send_message(Request.REM_MEM_REG, single_region(region.describe()), need_reply=True)
        ensure(reply is not None and reply.u64() != 0, "a region was removed twice")
        vm.serves()


@check(
    "memory.replaced",
    "A region that is replaced by another file at the same address is read from there",
    source=_ADD,
    says="The new mapping counts from the acknowledgement on.",
)
def _replaced(subject: Subject) -> None:
    with subject.vm() as vm:
        _needs_slots(vm.fe.protocol)
        for _ in range(5):
            region = vm.plug(1 << 36, MiB)
            vm.collect([vm.read("big", 4096, 65536, region=region)])
            vm.unplug(region)


@checks(
    "memory.waiting-",
    "Memory comes and goes while requests wait for data, in the order of {}",
    {vmm.name: vmm for vmm in VMMS},
    source=_ADD + ", VHOST_USER_SET_MEM_TABLE",
    says="Buffers in regions that stay are good for as long as the request takes.",
    fresh=True,
)
def _waiting(subject: Subject, case: Vmm) -> None:
    with subject.vm(vmm=case) as vm, vm.stall() as release:
        reads = vm.cold_reads(16)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        for i in range(3):
            region = vm.plug((1 << 36) + (i << 24), 1 << 20)
            vm.collect([vm.read("f00", region=region)])
            if i < 2:
                vm.unplug(region)
        release()
        vm.collect(reads)
