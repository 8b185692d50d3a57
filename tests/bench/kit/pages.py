"""The page cache: what is dropped so that the next read comes from the disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def drop(files: Iterable[Path]) -> None:
    """Drops the pages of *files*, after having written what is dirty (posix_fadvise(2), POSIX_FADV_DONTNEED).

    Pages that a process has mapped stay.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
