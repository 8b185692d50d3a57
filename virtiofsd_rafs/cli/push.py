"""``virtiofsd-rafs push``: brings a built image into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from virtiofsd_rafs.cli._image_options import ONE_SHOT_DEADLINE_S
from virtiofsd_rafs.cli._registry_options import registry_options

if TYPE_CHECKING:
    from virtiofsd_rafs.backends.config import RegistryAccess


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("reference")
@registry_options
def push(out: Path, reference: str, access: RegistryAccess | None) -> None:
    """Push the image that `build` left in OUT as REFERENCE (host/repository:tag).

    Prints the digest that pins the image. Credentials come from docker's config.json or podman's auth.json.

    \b
    Example: virtiofsd-rafs push image localhost:5000/debian:nginx --plain-http
    """
    import asyncio

    from virtiofsd_rafs.image.push import push_image

    digest = asyncio.run(
        push_image(
            out,
            reference,
            access=access,
            deadline=ONE_SHOT_DEADLINE_S,
            progress=lambda line: click.echo(line, err=True),
        )
    )
    click.echo(digest)
