"""The session: the keeper's loop, and what control, tools and tests see of the shared memory.

One handle serves three callers. The process that the user started makes it and runs the keeper; control,
forked from that process, inherits it; a test attaches to the memory of a running daemon.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from virtiofsd_rafs.native._lib import ffi, lib, raise_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_POST = Struct(f"={lib.VR_POST_WORDS}Q")
_TRACE = Struct(f"={lib.VR_TRACE_WORDS}Q")
_BATCH = 256
# What the rings of all threads hold (native/crates/session/src/rings.rs).
_MAX_BATCHES = 8 * 1024 // _BATCH
_STATUS_LEN = 65536
_MAX_MOUNT_FDS = 2 + 4 * 255
_MAX_WAKES = 8  # ring threads: native/crates/session/src/shared.rs

# What a failpoint does (native/crates/session/src/failpoint.rs, which also numbers the points).
KILL, HANG, ABORT, BREAK_OUT = 1, 2, 3, 4


class Post(NamedTuple):
    """A chunk that a parked request waits for, since ``time_ns`` (CLOCK_MONOTONIC)."""

    mount: int
    blob_index: int
    chunk_index: int
    nodeid: int
    file_offset: int
    time_ns: int


class Trace(NamedTuple):
    """A parked request that has been answered; times are CLOCK_MONOTONIC."""

    nodeid: int
    offset: int
    length: int
    parked_ns: int
    done_ns: int


class BlobFds(NamedTuple):
    """Descriptors of one blob's tables; ``data`` is None without a cache directory."""

    state: int
    extents: int
    touched: int
    data: int | None


class MountFds(NamedTuple):
    """Descriptors of a mounted image, owned by the keeper."""

    bootstrap: int
    spill: int
    blobs: list[BlobFds]


class ForkControl(NamedTuple):
    """What ``Session.run`` asks its caller for: fork control, and give it this end of the socket pair."""

    fd: int


class Session:
    """A handle on one daemon's session."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._posts = ffi.new("uint64_t[]", _BATCH * lib.VR_POST_WORDS)
        self._traces = ffi.new("uint64_t[]", _BATCH * lib.VR_TRACE_WORDS)

    @classmethod
    def create(cls, listener_fd: int, *, io_deadline_s: float, poll_us: int, keep: bool) -> Session:
        """A session with its keeper around *listener_fd*, a listening unix socket that it takes over.

        Ring threads look for more requests for at most *poll_us* microseconds before they sleep.
        Blocks SIGTERM, SIGINT and SIGHUP in this process: from now on ``run`` handles them.
        """
        out = ffi.new("void **")
        raise_for(lib.vr_session_new(listener_fd, int(io_deadline_s * 1000), poll_us, int(keep), out))
        return cls(out[0])

    def confine_workers(self, parts: int) -> None:
        """Confine all workers that will be forked; *parts* is of :func:`native.sandbox.confine`."""
        raise_for(lib.vr_session_confine_workers(self._handle, parts))

    @classmethod
    def attach(cls, pid: int) -> Session:
        """The session of a running daemon, by its keeper's pid. For tests: must be able to open its files."""
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if not os.readlink(link).startswith("/memfd:rafs-session"):
                    continue
                fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # closed meanwhile: the keeper may be starting
            out = ffi.new("void **")
            raise_for(lib.vr_session_attach(fd, out))
            return cls(out[0])
        raise ProcessLookupError(f"process {pid} is no keeper: it has no session memory")

    def run(self) -> int | ForkControl:
        """Run the keeper until it has ended (its exit code) or control must be forked.

        The process must have one thread.
        """
        fd = ffi.new("int32_t *")
        code = raise_for(lib.vr_session_run(self._handle, fd))
        return ForkControl(fd[0]) if code == lib.VR_SESSION_FORK_CONTROL else code

    def control_started(self, pid: int) -> None:
        """Tell the keeper that control runs as *pid*."""
        raise_for(lib.vr_session_control_started(self._handle, pid))

    def become_control(self, keep: list[int]) -> None:
        """Make this freshly forked process control.

        Only the session's descriptors, stderr and *keep* stay open.
        """
        raise_for(lib.vr_session_become_control(self._handle, ffi.new("int32_t[]", keep), len(keep)))

    @property
    def post_fd(self) -> int:
        """An eventfd that becomes readable when there are posts."""
        return raise_for(lib.vr_session_post_fd(self._handle))

    def posts(self) -> list[Post]:
        """All posts that have come since the last call."""
        return self._drain(lib.vr_session_posts, self._posts, _POST, Post._make)

    def trace(self) -> list[Trace]:
        """Parked requests that have been answered since the last call; old ones are lost when nobody asks."""
        return self._drain(lib.vr_session_traces, self._traces, _TRACE, Trace._make)

    def _drain(
        self, function: Any, buffer: Any, record: Struct, make: Callable[[Iterable[int]], T]
    ) -> list[T]:
        out: list[T] = []
        # A worker that a guest has taken over could fill its ring as fast as it is read.
        for _ in range(_MAX_BATCHES):
            n = raise_for(function(self._handle, buffer, _BATCH))
            out.extend(map(make, record.iter_unpack(ffi.buffer(buffer, n * record.size))))
            if n < _BATCH:
                break
        return out

    def wake(self) -> None:
        """Tell all ring threads that chunks have become ready."""
        raise_for(lib.vr_session_wake(self._handle))

    @property
    def wake_fds(self) -> list[int]:
        """The eventfds by which :meth:`wake` does that."""
        out = ffi.new("int32_t[]", _MAX_WAKES)
        n = raise_for(lib.vr_session_wakes(self._handle, out, _MAX_WAKES))
        return list(out[0 : min(n, _MAX_WAKES)])

    def mount_fds(self, mount: int = 0) -> MountFds | None:
        """Descriptors of the mounted image, for a control that takes over; None before the first mount."""
        if mount != 0:
            return None
        buffer = ffi.new("int32_t[]", _MAX_MOUNT_FDS)
        n = raise_for(lib.vr_session_mount(self._handle, buffer, _MAX_MOUNT_FDS))
        if n == 0:
            return None
        fds = ffi.unpack(buffer, n)
        per_blob = zip(*[iter(fds[2:])] * 4, strict=True)
        blobs = [BlobFds(s, e, t, data if data >= 0 else None) for s, e, t, data in per_blob]
        return MountFds(fds[0], fds[1], blobs)

    def status(self) -> dict[str, Any]:
        """Processes, session times (CLOCK_MONOTONIC, ns, 0 = not yet), queues and counters."""
        buffer = ffi.new("uint8_t[]", _STATUS_LEN)
        n = raise_for(lib.vr_session_status(self._handle, buffer, _STATUS_LEN))
        status = json.loads(bytes(ffi.buffer(buffer, min(n, _STATUS_LEN))))
        assert isinstance(status, dict)
        return status

    def arm_failpoint(self, point: int, *, skip: int = 0, action: int = KILL, times: int = 1) -> None:
        """Make the worker act when it passes *point*: *times* times, after *skip* free passes."""
        raise_for(lib.vr_session_failpoint(self._handle, point, skip, action, times))

    def armed_failpoint(self) -> int:
        """The point that has not acted yet, or 0."""
        return raise_for(lib.vr_session_failpoint_armed(self._handle))
