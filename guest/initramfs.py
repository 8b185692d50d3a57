"""An initramfs, for the kernels that have virtio-fs only as a module (Debian's 6.1).

It holds :file:`guest/initramfs.c` compiled and the modules of a root on virtio-fs. The archive ("newc" cpio,
not compressed) is written here, so that the same input gives the same bytes whoever builds it, and whenever.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import attrs

from guest.kit import HERE, static_program

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from guest.kit import Kernel


@attrs.frozen
class Entry:
    """A member of the archive; *mode* with the type bits, *device* is (major, minor) of a device node."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, content: bytes) -> Entry:
    return Entry(name, stat.S_IFREG | 0o755, content)


def plain(name: str, content: bytes) -> Entry:
    return Entry(name, stat.S_IFREG | 0o644, content)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive of *entries*, in their order: directories have to come before what is in them.

    Everything belongs to root, inode numbers count from 1, all times are 0. The format is described in
    Documentation/driver-api/early-userspace/buffer-format.rst of the kernel: 13 fields of 8 hexadecimal
    digits, name and content filled up to 4 bytes.
    """
    out = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4) + entry.content
        out += bytes(-len(out) % 4)
    return bytes(out)


def make_initramfs(out: Path, kernel: Kernel) -> Path | None:
    """Writes the initramfs that *kernel* needs for a root on virtio-fs to *out*.

    Returns:
        *out*, or ``None`` if the kernel has all of it built in.

    Raises:
        KitError: the C compiler is missing.
    """
    modules = kernel.root_modules
    if not modules:
        return None
    entries = [
        directory("dev"),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        *map(directory, ("proc", "root", "modules")),
        plain("modules/order", "".join(f"{path.name}\n" for path in modules).encode()),
        *(plain(f"modules/{path.name}", path.read_bytes()) for path in modules),
        program("init", static_program(HERE / "initramfs.c").read_bytes()),
    ]
    out.write_bytes(cpio(entries))
    return out
