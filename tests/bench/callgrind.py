"""Instructions per request that hits, counted by callgrind: exact where timings are noise.

`native/benches` serves requests in a ring thread without processes around it; valgrind counts what that
thread executes in user space. The figures in ``native/benches/figures.json`` hold for one compiler and one C
library: with others the counts are shown and not compared, but for what must hold with any.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "native/benches/figures.json"
TOLERANCE = 0.03
"""A count that differs by more has to be explained by the commit that changes the figures."""
QUEUES_TOLERANCE = 0.05
"""What four queues may cost more than one, per request."""
ROUNDS = 50


def toolchain() -> str:
    """What the counts depend on beside the code: compiler and C library."""
    version = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout
    return f"rustc {version.split()[1]}, {os.confstr('CS_GNU_LIBC_VERSION')}"


def build() -> Path:
    """Builds the program as the package is built; its path."""
    manifest = ROOT / "native/Cargo.toml"
    command = ["cargo", "build", "--release", "--locked", "--package", "benches", "--message-format=json"]
    built = subprocess.run(
        [*command, "--quiet", "--manifest-path", str(manifest)], check=True, capture_output=True, text=True
    )
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "hit-path":
            return Path(message["executable"])
    raise click.ClickException("cargo built no hit-path")


def count(program: Path, case: str, requests: int, profile: Path | None) -> float:
    """Instructions per request of *case*, whose rounds have *requests* each."""
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=hit_path_measured"]
    command.append(f"--callgrind-out-file={profile or os.devnull}")
    done = subprocess.run([*command, str(program), case, str(ROUNDS)], capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or collected is None:
        raise click.ClickException(f"{case}: valgrind ended with {done.returncode}:\n{done.stderr}")
    return int(collected[1]) / ROUNDS / requests


def faults(counts: dict[str, float], known: dict[str, float] | None) -> list[str]:
    """What is wrong with *counts*; *known* are the figures of the same toolchain."""
    found = []
    several = counts["getattr-4-queues"] / counts["getattr"]
    if several > 1 + QUEUES_TOLERANCE:
        found.append(f"four queues take {several:.2f} x the instructions of one per request")
    for case, counted in counts.items() if known is not None else ():
        before = known.get(case) if known else None
        if before is None:
            found.append(f"{case} has no figure")
        elif abs(counted / before - 1) > TOLERANCE:
            found.append(f"{case}: {counted:.0f}, not {before:.0f} ({counted / before - 1:+.1%})")
    return found


@click.command()
@click.option("--update", is_flag=True, help="Keep what was counted as the new figures.")
@click.option(
    "--profiles",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep callgrind's profiles here, for callgrind_annotate.",
)
def callgrind(update: bool, profiles: Path | None) -> None:
    """Instructions per request that hits, against the figures in native/benches.

    Exit code 1 when they differ by more than 3 %. A change that is meant is explained in the commit that
    updates the figures (--update).
    """
    program = build()
    listed = subprocess.run([program, "list"], check=True, capture_output=True, text=True).stdout
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"toolchain": None, "instructions": {}}
    same = kept["toolchain"] == toolchain()
    if profiles is not None:
        profiles.mkdir(parents=True, exist_ok=True)
    counts = {}
    click.echo(f"{'instructions per request':<26}{'counted':>10}{'figure':>10}")
    for line in listed.splitlines():
        case, requests = line.split()
        counts[case] = count(program, case, int(requests), profiles and profiles / f"callgrind.out.{case}")
        figure = kept["instructions"].get(case)
        click.echo(f"{case:<26}{counts[case]:>10.0f}{'-' if figure is None else round(figure):>10}")
    if update:
        figures = {case: round(counted) for case, counted in counts.items()}
        FIGURES.write_text(json.dumps({"toolchain": toolchain(), "instructions": figures}, indent=2) + "\n")
        same, kept["instructions"] = True, figures
    elif not same:
        click.echo(f"not compared: the figures are those of {kept['toolchain']}, this is {toolchain()}")
    found = faults(counts, kept["instructions"] if same else None)
    if found:
        raise click.ClickException("; ".join(found))
