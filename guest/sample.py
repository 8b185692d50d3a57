"""A bootable tree with every kind of file, name, time, owner, attribute and size that a tree can have."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
from pathlib import Path

from guest.kit import BUSYBOX

_SIZES = (0, 1, 100, 4095, 4096, 4097, 65_536, 1_048_575, 1_048_576, 1_048_577, 5_000_000)
_NAMES = (
    b"n" * 255,
    "Gr\u00fc\u00dfe \u4e16\u754c".encode(),
    b"\xff\xfe\x01",
    b" space ",
    b"new\nline",
    b"-",
    b"...",
    b"tab\t",
)
_TIMES_NS = {
    "nano": 1_700_000_000_123_456_789,
    "zero": 0,
    "before-1970": -86_400 * 10**9,
    "after-2038": 2**33 * 10**9 + 1,
}


def make_sample(root: Path) -> None:
    """Fills *root*; needs root's rights (device nodes, owners, ``trusted`` attributes).

    About 16 MB, 3 200 files.
    """
    root.mkdir(parents=True, exist_ok=True)
    _system(root)
    _content(root)
    _names(root)
    _special(root)
    _metadata(root)


def _system(root: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "mnt", "tmp", "run", "var/log", "etc", "data"):
        (root / name).mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    for applet in ("sh", "mount", "test", "sleep"):
        (root / "bin" / applet).symlink_to("busybox")
    os.mknod(root / "dev" / "console", stat.S_IFCHR | 0o600, os.makedev(5, 1))


def _content(root: Path) -> None:
    """Sizes around those of blocks and chunks, with bytes that compress and bytes that do not.

    The same every time.
    """
    noise = random.Random(3)
    data = root / "data"
    for size in _SIZES:
        (data / f"noise-{size}").write_bytes(noise.randbytes(size))
        (data / f"text-{size}").write_bytes((b"all work and no play " * (size // 21 + 1))[:size])
    with (data / "hole").open("wb") as file:
        file.write(b"begin")
        file.seek(3_000_000)
        file.write(b"end")
    (data / "same").write_bytes((data / "noise-5000000").read_bytes())


def _names(root: Path) -> None:
    many = root / "many"
    many.mkdir()
    for index in range(3000):
        (many / f"entry-{index}").write_bytes(b"%d" % index if index % 7 == 0 else b"")
    path = root / "deep"
    for level in range(40):
        path = path / f"level-{level}"
    path.mkdir(parents=True)
    (path / "bottom").write_text("bottom")
    names = root / "data" / "names"
    names.mkdir()
    for name in _NAMES:
        Path(os.fsdecode(bytes(names) + b"/" + name)).write_bytes(name)


def _special(root: Path) -> None:
    data = root / "data"
    os.link(data / "noise-100", data / "second-name")
    os.link(data / "noise-100", root / "third-name")
    (data / "short-link").symlink_to("names")
    (data / "long-link").symlink_to("/".join(["x" * 200] * 20))
    (data / "broken-link").symlink_to("nowhere")
    os.mkfifo(data / "fifo", 0o622)
    os.mknod(data / "char", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    os.mknod(data / "block", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    # A socket's path has to be short, so it is bound from within its folder.
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(data):
        listener.bind("socket")


def _metadata(root: Path) -> None:
    data = root / "data"
    for mode in (0o000, 0o444, 0o4755, 0o2755, 0o1777, 0o7777):
        (data / f"mode-{mode:o}").write_text("m")
        (data / f"mode-{mode:o}").chmod(mode)
    for owner, group in ((1, 2), (65_535, 65_536), (1_000_000, 4_000_000_000)):
        (data / f"owner-{owner}").write_text("o")
        os.chown(data / f"owner-{owner}", owner, group)
    os.lchown(data / "short-link", 33, 33)
    attributes = data / "attributes"
    attributes.mkdir()
    os.setxattr(attributes, "user.directory", b"yes")
    (attributes / "many").write_text("a")
    for index in range(40):
        os.setxattr(attributes / "many", f"user.number-{index}", b"v" * index)
    capability = attributes / "capability"
    capability.write_text("c")
    # cap_net_bind_service, effective and permitted (revision 2 of the format).
    os.setxattr(capability, "security.capability", bytes.fromhex("01000002" + "00040000" + 12 * "00"))
    os.setxattr(capability, "trusted.overlay.opaque", b"y")
    times = data / "times"
    times.mkdir()
    for name, when in _TIMES_NS.items():
        (times / name).write_text("t")
        os.utime(times / name, ns=(when, when))
    os.utime(times, ns=(1_600_000_000_999_999_999, 1_600_000_000_999_999_999))
