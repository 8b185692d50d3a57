"""What the shell scripts promise about their arguments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz import NAMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for folder in (ROOT / "scripts", ROOT / "scripts" / "lib", ROOT / ".ci")
    for path in folder.iterdir()
    if (path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"# Sourced")))
    or path.suffix == ".sh"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_accepts_the_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_check_refuses_an_unknown_argument() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "check", "--nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_check_explains_itself() -> None:
    done = subprocess.run([ROOT / ".ci" / "run", "--help"], capture_output=True, text=True, check=True)
    assert "--allow-missing=NAME" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("arguments", [["no-target"], ["--minutes", "0"], ["--jobs", "many"], ["--nonsense"]])
def test_fuzz_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "fuzz", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert arguments[-1] in done.stderr


def test_fuzz_lists_every_target_with_its_invariant() -> None:
    done = subprocess.run([ROOT / "scripts" / "fuzz", "--list"], capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert all(": " in line and line.split()[1] == "Invariant:" for line in done.stdout.splitlines())
    modules = {path.stem for path in (ROOT / "native" / "fuzz" / "src").glob("*.rs")}
    helpers = {"lib", "main", "tests", "input", "image", "guest", "world"}
    assert listed == (modules - helpers) | set(NAMES) | {"socket"}


@pytest.mark.parametrize(
    ("have", "want", "answer"),
    [("1.85.0", "1.85", 0), ("1.100.0", "1.85", 0), ("1.63.0", "1.85", 1), ("", "10", 1)],
)
def test_version_at_least(have: str, want: str, answer: int) -> None:
    lib = ROOT / "scripts" / "lib"
    script = f'. "{lib}/common.sh"; . "{lib}/apt.sh"; . "{lib}/tools.sh"; version_at_least "$1" "$2"'
    done = subprocess.run(["bash", "-c", script, "-", have, want], check=False)
    assert done.returncode == answer
