"""The command line of the benchmarks: one command for each of them."""

from __future__ import annotations

import click

from tests.bench.build import build
from tests.bench.callgrind import callgrind
from tests.bench.cold import cold
from tests.bench.crash import crash
from tests.bench.docs import docs
from tests.bench.faults import faults
from tests.bench.fullread import fullread
from tests.bench.held import held
from tests.bench.kit.compare import operations, page_command
from tests.bench.many import many
from tests.bench.memory import memory
from tests.bench.planner_model import model
from tests.bench.races import races
from tests.bench.start import start


class WithDefault(click.Group):
    """A group whose default command takes the arguments when they name none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] == "--cold":
            args = ["cold", *args[1:]]
        elif not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = ["operations", *args]
        return super().parse_args(ctx, args)


@click.group(cls=WithDefault)
def main() -> None:
    """Measures virtio-fs back-ends: this project's daemon, its peers, any other.

    Without a command: operations, which compares them by requests of every kind (scripts/bench operations
    --help tells its options; scripts/bench --quick takes 3 minutes). --cold stands for the command cold. Each
    table in docs/benchmarks.md is made by one of these commands; docs puts there what they measured.
    """


for command in (operations, held, races, start, memory, cold, fullread, crash, faults, many, model, build):
    main.add_command(command)
for command in (callgrind, page_command, docs):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="scripts/bench")
