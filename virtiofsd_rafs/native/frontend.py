"""The test front-end: drives a virtio-fs back-end as QEMU and a guest do, without a VM.

    with Frontend.connect("rafs.sock") as fe:
        fe.start()
        fe.init()
        entry = fe.lookup(ROOT_ID, "etc")
        fe.read(entry.nodeid, 0, 4096)
        assert not fe.check()          # what the back-end did wrong with rings and buffers

See ``frontend_device`` for the steps below FUSE.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Self

import attrs

from virtiofsd_rafs.fuse import (
    ROOT_ID,
    DirEntry,
    Init,
    Opcode,
    build_request,
    name_arg,
    parse_dirents,
    parse_xattr_names,
)
from virtiofsd_rafs.fuse.structs import (
    Attr,
    AttrOut,
    EntryOut,
    ForgetIn,
    GetattrIn,
    GetxattrIn,
    GetxattrOut,
    InitIn,
    InitOut,
    Kstatfs,
    LseekIn,
    LseekOut,
    OpenIn,
    OpenOut,
    ReadIn,
    ReleaseIn,
    StatfsOut,
)
from virtiofsd_rafs.native._lib import ffi, lib
from virtiofsd_rafs.native.frontend_device import Device, Layout, Reply, Token
from virtiofsd_rafs.native.frontend_link import (
    FrontendTimeout,
    MappedRegion,
    Message,
    QueueInfo,
    Region,
    RequestLost,
    RingFull,
    checked,
    milliseconds,
    pc_layout,
)
from virtiofsd_rafs.native.frontend_load import (
    Load,
    LoadResult,
    Op,
    OpResult,
    Target,
    Walk,
    WalkResult,
    run_load,
    run_walk,
)
from virtiofsd_rafs.native.frontend_tree import TreeEntry, TreeWalk

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

__all__ = [
    "Device",
    "Frontend",
    "FrontendTimeout",
    "Layout",
    "Load",
    "LoadResult",
    "MappedRegion",
    "Message",
    "Op",
    "OpResult",
    "QueueInfo",
    "Region",
    "Reply",
    "RequestLost",
    "RingFull",
    "Target",
    "Token",
    "TreeEntry",
    "Walk",
    "WalkResult",
    "pc_layout",
]

HIPRIO = 0
_PAGE = 4096

GUEST_INIT = Init(0x7BFFFFFB | 0x1FD << 32)
"""What Linux 6.12 offers over virtio-fs."""
GUEST_MINOR = 41


class Frontend(Device):
    """A front-end that speaks FUSE. Synchronous helpers raise ``OSError`` with the reply's errno."""

    @classmethod
    def connect(cls, where: str | os.PathLike[str] | socket.socket, **options: Any) -> Self:
        """A front-end on the socket at a path, or on a connected socket; *options* as for ``Device``.

        Only connects: ``start`` speaks.
        """
        front_end = cls(**options)
        front_end.attach(where)
        return front_end

    def request(
        self,
        opcode: int,
        nodeid: int,
        payload: bytes = b"",
        out_size: int | None = 0,
        *,
        queue: int = 1,
        unique: int | None = None,
        uid: int = 0,
        gid: int = 0,
        pid: int = 1,
        layout: Layout | None = None,
        region: int | None = None,
    ) -> Token:
        """Submits a FUSE request in the background; see ``Device.submit``."""
        number = self.next_unique() if unique is None else unique
        data = build_request(opcode, nodeid, payload, unique=number, uid=uid, gid=gid, pid=pid)
        return self.submit(data, out_size, queue=queue, layout=layout, region=region)

    def call(
        self, opcode: int, nodeid: int, payload: bytes = b"", out_size: int | None = 0, *, queue: int = 1
    ) -> bytes:
        """What a request answers behind the out header.

        Raises:
            OSError: the reply carries an errno.
        """
        reply = self.wait(self.request(opcode, nodeid, payload, out_size, queue=queue))
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error), f"{Opcode(opcode).name} of node {nodeid}")
        return reply.data

    def init(
        self, *, minor: int = GUEST_MINOR, flags: Init = GUEST_INIT, max_readahead: int = 131072
    ) -> InitOut:
        """FUSE_INIT as a guest's mount sends it."""
        request = InitIn(
            major=7, minor=minor, max_readahead=max_readahead, flags=flags & 0xFFFFFFFF, flags2=flags >> 32
        )
        return InitOut.unpack(self.call(Opcode.INIT, 0, request.pack(), InitOut.SIZE))

    def destroy(self) -> None:
        self.call(Opcode.DESTROY, 0)

    def lookup(self, parent: int, name: str | bytes, *, queue: int = 1) -> EntryOut:
        """The entry; ``nodeid`` 0 when the back-end answers with a negative entry."""
        return EntryOut.unpack(self.call(Opcode.LOOKUP, parent, name_arg(name), EntryOut.SIZE, queue=queue))

    def resolve(self, path: str | bytes) -> EntryOut:
        """The entry at an absolute path, links not followed.

        Raises:
            FileNotFoundError: the path leads nowhere.
        """
        entry = EntryOut(nodeid=ROOT_ID)
        for name in filter(None, os.fsencode(path).split(b"/")):
            entry = self.lookup(entry.nodeid, name)
            if not entry.nodeid:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        return entry if entry.attr.ino else EntryOut(nodeid=entry.nodeid, attr=self.getattr(entry.nodeid))

    def getattr(self, nodeid: int, *, queue: int = 1) -> Attr:
        data = self.call(Opcode.GETATTR, nodeid, GetattrIn().pack(), AttrOut.SIZE, queue=queue)
        return AttrOut.unpack(data).attr

    def open(self, nodeid: int, *, directory: bool = False, flags: int = os.O_RDONLY) -> int:
        """A handle; 0 when the back-end needs none (ENOSYS)."""
        opcode = Opcode.OPENDIR if directory else Opcode.OPEN
        try:
            return OpenOut.unpack(self.call(opcode, nodeid, OpenIn(flags=flags).pack(), OpenOut.SIZE)).fh
        except OSError as e:
            if e.errno != errno.ENOSYS:
                raise
            return 0

    def release(self, nodeid: int, fh: int, *, directory: bool = False) -> None:
        self.call(Opcode.RELEASEDIR if directory else Opcode.RELEASE, nodeid, ReleaseIn(fh=fh).pack())

    def read(self, nodeid: int, offset: int, size: int, *, fh: int = 0, queue: int = 1) -> bytes:
        request = ReadIn(fh=fh, offset=offset, size=size)
        return self.call(Opcode.READ, nodeid, request.pack(), size, queue=queue)

    def readdirplus(
        self, nodeid: int, offset: int = 0, size: int = 32 * _PAGE, *, fh: int = 0
    ) -> list[DirEntry]:
        """The entries that one READDIRPLUS from cookie *offset* returns; none at the end."""
        request = ReadIn(fh=fh, offset=offset, size=size)
        return list(parse_dirents(self.call(Opcode.READDIRPLUS, nodeid, request.pack(), size), plus=True))

    def readdir(self, nodeid: int, offset: int = 0, size: int = 32 * _PAGE, *, fh: int = 0) -> list[DirEntry]:
        """As ``readdirplus``, for READDIR."""
        request = ReadIn(fh=fh, offset=offset, size=size)
        return list(parse_dirents(self.call(Opcode.READDIR, nodeid, request.pack(), size), plus=False))

    def readlink(self, nodeid: int) -> bytes:
        return self.call(Opcode.READLINK, nodeid, b"", _PAGE)

    def getxattr(self, nodeid: int, name: str | bytes, size: int = 65536) -> bytes:
        return self.call(Opcode.GETXATTR, nodeid, GetxattrIn(size=size).pack() + name_arg(name), size)

    def getxattr_size(self, nodeid: int, name: str | bytes) -> int:
        data = self.call(Opcode.GETXATTR, nodeid, GetxattrIn().pack() + name_arg(name), GetxattrOut.SIZE)
        return GetxattrOut.unpack(data).size

    def listxattr(self, nodeid: int, size: int = 65536) -> list[bytes]:
        return parse_xattr_names(self.call(Opcode.LISTXATTR, nodeid, GetxattrIn(size=size).pack(), size))

    def statfs(self, nodeid: int = ROOT_ID) -> Kstatfs:
        return StatfsOut.unpack(self.call(Opcode.STATFS, nodeid, b"", StatfsOut.SIZE)).st

    def lseek(self, nodeid: int, offset: int, whence: int, *, fh: int = 0) -> int:
        request = LseekIn(fh=fh, offset=offset, whence=whence)
        return LseekOut.unpack(self.call(Opcode.LSEEK, nodeid, request.pack(), LseekOut.SIZE)).offset

    def forget(self, nodeid: int, nlookup: int = 1) -> Reply:
        """FORGET over the hiprio queue, as Linux sends it: without a writable buffer."""
        token = self.request(Opcode.FORGET, nodeid, ForgetIn(nlookup=nlookup).pack(), None, queue=HIPRIO)
        return self.wait(token)

    # --- loops --------------------------------------------------------------------------------------------

    def load(self, load: Load) -> LoadResult:
        """Runs a load; other threads may use the front-end meanwhile, also to stop and resume the device."""
        before = self.faults()
        result = run_load(self._handle, load, (load.layout or self.layout).word())
        return attrs.evolve(result, faults=self._faults_since(before))

    def walk(self, walk: Walk) -> WalkResult:
        """Lists a tree as a guest does; as ``load`` otherwise."""
        before = self.faults()
        result = run_walk(self._handle, walk, (walk.layout or self.layout).word())
        return attrs.evolve(result, load=attrs.evolve(result.load, faults=self._faults_since(before)))

    def _faults_since(self, before: dict[str, int]) -> dict[str, int]:
        new = {kind: n - before.get(kind, 0) for kind, n in self.faults().items()}
        return {kind: n for kind, n in new.items() if n}

    def stop_loads(self) -> None:
        """Makes running loads submit no more; they end when what is in flight is answered."""
        checked(lib.vr_frontend_load_stop(self._handle))

    def digest(
        self,
        files: Sequence[tuple[int, int, int]],
        *,
        depth: int = 32,
        read_size: int = 128 * 1024,
        queue: int = 1,
        layout: Layout | None = None,
    ) -> list[tuple[str | None, int]]:
        """SHA-256 of each (nodeid, handle, size) and 0, or ``None`` and an errno, -1 for a wrong length."""
        digests = ffi.new("uint8_t[]", 32 * len(files))
        statuses = ffi.new("int32_t[]", len(files))
        words = ffi.new("uint64_t[]", [word for file in files for word in file])
        word = (layout or self.layout).word()
        wait = milliseconds(self.timeout_s)
        checked(
            lib.vr_frontend_digest(
                self._handle, queue, words, len(files), read_size, depth, word, wait, digests, statuses
            )
        )
        data = bytes(ffi.buffer(digests))
        return [
            (None if status else data[32 * i : 32 * i + 32].hex(), int(status))
            for i, status in enumerate(statuses)
        ]

    def read_tree(
        self,
        nodeid: int = ROOT_ID,
        *,
        depth: int = 32,
        read_size: int = 128 * 1024,
        queue: int = 1,
        content: bool = True,
        xattrs: bool = True,
    ) -> dict[bytes, TreeEntry]:
        """Everything below a directory by path, itself as ``/``, with up to *depth* requests in flight.

        Raises:
            OSError: a request other than READ was refused; failed reads are told in the entries.
            PeerError: a directory has a name twice, or requests stay unanswered.
        """
        walk = TreeWalk(self, depth=depth, queue=queue, content=content, xattrs=xattrs)
        walk.run(nodeid, read_size)
        return walk.entries
