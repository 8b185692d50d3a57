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
from typing import Any, NoReturn

import attrs

from guest.boot import boot
from guest.daemon import PROGRAM, DaemonError
from guest.kit import ROOT, VAR, Kernel, KitError
from guest.progress import Progress
from guest.qemu import GuestError
from guest.registry import Registry
from guest.report import compare, describe
from guest.slowlink import SlowLinkProcess

FOLDER = VAR / "quickstart"


class QuickstartError(Exception):
    """A step failed; the text says which and why."""


@attrs.frozen
class Source:
    """An image in a registry.

    Attributes:
        host: registry, as in a reference.
        rest: repository with tag.
        plain_http: the registry speaks http.
        size: bytes of bootstrap and blobs, if known here.
    """

    host: str
    rest: str
    plain_http: bool
    size: int | None


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
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args(argv)
    if parsed.rate <= 0 or parsed.latency < 0 or parsed.memory < 128 or parsed.timeout <= 0:
        parser.error("--rate and --timeout have to be above 0, --latency at least 0, --memory at least 128")
    # The script changes to the project's folder before it comes here.
    here = Path(os.environ.get("CALLER_PWD", "."))
    for name in ("dir", "json"):
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
    size = sum(path.stat().st_size for path in out.iterdir())
    return Source(f"127.0.0.1:{registry.port}", "quickstart/image:latest", plain_http=True, size=size)


def two_boots(parsed: argparse.Namespace, stack: contextlib.ExitStack, progress: Progress) -> dict[str, Any]:
    """Everything between the command line and the report; the report as data."""
    kernel = Kernel.find(parsed.kernel)
    registry = None
    if parsed.image is None:
        shutil.rmtree(FOLDER / "registry", ignore_errors=True)
        registry = stack.enter_context(Registry(FOLDER / "registry"))
        source = make_image(parsed.dir, registry, progress)
    else:
        host, _, rest = parsed.image.partition("/")
        source = Source(host, rest, plain_http=parsed.plain_http, size=None)
    host, link = source.host, None
    if source.plain_http:
        name, _, port = source.host.rpartition(":") if ":" in source.host else (source.host, "", "80")
        proxy = stack.enter_context(
            SlowLinkProcess(int(port), host=name, rate_mbit=parsed.rate, latency_ms=parsed.latency)
        )
        host = f"127.0.0.1:{proxy.port}"
        link = {"rate_mbit_s": parsed.rate, "latency_ms": parsed.latency}
        progress.step(f"link: {parsed.rate:g} Mbit/s, {parsed.latency:g} ms before the registry")
    else:
        progress.step("link: none of ours, the registry speaks https")
    cache = FOLDER / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    options = ["--cache-dir", str(cache), *(["--plain-http"] if source.plain_http else [])]
    results: list[dict[str, Any]] = []
    for name, state in (("cold", "empty"), ("warm", "warm")):
        progress.step(f"boot: {parsed.machine}, Linux {kernel.release}, root over virtio-fs, {state} cache")
        before = registry.traffic() if registry is not None else None
        seen = boot(
            name,
            f"{host}/{source.rest}",
            kernel=kernel,
            options=options,
            logs=FOLDER / "logs",
            kind=parsed.machine,
            memory=parsed.memory,
            timeout=parsed.timeout,
            note=progress.note,
        )
        progress.step(f"boot: HTTP 200 after {seen.times['HTTP 200']:.1f} s")
        traffic = registry.traffic() - before if registry is not None and before is not None else None
        results.append(describe(seen, source.size, traffic))
    return {"kernel": kernel.release, "machine": parsed.machine, "link": link, "boots": results}


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
            results = two_boots(parsed, stack, progress)
    except (QuickstartError, DaemonError, GuestError, KitError, OSError, RuntimeError) as error:
        progress.plain()
        print(f"quickstart: {error}", file=sys.stderr)
        print(f"quickstart: logs are in {FOLDER / 'logs'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        progress.plain()
        sys.exit(130)
    progress.plain()
    for result in results["boots"]:
        for line in result.pop("text"):
            progress.plain(line)
        progress.plain()
    for line in compare(results["boots"]):
        progress.plain(line)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(results, indent=2) + "\n")
        progress.plain(f"results as JSON: {parsed.json}")


if __name__ == "__main__":
    main()
