"""Descriptors: the device must not care how a request is cut into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conformance.check import Violation, check, checks, ensure
from tests.conformance.raw import Raw, table
from virtiofsd_rafs.fuse import Opcode, build_request
from virtiofsd_rafs.fuse.structs import ReadIn
from virtiofsd_rafs.native.frontend_device import Layout
from virtiofsd_rafs.native.frontend_link import MiB, Region

if TYPE_CHECKING:
    from tests.conformance.raw import Piece
    from tests.conformance.subject import Subject, Vm

_FRAMING = "virtio 1.3, 2.7.4.1"
_FRAMING_SAYS = "The device MUST NOT make assumptions about the particular arrangement of descriptors."
_SIZE = 9000


def _layouts(indirect: bool) -> dict[str, Layout]:
    prefix = "indirect-" if indirect else "chained-"
    return {
        prefix + "linux": Layout("linux", indirect),
        prefix + "compact": Layout("compact", indirect),
        prefix + "1": Layout("pieces", indirect, 1),
        prefix + "7": Layout("pieces", indirect, 7),
        prefix + "39": Layout("pieces", indirect, 39),
        prefix + "4095": Layout("pieces", indirect, 4095),
    }


@checks(
    "frame.",
    "Requests are served that are cut as: {}",
    _layouts(False) | _layouts(True),
    source=_FRAMING + "; fs/fuse/virtio_fs.c, virtio_fs_enqueue_req (linux)",
    says=_FRAMING_SAYS,
)
def _layout(subject: Subject, case: Layout) -> None:
    # A chain is never longer than the ring.
    size = min(_SIZE, 800 * (case.pieces or _SIZE))
    with subject.vm(layout=case) as vm:
        fh = vm.handle("big")
        for offset in (0, 12345):
            vm.collect([vm.read("big", offset, size, fh=fh)])
        vm.collect([vm.read("f00", len(vm.tree.files["f00"]) - 5, 100)])
        # Until descriptors have to be used again.
        for _ in range(8):
            vm.collect(vm.reads(8, sizes=(size // 4, size // 8)))


def _raw_read(vm: Vm, size: int = 3000, offset: int = 777, region: int | None = None) -> tuple[Raw, bytes]:
    args = ReadIn(fh=vm.handle("big"), offset=offset, size=size).pack()
    raw = Raw.place(vm, Opcode.READ, vm.node("big"), args, 16 + size, region=region)
    return raw, vm.tree.files["big"][offset : offset + size]


def _expect(raw: Raw, pieces: list[Piece], want: bytes, *, indirect: bool = False) -> None:
    error, data = raw.answer(raw.submit(pieces, indirect=indirect))
    ensure(not error, f"READ failed with errno {error}")
    if data != want:
        raise Violation(f"READ brought {len(data)} bytes, not the {len(want)} expected ones")


@check(
    "frame.in-header-split",
    "The in header may be split anywhere",
    source=_FRAMING,
    says=_FRAMING_SAYS,
)
def _in_header_split(subject: Subject) -> None:
    with subject.vm() as vm:
        for cut in (1, 3, 4, 8, 15, 24, 39, 41, 56, 79):
            raw, want = _raw_read(vm)
            _expect(raw, [*raw.request_pieces(cut), *raw.reply_pieces()], want)
        raw, want = _raw_read(vm)
        _expect(raw, [*raw.request_pieces(1, 2, 3, 5, 8, 13, 21, 34, 55), *raw.reply_pieces(16)], want)


@check(
    "frame.out-header-split",
    "The out header may be split anywhere, also in the middle of a number",
    source=_FRAMING,
    says=_FRAMING_SAYS,
)
def _out_header_split(subject: Subject) -> None:
    with subject.vm() as vm:
        for cut in (1, 4, 7, 8, 15, 16, 17, 100):
            raw, want = _raw_read(vm)
            _expect(raw, [*raw.request_pieces(40), *raw.reply_pieces(cut)], want)
        raw, want = _raw_read(vm)
        _expect(raw, [*raw.request_pieces(), *raw.reply_pieces(1, 2, 3, 5, 8, 13, 21, 34, 2999)], want)


@check(
    "frame.parts-apart",
    "Writable parts may lie anywhere and in any order of addresses",
    source="virtio 1.3, 2.7.5, 2.7.8.2",
    says="Bytes are written in the order of the descriptors, beginning at the first device-writable buffer.",
)
def _parts_apart(subject: Subject) -> None:
    with subject.vm() as vm:
        raw, want = _raw_read(vm, 3000)
        first, *rest = raw.reply_pieces(16, 1016, 2016)
        # Data land in reverse order of addresses: the last thousand bytes of the room come first.
        token = raw.submit([*raw.request_pieces(40), first, *reversed(rest)])
        error, data = raw.answer(token)
        ensure(not error, f"READ failed with errno {error}")
        ensure(data[2000:] + data[1000:2000] + data[:1000] == want, "data are not in the descriptors' order")


@check(
    "frame.table-behind-chain",
    "A chain of descriptors may end in an indirect table",
    source="virtio 1.3, 2.7.5.3.2",
    says="The device MUST handle zero or more normal descriptors followed by a single indirect one.",
)
def _table_behind_chain(subject: Subject) -> None:
    with subject.vm() as vm:
        for direct in (1, 2, 3):
            raw, want = _raw_read(vm)
            pieces = [*raw.request_pieces(40), *raw.reply_pieces(16)]
            _expect(raw, [*pieces[:direct], table(vm, pieces[direct:])], want)


@check(
    "frame.table-write-flag",
    "The write flag of a descriptor that refers to an indirect table means nothing",
    source="virtio 1.3, 2.7.5.3.2",
    says="The device MUST ignore the write-only flag in the descriptor that refers to an indirect table.",
)
def _table_write_flag(subject: Subject) -> None:
    with subject.vm() as vm:
        raw, want = _raw_read(vm)
        where, size, flags = table(vm, [*raw.request_pieces(40), *raw.reply_pieces(16)])
        _expect(raw, [(where, size, flags | 1)], want)


@check(
    "frame.table-scattered",
    "An indirect table may hold its chain in any order",
    source="virtio 1.3, 2.7.5.3",
    says="Indirect descriptors are chained by next; the first one is at the table's start.",
)
def _table_scattered(subject: Subject) -> None:
    with subject.vm() as vm:
        raw, want = _raw_read(vm)
        pieces = [*raw.request_pieces(40), *raw.reply_pieces(16, 500)]
        _expect(raw, [table(vm, pieces, [0, 4, 2, 1, 3])], want)


@check(
    "frame.table-longer-than-ring",
    "An indirect table may be as long as the ring",
    source="virtio 1.3, 2.7.5.3.1",
    says="A driver MUST NOT create a descriptor chain longer than the Queue Size.",
)
def _table_long(subject: Subject) -> None:
    with subject.vm(queue_size=64) as vm:
        raw, want = _raw_read(vm)
        cuts = [16 + 40 * i for i in range(62)]
        pieces = [*raw.request_pieces(), *raw.reply_pieces(*cuts)]
        ensure(len(pieces) == 64, "the check itself is wrong")
        _expect(raw, [table(vm, pieces)], want)


@check(
    "frame.empty-descriptors",
    "Descriptors of no length in between change nothing",
    source=_FRAMING,
    says=_FRAMING_SAYS,
)
def _empty(subject: Subject) -> None:
    with subject.vm() as vm:
        raw, want = _raw_read(vm)
        first, second = raw.request_pieces(40)
        head, rest = raw.reply_pieces(16)
        nothing, nowhere = (raw.request, 0, 0), (raw.reply, 0, 1)
        _expect(raw, [nothing, first, nothing, second, nowhere, head, nowhere, rest, nowhere], want)


@check(
    "frame.header-length-lies",
    "An in header with a wrong length is refused or served by what is there, and does no harm",
    source="include/uapi/linux/fuse.h, fuse_in_header.len; virtio 1.3, 2.7.5.2, 5.11.6.1",
    says="len counts the whole request. A driver may be wrong or hostile; the device must survive.",
)
def _length_lies(subject: Subject) -> None:
    with subject.vm() as vm:
        for length in (0, 1, 39, 40, 55, 57, 4096, 0xFFFF_FFFF):
            unique = vm.fe.next_unique()
            data = build_request(Opcode.GETATTR, vm.node("f00"), bytes(16), unique=unique, len_=length)
            reply = vm.fe.wait(vm.fe.submit(data, 104))
            ensure(0 <= reply.error < 512, f"error {-reply.error} for a length of {length}")
        vm.serves()


@check(
    "frame.large",
    "A read of 1 MiB into 256 pages and more is served whole",
    source="virtio 1.3, 5.11.6.1; fs/fuse/virtio_fs.c, virtio_fs_enqueue_req; fuse_init_out.max_pages",
    says="Linux sends up to max_pages pages in one request, bounded by the ring's size.",
)
def _large(subject: Subject) -> None:
    with subject.vm() as vm:
        reads = [vm.read("big", offset, MiB, fh=vm.handle("big")) for offset in (0, 4096, 500_000)]
        vm.collect(reads)


@check(
    "frame.across-regions",
    "A buffer may reach from one memory region into the next",
    source="virtio 1.3, 2.7.5; vhost-user.rst, Memory access",
    says="Descriptors hold guest-physical addresses; guest memory knows no regions.",
)
def _across_regions(subject: Subject) -> None:
    border = 16 * MiB
    with subject.vm(regions=[Region(0, border), Region(border, border)]) as vm:
        args = ReadIn(fh=vm.handle("big"), offset=0, size=8192).pack()
        raw = Raw.place(vm, Opcode.READ, vm.node("big"), args, 16)
        low = vm.fe.alloc(4096, at=border - 4096)
        high = vm.fe.alloc(4096, at=border)
        token = raw.submit([*raw.request_pieces(), (raw.reply, 16, 1), (low, 8192, 1)])
        vm.fe.wait(token)
        found = vm.fe.read_memory(low, 4096) + vm.fe.read_memory(high, 4096)
        ensure(found == vm.tree.files["big"][:8192], "data across the border of two regions are wrong")
        # The request itself, its header on both sides.
        raw, want = _raw_read(vm)
        vm.fe.write_memory(border - 20, raw.data[:20])
        vm.fe.write_memory(border, raw.data[20:])
        error, data = raw.answer(raw.submit([(border - 20, len(raw.data), 0), *raw.reply_pieces(16)]))
        ensure(not error and data == want, f"a request across the border failed with errno {error}")


@check(
    "frame.high-memory",
    "Buffers above 4 GiB are used as any others",
    source="virtio 1.3, 2.7.5 (addr is le64)",
    says="Addresses have 64 bits.",
)
def _high_memory(subject: Subject) -> None:
    regions = [Region(0, 16 * MiB), Region(4 << 30, 8 * MiB), Region(1 << 40, 8 * MiB)]
    with subject.vm(regions=regions) as vm:
        for region in (4 << 30, 1 << 40):
            raw, want = _raw_read(vm, region=region)
            _expect(raw, [*raw.request_pieces(40), *raw.reply_pieces(16)], want)
            vm.collect([vm.read("big", 5000, 8192, region=region)])


@check(
    "frame.memory-offset",
    "A region may begin anywhere in its file",
    source="vhost-user.rst, Memory regions description",
    says="mmap offset is where the region starts in the mapped memory.",
)
def _memory_offset(subject: Subject) -> None:
    regions = [
        Region(0, 12 * MiB, file=0, file_offset=8 * MiB),
        Region(1 << 33, 4 * MiB, file=0, file_offset=4 * MiB),
        Region(1 << 34, 4 * MiB, file=0),
    ]
    with subject.vm(regions=regions) as vm:
        for region in (0, 1 << 33, 1 << 34):
            vm.collect([vm.read("big", 5000, 8192, region=region)])
        vm.serves()
