"""Who takes part in a comparison, and how each is started: alone on a tree, or over a registry."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from guest.daemon import PROGRAM, BackEnd, Daemon
from guest.kit import ROOT
from guest.pull_first import VIRTIOFSD, Virtiofsd
from tests.bench import peers, sides
from tests.bench.kit import floor
from tests.bench.material import REPOSITORY, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.material import Material
    from tests.sim.registry import RegistrySimulator

AUTO, NONE = "auto", "none"


@attrs.frozen
class Contender:
    """A back-end that can be started again and again.

    ``start`` serves the tree from here, with what it keeps in a work folder; ``over`` serves it from a
    registry. ``data`` are the files, below the work folder or of the tree, that it reads content from.
    """

    name: str
    start: Callable[[Path], BackEnd]
    over: Callable[[RegistrySimulator, Path], BackEnd] | None = None
    data: Callable[[Path], Sequence[Path]] | None = None
    same_tree: bool = True
    """Whether it shows the tree as all others do."""
    version: str = ""


@attrs.frozen
class Attached:
    """A back-end that runs already and takes one connection."""

    name: str
    socket: Path
    pid: int

    @classmethod
    def parse(cls, text: str) -> Attached:
        """``NAME=SOCKET,PID``.

        Raises:
            BadParameter: it is something else.
        """
        name, _, rest = text.partition("=")
        socket, _, pid = rest.rpartition(",")
        if not name or not socket or not pid.isdigit():
            raise click.BadParameter(f"{text}: NAME=SOCKET,PID is expected", param_hint="--attach")
        return cls(name, Path(socket), int(pid))

    def connect(self) -> sides.Side:
        return sides.attach(self.name, self.socket, self.pid)


def version_of(program: str | Path) -> str:
    """The first number with points in what a program says to ``--version``; nothing if it says none."""
    try:
        done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found[0] if found else ""


def blob_data(work: Path) -> list[Path]:
    """Files with decoded content in a cache directory, as this project and nydusd lay it out."""
    return sorted((work / "cache").rglob("*.blob.data"))


def rafs(name: str, program: Path, material: Material) -> Contender:
    """This project's daemon, or another build of it."""

    def options(work: Path, *more: str) -> list[str]:
        return [*more, "--cache-dir", str(work / "cache"), "--log-level", "warning"]

    def start(work: Path) -> BackEnd:
        arguments = options(work, "--blob-dir", str(material.image))
        return Daemon(str(material.bootstrap), work, work / "log", arguments, program=program)

    def over(sim: RegistrySimulator, work: Path) -> BackEnd:
        arguments = options(work, "--plain-http")
        return Daemon(reference(sim), work, work / "log", arguments, program=program)

    return Contender(name, start, over, blob_data, version=version_of(program))


def nydusd(program: str, material: Material) -> Contender:
    def run(work: Path, backend: dict[str, object]) -> BackEnd:
        return peers.Nydusd(program, material.bootstrap, backend, work, work / "cache")

    def over(sim: RegistrySimulator, work: Path) -> BackEnd:
        return run(work, peers.registry(sim.host, REPOSITORY))

    def start(work: Path) -> BackEnd:
        return run(work, peers.localfs(material.image))

    return Contender("nydusd", start, over, blob_data, version=version_of(program))


def _large(tree: Path) -> list[Path]:
    return [p for p in tree.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size >= 1 << 20]


def virtiofsd(program: str, material: Material) -> Contender:
    tree = material.tree

    def start(work: Path) -> BackEnd:
        return Virtiofsd(program, tree, work)

    return Contender("virtiofsd", start, data=lambda _: _large(tree), version=version_of(program))


def installed_virtiofsd() -> str | None:
    """Debian's, which the scripts keep in ``var``: unpacked there if missing. ``None``: it cannot be."""
    if not VIRTIOFSD.exists():
        click.echo("virtiofsd: Debian's package is fetched")
        done = subprocess.run([ROOT / "scripts" / "lib" / "install", "virtiofsd"], check=False)
        if done.returncode or not VIRTIOFSD.exists():
            click.echo(
                "virtiofsd is left out: it cannot be installed (above); --virtiofsd PROGRAM takes another"
            )
            return None
    return str(VIRTIOFSD)


def floor_of(material: Material, work: Path, options: Sequence[str] = (), name: str = "floor") -> Contender:
    """The kit's own program, which shows a tree of its own."""
    program = floor.build(work)
    data = floor.data_of(material.tree, work)
    return Contender(name, lambda folder: floor.start(program, data, folder, options), same_tree=False)


def command(text: str, material: Material) -> Contender:
    """``NAME=COMMAND``, a command line with ``{socket}`` and, as it needs them, ``{dir}`` (the tree),
    ``{image}`` (the folder of bootstrap and blob), ``{bootstrap}`` and ``{work}`` (a folder of its own).

    Raises:
        BadParameter: there is no name, or no ``{socket}``.
    """
    name, _, line = text.partition("=")
    if not name or "{socket}" not in line:
        raise click.BadParameter(
            f"{text}: NAME='PROGRAM ... {{socket}} ...' is expected", param_hint="--command"
        )

    def start(work: Path) -> BackEnd:
        socket = work / "vhost.sock"
        socket.unlink(missing_ok=True)
        places = {
            "{socket}": socket,
            "{dir}": material.tree,
            "{image}": material.image,
            "{bootstrap}": material.bootstrap,
            "{work}": work,
        }
        argv = shlex.split(line)
        for place, path in places.items():
            argv = [argument.replace(place, str(path)) for argument in argv]
        return BackEnd(argv, socket, work / "log")

    data = (lambda _: _large(material.tree)) if "{dir}" in line else None
    return Contender(name, start, data=data)


def find(
    material: Material,
    work: Path,
    *,
    own: bool = True,
    other: str | None = None,
    virtiofsd_program: str = AUTO,
    nydusd_program: str | None = None,
    commands: Sequence[str] = (),
    with_floor: bool = True,
    floor_poll_us: int | None = None,
) -> list[Contender]:
    """All that were asked for, ours first, the floor last."""
    found = []
    if own:
        found.append(rafs("rafs", PROGRAM, material))
    if other is not None:
        found.append(rafs("other", Path(other), material))
    if virtiofsd_program == AUTO:
        installed = installed_virtiofsd()
        found += [virtiofsd(installed, material)] if installed else []
    elif virtiofsd_program != NONE:
        found.append(virtiofsd(virtiofsd_program, material))
    if nydusd_program is not None:
        found.append(nydusd(nydusd_program, material))
    found += [command(text, material) for text in commands]
    if with_floor:
        found.append(floor_of(material, work))
    if floor_poll_us is not None:
        found.append(floor_of(material, work, ["--poll-us", str(floor_poll_us)], "floor polling"))
    return found


def empty(folder: Path) -> Path:
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
