"""The FUSE protocol in Python, sans-IO: for tests and traces. The hot path is Rust.

``structs`` and ``consts`` mirror the kernel's header, ``messages`` builds requests and parses replies.
"""

from virtiofsd_rafs.fuse.consts import ROOT_ID, AttrFlag, Fopen, Init, Opcode
from virtiofsd_rafs.fuse.messages import (
    DirEntry,
    build_dirent,
    build_request,
    mode_to_dtype,
    name_arg,
    parse_dirents,
    parse_xattr_names,
)

__all__ = [
    "ROOT_ID",
    "AttrFlag",
    "DirEntry",
    "Fopen",
    "Init",
    "Opcode",
    "build_dirent",
    "build_request",
    "mode_to_dtype",
    "name_arg",
    "parse_dirents",
    "parse_xattr_names",
]
