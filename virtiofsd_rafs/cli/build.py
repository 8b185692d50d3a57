"""``virtiofsd-rafs build``: makes an image from a directory."""

from __future__ import annotations

from pathlib import Path

import click


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("ib").removesuffix("b")
        shift = {"k": 10, "m": 20}.get(text[-1:], 0)
        digits = text[:-1] if shift else text
        if not digits.isdecimal():
            self.fail(f"{value!r} is not a size such as 1M or 65536", param, ctx)
        return int(digits) << shift


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the image.",
)
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
    "--chunk-size", type=_Size(), default="1M", show_default=True, help="A power of two from 4K to 16M."
)
def build(directory: Path, output: Path, compressor: str, digester: str, chunk_size: int) -> None:
    """Build a RAFS v6 image from DIRECTORY.

    Leaves OUTPUT/image.boot and the data blob, named by its sha256.

    \b
    Example: virtiofsd-rafs build rootfs -o image
    """
    from virtiofsd_rafs.image.build import build_image

    result = build_image(directory, output, compressor=compressor, digester=digester, chunk_size=chunk_size)
    click.echo(f"bootstrap  {result.bootstrap}  {result.bootstrap_size} bytes, {result.n_inodes} inodes")
    if result.blob:
        click.echo(
            f"blob       {result.blob}  {result.blob_size} bytes, {result.n_chunks} chunks,"
            f" {result.n_duplicate_chunks} found again"
        )
    click.echo(f"content    {result.content_size} bytes")
