"""The console script, also as ``python -m virtiofsd_rafs``.

Nothing is imported here that ``serve`` does not need for its sockets.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line. The sockets of ``serve`` are there before its options are looked at."""
    if sys.argv[1:2] != ["serve"]:
        from virtiofsd_rafs.cli import main as run

        run()
        return
    from virtiofsd_rafs import sockets

    try:
        sockets.bind_early(sys.argv[2:])
        from virtiofsd_rafs.cli import main as run

        run()
    finally:
        sockets.drop()


if __name__ == "__main__":
    main()
