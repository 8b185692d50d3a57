"""The FUSE structures as the Linux kernel lays them out (include/uapi/linux/fuse.h, protocol 7.38).

Field names are the kernel's. Structures that no virtio-fs guest sends to a read-only tree and that nothing
here tests (locks, ioctl, poll, notifications) are left out. For tests and traces: hot paths are Rust.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import attrs

from virtiofsd_rafs.fuse.wire import Wire, i32, u16, u32, u64


@attrs.frozen
class InHeader(Wire):
    """Header of every request. ``len`` counts the header; ``unique`` comes back in the reply."""

    C_NAME: ClassVar[str] = "fuse_in_header"
    len: u32 = 0
    opcode: u32 = 0
    unique: u64 = 0
    nodeid: u64 = 0
    uid: u32 = 0
    gid: u32 = 0
    pid: u32 = 0
    total_extlen: u16 = 0
    padding: u16 = 0


@attrs.frozen
class OutHeader(Wire):
    """Header of every reply. ``error`` is 0 or a negative errno; an error reply is this header alone."""

    C_NAME: ClassVar[str] = "fuse_out_header"
    len: u32 = 0
    error: i32 = 0
    unique: u64 = 0


@attrs.frozen
class InitIn(Wire):
    """FUSE_INIT. ``flags2`` holds flags 32 to 63 and counts only with INIT_EXT in ``flags``."""

    C_NAME: ClassVar[str] = "fuse_init_in"
    major: u32 = 0
    minor: u32 = 0
    max_readahead: u32 = 0
    flags: u32 = 0
    flags2: u32 = 0
    unused: Annotated[bytes, "44s"] = bytes(44)


@attrs.frozen
class InitOut(Wire):
    """Reply to FUSE_INIT; ``max_pages`` counts only with MAX_PAGES in ``flags``."""

    C_NAME: ClassVar[str] = "fuse_init_out"
    major: u32 = 0
    minor: u32 = 0
    max_readahead: u32 = 0
    flags: u32 = 0
    max_background: u16 = 0
    congestion_threshold: u16 = 0
    max_write: u32 = 0
    time_gran: u32 = 0
    max_pages: u16 = 0
    map_alignment: u16 = 0
    flags2: u32 = 0
    unused: Annotated[bytes, "28s"] = bytes(28)


@attrs.frozen
class Attr(Wire):
    """Attributes of an inode; ``blocks`` are units of 512 bytes, ``rdev`` is the kernel's 32-bit encoding."""

    C_NAME: ClassVar[str] = "fuse_attr"
    ino: u64 = 0
    size: u64 = 0
    blocks: u64 = 0
    atime: u64 = 0
    mtime: u64 = 0
    ctime: u64 = 0
    atimensec: u32 = 0
    mtimensec: u32 = 0
    ctimensec: u32 = 0
    mode: u32 = 0
    nlink: u32 = 0
    uid: u32 = 0
    gid: u32 = 0
    rdev: u32 = 0
    blksize: u32 = 0
    flags: u32 = 0


@attrs.frozen
class GetattrIn(Wire):
    """``struct fuse_getattr_in``."""

    C_NAME: ClassVar[str] = "fuse_getattr_in"
    getattr_flags: u32 = 0
    dummy: u32 = 0
    fh: u64 = 0


@attrs.frozen
class AttrOut(Wire):
    """``struct fuse_attr_out``."""

    C_NAME: ClassVar[str] = "fuse_attr_out"
    attr_valid: u64 = 0
    attr_valid_nsec: u32 = 0
    dummy: u32 = 0
    attr: Attr = attrs.field(factory=Attr)


@attrs.frozen
class SetattrIn(Wire):
    """``struct fuse_setattr_in``."""

    C_NAME: ClassVar[str] = "fuse_setattr_in"
    valid: u32 = 0
    padding: u32 = 0
    fh: u64 = 0
    size: u64 = 0
    lock_owner: u64 = 0
    atime: u64 = 0
    mtime: u64 = 0
    ctime: u64 = 0
    atimensec: u32 = 0
    mtimensec: u32 = 0
    ctimensec: u32 = 0
    mode: u32 = 0
    unused4: u32 = 0
    uid: u32 = 0
    gid: u32 = 0
    unused5: u32 = 0


@attrs.frozen
class EntryOut(Wire):
    """Reply to LOOKUP and to what creates inodes. ``nodeid`` 0 is a negative entry, for ``entry_valid`` s."""

    C_NAME: ClassVar[str] = "fuse_entry_out"
    nodeid: u64 = 0
    generation: u64 = 0
    entry_valid: u64 = 0
    attr_valid: u64 = 0
    entry_valid_nsec: u32 = 0
    attr_valid_nsec: u32 = 0
    attr: Attr = attrs.field(factory=Attr)


@attrs.frozen
class ForgetIn(Wire):
    """``struct fuse_forget_in``."""

    C_NAME: ClassVar[str] = "fuse_forget_in"
    nlookup: u64 = 0


@attrs.frozen
class ForgetOne(Wire):
    """``struct fuse_forget_one``."""

    C_NAME: ClassVar[str] = "fuse_forget_one"
    nodeid: u64 = 0
    nlookup: u64 = 0


@attrs.frozen
class BatchForgetIn(Wire):
    """BATCH_FORGET: ``count`` ForgetOne follow."""

    C_NAME: ClassVar[str] = "fuse_batch_forget_in"
    count: u32 = 0
    dummy: u32 = 0


@attrs.frozen
class OpenIn(Wire):
    """``struct fuse_open_in``."""

    C_NAME: ClassVar[str] = "fuse_open_in"
    flags: u32 = 0
    open_flags: u32 = 0


@attrs.frozen
class OpenOut(Wire):
    """``struct fuse_open_out``."""

    C_NAME: ClassVar[str] = "fuse_open_out"
    fh: u64 = 0
    open_flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class CreateIn(Wire):
    """``struct fuse_create_in``."""

    C_NAME: ClassVar[str] = "fuse_create_in"
    flags: u32 = 0
    mode: u32 = 0
    umask: u32 = 0
    open_flags: u32 = 0


@attrs.frozen
class ReadIn(Wire):
    """``struct fuse_read_in``."""

    C_NAME: ClassVar[str] = "fuse_read_in"
    fh: u64 = 0
    offset: u64 = 0
    size: u32 = 0
    read_flags: u32 = 0
    lock_owner: u64 = 0
    flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class WriteIn(Wire):
    """``struct fuse_write_in``."""

    C_NAME: ClassVar[str] = "fuse_write_in"
    fh: u64 = 0
    offset: u64 = 0
    size: u32 = 0
    write_flags: u32 = 0
    lock_owner: u64 = 0
    flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class WriteOut(Wire):
    """``struct fuse_write_out``."""

    C_NAME: ClassVar[str] = "fuse_write_out"
    size: u32 = 0
    padding: u32 = 0


@attrs.frozen
class ReleaseIn(Wire):
    """``struct fuse_release_in``."""

    C_NAME: ClassVar[str] = "fuse_release_in"
    fh: u64 = 0
    flags: u32 = 0
    release_flags: u32 = 0
    lock_owner: u64 = 0


@attrs.frozen
class FlushIn(Wire):
    """``struct fuse_flush_in``."""

    C_NAME: ClassVar[str] = "fuse_flush_in"
    fh: u64 = 0
    unused: u32 = 0
    padding: u32 = 0
    lock_owner: u64 = 0


@attrs.frozen
class FsyncIn(Wire):
    """``struct fuse_fsync_in``."""

    C_NAME: ClassVar[str] = "fuse_fsync_in"
    fh: u64 = 0
    fsync_flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class Kstatfs(Wire):
    """File system statistics; ``blocks`` are units of ``frsize``."""

    C_NAME: ClassVar[str] = "fuse_kstatfs"
    blocks: u64 = 0
    bfree: u64 = 0
    bavail: u64 = 0
    files: u64 = 0
    ffree: u64 = 0
    bsize: u32 = 0
    namelen: u32 = 0
    frsize: u32 = 0
    padding: u32 = 0
    spare: Annotated[bytes, "24s"] = bytes(24)


@attrs.frozen
class StatfsOut(Wire):
    """``struct fuse_statfs_out``."""

    C_NAME: ClassVar[str] = "fuse_statfs_out"
    st: Kstatfs = attrs.field(factory=Kstatfs)


@attrs.frozen
class SetxattrIn(Wire):
    """``struct fuse_setxattr_in``."""

    C_NAME: ClassVar[str] = "fuse_setxattr_in"
    size: u32 = 0
    flags: u32 = 0
    setxattr_flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class GetxattrIn(Wire):
    """GETXATTR and LISTXATTR; ``size`` 0 asks for the size, which comes as GetxattrOut."""

    C_NAME: ClassVar[str] = "fuse_getxattr_in"
    size: u32 = 0
    padding: u32 = 0


@attrs.frozen
class GetxattrOut(Wire):
    """``struct fuse_getxattr_out``."""

    C_NAME: ClassVar[str] = "fuse_getxattr_out"
    size: u32 = 0
    padding: u32 = 0


@attrs.frozen
class AccessIn(Wire):
    """``struct fuse_access_in``."""

    C_NAME: ClassVar[str] = "fuse_access_in"
    mask: u32 = 0
    padding: u32 = 0


@attrs.frozen
class LseekIn(Wire):
    """LSEEK; ``whence`` is SEEK_DATA (3) or SEEK_HOLE (4)."""

    C_NAME: ClassVar[str] = "fuse_lseek_in"
    fh: u64 = 0
    offset: u64 = 0
    whence: u32 = 0
    padding: u32 = 0


@attrs.frozen
class LseekOut(Wire):
    """``struct fuse_lseek_out``."""

    C_NAME: ClassVar[str] = "fuse_lseek_out"
    offset: u64 = 0


@attrs.frozen
class MknodIn(Wire):
    """``struct fuse_mknod_in``."""

    C_NAME: ClassVar[str] = "fuse_mknod_in"
    mode: u32 = 0
    rdev: u32 = 0
    umask: u32 = 0
    padding: u32 = 0


@attrs.frozen
class MkdirIn(Wire):
    """``struct fuse_mkdir_in``."""

    C_NAME: ClassVar[str] = "fuse_mkdir_in"
    mode: u32 = 0
    umask: u32 = 0


@attrs.frozen
class RenameIn(Wire):
    """``struct fuse_rename_in``."""

    C_NAME: ClassVar[str] = "fuse_rename_in"
    newdir: u64 = 0


@attrs.frozen
class Rename2In(Wire):
    """``struct fuse_rename2_in``."""

    C_NAME: ClassVar[str] = "fuse_rename2_in"
    newdir: u64 = 0
    flags: u32 = 0
    padding: u32 = 0


@attrs.frozen
class LinkIn(Wire):
    """``struct fuse_link_in``."""

    C_NAME: ClassVar[str] = "fuse_link_in"
    oldnodeid: u64 = 0


@attrs.frozen
class FallocateIn(Wire):
    """``struct fuse_fallocate_in``."""

    C_NAME: ClassVar[str] = "fuse_fallocate_in"
    fh: u64 = 0
    offset: u64 = 0
    length: u64 = 0
    mode: u32 = 0
    padding: u32 = 0


@attrs.frozen
class CopyFileRangeIn(Wire):
    """``struct fuse_copy_file_range_in``."""

    C_NAME: ClassVar[str] = "fuse_copy_file_range_in"
    fh_in: u64 = 0
    off_in: u64 = 0
    nodeid_out: u64 = 0
    fh_out: u64 = 0
    off_out: u64 = 0
    len: u64 = 0
    flags: u64 = 0


@attrs.frozen
class InterruptIn(Wire):
    """``struct fuse_interrupt_in``."""

    C_NAME: ClassVar[str] = "fuse_interrupt_in"
    unique: u64 = 0


@attrs.frozen
class SyncfsIn(Wire):
    """``struct fuse_syncfs_in``."""

    C_NAME: ClassVar[str] = "fuse_syncfs_in"
    padding: u64 = 0


@attrs.frozen
class SetupmappingIn(Wire):
    """``struct fuse_setupmapping_in``."""

    C_NAME: ClassVar[str] = "fuse_setupmapping_in"
    fh: u64 = 0
    foffset: u64 = 0
    len: u64 = 0
    flags: u64 = 0
    moffset: u64 = 0


@attrs.frozen
class RemovemappingIn(Wire):
    """``struct fuse_removemapping_in``."""

    C_NAME: ClassVar[str] = "fuse_removemapping_in"
    count: u32 = 0


@attrs.frozen
class RemovemappingOne(Wire):
    """``struct fuse_removemapping_one``."""

    C_NAME: ClassVar[str] = "fuse_removemapping_one"
    moffset: u64 = 0
    len: u64 = 0


@attrs.frozen
class Dirent(Wire):
    """Start of a directory entry; the name follows, padded to 8 bytes. ``off`` is the next one's cookie."""

    C_NAME: ClassVar[str] = "fuse_dirent"
    ino: u64 = 0
    off: u64 = 0
    namelen: u32 = 0
    type: u32 = 0


@attrs.frozen
class Direntplus(Wire):
    """Start of a READDIRPLUS entry: attributes as LOOKUP gives them, then the directory entry."""

    C_NAME: ClassVar[str] = "fuse_direntplus"
    entry_out: EntryOut = attrs.field(factory=EntryOut)
    dirent: Dirent = attrs.field(factory=Dirent)
