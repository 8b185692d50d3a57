"""Runs a program as on a kernel that lacks some system calls.

``lesser_kernel.py NUMBER[,NUMBER...] PROGRAM ARGUMENT...``: the calls fail with ENOSYS, by a seccomp filter
(linux/seccomp.h, linux/filter.h) that the program cannot take off.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LD_W_ABS, _JEQ, _RET = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def take_away(numbers: list[int]) -> None:
    """Lets the system calls *numbers* fail with ENOSYS from now on."""
    lines = [(_LD_W_ABS, 0, 0, 0)]
    for number in numbers:
        lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    lines.append((_RET, 0, 0, _ALLOW))
    code = b"".join(struct.pack("<HBBI", *line) for line in lines)
    program = _Program(len(lines), code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


if __name__ == "__main__":
    take_away([int(number) for number in sys.argv[1].split(",")])
    os.execv(sys.argv[2], sys.argv[2:])
