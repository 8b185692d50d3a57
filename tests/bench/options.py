"""Options that several modes share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guest.kit import VAR

if TYPE_CHECKING:
    from collections.abc import Callable

FC = TypeVar("FC", bound="Callable[..., Any] | click.Command")

virtiofsd_option = click.option(
    "--virtiofsd", metavar="PROGRAM", help="Compare with this virtiofsd on the tree."
)
nydusd_option = click.option("--nydusd", metavar="PROGRAM", help="Compare with this nydusd on the image.")
work_option = click.option(
    "--work",
    type=click.Path(path_type=Path, resolve_path=True),
    default=VAR / "bench",
    show_default="var/bench",
    help="Keep material here.",
)
json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all measurements here."
)


def rounds_option(default: int, most: int | None = None) -> Callable[[FC], FC]:
    """``--rounds``: how often everything is measured."""
    return click.option("--rounds", type=click.IntRange(1, most), default=default, show_default=True)
