"""``virtiofsd-rafs cache``: show, clean and verify a cache directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from virtiofsd_rafs.cli._params import Size
from virtiofsd_rafs.config import default_cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.cache.gc import Removed

# `verify` found bad chunks (docs/scripting.md).
EXIT_BAD_CHUNKS = 6

_AGE = re.compile(r"(\d+)\s*([smhdw])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Age(click.ParamType[float]):
    """A length of time such as ``90m``, ``12h``, ``30d``, in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        match = _AGE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no time: write 90m, 12h, 30d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _ago(when: float | None) -> str:
    import time

    if when is None:
        return "-"
    seconds = max(0, time.time() - when)
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:.0f}s"


def _print_json(data: Any) -> None:
    import json

    click.echo(json.dumps(data, indent=2))


def _options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path),
        default=default_cache_dir,
        show_default="as for serve",
        help="The directory.",
    )(command)


@click.group()
def cache() -> None:
    """Show, clean and verify a cache directory; running daemons are left in peace."""


@cache.command("ls")
@_options
def list_blobs(cache_dir: Path, as_json: bool) -> None:
    """List the blobs: what is stored of each, which images refer to it, who uses it.

    \b
    Example: virtiofsd-rafs cache ls --cache-dir /var/cache/virtiofsd-rafs
    """
    from virtiofsd_rafs.cache.inventory import as_json as to_json
    from virtiofsd_rafs.cache.inventory import scan

    found = scan(cache_dir)
    if as_json:
        _print_json(to_json(found))
        return
    for blob in found.blobs:
        marks = [text for text, on in (("in use", blob.in_use), ("nydusd's record", blob.nydusd)) if on] + (
            [] if blob.map_digest else ["nydusd's alone"]
        )
        click.echo(
            f"{blob.stem}\n    {_size(blob.disk_bytes)} on the disk, {blob.n_verified + blob.n_present} of"
            f" {blob.n_chunks} chunks ({blob.n_verified} verified), used {_ago(blob.last_used)} ago"
            + "".join(f", {mark}" for mark in marks)
        )
        for name in found.images_of(blob) or ["no image here refers to it"]:
            click.echo(f"    {name}")
    click.echo(f"{len(found.blobs)} blobs, {len(found.images)} images, {_size(found.disk_bytes)} on the disk")


@cache.command("du")
@_options
def disk_usage(cache_dir: Path, as_json: bool) -> None:
    """Show what each image uses on the disk, alone and shared with others.

    \b
    Example: virtiofsd-rafs cache du --json
    """
    from virtiofsd_rafs.cache.inventory import in_use, last_used, scan

    found = scan(cache_dir)
    rows: list[dict[str, Any]] = []
    for image in found.images:
        blobs = found.blobs_of(image)
        alone = sum(blob.disk_bytes for blob in blobs if len(found.images_of(blob)) == 1)
        rows.append(
            {
                "name": image.name,
                "disk_bytes": image.disk_bytes + sum(blob.disk_bytes for blob in blobs),
                "alone_bytes": image.disk_bytes + alone,
                "last_used": last_used(found, image),
                "in_use": in_use(found, image),
            }
        )
    orphans = sum(blob.disk_bytes for blob in found.blobs if not found.images_of(blob))
    total = {"images": rows, "unreferenced_bytes": orphans, "disk_bytes": found.disk_bytes}
    if as_json:
        _print_json({"dir": str(cache_dir), **total})
        return
    for row in rows:
        click.echo(
            f"{_size(row['disk_bytes']):>12} {_size(row['alone_bytes']):>12} alone  {row['name']}"
            + ("  (in use)" if row["in_use"] else "")
        )
    click.echo(f"{_size(orphans):>12} in blobs that no image here refers to")
    click.echo(f"{_size(found.disk_bytes):>12} in all")


@cache.command()
@_options
@click.option("--max-size", type=Size(), help="Remove the images used longest ago until this is enough.")
@click.option("--older-than", type=Age(), help="Remove images that were not used for so long (30d, 12h).")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def gc(cache_dir: Path, as_json: bool, max_size: int | None, older_than: float | None, dry_run: bool) -> None:
    """Remove images that no running daemon uses, and blobs that no image refers to.

    Without --max-size and --older-than all images stay.

    \b
    Example: virtiofsd-rafs cache gc --older-than 30d --dry-run
    """
    from virtiofsd_rafs.cache.gc import collect

    done = collect(cache_dir, max_size=max_size, older_than_s=older_than, dry_run=dry_run)
    if as_json:
        import attrs

        _print_json({"dir": str(cache_dir), "dry_run": dry_run, **attrs.asdict(done)})
        return
    _print_removed(done, dry_run)


def _print_removed(done: Removed, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for name in done.images:
        click.echo(f"{verb} image {name}")
    for stem in done.blobs:
        click.echo(f"{verb} blob {stem}")
    for name in done.kept_in_use:
        click.echo(f"kept image {name}: a running daemon uses it")
    click.echo(
        f"{verb} {len(done.images)} images, {len(done.blobs)} blobs, {done.n_files} other files:"
        f" {_size(done.disk_bytes)}; {_size(done.disk_bytes_left)} are left"
    )


@cache.command()
@_options
@click.option(
    "--bootstrap",
    "bootstraps",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Also the blobs of this bootstrap file; may be repeated.",
)
@click.pass_context
def verify(ctx: click.Context, cache_dir: Path, as_json: bool, bootstraps: tuple[Path, ...]) -> None:
    """Read all stored chunks back and compare them with what the images promise.

    Bad chunks become absent, so that they are fetched again, and their bytes are given back to the disk. Exit
    code 0: all are good, 6: some were bad.

    \b
    Example: virtiofsd-rafs cache verify --json
    """
    from virtiofsd_rafs.cache.verify import verify as run

    def progress(stem: str) -> None:
        if not as_json:
            click.echo(f"reading {stem}", err=True)

    report = run(cache_dir, list(bootstraps), progress)
    if as_json:
        import attrs

        _print_json({"dir": str(cache_dir), "ok": not report.n_bad, **attrs.asdict(report)})
    else:
        for bad in report.bad:
            click.echo(f"bad: chunk {bad['chunk']} of {bad['blob']}")
        for stem in report.unknown:
            click.echo(f"not verified: {stem} (no image here vouches for it; --bootstrap FILE)")
        for problem in report.problems:
            click.echo(f"not verified: {problem}")
        click.echo(f"{report.n_good} chunks of {len(report.blobs)} blobs are good, {report.n_bad} were bad")
    if report.n_bad:
        ctx.exit(EXIT_BAD_CHUNKS)


@cache.command()
@_options
@click.option(
    "--bootstrap",
    "bootstraps",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Also the blobs of this bootstrap file; may be repeated.",
)
def export(cache_dir: Path, as_json: bool, bootstraps: tuple[Path, ...]) -> None:
    """Make the directory readable for nydusd: note in its own form what is stored and verified.

    Parts of these blobs are not evicted any more. Daemons that run go on noting only with `serve
    --cache-nydusd`.

    \b
    Example: virtiofsd-rafs cache export --cache-dir /var/lib/nydus/cache
    """
    from virtiofsd_rafs.cache.nydusd import export as run

    exported = run(cache_dir, list(bootstraps))
    if as_json:
        _print_json({"dir": str(cache_dir), "blobs": exported})
        return
    for stem, n_chunks in exported.items():
        click.echo(f"{stem}: {n_chunks} chunks")
