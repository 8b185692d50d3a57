"""The sandbox: what the kernel offers, and confining the calling process for good."""

from __future__ import annotations

import os

from virtiofsd_rafs.native._lib import ffi, last_error, lib, raise_for

# What may be done with a path: read; read and run; read and write; remove files.
READ, RUN, WRITE, REMOVE = b"r", b"x", b"w", b"d"


def available() -> int:
    """What this kernel offers, as :func:`is_whole` and the others read it."""
    return raise_for(lib.vr_sandbox_available())


def confine(allowed: list[tuple[bytes, str]]) -> tuple[int, str]:
    """Confine this process, which must have one thread, and all that it starts.

    *allowed* says for files and folders what may still be done with them and all below; those that do not
    exist are passed over. Returns what is in force, and why that is not all. Raises CacheError when nothing
    can be.
    """
    entries = b"".join(access + os.fsencode(path) + b"\0" for access, path in allowed)
    parts = raise_for(lib.vr_sandbox_confine(ffi.from_buffer(entries), len(entries)))
    return parts, "" if is_whole(parts) else last_error()


def is_whole(parts: int) -> bool:
    """Whether nothing is missing that matters."""
    return bool(parts & lib.VR_SANDBOX_WHOLE)


def has_seccomp(parts: int) -> bool:
    """Whether system calls are filtered."""
    return bool(parts & lib.VR_SANDBOX_SECCOMP)


def landlock_abi(parts: int) -> int:
    """The ABI of Landlock that is used; 0: none."""
    return parts & 0xFFFF
