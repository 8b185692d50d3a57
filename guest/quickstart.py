"""The Python half of :file:`scripts/quickstart`, which says what it does and takes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from guest.boot import boot
from guest.daemon import PROGRAM, Daemon, DaemonError
from guest.kit import ROOT, VAR, Kernel, KitError
from guest.progress import Progress
from guest.pull_first import VIRTIOFSD, PullError, Virtiofsd, pack, pull, push
from guest.qemu import GuestError
from guest.registry import Registry, Traffic
from guest.report import comparison, recording, recording_of_pull
from guest.slowlink import SlowLinkProcess
from virtiofsd_rafs.report import model, text, trace
from virtiofsd_rafs.report.html import page

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest.boot import Boot
    from guest.daemon import BackEnd

FOLDER = VAR / "quickstart"
# Where the same image lies as a classic one.
OCI_REPOSITORY = "quickstart/oci"


class QuickstartError(Exception):
    """A step failed; the text says which and why."""


FAILURES = (QuickstartError, DaemonError, GuestError, KitError, PullError, OSError, RuntimeError)


@attrs.frozen
class Source:
    """An image in a registry.

    Attributes:
        host: registry, as in a reference.
        rest: repository with tag.
        plain_http: the registry speaks http.
        root: the directory that it was made from, if it was made here.
    """

    host: str
    rest: str
    plain_http: bool
    root: Path | None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="quickstart", add_help=False, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dir", type=Path)
    what.add_argument("--image")
    parser.add_argument("--plain-http", action="store_true")
    parser.add_argument("--rate", type=float, default=30)
    parser.add_argument("--latency", type=float, default=20)
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--machine", choices=["q35", "microvm"], default="q35")
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--skip-pull-first", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path, default=FOLDER / "report.html")
    parsed = parser.parse_args(argv)
    if parsed.rate <= 0 or parsed.latency < 0 or parsed.memory < 128 or parsed.timeout <= 0:
        parser.error("--rate and --timeout have to be above 0, --latency at least 0, --memory at least 128")
    # The script changes to the project's folder before it comes here.
    here = Path(os.environ.get("CALLER_PWD", "."))
    for name in ("dir", "json", "html"):
        if getattr(parsed, name) is not None:
            setattr(parsed, name, here / getattr(parsed, name))
    if parsed.dir is not None and not parsed.dir.is_dir():
        parser.error(f"--dir {parsed.dir} is not a directory")
    if parsed.image is not None and "/" not in parsed.image:
        parser.error("--image has to be host[:port]/repository:tag")
    if parsed.plain_http and parsed.image is None:
        parser.error("--plain-http says something about the registry of --image")
    return parsed


def run(what: str, *argv: str | Path) -> str:
    """Runs a program; its output.

    Raises:
        QuickstartError: it failed.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise QuickstartError(f"{what} failed (exit code {done.returncode}):\n{done.stderr.strip()}")
    return done.stdout


def make_image(directory: Path | None, registry: Registry, progress: Progress) -> Source:
    """Builds the image and pushes it to *registry*."""
    if directory is None:
        directory = FOLDER / "root"
        if not directory.exists():
            progress.step("image: a Debian 12 with nginx and Python (debootstrap, once, takes a minute)")
            run("debootstrap", ROOT / "scripts" / "lib" / "debian-root", directory)
    progress.step(f"image: built from {directory}")
    out = FOLDER / "image"
    shutil.rmtree(out, ignore_errors=True)
    for line in run("virtiofsd-rafs build", PROGRAM, "build", directory, "-o", out).splitlines():
        progress.plain(f"             {line}")
    reference = f"127.0.0.1:{registry.port}/quickstart/image:latest"
    progress.step(f"image: pushed to {reference}")
    run("virtiofsd-rafs push", PROGRAM, "push", out, reference, "--plain-http")
    return Source(f"127.0.0.1:{registry.port}", "quickstart/image:latest", plain_http=True, root=directory)


def make_oci_image(root: Path, registry: Registry, progress: Progress) -> None:
    """The same root directory as gzipped tar layers, beside it."""
    progress.step("image: the same files as a classic OCI image, for the comparison")
    folder = FOLDER / "oci"
    shutil.rmtree(folder, ignore_errors=True)
    push(pack(root, folder), f"127.0.0.1:{registry.port}", OCI_REPOSITORY)


class Boots:
    """Boots of one image with one kernel over one link, and what they gave: recordings for a report."""

    def __init__(self, parsed: argparse.Namespace, stack: contextlib.ExitStack, progress: Progress) -> None:
        self._parsed = parsed
        self._progress = progress
        self.kernel = Kernel.find(parsed.kernel)
        self._registry = None
        if parsed.image is None:
            shutil.rmtree(FOLDER / "registry", ignore_errors=True)
            self._registry = stack.enter_context(Registry(FOLDER / "registry"))
            self._source = make_image(parsed.dir, self._registry, progress)
            if not parsed.skip_pull_first:
                assert self._source.root is not None
                make_oci_image(self._source.root, self._registry, progress)
        else:
            host, _, rest = parsed.image.partition("/")
            self._source = Source(host, rest, plain_http=parsed.plain_http, root=None)
        self._host = self._source.host
        self.link: dict[str, float] | None = None
        if self._source.plain_http:
            name, _, port = self._host.rpartition(":") if ":" in self._host else (self._host, "", "80")
            proxy = SlowLinkProcess(int(port), host=name, rate_mbit=parsed.rate, latency_ms=parsed.latency)
            self._host = f"127.0.0.1:{stack.enter_context(proxy).port}"
            self.link = {"rate_mbit_s": parsed.rate, "latency_ms": parsed.latency}
            progress.step(f"link: {parsed.rate:g} Mbit/s, {parsed.latency:g} ms before the registry")
        else:
            progress.step("link: none of ours, the registry speaks https")
        self._cache = FOLDER / "cache"
        shutil.rmtree(self._cache, ignore_errors=True)

    def note(self) -> str:
        """Under which conditions it all happened."""
        link = f"{self.link['rate_mbit_s']:g} Mbit/s, {self.link['latency_ms']:g} ms" if self.link else ""
        return ", ".join(filter(None, (link, f"Linux {self.kernel.release}", self._parsed.machine)))

    def _traffic(self) -> Traffic:
        return self._registry.traffic() if self._registry is not None else Traffic(0, 0)

    def _boot(self, name: str, image: str, back_end: Callable[..., BackEnd] = Daemon) -> Boot:
        options = ["--cache-dir", str(self._cache), *(["--plain-http"] if self._source.plain_http else [])]
        seen = boot(
            name,
            image,
            kernel=self.kernel,
            options=options,
            logs=FOLDER / "logs",
            kind=self._parsed.machine,
            memory=self._parsed.memory,
            timeout=self._parsed.timeout,
            note=self._progress.note,
            back_end=back_end,
        )
        self._progress.step(f"boot: HTTP 200 after {seen.times['HTTP 200']:.1f} s")
        return seen

    def lazy(self, name: str) -> dict[str, Any]:
        """A boot with the cache as it is: empty at first."""
        state = "warm" if self._cache.exists() else "empty"
        machine = f"{self._parsed.machine}, Linux {self.kernel.release}"
        self._progress.step(f"boot: {machine}, root over virtio-fs, {state} cache")
        before = self._traffic()
        seen = self._boot(name.split()[0].lower(), f"{self._host}/{self._source.rest}")
        return recording(seen, name, self._traffic() - before if self._registry is not None else None)

    def pull_first(self, name: str) -> dict[str, Any]:
        """The classic way: pull and unpack all, then boot from the directory with virtiofsd."""
        if not VIRTIOFSD.exists():
            raise QuickstartError(
                "there is no virtiofsd: run scripts/lib/install guest, or --skip-pull-first"
            )
        self._progress.step("pull first: downloads and unpacks the whole image over the same link")
        folder = FOLDER / "pulled"
        shutil.rmtree(folder, ignore_errors=True)
        before = self._traffic()
        pulled = pull(self._host, OCI_REPOSITORY, folder, note=self._progress.note)
        self._progress.step(f"pull first: unpacked after {pulled.seconds:.1f} s; boots with virtiofsd")

        def virtiofsd(image: str, work: Path, log: Path, options: Sequence[str]) -> BackEnd:
            del image, options
            return Virtiofsd(VIRTIOFSD, folder / "root", work, log)

        seen = self._boot("pull-first", OCI_REPOSITORY, virtiofsd)
        shutil.rmtree(folder)
        image = f"{self._host}/{OCI_REPOSITORY}:latest"
        return recording_of_pull(pulled, seen, name, image, self._traffic() - before)


def all_boots(
    parsed: argparse.Namespace, stack: contextlib.ExitStack, progress: Progress
) -> tuple[list[model.Report], Boots]:
    """Everything between the command line and the report. Each recording is kept beside it."""
    boots = Boots(parsed, stack, progress)
    recordings = [boots.lazy("Cold cache"), boots.lazy("Warm cache")]
    if parsed.image is not None:
        progress.step("pull first: left out, as only --image's registry has that image")
    elif not parsed.skip_pull_first:
        recordings.append(boots.pull_first("Pull first"))
    folder = FOLDER / "traces"
    folder.mkdir(exist_ok=True)
    for one in recordings:
        (folder / f"{one['name'].replace(' ', '-').lower()}.json").write_text(json.dumps(one))
    return [model.analyse(trace.parse(one)) for one in recordings], boots


def main() -> None:
    """Does it all and ends the process with the exit code."""

    def ended(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    # sys.exit unwinds the stack below, so that everything that was started is ended.
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGHUP, ended)
    parsed = arguments()
    progress = Progress()
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            reports, boots = all_boots(parsed, stack, progress)
    except FAILURES as error:
        progress.plain()
        print(f"quickstart: {error}", file=sys.stderr)
        print(f"quickstart: logs are in {FOLDER / 'logs'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        progress.plain()
        sys.exit(130)
    progress.plain()
    for line in text.lines(reports[0]):
        progress.plain(line)
    progress.plain()
    for line in [*text.side_by_side(reports), *filter(None, [comparison(reports)])]:
        progress.plain(line)
    progress.plain()
    if parsed.json is not None:
        conditions = {"kernel": boots.kernel.release, "machine": parsed.machine, "link": boots.link}
        found = conditions | {"boots": [report.as_dict() for report in reports]}
        parsed.json.write_text(json.dumps(found, indent=2) + "\n")
        progress.plain(f"results as JSON: {parsed.json}")
    parsed.html.write_text(page(reports, note=boots.note()), encoding="utf-8")
    progress.plain(f"page to look at: {parsed.html}")


if __name__ == "__main__":
    main()
