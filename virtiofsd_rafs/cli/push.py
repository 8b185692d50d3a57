"""``virtiofsd-rafs push``: brings a built image into a registry."""

from __future__ import annotations

from pathlib import Path

import click

from virtiofsd_rafs.cli._image_options import ONE_SHOT_DEADLINE_S


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("reference")
@click.option("--plain-http", is_flag=True, help="Speak http instead of https.")
@click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM certificates to trust beside the system's.",
)
def push(out: Path, reference: str, plain_http: bool, ca_file: Path | None) -> None:
    """Push the image that `build` left in OUT as REFERENCE (host/repository:tag).

    Prints the digest that pins the image. Credentials come from docker's config.json (DOCKER_CONFIG).

    \b
    Example: virtiofsd-rafs push image localhost:5000/debian:nginx --plain-http
    """
    import asyncio

    from virtiofsd_rafs.image.push import push_image

    digest = asyncio.run(
        push_image(
            out,
            reference,
            plain_http=plain_http,
            ca_file=ca_file,
            deadline=ONE_SHOT_DEADLINE_S,
            progress=lambda line: click.echo(line, err=True),
        )
    )
    click.echo(digest)
