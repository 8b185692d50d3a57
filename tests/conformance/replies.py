"""What comes back: once, with the right length, into writable descriptors and nowhere else."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from tests.conformance.check import check, ensure
from virtiofsd_rafs.fuse import ROOT_ID, Opcode, name_arg
from virtiofsd_rafs.fuse.structs import ReadIn
from virtiofsd_rafs.native.frontend import Load, Op, Target

if TYPE_CHECKING:
    from tests.conformance.subject import Subject

_LENGTH = "virtio 1.3, 2.7.8.2; Linux ≥ 7.1 fs/fuse/virtio_fs.c, virtio_fs_verify_response"
_LENGTH_SAYS = (
    "len is the number of bytes written, and Linux fails a reply whose len is not the out header's."
)


@check(
    "reply.used-length",
    "The used length of a reply is the length in its out header",
    source=_LENGTH,
    says=_LENGTH_SAYS,
)
def _used_length(subject: Subject) -> None:
    with subject.vm(strict=True) as vm:
        vm.serves()
        vm.collect(vm.reads(16))
        vm.collect([vm.read("big", len(vm.tree.files["big"]) - 100, 4096)])
        vm.fe.readdirplus(ROOT_ID, fh=vm.fe.open(ROOT_ID, directory=True))
        vm.fe.statfs()


@check(
    "reply.used-length-error",
    "An error reply is an out header alone, and its used length 16",
    source=_LENGTH + "; fs/fuse/dev.c, fuse_dev_do_write",
    says=_LENGTH_SAYS + " A reply with an error carries nothing else.",
)
def _used_length_error(subject: Subject) -> None:
    with subject.vm(strict=True) as vm:
        for opcode, payload in ((Opcode.READLINK, b""), (60, bytes(8)), (Opcode.MKDIR, bytes(8) + b"x\0")):
            token = vm.fe.request(opcode, vm.node("f00"), payload, 4096)
            reply = vm.fe.wait(token)
            ensure(reply.error, f"opcode {int(opcode)} on a regular file succeeded")
            ensure(reply.length == 16, f"an error reply says it has {reply.length} bytes")
            ensure(reply.used_len == 16, f"an error reply has the used length {reply.used_len}")


@check(
    "reply.used-length-forget",
    "FORGET is completed without a reply, with used length 0",
    source="virtio 1.3, 2.7.8.2, 5.11.6.2; include/uapi/linux/fuse.h, FUSE_FORGET (no reply)",
    says="A buffer without a device-writable part cannot have bytes written.",
)
def _used_length_forget(subject: Subject) -> None:
    with subject.vm() as vm:
        for name in vm.tree.small[:8]:
            reply = vm.fe.forget(vm.node(name))
            ensure(reply.used_len == 0, f"FORGET has the used length {reply.used_len}")
        vm.forget_nodes()
        vm.serves()


@check(
    "reply.exactly-once",
    "Each of 20 000 requests is answered exactly once, with its own data",
    source="virtio 1.3, 2.7.8.2, 2.7.14; fs/fuse/virtio_fs.c, virtio_fs_requests_done_work",
    says="A used element names a chain that was made available, once; unique says whose reply it is.",
)
def _exactly_once(subject: Subject) -> None:
    with subject.vm(reuse_newest=False) as vm:
        names = vm.tree.small[:8]
        targets = [
            Target(vm.node(name), len(vm.tree.files[name]), fh=vm.handle(name), content=vm.tree.root / name)
            for name in names
        ]
        lookups = [Target(ROOT_ID, name=name.encode()) for name in names]
        ops = [Op("read", targets, 4096, 2), Op("getattr", targets), Op("lookup", lookups)]
        result = vm.fe.load(Load(ops, depth=64, count=20_000))
        faults = {kind: n for kind, n in result.faults.items() if kind != "used_length"}
        ensure(not faults, f"{faults}: {'; '.join(vm.fe.fault_texts()[:2])}")
        ensure(not result.lost, f"{result.lost} requests were not answered")
        wrong = sum(op.wrong for op in result.ops)
        ensure(not wrong, f"{wrong} replies had wrong data")
        ensure(not sum(op.errors for op in result.ops), "requests failed")


@check(
    "reply.out-of-order-unique",
    "unique comes back as it was sent, whatever it is",
    source="include/uapi/linux/fuse.h, struct fuse_in_header, fuse_out_header",
    says="The reply's unique is the request's.",
)
def _unique(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        uniques = [1, 2, 0xFFFF_FFFE, 1 << 32, (1 << 63) | 6, (1 << 64) - 2]
        tokens = [vm.fe.request(Opcode.GETATTR, node, bytes(16), 104, unique=unique) for unique in uniques]
        for token, unique in zip(tokens, uniques, strict=True):
            found = vm.fe.wait(token).unique
            ensure(found == unique, f"unique {unique:#x} came back as {found:#x}")


@check(
    "reply.short-buffer",
    "A reply never exceeds the writable descriptors",
    source="virtio 1.3, 2.7.5.1, 2.7.8.2",
    says="The device writes into device-writable buffers, and no more than they hold.",
)
def _short_buffer(subject: Subject) -> None:
    with subject.vm() as vm:
        args = ReadIn(fh=vm.handle("big"), offset=0, size=65536).pack()
        for room in (0, 1, 100, 4096, 10_000):
            token = vm.fe.request(Opcode.READ, vm.node("big"), args, room)
            reply = vm.fe.wait(token)
            ensure(reply.length <= 16 + room, f"READ into {room} bytes was answered with {reply.length - 16}")
            if not reply.error:
                wanted = vm.tree.files["big"][: len(reply.data)]
                ensure(reply.data == wanted, "READ into a short buffer brought wrong bytes")
        for opcode, payload in ((Opcode.LOOKUP, name_arg("f00")), (Opcode.GETATTR, bytes(16))):
            node = ROOT_ID if opcode == Opcode.LOOKUP else vm.node("f00")
            reply = vm.fe.wait(vm.fe.request(opcode, node, payload, 8))
            ensure(reply.length <= 24, f"{opcode.name} into 8 bytes was answered with {reply.length - 16}")
        vm.serves()


@check(
    "reply.long-buffer",
    "Room that a reply does not need is left alone",
    source="virtio 1.3, 2.7.8.2; Linux ≥ 7.1 fs/fuse/virtio_fs.c, virtio_fs_verify_response",
    says="The device may write fewer bytes than there is room for, and says how many.",
)
def _long_buffer(subject: Subject) -> None:
    with subject.vm() as vm:
        for name in ("f00", "empty"):
            args = ReadIn(fh=vm.handle(name), offset=0, size=262_144).pack()
            reply = vm.fe.wait(vm.fe.request(Opcode.READ, vm.node(name), args, 262_144))
            vm.expect(reply, vm.tree.files[name])
        reply = vm.fe.wait(vm.fe.request(Opcode.GETATTR, vm.node("f00"), bytes(16), 8192))
        ensure(reply.error == 0 and reply.length == 16 + 104, f"GETATTR has {reply.length} bytes")


@check(
    "reply.no-room-for-header",
    "A request without room for an out header is completed, and nothing is written past its buffers",
    source="virtio 1.3, 2.7.8.2, 5.11.6.1",
    says="Every request has a device-writable out header; what has none cannot be answered.",
)
def _no_room_for_header(subject: Subject) -> None:
    from tests.conformance.raw import Raw

    with subject.vm() as vm:
        raw = Raw.place(vm, Opcode.GETATTR, vm.node("f00"), bytes(16), 8)
        token = raw.submit([*raw.request_pieces(), (raw.reply, 8, 1)])
        used = vm.fe.wait(token).used_len
        ensure(used <= 8, f"used length {used} of a chain with 8 writable bytes")
        raw.check_guards(8)
        vm.serves()


@check(
    "reply.errno-range",
    "Errors are negative errnos that Linux knows",
    source="fs/fuse/dev.c, fuse_dev_do_write (oh.error <= -512 || oh.error > 0 is EINVAL)",
    says="An error is 0 or between -511 and -1.",
)
def _errno_range(subject: Subject) -> None:
    with subject.vm() as vm:
        missing = vm.fe.wait(vm.fe.request(Opcode.LOOKUP, ROOT_ID, name_arg("absent"), 128))
        negative = missing.error == 0 and missing.data[:8] == bytes(8)
        ensure(negative or missing.error == errno.ENOENT, f"LOOKUP of an absent name: {missing.error}")
        for opcode in (*range(1, 54), 77, 4096):
            if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.INIT, Opcode.DESTROY):
                continue
            reply = vm.fe.wait(vm.fe.request(opcode, 0xDEAD_BEEF_DEAD, bytes(64), 4096))
            ensure(0 <= reply.error < 512, f"opcode {opcode} on an unknown node: error {-reply.error}")
