"""Credentials in environment variables, kept where only control sees them.

What a process was started with can be read in ``/proc/<pid>/environ``, and each of its children has a copy,
also a worker that a guest has taken over. The keeper therefore moves such values into a memfd that it hands
to control alone, takes them out of its own environment, and overwrites what the kernel and the interpreter
have of them. No step here makes another copy.
"""

from __future__ import annotations

import logging
import os
import re

_log = logging.getLogger(__name__)

# Variables that are a secret, whatever they hold ...
_SECRET = re.compile(
    rb"AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|OSS_ACCESS_KEY_SECRET|OSS_SESSION_TOKEN"
    rb"|ALIBABA_CLOUD_ACCESS_KEY_SECRET|ALIBABA_CLOUD_SECURITY_TOKEN|IMAGE_PULL_AUTH"
)
# ... and those that are one if there is a user in them.
_URL = re.compile(rb"(?:https?|all)_proxy", re.IGNORECASE)
# Its place in /proc/self/stat behind the name in parentheses (proc(5), field 50).
_ENV_START = 50 - 3


def hide_secrets() -> int | None:
    """Moves them out of the environment, into a memfd for ``reveal_secrets``; None when there are none."""
    found = {name: value for name, value in os.environb.items() if _is_secret(name, value)}
    if not found:
        return None
    fd = os.memfd_create("rafs-environment", os.MFD_CLOEXEC)
    for name, value in found.items():
        os.writev(fd, (name, b"=", value, b"\0"))
    for name in found:
        del os.environb[name]
    try:
        _overwrite_kernels(list(found))
    except (OSError, ValueError, IndexError) as e:
        names = b", ".join(found).decode(errors="replace")
        _log.warning("/proc/self/environ still shows %s: %s", names, e)
    _overwrite_ours(list(found.values()))
    return fd


def reveal_secrets(fd: int | None) -> None:
    """Puts them back, for this process and those that it starts; the kernel's copy stays overwritten."""
    if fd is None:
        return
    for entry in os.pread(fd, os.fstat(fd).st_size, 0).split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if equals:
            os.environb[name] = value


def _is_secret(name: bytes, value: bytes) -> bool:
    if _URL.fullmatch(name):
        return b"@" in value
    return bool(value) and _SECRET.fullmatch(name) is not None


def _overwrite_kernels(names: list[bytes]) -> None:
    """Zeroes the values of *names* in the memory that /proc/self/environ shows."""
    with open("/proc/self/stat", "rb") as f:
        start = int(f.read().rpartition(b")")[2].split()[_ENV_START])
    # One byte in front, so that each variable begins behind a NUL.
    environ = bytearray(b"\0") + bytearray(_environ_len())
    with open("/proc/self/environ", "rb", buffering=0) as f:
        f.readinto(memoryview(environ)[1:])
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for name in names:
            at = environ.find(b"\0" + name + b"=")
            if at < 0:
                continue
            first = at + len(name) + 2
            end = environ.find(b"\0", first)
            n = (end if end >= 0 else len(environ)) - first
            memory.seek(start + first - 1)
            memory.write(bytes(n))
    environ[:] = bytes(len(environ))


def _environ_len() -> int:
    """Bytes of /proc/self/environ, whose size no stat tells."""
    piece = bytearray(1 << 16)
    n = 0
    with open("/proc/self/environ", "rb", buffering=0) as f:
        while got := f.readinto(piece):
            n += got
    piece[:] = bytes(len(piece))
    return n


def _overwrite_ours(values: list[bytes]) -> None:
    """Zeroes *values* themselves, which nobody uses any more: freed memory keeps its content."""
    import ctypes

    # CPython's bytes are a header and the bytes with a NUL behind them. Short ones may be shared.
    header = bytes.__basicsize__ - 1
    for value in values:
        if len(value) > 1:
            ctypes.memset(id(value) + header, 0, len(value))
