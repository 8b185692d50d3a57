"""``virtiofsd-rafs check``: verifies an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from virtiofsd_rafs.cli._image_options import ONE_SHOT_DEADLINE_S, image_options

if TYPE_CHECKING:
    from pathlib import Path

    from virtiofsd_rafs.backends.config import BackendConfig, RegistryAccess
    from virtiofsd_rafs.image.check import Report


@click.command()
@click.argument("image")
@image_options
@click.option("--metadata-only", is_flag=True, help="Do not read the blobs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def check(
    ctx: click.Context,
    image: str,
    blob_dir: Path | None,
    cache_dir: Path | None,
    pull: Literal["missing", "always", "never"],
    access: RegistryAccess | None,
    backend: BackendConfig | None,
    metadata_only: bool,
    as_json: bool,
) -> None:
    """Verify the structures of IMAGE and, with its blobs at hand, the digest of every chunk.

    IMAGE is a bootstrap file or host/repository:tag. Every fault is named. Exit code 0: none, 3: some,
    4: the registry does not deliver.

    \b
    Example: virtiofsd-rafs check image/image.boot
    """
    import asyncio

    from virtiofsd_rafs.image.check import Report, check_image

    report = Report()
    asyncio.run(
        check_image(
            image,
            report,
            blob_dir=blob_dir,
            cache_dir=cache_dir,
            pull=pull,
            access=access,
            backend=backend,
            metadata_only=metadata_only,
            deadline=ONE_SHOT_DEADLINE_S,
        )
    )
    _print(report, as_json=as_json)
    if report.findings:
        ctx.exit(3)


def _print(report: Report, *, as_json: bool) -> None:
    import attrs

    if as_json:
        import json

        click.echo(json.dumps({"ok": not report.findings, **attrs.asdict(report)}, indent=2))
        return
    for finding in report.findings:
        click.echo(f"{finding.where}: {finding.msgid}: {finding.message}")
    for blob in report.blobs_missing:
        click.echo(f"blob {blob} is not beside the bootstrap and was not read (--blob-dir, --blob-source)")
    n = len(report.findings)
    click.echo(
        f"{report.n_names} names, {report.n_inodes} inodes, {report.n_chunks} chunks,"
        f" {report.n_chunks_verified} of them verified; {n or 'no'} fault{'' if n == 1 else 's'}"
    )
