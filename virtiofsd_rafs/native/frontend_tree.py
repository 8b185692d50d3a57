"""A whole tree read through the test front-end: many requests in flight, answered in any order.

A walk is a set of small tasks, written as generators that yield a request and get its reply. File content is
read and hashed by native code.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

import attrs

from virtiofsd_rafs.errors import PeerError
from virtiofsd_rafs.fuse import Opcode, name_arg, parse_dirents, parse_xattr_names
from virtiofsd_rafs.fuse.structs import Attr, EntryOut, GetxattrIn, OpenIn, OpenOut, ReadIn, ReleaseIn
from virtiofsd_rafs.native.frontend_link import FrontendTimeout

if TYPE_CHECKING:
    from collections.abc import Generator

    from virtiofsd_rafs.native.frontend import Frontend
    from virtiofsd_rafs.native.frontend_device import Reply, Token

_READDIR_SIZE = 128 * 1024
_XATTR_SIZE = 65536
_LINK_SIZE = 4096
_FILES_AT_ONCE = 256
"""Handles open at the same time, for back-ends that want them."""

_Request: TypeAlias = tuple[int, int, bytes, int]
"""(opcode, nodeid, payload, bytes of the reply's body)"""
_Task: TypeAlias = "Generator[_Request, Reply, None]"


@attrs.define
class TreeEntry:
    """A file as the back-end shows it. ``error`` is the errno that reading it met, -1 for a wrong length."""

    nodeid: int
    attr: Attr
    type: int = 0
    """The directory entry's ``DT_*``; 0 for the root."""
    sha256: str | None = None
    target: bytes | None = None
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    error: int = 0


def _raise(reply: Reply, what: str) -> None:
    if reply.error:
        raise OSError(reply.error, os.strerror(reply.error), what)


class TreeWalk:
    """A walk from *nodeid* down. ``entries`` by path, the start as ``/``."""

    def __init__(self, fe: Frontend, *, depth: int, queue: int, content: bool, xattrs: bool) -> None:
        self._fe = fe
        self._depth = depth
        self._queue = queue
        self._content = content
        self._xattrs = xattrs
        self.entries: dict[bytes, TreeEntry] = {}
        self._ready: deque[_Task] = deque()
        self._no_opendir = False

    def run(self, nodeid: int, read_size: int) -> None:
        self.entries[b"/"] = root = TreeEntry(nodeid, self._fe.getattr(nodeid, queue=self._queue))
        self._look_into(b"/", root)
        self._schedule()
        if self._content:
            files = [(p, e) for p, e in self.entries.items() if stat.S_ISREG(e.attr.mode)]
            for i in range(0, len(files), _FILES_AT_ONCE):
                self._digest(files[i : i + _FILES_AT_ONCE], read_size)

    def _look_into(self, path: bytes, entry: TreeEntry) -> None:
        if stat.S_ISDIR(entry.attr.mode):
            self._ready.append(self._list(path, entry))
        elif stat.S_ISLNK(entry.attr.mode):
            self._ready.append(self._readlink(path, entry))
        if self._xattrs:
            self._ready.append(self._read_xattrs(path, entry))

    def _schedule(self) -> None:
        """Runs all tasks, up to ``depth`` requests in flight at a time."""
        fe = self._fe
        running: dict[int, tuple[_Task, Token]] = {}
        while self._ready or running:
            while self._ready and len(running) < self._depth:
                self._advance(self._ready.popleft(), None, running)
            if not running:
                continue
            done = fe.poll(self._queue, fe.timeout_s) & running.keys()
            if not done:
                raise FrontendTimeout(f"{len(running)} requests of the walk stay unanswered")
            for number in sorted(done):
                task, token = running.pop(number)
                self._advance(task, fe.wait(token), running)

    def _advance(self, task: _Task, reply: Reply | None, running: dict[int, tuple[_Task, Token]]) -> None:
        """Gives a task its reply and submits the request that it comes up with next, if any."""
        try:
            opcode, nodeid, payload, out_size = next(task) if reply is None else task.send(reply)
        except StopIteration:
            return
        token = self._fe.request(opcode, nodeid, payload, out_size, queue=self._queue)
        running[token.id] = (task, token)

    def _list(self, path: bytes, entry: TreeEntry) -> _Task:
        fh = 0
        if not self._no_opendir:
            reply = yield Opcode.OPENDIR, entry.nodeid, OpenIn().pack(), OpenOut.SIZE
            if reply.error == errno.ENOSYS:
                self._no_opendir = True
            else:
                _raise(reply, f"OPENDIR of {path!r}")
                fh = OpenOut.unpack(reply.data).fh
        offset = 0
        while True:
            request = ReadIn(fh=fh, offset=offset, size=_READDIR_SIZE)
            reply = yield Opcode.READDIRPLUS, entry.nodeid, request.pack(), _READDIR_SIZE
            _raise(reply, f"READDIRPLUS of {path!r}")
            found = list(parse_dirents(reply.data, plus=True))
            if not found:
                break
            offset = found[-1].off
            for dirent in found:
                if dirent.name in (b".", b".."):
                    continue
                child = path.rstrip(b"/") + b"/" + dirent.name
                found_entry = dirent.entry
                if child in self.entries:
                    raise PeerError(f"READDIRPLUS of {path!r} returns {dirent.name!r} twice")
                if found_entry is None or not found_entry.nodeid:
                    # The back-end has no attributes at hand; the kernel looks up when it needs them.
                    reply = yield Opcode.LOOKUP, entry.nodeid, name_arg(dirent.name), EntryOut.SIZE
                    _raise(reply, f"LOOKUP of {child!r}")
                    found_entry = EntryOut.unpack(reply.data)
                self.entries[child] = TreeEntry(found_entry.nodeid, found_entry.attr, dirent.type)
                self._look_into(child, self.entries[child])
        if fh:
            yield Opcode.RELEASEDIR, entry.nodeid, ReleaseIn(fh=fh).pack(), 0

    def _readlink(self, path: bytes, entry: TreeEntry) -> _Task:
        reply = yield Opcode.READLINK, entry.nodeid, b"", _LINK_SIZE
        _raise(reply, f"READLINK of {path!r}")
        entry.target = reply.data

    def _read_xattrs(self, path: bytes, entry: TreeEntry) -> _Task:
        reply = yield Opcode.LISTXATTR, entry.nodeid, GetxattrIn(size=_XATTR_SIZE).pack(), _XATTR_SIZE
        if reply.error in (errno.ENOSYS, errno.EOPNOTSUPP):
            self._xattrs = self._xattrs and reply.error != errno.ENOSYS
            return
        _raise(reply, f"LISTXATTR of {path!r}")
        for name in parse_xattr_names(reply.data):
            request = GetxattrIn(size=_XATTR_SIZE).pack() + name_arg(name)
            reply = yield Opcode.GETXATTR, entry.nodeid, request, _XATTR_SIZE
            _raise(reply, f"GETXATTR {name!r} of {path!r}")
            entry.xattrs[name] = reply.data

    def _digest(self, files: list[tuple[bytes, TreeEntry]], read_size: int) -> None:
        fe = self._fe
        handles = []
        for path, entry in files:
            try:
                handles.append(fe.open(entry.nodeid))
            except OSError as e:
                raise OSError(e.errno, e.strerror, f"OPEN of {path!r}") from e
        found = fe.digest(
            [(e.nodeid, fh, e.attr.size) for (_, e), fh in zip(files, handles, strict=True)],
            depth=self._depth,
            read_size=read_size,
            queue=self._queue,
        )
        for (_, entry), fh, (sha256, error) in zip(files, handles, found, strict=True):
            entry.sha256, entry.error = sha256, error
            if fh:
                fe.release(entry.nodeid, fh)
