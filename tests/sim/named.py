"""Runs the daemon with a resolver that a test plays: see ``write_program``.

``registry.test`` is 127.0.0.1, unless the file ``FOLDER/down`` exists: then nobody answers, as when the
network's name server is away. Each failed question adds a byte to ``FOLDER/failed``. Other names are looked
up as ever.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

from virtiofsd_rafs.cli import main

NAME = "registry.test"


class PlayedResolver:
    """Replaces ``socket.getaddrinfo``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, *arguments: Any, **options: Any) -> Any:
        if host != NAME:
            return self._real(host, *arguments, **options)
        if (self._folder / "down").exists():
            with (self._folder / "failed").open("ab") as failed:
                failed.write(b".")
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self._real("127.0.0.1", *arguments, **options)


def write_program(folder: Path) -> Path:
    """A program for ``Daemon`` that runs the daemon with the played resolver of *folder*."""
    program = folder / "named"
    root = Path(__file__).resolve().parents[2]
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "from tests.sim.named import run\n"
        f"sys.exit(run({str(folder)!r}))\n"
    )
    program.chmod(0o755)
    return program


def run(folder: str) -> Any:
    """The command line of the daemon, with the resolver of *folder*."""
    socket.getaddrinfo = PlayedResolver(Path(folder))
    return main()
