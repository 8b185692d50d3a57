"""Credentials in environment variables, kept where only control sees them.

What a process was started with can be read in ``/proc/<pid>/environ``, and each of its children has a copy,
also a worker that a guest has taken over. The keeper therefore moves such values into a memfd that it hands
to control alone, takes them out of its own environment, and overwrites the place where the kernel left them.
What Python itself had copied is freed, not wiped: passwords in files stay the better choice.
"""

from __future__ import annotations

import logging
import os
import re

_log = logging.getLogger(__name__)

# Variables that are a secret, whatever they hold ...
_SECRET = re.compile(
    r"AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|OSS_ACCESS_KEY_SECRET|OSS_SESSION_TOKEN"
    r"|ALIBABA_CLOUD_ACCESS_KEY_SECRET|ALIBABA_CLOUD_SECURITY_TOKEN|IMAGE_PULL_AUTH"
)
# ... and those that are one if there is a user in them.
_URL = re.compile(r"(?:https?|all)_proxy", re.IGNORECASE)
# Its place in /proc/self/stat behind the name in parentheses (proc(5), field 50).
_ENV_START = 50 - 3


def hide_secrets() -> int | None:
    """Moves them out of the environment, into a memfd for ``reveal_secrets``; None when there are none."""
    found = {name: value for name, value in os.environ.items() if _is_secret(name, value)}
    if not found:
        return None
    import json

    fd = os.memfd_create("rafs-environment", os.MFD_CLOEXEC)
    data = json.dumps({name: os.fsencode(value).hex() for name, value in found.items()}).encode()
    os.pwrite(fd, data, 0)
    for name in found:
        del os.environ[name]
    try:
        _overwrite([os.fsencode(name) for name in found])
    except (OSError, ValueError, IndexError) as e:
        _log.warning("/proc/self/environ still shows %s: %s", ", ".join(found), e)
    return fd


def reveal_secrets(fd: int | None) -> None:
    """Puts them back, for this process and those that it starts; the kernel's copy stays overwritten."""
    if fd is None:
        return
    import json

    for name, value in json.loads(os.pread(fd, os.fstat(fd).st_size, 0)).items():
        os.environ[name] = os.fsdecode(bytes.fromhex(value))


def _is_secret(name: str, value: str) -> bool:
    if _URL.fullmatch(name):
        return "@" in value
    return bool(value) and _SECRET.fullmatch(name) is not None


def _overwrite(names: list[bytes]) -> None:
    """Zeroes the values of *names* in the memory that /proc/self/environ shows."""
    with open("/proc/self/stat", "rb") as f:
        start = int(f.read().rpartition(b")")[2].split()[_ENV_START])
    with open("/proc/self/environ", "rb") as f:
        environ = f.read()
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        at = 0
        for entry in environ.split(b"\0"):
            name, equals, value = entry.partition(b"=")
            if equals and name in names:
                memory.seek(start + at + len(name) + 1)
                memory.write(bytes(len(value)))
            at += len(entry) + 1
