"""Every FUSE opcode on a read-only tree: known and unknown, whole and cut short."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import attrs

from tests.conformance.check import check, checks, ensure
from virtiofsd_rafs.fuse import ROOT_ID, Opcode, name_arg
from virtiofsd_rafs.fuse.structs import (
    AccessIn,
    AttrOut,
    CopyFileRangeIn,
    CreateIn,
    EntryOut,
    FallocateIn,
    FlushIn,
    FsyncIn,
    GetxattrIn,
    InterruptIn,
    LinkIn,
    LseekIn,
    LseekOut,
    MkdirIn,
    MknodIn,
    OpenIn,
    OpenOut,
    ReadIn,
    ReleaseIn,
    Rename2In,
    RenameIn,
    SetattrIn,
    SetupmappingIn,
    SetxattrIn,
    StatfsOut,
    SyncfsIn,
    WriteIn,
    WriteOut,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.subject import Subject, Vm

E = errno
_REFUSED = frozenset({E.EROFS, E.EPERM, E.EACCES, E.ENOSYS, E.EOPNOTSUPP, E.EBADF})
"""How a change of a read-only tree may be refused. EBADF: there is no handle that could write."""
_LACKING = frozenset({E.ENOSYS, E.EOPNOTSUPP, E.ENOTTY, E.EINVAL, E.EBADF})
_STAYS = "stays away for good: the kernel remembers ENOSYS"


@attrs.frozen
class _Case:
    """A whole request and what may be answered.

    ``allowed`` has the errnos, 0 for success. ``payload`` is called with the VM and a handle for the node.
    """

    opcode: int
    payload: Callable[[Vm, int], bytes] = lambda _vm, _fh: b""
    allowed: frozenset[int] = frozenset({0})
    node: str = "f00"
    out_size: int = 4096
    size: int | None = None
    """Bytes of a successful reply's body."""


def _fixed(data: bytes) -> Callable[[Vm, int], bytes]:
    return lambda _vm, _fh: data


_OK = frozenset({0})
_NAME = name_arg("new")
_CASES = [
    _Case(Opcode.LOOKUP, _fixed(name_arg("f00")), node="/", size=EntryOut.SIZE),
    _Case(Opcode.GETATTR, _fixed(bytes(16)), size=AttrOut.SIZE),
    _Case(Opcode.SETATTR, lambda _vm, fh: SetattrIn(valid=1, fh=fh, mode=0o600).pack(), _REFUSED),
    _Case(Opcode.READLINK, node="link"),
    _Case(Opcode.SYMLINK, _fixed(_NAME + name_arg("target")), _REFUSED, node="/"),
    _Case(Opcode.MKNOD, _fixed(MknodIn(mode=0o100644).pack() + _NAME), _REFUSED, node="/"),
    _Case(Opcode.MKDIR, _fixed(MkdirIn(mode=0o755).pack() + _NAME), _REFUSED, node="/"),
    _Case(Opcode.UNLINK, _fixed(name_arg("f01")), _REFUSED, node="/"),
    _Case(Opcode.RMDIR, _fixed(name_arg("many")), _REFUSED | {E.ENOTEMPTY}, node="/"),
    _Case(Opcode.RENAME, _fixed(RenameIn(newdir=1).pack() + name_arg("f01") + _NAME), _REFUSED, node="/"),
    _Case(Opcode.LINK, lambda vm, _: LinkIn(oldnodeid=vm.node("f00")).pack() + _NAME, _REFUSED, node="/"),
    _Case(Opcode.OPEN, _fixed(OpenIn().pack()), _OK | {E.ENOSYS}, size=OpenOut.SIZE),
    _Case(Opcode.READ, lambda _vm, fh: ReadIn(fh=fh, size=4096).pack()),
    _Case(
        Opcode.WRITE, lambda _vm, fh: WriteIn(fh=fh, size=4).pack() + b"data", _REFUSED, size=WriteOut.SIZE
    ),
    _Case(Opcode.STATFS, node="/", size=StatfsOut.SIZE),
    _Case(Opcode.RELEASE, lambda _vm, fh: ReleaseIn(fh=fh).pack(), _OK | {E.ENOSYS}, size=0),
    _Case(Opcode.FSYNC, lambda _vm, fh: FsyncIn(fh=fh).pack(), _OK | _LACKING | {E.EROFS}, size=0),
    _Case(Opcode.SETXATTR, _fixed(SetxattrIn(size=1).pack()[:8] + b"user.x\0v"), _REFUSED),
    _Case(
        Opcode.GETXATTR,
        _fixed(GetxattrIn(size=100).pack() + b"user.absent\0"),
        frozenset({E.ENODATA, E.ENOSYS, E.EOPNOTSUPP}),
    ),
    _Case(Opcode.LISTXATTR, _fixed(GetxattrIn(size=4096).pack()), _OK | {E.ENOSYS, E.EOPNOTSUPP}),
    _Case(Opcode.REMOVEXATTR, _fixed(b"user.x\0"), _REFUSED),
    _Case(Opcode.FLUSH, lambda _vm, fh: FlushIn(fh=fh).pack(), _OK | {E.ENOSYS, E.EBADF}, size=0),
    _Case(Opcode.OPENDIR, _fixed(OpenIn().pack()), _OK | {E.ENOSYS}, node="/", size=OpenOut.SIZE),
    _Case(Opcode.READDIR, lambda _vm, fh: ReadIn(fh=fh, size=4096).pack(), node="/"),
    _Case(Opcode.RELEASEDIR, lambda _vm, fh: ReleaseIn(fh=fh).pack(), _OK | {E.ENOSYS}, node="/", size=0),
    _Case(Opcode.FSYNCDIR, lambda _vm, fh: FsyncIn(fh=fh).pack(), _OK | _LACKING, node="/", size=0),
    _Case(Opcode.GETLK, _fixed(bytes(48)), _OK | _LACKING),
    _Case(Opcode.SETLK, _fixed(bytes(48)), _OK | _LACKING),
    _Case(Opcode.SETLKW, _fixed(bytes(48)), _OK | _LACKING),
    _Case(Opcode.ACCESS, _fixed(AccessIn(mask=4).pack()), _OK | {E.ENOSYS}, size=0),
    _Case(Opcode.CREATE, _fixed(CreateIn(flags=0o101, mode=0o644).pack() + _NAME), _REFUSED, node="/"),
    _Case(Opcode.BMAP, _fixed(bytes(16)), _LACKING),
    _Case(Opcode.IOCTL, _fixed(bytes(32)), _LACKING),
    _Case(Opcode.POLL, _fixed(bytes(24)), _OK | _LACKING),
    _Case(Opcode.FALLOCATE, lambda _vm, fh: FallocateIn(fh=fh, length=1).pack(), _REFUSED),
    _Case(Opcode.READDIRPLUS, lambda _vm, fh: ReadIn(fh=fh, size=4096).pack(), node="/"),
    _Case(Opcode.RENAME2, _fixed(Rename2In(newdir=1).pack() + name_arg("f01") + _NAME), _REFUSED, node="/"),
    _Case(
        Opcode.LSEEK,
        lambda _vm, fh: LseekIn(fh=fh, offset=0, whence=3).pack(),
        _OK | {E.ENOSYS},
        size=LseekOut.SIZE,
    ),
    _Case(
        Opcode.COPY_FILE_RANGE,
        lambda vm, fh: CopyFileRangeIn(
            fh_in=fh, nodeid_out=vm.node("f01"), fh_out=vm.handle("f01"), len=1
        ).pack(),
        _REFUSED,
    ),
    _Case(Opcode.SETUPMAPPING, _fixed(SetupmappingIn(len=4096, flags=2).pack()), _LACKING),
    _Case(Opcode.REMOVEMAPPING, _fixed(bytes(4)), _OK | _LACKING),
    _Case(Opcode.SYNCFS, _fixed(SyncfsIn().pack()), _OK | {E.ENOSYS}, node="/", size=0),
    _Case(Opcode.TMPFILE, _fixed(CreateIn(flags=0o2, mode=0o600).pack() + b"\0"), _REFUSED, node="/"),
    _Case(Opcode.STATX, _fixed(bytes(24)), _OK | {E.ENOSYS}),
    _Case(
        Opcode.COPY_FILE_RANGE_64,
        lambda vm, fh: CopyFileRangeIn(
            fh_in=fh, nodeid_out=vm.node("f01"), fh_out=vm.handle("f01"), len=1
        ).pack(),
        _REFUSED,
    ),
]
_BY_NAME = {Opcode(case.opcode).name.lower().replace("_", "-"): case for case in _CASES}


def _node(vm: Vm, name: str) -> int:
    return ROOT_ID if name == "/" else vm.node(name)


def _errnos(errors: frozenset[int]) -> str:
    return ", ".join(errno.errorcode[e] if e else "success" for e in sorted(errors))


@checks(
    "opcode.",
    "{} is answered as Linux expects of a read-only tree",
    _BY_NAME,
    source="include/uapi/linux/fuse.h; fs/fuse/dir.c, file.c, xattr.c, readdir.c; open(2), rename(2) EROFS",
    says="Changes are refused; ENOSYS where the kernel has an answer of its own to that, which "
    + _STAYS
    + ".",
)
def _opcode(subject: Subject, case: _Case) -> None:
    with subject.vm() as vm:
        fh = vm.fe.open(_node(vm, case.node), directory=case.node == "/") if case.node != "link" else 0
        payload = case.payload(vm, fh)
        token = vm.fe.request(case.opcode, _node(vm, case.node), payload, case.out_size)
        reply = vm.fe.wait(token)
        found = errno.errorcode.get(reply.error, str(reply.error)) if reply.error else "success"
        ensure(reply.error in case.allowed, f"{found}, allowed: {_errnos(case.allowed)}")
        if not reply.error and case.size is not None:
            ensure(len(reply.data) == case.size, f"a body of {len(reply.data)} bytes, not {case.size}")
        vm.serves()
        if case.allowed is _REFUSED:
            ensure(_is_absent(vm, "new"), "it was refused and done")


def _is_absent(vm: Vm, name: str) -> bool:
    reply = vm.fe.wait(vm.fe.request(Opcode.LOOKUP, ROOT_ID, name_arg(name), EntryOut.SIZE))
    return reply.error == E.ENOENT or (not reply.error and not EntryOut.unpack(reply.data).nodeid)


@checks(
    "opcode-short.",
    "{} that is cut short is answered with an error or not at all, and does no harm",
    _BY_NAME,
    source="virtio 1.3, 2.7.5.2, 5.11.6.1; include/uapi/linux/fuse.h, fuse_in_header.len",
    says="len counts the whole request. A driver may be wrong or hostile; the device must survive.",
)
def _short(subject: Subject, case: _Case) -> None:
    with subject.vm() as vm:
        node = _node(vm, case.node)
        whole = case.payload(vm, 0)
        for length in sorted({0, 1, 3, len(whole) // 2, max(len(whole) - 1, 0)}):
            if length >= len(whole) and whole:
                continue
            reply = vm.fe.wait(vm.fe.request(case.opcode, node, whole[:length], case.out_size))
            ensure(0 <= reply.error < 512, f"error {-reply.error} for {length} bytes of arguments")
        vm.serves()


@checks(
    "opcode.unknown-",
    "Opcode {} is unknown and answered with ENOSYS",
    {str(opcode): opcode for opcode in (0, 7, 19, 54, 99, 4095, 4096, 0x7FFF_FFFF, 0xFFFF_FFFF)},
    source="include/uapi/linux/fuse.h; fs/fuse (every new opcode is tried once)",
    says="ENOSYS tells the kernel that the server does not know an operation; it does without.",
)
def _unknown(subject: Subject, case: int) -> None:
    with subject.vm() as vm:
        reply = vm.fe.wait(vm.fe.request(case, vm.node("f00"), bytes(64), 128))
        ensure(reply.error == errno.ENOSYS, f"errno {reply.error}")
        vm.serves()


@check(
    "opcode.forget",
    "FORGET of known and unknown nodes, once and too often, is completed without a reply",
    source="fs/fuse/virtio_fs.c, virtio_fs_queue_forget; include/uapi/linux/fuse.h, FUSE_FORGET (no reply)",
    says="Linux sends it over the hiprio queue without a device-writable descriptor.",
)
def _forget(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        for nodeid, n in ((node, 1), (node, 1000), (0xDEAD_BEEF, 1), (0, 0), (2**64 - 1, 2**64 - 1)):
            vm.fe.forget(nodeid, n)
        vm.forget_nodes()
        vm.serves()


@check(
    "opcode.forget-storm",
    "10 000 FORGETs at once are completed, as when a guest drops its caches",
    source="fs/fuse/virtio_fs.c, virtio_fs_send_forget_request; virtio 1.3, 5.11.6.2",
    says="Linux queues each forget by itself, and tries again when the ring is full.",
)
def _forget_storm(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        args = struct.pack("<Q", 0)
        tokens = [vm.fe.request(Opcode.FORGET, node, args, None, queue=0) for _ in range(10_000)]
        for token in tokens:
            vm.fe.wait(token)
        vm.serves()


@check(
    "opcode.batch-forget",
    "BATCH_FORGET is completed without a reply, also when its count is a lie",
    source="fs/fuse/dev.c, fuse_read_batch_forget; include/uapi/linux/fuse.h, FUSE_BATCH_FORGET (no reply)",
    says="count pairs of nodeid and nlookup follow.",
)
def _batch_forget(subject: Subject) -> None:
    with subject.vm() as vm:
        pair = struct.pack("<QQ", vm.node("f00"), 1)
        for count, pairs in ((1, pair), (2, pair * 2), (0, b""), (1000, pair), (0xFFFF_FFFF, b"")):
            data = struct.pack("<II", count, 0) + pairs
            vm.fe.wait(vm.fe.request(Opcode.BATCH_FORGET, 0, data, None, queue=0))
        vm.forget_nodes()
        vm.serves()


@check(
    "opcode.interrupt",
    "INTERRUPT is completed, of a request that is gone too",
    source="include/uapi/linux/fuse.h, FUSE_INTERRUPT; fs/fuse/virtio_fs.c (never sent by Linux)",
    says="A server may ignore it, or answer EAGAIN or ENOSYS.",
)
def _interrupt(subject: Subject) -> None:
    with subject.vm() as vm:
        payload = InterruptIn(unique=4).pack()
        vm.fe.wait(vm.fe.request(Opcode.INTERRUPT, 0, payload, None, queue=0))
        reply = vm.fe.wait(vm.fe.request(Opcode.INTERRUPT, 0, payload, 0, queue=0))
        ensure(reply.error in (0, E.EAGAIN, E.ENOSYS, E.ENOENT), f"errno {reply.error}")
        vm.serves()


@check(
    "opcode.notify-reply",
    "NOTIFY_REPLY that nobody asked for is completed",
    source="include/uapi/linux/fuse.h, FUSE_NOTIFY_REPLY",
    says="It answers FUSE_NOTIFY_RETRIEVE, which a device without notification queue never sends.",
)
def _notify_reply(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.fe.wait(vm.fe.request(Opcode.NOTIFY_REPLY, vm.node("f00"), bytes(40), 128))
        vm.serves()


@check(
    "opcode.hiprio-not-blocked",
    "The hiprio queue is served while a request queue waits for data",
    source="virtio 1.3, 5.11.6.2",
    says="The device MUST NOT pause processing of the hiprio queue due to activity on a normal one.",
    fresh=True,
)
def _hiprio(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        with vm.stall() as release:
            reads = vm.cold_reads(8)
            ensure(vm.unanswered(reads), "the check itself is wrong: no request waits for data")
            for _ in range(20):
                vm.fe.forget(node)
            release()
            vm.collect(reads)


@check(
    "opcode.readdir-pages",
    "A directory read in small pieces, with READDIR and READDIRPLUS, has each name once",
    source="fs/fuse/readdir.c, parse_dirfile, parse_dirplusfile",
    says="Each entry's off is where the next call goes on; entries are padded to 8 bytes and never cut.",
)
def _readdir(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("many")
        want = sorted(f"n{i:03}".encode() for i in range(200))
        for ask in (vm.fe.readdir, vm.fe.readdirplus):
            fh = vm.fe.open(node, directory=True)
            names: list[bytes] = []
            offset = 0
            while entries := ask(node, offset, 1024, fh=fh):
                names += [entry.name for entry in entries]
                offset = entries[-1].off
                ensure(len(names) < 1000, "the directory has no end")
            found = sorted(name for name in names if name not in (b".", b".."))
            ensure(found == want, f"{ask.__name__} found {len(found)} names, {len(set(found))} different")


@check(
    "opcode.read-size",
    "READ brings no more than it was asked for, whatever room there is",
    source="include/uapi/linux/fuse.h, fuse_read_in.size; fs/fuse/file.c, fuse_do_readfolio",
    says="size is what is wanted; Linux offers exactly that room.",
)
def _read_size(subject: Subject) -> None:
    with subject.vm() as vm:
        args = ReadIn(fh=vm.handle("big"), offset=4096, size=100).pack()
        reply = vm.fe.wait(vm.fe.request(Opcode.READ, vm.node("big"), args, 8192))
        vm.expect(reply, vm.tree.files["big"][4096:4196])


@check(
    "opcode.read-ends",
    "READ at, across and beyond the end of a file is short, and no error",
    source="fs/fuse/file.c, fuse_read_update_size, fuse_short_read",
    says="A short read tells the kernel where the file ends.",
)
def _read_ends(subject: Subject) -> None:
    with subject.vm() as vm:
        size = len(vm.tree.files["f00"])
        for offset in (0, size - 1, size, size + 1, size + 100_000, 1 << 40, (1 << 63) - 4097):
            vm.collect([vm.read("f00", offset, 4096)])
        vm.collect([vm.read("empty", 0, 4096), vm.read("f00", 0, 0)])
