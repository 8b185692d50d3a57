"""Blobs that lie in directories, each in a file named by its id: a build's output, a NAS, a test."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.base import ANSWERED_BY, check_range, file_name
from virtiofsd_rafs.backends.config import DEFAULT_FILE_TIMEOUT_S
from virtiofsd_rafs.backends.readers import Readers
from virtiofsd_rafs.errors import AuthError, BackendError, BadReply, NotFound, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

# An image has at most 255 blobs and reads few of them at a time.
_MAX_OPEN = 64
# What a network file system says when a handle is no good any more, or a server was away for a moment.
_WORTH_REOPENING = (errno.ESTALE, errno.EIO, errno.ENXIO, errno.ETIMEDOUT)


class LocalDirSource:
    """A BlobSource over ``<directory>/<blob_id>``, in the first directory that has it.

    Reads run in threads of their own and have a deadline: a NAS may hang, the loop must not. A stale handle
    is replaced within the read that met it.

    Args:
        directories: looked into in this order.
        blob_file: a file that holds the image's only blob, whatever its id; asked first.
        timeout_s: how long an operation may hang.
    """

    def __init__(
        self,
        directories: Sequence[Path] | Path,
        *,
        blob_file: Path | None = None,
        timeout_s: float = DEFAULT_FILE_TIMEOUT_S,
    ) -> None:
        self._directories = (directories,) if isinstance(directories, Path) else tuple(directories)
        self._blob_file = blob_file
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._closed = False
        self._readers = Readers(timeout_s=timeout_s, what=self.label)

    @property
    def label(self) -> str:
        """The place, for people."""
        return str(self._blob_file or self._directories[0])

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource.

        A file that ends before the range is a BadReply: it may still be on its way here.
        """
        check_range(offset, length)
        data = await self._readers.run(self._read, file_name(blob_id), offset, length)
        ANSWERED_BY.set("local")
        return data

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource."""
        return await self._readers.run(self._size, file_name(blob_id))

    async def close(self) -> None:
        """See BlobSource."""
        with self._lock:
            self._closed = True
            kept = list(self._open.values())
            self._open.clear()
        self._readers.close()
        for fd in kept:
            os.close(fd)

    def _read(self, name: str, offset: int, length: int) -> bytes:
        try:
            return self._read_once(name, offset, length)
        except OSError as e:
            if isinstance(e, BackendError):
                raise
            self._forget(name)
            if e.errno not in _WORTH_REOPENING:
                raise self._unreadable(name, e) from e
        try:
            return self._read_once(name, offset, length)
        except OSError as e:
            if isinstance(e, BackendError):
                raise
            self._forget(name)
            raise self._unreadable(name, e) from e

    def _read_once(self, name: str, offset: int, length: int) -> bytes:
        fd = self._dup(name)
        try:
            parts: list[bytes] = []
            got = 0
            while got < length:
                part = os.pread(fd, length - got, offset + got)
                if not part:
                    self._forget(name)
                    size = os.fstat(fd).st_size
                    raise BadReply(
                        f"blob {name} in {self.label} has {size} bytes, {offset + length} are needed"
                    )
                parts.append(part)
                got += len(part)
        finally:
            os.close(fd)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unreadable(self, name: str, error: OSError) -> Unreachable:
        return Unreachable(f"blob {name} in {self.label} cannot be read: {error.strerror}")

    def _size(self, name: str) -> int:
        for last in (False, True):
            fd = self._dup(name)
            try:
                return os.fstat(fd).st_size
            except OSError as e:
                self._forget(name)
                if last:
                    raise self._unreadable(name, e) from e
            finally:
                os.close(fd)
        raise AssertionError("unreachable")

    def _dup(self, name: str) -> int:
        """A descriptor that is the caller's to close: another thread may close the kept one meanwhile."""
        with self._lock:
            kept = self._open.get(name)
            if kept is not None:
                self._open.move_to_end(name)
                return os.dup(kept)
        fd = self._open_file(name)
        surplus = []
        with self._lock:
            if not self._closed and name not in self._open:
                self._open[name] = os.dup(fd)
                while len(self._open) > _MAX_OPEN:
                    surplus.append(self._open.popitem(last=False)[1])
        for old in surplus:  # outside of the lock: closing may wait for a server
            os.close(old)
        return fd

    def _open_file(self, name: str) -> int:
        """A descriptor of the blob's file, from the first place that has it."""
        paths = [self._blob_file] if self._blob_file is not None else []
        paths += [directory / name for directory in self._directories]
        refused: BackendError | None = None
        for path in paths:
            try:
                fd = _open_regular(path)
            except BackendError as e:
                refused = refused or e  # the next one may have it, and may be read
                continue
            if fd is not None:
                return fd
        if refused is not None:
            raise refused
        for directory in self._directories:
            if not directory.is_dir():
                # A mount that is away for a while, not a blob that was never there.
                raise Unreachable(f"the directory {directory} is not there", remedy="is it mounted?")
        where = ", ".join(map(str, self._directories)) or str(self._blob_file)
        raise NotFound(f"blob {name} is not in {where}", remedy="check --blob-dir or --blob-source")

    def _forget(self, name: str) -> None:
        with self._lock:
            fd = self._open.pop(name, None)
        if fd is not None:
            os.close(fd)


def _open_regular(path: Path) -> int | None:
    """A descriptor of *path*; None when nothing is there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as e:
        raise AuthError(f"{path} may not be read", remedy="mend its permissions, or --sandbox-allow") from e
    except OSError as e:
        raise Unreachable(f"{path} cannot be opened: {e.strerror}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotFound(f"{path} is no regular file", remedy="check --blob-dir")
    return fd
