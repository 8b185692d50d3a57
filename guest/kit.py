"""The guest kit: a small disk with everything of ours that a guest needs, so that any image boots as it is.

The root file system comes from the image alone. The kit is a second, read-only disk (ext4 on NVMe: both are
built into Debian's cloud kernels, so no initramfs is needed) with a static busybox, the driver of the network
card, :file:`guest/init`, :file:`guest/hash_tree.c` compiled, and one job to run. The image has to have
``/bin/sh``, ``mount`` and the directories ``/dev``, ``/proc``, ``/sys`` and ``/mnt``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VAR = ROOT / "var"
BUSYBOX = Path("/bin/busybox")

# The first process. It may use the image's programs and nothing else; NVMe disks appear a moment after the
# root is mounted.
_BOOTSTRAP = (
    "mount -t devtmpfs dev /dev; "
    "until test -b /dev/nvme0n1; do sleep 0.05; done; "
    "mount -r -t ext4 /dev/nvme0n1 /mnt && exec /mnt/init"
)


class KitError(Exception):
    """A part of the kit is missing or cannot be made; the text says how to get it."""


@attrs.frozen
class Kernel:
    """A kernel below ``var/kernels``, as :file:`scripts/lib/kernels.sh` leaves it."""

    series: str
    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return (self.folder / "release").read_text().strip()

    @property
    def root_modules(self) -> list[Path]:
        """The modules that a root on virtio-fs needs, in load order; none if all is built in."""
        order = self.folder / "root-modules" / "order"
        if not order.is_file():
            return []
        return [order.parent / name for name in order.read_text().split()]

    @classmethod
    def find(cls, series: str) -> Kernel:
        """The kernel of *series* (``"6.1"``, ``"6.12"``, ``"7"``).

        Raises:
            KitError: it has not been downloaded.
        """
        folder = VAR / "kernels" / series
        if not (folder / "vmlinuz").is_file():
            raise KitError(f"there is no guest kernel {series}: run scripts/lib/install guest")
        return cls(series, folder)


def hash_tree_program(folder: Path = VAR / "guest") -> Path:
    """The compiled :file:`hash_tree.c`, for host and guests."""
    return static_program(HERE / "hash_tree.c", folder)


def static_program(source: Path, folder: Path = VAR / "guest") -> Path:
    """The C program *source* compiled into *folder*, with nothing shared; again when its source is newer.

    Raises:
        KitError: there is no C compiler, or it refuses the source.
    """
    program = folder / source.stem.replace("_", "-")
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            built = Path(tmp) / program.name
            _run(["cc", "-std=gnu11", "-O2", "-Wall", "-static", "-s", "-o", str(built), str(source)])
            built.replace(program)
    return program


def make_kit(out: Path, kernel: Kernel, job: str | Path) -> Path:
    """Writes a kit for *kernel* to the file *out*.

    Args:
        out: the disk image to write (a few MB).
        kernel: its modules go into the kit.
        job: a shell script that :file:`guest/init` reads in when the guest is up; a name stands for a file in
            :file:`guest/jobs`. Descriptor 3 is the report, ``$B`` is busybox, ``milestone`` writes to the
            console.

    Raises:
        KitError: busybox or a tool is missing.
    """
    if not BUSYBOX.is_file():
        raise KitError("a static /bin/busybox is needed: run scripts/lib/install guest")
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp)
        shutil.copy(BUSYBOX, tree / "busybox")
        shutil.copy(HERE / "init", tree / "init")
        shutil.copy(hash_tree_program(), tree / "hash-tree")
        shutil.copytree(kernel.folder / "modules", tree / "modules")
        shutil.copy(job if isinstance(job, Path) else HERE / "jobs" / job, tree / "job")
        out.unlink(missing_ok=True)
        mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if mke2fs is None:
            raise KitError("mke2fs is needed: run scripts/lib/install guest")
        _run([mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(out), "16M"])
    return out


def _host_tsc_khz() -> int | None:
    """The rate of this machine's time stamp counter, as its kernel tells it."""
    match = re.search(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return int(float(match[1]) * 1000) if match else None


def kernel_command_line(*, tag: str = "rafs", extra: Sequence[str] = (), quiet: bool = True) -> str:
    """The command line that boots the virtio-fs *tag* as root, then the kit.

    *extra* words are for the kernel and the job.
    """
    words = [f"root={tag}", "rootfstype=virtiofs", "ro", "console=ttyS0", "panic=-1"]
    if quiet:
        words.append("quiet")
    # microvm has no timer to measure the time stamp counter against: on a busy host its guests hang early
    # without this.
    khz = _host_tsc_khz()
    if khz is not None:
        words.append(f"tsc_early_khz={khz}")
    words += [*extra, "init=/bin/sh", "--", "-c", f'"{_BOOTSTRAP}"']
    return " ".join(words)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KitError(f"{argv[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
