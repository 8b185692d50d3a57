"""The command line of the benchmarks: one command for each of them."""

from __future__ import annotations

import click

from tests.bench.build import build
from tests.bench.cold import cold
from tests.bench.crash import crash
from tests.bench.faults import faults
from tests.bench.fullread import fullread
from tests.bench.held import held
from tests.bench.many import many
from tests.bench.memory import memory
from tests.bench.operations import operations
from tests.bench.planner_model import model
from tests.bench.start import start


@click.group()
def main() -> None:
    """Measures the daemon and its peers in turn. Options take the peers' programs; see docs/benchmarks.md."""


for command in (operations, held, start, memory, cold, fullread, crash, faults, many, model, build):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="scripts/bench")
