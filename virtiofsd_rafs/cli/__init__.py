"""The command line. Each command lives in its own module and is imported only when it is called, because
``serve`` must bind its sockets within milliseconds.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from virtiofsd_rafs import __version__

# command name -> (module, attribute, one line of help)
_COMMANDS = {
    "serve": ("virtiofsd_rafs.cli.serve", "serve", "Serve an image to one VM over vhost-user."),
    "status": (
        "virtiofsd_rafs.cli.status",
        "status",
        "Show a running daemon's cache and traffic, and who waits for what.",
    ),
    "boot": ("virtiofsd_rafs.cli.boot", "boot", "Show what happened while a guest started (boot report)."),
    "cache": ("virtiofsd_rafs.cli.cache", "cache", "Show, clean and verify a cache directory."),
    "record": (
        "virtiofsd_rafs.cli.record",
        "record",
        "Write down what a guest has read, as a prefetch list.",
    ),
    "build": ("virtiofsd_rafs.cli.build", "build", "Build a RAFS v6 image from a directory."),
    "push": ("virtiofsd_rafs.cli.push", "push", "Push a built image to a registry."),
    "inspect": ("virtiofsd_rafs.cli.inspect", "inspect", "Show what an image contains."),
    "check": ("virtiofsd_rafs.cli.check", "check", "Verify an image's structures and digests."),
}

# What the operating system refused (a full disk, a folder that may not be written) without a better name.
_SYSTEM_MSGID = "system.error"


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, attribute, _ = entry
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup)
@click.version_option(__version__, prog_name="virtiofsd-rafs")
def cli() -> None:
    """Start microVM containers before their image has been fetched."""


def main() -> None:
    """Run the command line; errors of this package and of the system end with one clear line."""
    from virtiofsd_rafs.errors import LocalError, VirtiofsdRafsError

    try:
        cli(auto_envvar_prefix="VIRTIOFSD_RAFS")
    except VirtiofsdRafsError as e:
        print(f"virtiofsd-rafs: {e.msgid}: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except OSError as e:
        _drop_unwritable_output()
        where = f"{os.fsdecode(e.filename)}: " if isinstance(e.filename, (str, bytes)) else ""
        print(f"virtiofsd-rafs: {_SYSTEM_MSGID}: {where}{e.strerror or e}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        import traceback

        traceback.print_exc()
        print(f"virtiofsd-rafs: {LocalError.msgid}: please report the lines above", file=sys.stderr)
        sys.exit(LocalError.exit_code)


def _drop_unwritable_output() -> None:
    """Python flushes stdout once more when it ends: what cannot be written must not change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
