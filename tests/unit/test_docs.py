"""Links between documents lead somewhere, and what documents say about commands is what the commands say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from virtiofsd_rafs import errors
from virtiofsd_rafs.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("guest/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


def exit_codes(kind: type[errors.VirtiofsdRafsError]) -> Iterator[int]:
    yield kind.exit_code
    for child in kind.__subclasses__():
        yield from exit_codes(child)


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "scripting.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert set(exit_codes(errors.VirtiofsdRafsError)) <= documented


def test_options_in_the_documents_exist() -> None:
    """Every ``--option`` that README and operations name belongs to a command."""
    runner = CliRunner()
    context = cli.make_context("virtiofsd-rafs", ["check"], resilient_parsing=True)
    calls = [[name] for name in cli.list_commands(context)]
    for (name,) in calls[:]:
        command = cli.get_command(context, name)
        if isinstance(command, click.Group):
            calls += [[name, part] for part in command.commands]
    known = {option for call in calls for option in options(runner.invoke(cli, [*call, "--help"]).output)}
    known |= options((ROOT / "scripts" / "quickstart").read_text())
    known |= {"--unix-socket", "--help"}
    for page in ("README.md", "docs/operations.md"):
        assert options((ROOT / page).read_text()) - known == set()


def options(text: str) -> set[str]:
    """Long options in *text*."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
