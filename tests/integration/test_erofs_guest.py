"""An uncompressed image is an EROFS image: a guest mounts bootstrap and blob as two disks, without any of our
code.

The guest's own kernel is the judge. An initramfs of busybox, erofs.ko and hash-tree mounts the disks and
compares the tree with what hash-tree said about the source.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from guest.initramfs import cpio, directory, plain, program
from guest.kit import BUSYBOX, Kernel, KitError, hash_tree_program
from tests.source_trees import make_varied_tree
from virtiofsd_rafs.image.build import build_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.guest

BOOT_TIMEOUT_S = 300  # a guard against a guest that hangs, not a measure
INIT = """#!/busybox sh
B=/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
while read m; do case $m in libcrc32c.ko|erofs.ko) $B insmod /modules/$m;; esac; done < /modules/order
until $B test -b /dev/nvme0n1 && $B test -b /dev/nvme0n2; do $B sleep 0.05; done
# The kernel numbers disks as it finds them.
$B mount -t sysfs sys /sys
for d in nvme0n1 nvme0n2; do
    case $($B cat /sys/block/$d/nsid) in 1) boot=/dev/$d;; 2) blob=/dev/$d;; esac
done
$B mount -r -t erofs -o device=$blob $boot /image && /hash-tree /image > /found
$B cmp /expected /found && verdict=equal || verdict=different
$B diff /expected /found | $B head -n 20
$B echo verdict: $verdict
$B poweroff -f
"""


@pytest.mark.parametrize("series", ["6.12", "7"])
@pytest.mark.parametrize("chunk_size", [4096, 1 << 20])
def test_kernel_mounts_uncompressed_image(
    tmp_path: Path, series: str, chunk_size: int, tool: Callable[[str], str], missing: Callable[[str], None]
) -> None:
    try:
        kernel = Kernel.find(series)
        hash_tree = hash_tree_program()
    except KitError:
        missing(f"kernel-{series}")
        raise
    qemu = tool("qemu-system-x86_64")
    if not BUSYBOX.is_file():
        missing("busybox")
    (tmp_path / "source").mkdir()
    make_varied_tree(tmp_path / "source")
    result = build_image(tmp_path / "source", tmp_path / "out", compressor="none", chunk_size=chunk_size)
    expected = subprocess.run(
        [hash_tree, "-l", tmp_path / "source"], check=True, stdout=subprocess.PIPE
    ).stdout
    assert expected.count(b"\n") > 700

    entries = [
        *map(directory, ("proc", "dev", "sys", "image", "modules")),
        *(plain(f"modules/{path.name}", path.read_bytes()) for path in (kernel.folder / "modules").iterdir()),
        program("busybox", BUSYBOX.read_bytes()),
        program("hash-tree", hash_tree.read_bytes()),
        program("init", INIT.encode()),
        plain("expected", expected),
    ]
    (tmp_path / "initramfs").write_bytes(cpio(entries))
    disks = ["-device", "nvme,id=nvme,serial=image"]
    for number, path in enumerate((result.bootstrap, result.blob), start=1):
        disks += ["-drive", f"if=none,id=disk{number},format=raw,readonly=on,file={path}"]
        disks += ["-device", f"nvme-ns,drive=disk{number},nsid={number}"]
    done = subprocess.run(
        [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-machine", "q35,accel=tcg", "-cpu", "max", "-m", "512M", *disks),
            *("-kernel", kernel.image, "-initrd", tmp_path / "initramfs"),
            *("-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=BOOT_TIMEOUT_S,
        check=True,
    )
    assert b"verdict: equal" in done.stdout, done.stdout[-4000:].decode("utf-8", "replace")
