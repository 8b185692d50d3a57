"""The floor program: built when it is needed, started like any other back-end."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guest.daemon import BackEnd

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).with_name("floor.c")
FILES = 8
_MiB = 1 << 20


def build(work: Path) -> Path:
    """The program below *work*, compiled unless this very source has been.

    Raises:
        ClickException: there is no C compiler, or it failed.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = work / f"floor-{digest}"
    if program.exists():
        return program
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise click.ClickException("no C compiler for the floor program: install gcc, or give --no-floor")
    work.mkdir(parents=True, exist_ok=True)
    part = program.with_suffix(".part")
    argv = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(part), str(SOURCE)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"the floor program cannot be compiled:\n{done.stderr}")
    part.rename(program)
    return program


def data_of(tree: Path, work: Path) -> Path:
    """A file of the largest files of *tree*, each cut to the size of the smallest of them.

    The floor copies from as many bytes as the others read, so that caches of the processor help it no more.

    Raises:
        ClickException: the tree has too few large files.
    """
    sizes = sorted((p.stat().st_size, p) for p in tree.rglob("*") if p.is_file() and not p.is_symlink())
    large = [(size, path) for size, path in sizes if size >= _MiB][-FILES:]
    if len(large) < FILES:
        raise click.ClickException(f"the floor program wants {FILES} files of 1 MiB or more in {tree}")
    least = large[0][0] & -4096
    digest = hashlib.sha256(repr((str(tree), large)).encode()).hexdigest()[:8]
    out = work / f"floor-{digest}.data"
    if not out.exists():
        part = out.with_suffix(".part")
        with part.open("wb") as file:
            for _, path in large:
                with path.open("rb") as source:
                    file.write(source.read(least))
        part.rename(out)
    return out


def start(program: Path, data: Path, work: Path, options: Sequence[str] = ()) -> BackEnd:
    """The floor program on *data*; its socket and log are in *work*."""
    socket = work / "vhost.sock"
    argv = [program, "--socket", socket, "--data", data, "--files", str(FILES), *options]
    return BackEnd([str(each) for each in argv], socket, work / "log")
