"""``virtiofsd-rafs build``: makes an image from a directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from virtiofsd_rafs.cli._params import Size

if TYPE_CHECKING:
    from virtiofsd_rafs.image.build import BuildResult
    from virtiofsd_rafs.native.builder import Progress

_SHOWN_MISSING = 5


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the image.")
@click.option(
    "--compressor",
    type=click.Choice(["zstd", "lz4_block", "gzip", "none"]),
    default="zstd",
    show_default=True,
    help="How chunks are compressed; with none, the kernel's EROFS can mount the image too.",
)
@click.option(
    "--digester",
    type=click.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="What chunks are verified with.",
)
@click.option(
    "--chunk-size", type=Size(), default="1MiB", show_default=True, help="A power of two from 4KiB to 16MiB."
)
@click.option(
    "--prefetch-files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="List of files to prefetch: named in the image, their chunks first in the blob, in this order.",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1),
    show_default="one per CPU",
    help="Threads that compress. The image does not depend on it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    directory: Path,
    output: Path,
    compressor: str,
    digester: str,
    chunk_size: int,
    prefetch_files: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build a RAFS v6 image from DIRECTORY.

    Leaves OUTPUT/image.boot and the data blob, named by its sha256.

    A list for --prefetch-files has one path per line, absolute in the image; a directory stands for all files
    in it. "PATH<TAB>OFFSET<TAB>LENGTH" means a part of a file.

    \b
    Example: virtiofsd-rafs build rootfs -o image
    """
    from virtiofsd_rafs.image.build import build_image

    # A terminal sees that something happens; a log, a pipe and a program do not want to.
    show = _Status() if sys.stderr.isatty() and not as_json else None
    try:
        result = build_image(
            directory,
            output,
            compressor=compressor,
            digester=digester,
            chunk_size=chunk_size,
            jobs=jobs,
            prefetch=_listed(prefetch_files) if prefetch_files else (),
            watch=show,
        )
    finally:
        if show:
            show.clear()
    if result.prefetch_missing:
        shown = ", ".join(result.prefetch_missing[:_SHOWN_MISSING])
        more = len(result.prefetch_missing) - _SHOWN_MISSING
        click.echo(f"not in {directory}: {shown}{f' and {more} more' if more > 0 else ''}", err=True)
    if as_json:
        import json

        click.echo(json.dumps(_as_dict(result), indent=2))
        return
    click.echo(f"bootstrap  {result.bootstrap}  {result.bootstrap_size} bytes, {result.n_inodes} inodes")
    if result.blob:
        click.echo(
            f"blob       {result.blob}  {result.blob_size} bytes, {result.n_chunks} chunks,"
            f" {result.n_duplicate_chunks} found again"
        )
    if result.n_prefetch:
        click.echo(f"prefetch   {result.n_prefetch} files and directories")
    click.echo(f"content    {result.content_size} bytes in {result.total_s:.1f} s")


def _listed(path: Path) -> list[tuple[bytes, int, int | None]]:
    """The entries of the list at *path*. Raises ConfigError for lines that make no sense."""
    from virtiofsd_rafs.errors import ConfigError
    from virtiofsd_rafs.runtime.prefetch import parse_list

    entries, bad = parse_list(path.read_bytes())
    if bad:
        raise ConfigError(
            f"{path}, line {bad[0]}: neither an absolute path nor path, offset and length",
            remedy="separate the three by one tab each",
        )
    return [(entry.path, entry.offset, entry.length) for entry in entries]


def _as_dict(result: BuildResult) -> dict[str, object]:
    return {
        "bootstrap": str(result.bootstrap),
        "bootstrap_size": result.bootstrap_size,
        "blob": str(result.blob) if result.blob else None,
        "blob_id": result.blob_id,
        "blob_size": result.blob_size,
        "inodes": result.n_inodes,
        "chunks": result.n_chunks,
        "duplicate_chunks": result.n_duplicate_chunks,
        "content_size": result.content_size,
        "prefetch": {"entries": result.n_prefetch, "missing": list(result.prefetch_missing)},
        "jobs": result.jobs,
        "seconds": {
            "content": round(result.content_s, 3),
            "bootstrap": round(result.bootstrap_s, 3),
            "sync": round(result.sync_s, 3),
            "total": round(result.total_s, 3),
        },
    }


class _Status:
    """One line on the terminal that is written again and again."""

    def __init__(self) -> None:
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        mib = 1 << 20
        text = (
            f"{progress.inodes} inodes, {progress.read // mib} MiB read, {progress.stored // mib} MiB stored"
        )
        click.echo("\r" + text.ljust(self._width), nl=False, err=True)
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)
