"""Blobs that lie in a directory, each in a file named by its id: a build's output, a NAS, a test."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.base import ANSWERED_BY, check_range, file_name
from virtiofsd_rafs.errors import AuthError, BackendError, BadReply, NotFound, Unreachable

if TYPE_CHECKING:
    from pathlib import Path

# An image has at most 255 blobs and reads few of them at a time.
_MAX_OPEN = 64


class LocalDirSource:
    """A BlobSource over ``<directory>/<blob_id>``.

    Reads run in threads: a NAS may hang, the loop must not.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._closed = False

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        """See BlobSource.

        A file that ends before the range is a BadReply: it may still be on its way here.
        """
        check_range(offset, length)
        data = await asyncio.to_thread(self._read, file_name(blob_id), offset, length)
        ANSWERED_BY.set("local")
        return data

    async def blob_size(self, blob_id: str) -> int:
        """See BlobSource."""
        return await asyncio.to_thread(self._size, file_name(blob_id))

    async def close(self) -> None:
        """See BlobSource."""
        with self._lock:
            self._closed = True
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _read(self, name: str, offset: int, length: int) -> bytes:
        fd = self._dup(name)
        try:
            parts: list[bytes] = []
            got = 0
            while got < length:
                part = os.pread(fd, length - got, offset + got)
                if not part:
                    self._forget(name)
                    size = os.fstat(fd).st_size
                    raise BadReply(f"{self._directory / name} has {size} bytes, {offset + length} are needed")
                parts.append(part)
                got += len(part)
        except OSError as e:
            if isinstance(e, BackendError):
                raise
            self._forget(name)  # a stale handle of a network file system is good for nothing
            raise Unreachable(f"{self._directory / name} cannot be read: {e.strerror}") from e
        finally:
            os.close(fd)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _size(self, name: str) -> int:
        fd = self._dup(name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _dup(self, name: str) -> int:
        """A descriptor that is the caller's to close: another thread may close the kept one meanwhile."""
        with self._lock:
            kept = self._open.get(name)
            if kept is not None:
                self._open.move_to_end(name)
                return os.dup(kept)
        fd = self._open_file(name)
        with self._lock:
            if not self._closed and name not in self._open:
                self._open[name] = os.dup(fd)
                while len(self._open) > _MAX_OPEN:
                    os.close(self._open.popitem(last=False)[1])
        return fd

    def _open_file(self, name: str) -> int:
        path = self._directory / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotFound(f"blob {name} is not in {self._directory}", remedy="check --blob-dir") from e
        except PermissionError as e:
            raise AuthError(f"{path} may not be read", remedy="mend its permissions") from e
        except OSError as e:
            raise Unreachable(f"{path} cannot be opened: {e.strerror}") from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotFound(f"{path} is no regular file", remedy="check --blob-dir")
        return fd

    def _forget(self, name: str) -> None:
        with self._lock:
            fd = self._open.pop(name, None)
            if fd is not None:
                os.close(fd)
