"""Sessions: reset, reconnect, FUSE_INIT once more, and FUSE versions."""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING

from tests.conformance.check import NotOffered, check, checks, ensure
from tests.conformance.pauses import lost
from virtiofsd_rafs.errors import PeerError, SocketSetupError
from virtiofsd_rafs.fuse import ROOT_ID, Init, Opcode
from virtiofsd_rafs.fuse.structs import InitIn, InitOut
from virtiofsd_rafs.native.frontend import GUEST_INIT, FrontendTimeout
from virtiofsd_rafs.native.vhost_user import Protocol

if TYPE_CHECKING:
    from tests.conformance.subject import Subject

_RESET = "vhost-user.rst, VHOST_USER_RESET_DEVICE"
_INIT = "include/uapi/linux/fuse.h; fs/fuse/inode.c, process_init_reply"


@check(
    "reset.device",
    "RESET_DEVICE disables the rings and forgets the driver",
    source=_RESET,
    says="Disables all rings and resets all internal state to the initial one, ready to be set up again.",
)
def _reset(subject: Subject) -> None:
    with subject.vm() as vm:
        if not vm.fe.protocol & Protocol.RESET_DEVICE:
            raise NotOffered("RESET_DEVICE")
        node = vm.node("f00")
        vm.fe.reset_device()
        vm.fe.get_features()
        token = vm.fe.request(Opcode.GETATTR, node, bytes(16), 104)
        vm.fe.kick(1)
        time.sleep(0.15)
        ensure(token.id not in vm.fe.poll(1), "a ring was served after RESET_DEVICE")
        vm.fe.driver_ok()
        vm.forget_nodes()
        vm.fe.init()
        vm.serves()


@check(
    "reset.waiting",
    "A reset while requests wait for data forgets them: no late write",
    source=_RESET,
    says="A device that was reset knows nothing of former requests; their buffers are the guest's.",
    fresh=True,
)
def _reset_waiting(subject: Subject) -> None:
    with subject.vm() as vm, vm.stall() as release:
        reads = vm.cold_reads(16)
        ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
        vm.fe.reset()
        release()
        vm.forget_nodes()
        vm.fe.init()
        ensure(lost(vm, reads) > 0, "the check itself is wrong: all requests were answered before")
        vm.collect(vm.cold_reads(16))
        time.sleep(0.2)


@check(
    "reset.under-load",
    "Twenty resets with requests under way, each followed by a boot",
    source=_RESET,
    says="Ready to be reinitialised, at any moment.",
)
def _reset_under_load(subject: Subject) -> None:
    with subject.vm(queue_size=128) as vm:
        for _ in range(20):
            reads = vm.reads(32)
            vm.fe.reset()
            lost(vm, reads)
            vm.forget_nodes()
            vm.fe.init()
        vm.serves()


@check(
    "connect.again",
    "When a VM has gone another one may connect",
    source="vhost-user.rst, Backend program conventions; Cloud Hypervisor (a reboot is a new connection)",
    says="Nothing says so for back-ends that serve one VM: those end, which is not offered here.",
)
def _again(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.serves()
    for _ in range(2):
        try:
            with subject.vm() as vm:
                vm.serves()
        except FrontendTimeout:
            raise
        except PeerError as e:
            # One that ends may be connected to, and close at once.
            if "closed" not in str(e):
                raise
            raise NotOffered("it serves one connection") from e
        except SocketSetupError as e:
            raise NotOffered("it serves one connection") from e


@check(
    "connect.gone-under-load",
    "A VM that goes away with requests under way leaves a back-end that ends cleanly or serves the next one",
    source="vhost-user.rst, Communication",
    says="A connection may be closed at any time.",
)
def _gone(subject: Subject) -> None:
    for _ in range(3):
        try:
            with subject.vm(queue_size=128) as vm:
                vm.reads(64)
                vm.fe.detach()
        except SocketSetupError as e:
            raise NotOffered("it serves one connection") from e
        except PeerError:
            pass
    try:
        with subject.vm() as vm:
            vm.serves()
    except SocketSetupError as e:
        raise NotOffered("it serves one connection") from e


@checks(
    "init.minor-",
    "A guest with FUSE 7.{} is served",
    {str(minor): minor for minor in range(27, 46)},
    source=_INIT,
    says="Both sides use the smaller minor; the reply has 64 bytes from 7.23 on, attributes 88, entries 128.",
)
def _minor(subject: Subject, case: int) -> None:
    with subject.vm(init=False) as vm:
        flags = GUEST_INIT if case >= 36 else Init(GUEST_INIT & 0x3FFF_FFFF)
        request = InitIn(
            major=7, minor=case, max_readahead=131072, flags=flags & 0xFFFFFFFF, flags2=flags >> 32
        ).pack()
        token = vm.fe.request(Opcode.INIT, 0, request if case >= 36 else request[:16], 64)
        reply = vm.fe.wait(token)
        ensure(not reply.error, f"FUSE_INIT failed with errno {reply.error}")
        ensure(len(reply.data) == 64, f"the reply to FUSE_INIT has {len(reply.data)} bytes")
        out = InitOut.unpack(reply.data)
        ensure(out.major == 7, f"major {out.major}")
        ensure(out.minor >= 27, f"minor {out.minor}")
        ensure(out.max_write >= 4096, f"max_write {out.max_write}")
        ensure(not out.flags & ~flags & 0xFFFFFFFF, "flags that were not offered")
        ensure(case >= 36 or not out.flags2, "flags2 for a guest that has none")
        vm.serves()
        entry = vm.fe.wait(vm.fe.request(Opcode.LOOKUP, ROOT_ID, b"f00\0", 128))
        ensure(len(entry.data) == 128, f"an entry has {len(entry.data)} bytes")
        attr = vm.fe.wait(vm.fe.request(Opcode.GETATTR, ROOT_ID, bytes(16), 104))
        ensure(len(attr.data) == 104, f"attributes have {len(attr.data)} bytes")


@check(
    "init.major-newer",
    "A guest with a newer major is told of major 7, and asks again",
    source=_INIT.replace("process_init_reply", "fuse_send_init") + "; Documentation of FUSE_INIT",
    says="If the kernel's major is larger the daemon answers with its own, and the kernel sends INIT again.",
)
def _major_newer(subject: Subject) -> None:
    with subject.vm(init=False) as vm:
        request = InitIn(major=8, minor=0, max_readahead=4096).pack()
        reply = vm.fe.wait(vm.fe.request(Opcode.INIT, 0, request, 64))
        ensure(not reply.error, f"FUSE_INIT with major 8 failed with errno {reply.error}")
        major = struct.unpack_from("<I", reply.data)[0]
        ensure(major == 7, f"the daemon's major is {major}")
        ensure(vm.fe.init().major == 7, "the second INIT failed")
        vm.serves()


@check(
    "init.major-older",
    "A guest with an older major is refused with EPROTO",
    source="include/uapi/linux/fuse.h, Protocol changelog; libfuse lib/fuse_lowlevel.c, do_init",
    says="A daemon that does not speak the kernel's major answers EPROTO.",
)
def _major_older(subject: Subject) -> None:
    with subject.vm(init=False) as vm:
        request = InitIn(major=6, minor=0, max_readahead=4096).pack()
        reply = vm.fe.wait(vm.fe.request(Opcode.INIT, 0, request, 64))
        ensure(reply.error == errno.EPROTO, f"FUSE_INIT with major 6: errno {reply.error}")
        ensure(vm.fe.init().major == 7, "the next INIT failed")
        vm.serves()


@check(
    "init.again",
    "A second FUSE_INIT without DESTROY begins a new session",
    source="fs/fuse/virtio_fs.c, virtio_fs_get_tree (a kexec'ed or crashed guest mounts anew)",
    says="Who mounts sends INIT; a guest that crashed sends no DESTROY before.",
)
def _init_again(subject: Subject) -> None:
    with subject.vm() as vm:
        for _ in range(3):
            vm.serves()
            ensure(vm.fe.init().major == 7, "the second INIT failed")
            vm.forget_nodes()
        vm.serves()


@check(
    "init.destroy",
    "DESTROY is answered, and INIT begins a new session",
    source="fs/fuse/inode.c, fuse_send_destroy; include/uapi/linux/fuse.h, FUSE_DESTROY",
    says="virtio-fs waits for the reply to DESTROY when it unmounts; then it may mount again.",
)
def _destroy(subject: Subject) -> None:
    with subject.vm() as vm:
        for _ in range(3):
            vm.serves()
            reply = vm.fe.wait(vm.fe.request(Opcode.DESTROY, 0, b"", 0))
            ensure(reply.error == 0, f"DESTROY failed with errno {reply.error}")
            ensure(vm.fe.init().major == 7, "INIT after DESTROY failed")
            vm.forget_nodes()
        vm.serves()


@check(
    "init.missing",
    "A request before INIT is answered, and does no harm",
    source="fs/fuse/dev.c, fuse_get_req (the kernel blocks requests until INIT is answered)",
    says="Linux never sends one; a device must live with any driver.",
)
def _init_missing(subject: Subject) -> None:
    with subject.vm(init=False) as vm:
        for opcode, payload in ((Opcode.GETATTR, bytes(16)), (Opcode.LOOKUP, b"f00\0"), (Opcode.STATFS, b"")):
            reply = vm.fe.wait(vm.fe.request(opcode, ROOT_ID, payload, 128))
            ensure(0 <= reply.error < 512, f"{opcode.name} before INIT: error {reply.error}")
        ensure(vm.fe.init().major == 7, "INIT after other requests failed")
        vm.serves()
