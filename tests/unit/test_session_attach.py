"""Finding the session of a daemon by its pid."""

from __future__ import annotations

import subprocess
import sys

import pytest

from virtiofsd_rafs.native.session import Session

RESTLESS = """
import os
print(flush=True)
while True:
    for fd in [os.open("/dev/null", 0) for _ in range(50)]:
        os.close(fd)
"""


def test_descriptors_may_go_meanwhile() -> None:
    """A keeper that starts opens and closes files."""
    with subprocess.Popen([sys.executable, "-c", RESTLESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            for _ in range(200):
                with pytest.raises(ProcessLookupError):
                    Session.attach(process.pid)
        finally:
            process.kill()
