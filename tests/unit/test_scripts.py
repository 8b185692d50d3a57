"""What the shell scripts promise about their arguments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("have", "want", "answer"),
    [("1.85.0", "1.85", 0), ("1.100.0", "1.85", 0), ("1.63.0", "1.85", 1), ("", "10", 1)],
)
def test_version_at_least(have: str, want: str, answer: int) -> None:
    lib = ROOT / "scripts" / "lib"
    script = f'. "{lib}/common.sh"; . "{lib}/apt.sh"; . "{lib}/tools.sh"; version_at_least "$1" "$2"'
    done = subprocess.run(["bash", "-c", script, "-", have, want], check=False)
    assert done.returncode == answer
