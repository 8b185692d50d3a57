"""Types of options."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from virtiofsd_rafs.cli._params import Size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7b", 7),
        ("64MiB", 64 << 20),
        ("64mib", 64 << 20),
        ("64M", 64 << 20),
        (" 64 MiB ", 64 << 20),
        ("1GB", 10**9),
        ("1KB", 1000),
        ("1.5KiB", 1536),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5", "1.0001KiB", "1PiB", "1i", "0x10", "1 2", "9" * 30, "٣"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole|more than"):
        parse_size(text)


@pytest.mark.parametrize(("size", "text"), [(0, "0"), (1000, "1000"), (1 << 20, "1MiB"), (3 << 30, "3GiB")])
def test_sizes_are_shown_as_they_are_read(size: int, text: str) -> None:
    assert format_size(size) == text
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "1048576"),
        (["--x", "2M"], "2097152"),
        (["--x", "1"], "1 is less than 1KiB"),
        (["--x", "9MiB"], "9MiB is more than 8MiB"),
        (["--x", "lots"], "'lots' is no size"),
    ],
)
def test_option(arguments: list[str], expected: str) -> None:
    @click.command()
    @click.option("--x", type=Size(1 << 10, 8 << 20), default=1 << 20)
    def command(x: int) -> None:
        click.echo(x)

    assert expected in CliRunner().invoke(command, arguments).output
