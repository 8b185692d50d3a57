"""A real OCI registry on loopback: Debian's ``docker-registry`` (distribution 2.8)."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

import attrs

if TYPE_CHECKING:
    from pathlib import Path


# A line of the access log: the path in the quoted request, behind it the answer's status and length.
_ANSWER = re.compile(rb'"(?:GET|HEAD) (/v2/[^" ]+)[^"]*" (\d{3}) (\d+) ')


@attrs.frozen
class Traffic:
    """What a registry has answered: requests and bytes of their bodies."""

    requests: int
    bytes: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.requests - earlier.requests, self.bytes - earlier.bytes)


def read_log(log: bytes, digest: str = "") -> Traffic:
    """What the access log *log* tells: everything that was read, or only what had *digest* in its path."""
    lengths = [int(length) for path, _, length in _ANSWER.findall(log) if digest.encode() in path]
    return Traffic(len(lengths), sum(lengths))


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Registry:
    """A running registry that keeps its content in *folder*.

    A context manager: leaving it ends the registry.
    """

    def __init__(self, folder: Path) -> None:
        program = shutil.which("docker-registry")
        if program is None:
            raise FileNotFoundError("docker-registry is missing: run scripts/lib/install build")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.log = folder / "registry.log"
        config = folder / "config.json"
        # JSON is YAML as well.
        config.write_text(json.dumps(self._config(folder), indent=2))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _config(self, folder: Path) -> dict[str, Any]:
        return {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
            "http": {"addr": f"127.0.0.1:{self.port}"},
        }

    def _wait(self, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/v2/")
                # A registry that asks for a password is ready, too.
                if connection.getresponse().status in (http.HTTPStatus.OK, http.HTTPStatus.UNAUTHORIZED):
                    return
            except OSError:
                pass
            finally:
                connection.close()
            if self._process.poll() is not None or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"docker-registry did not start; its log ends:\n{end}")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, the host part of references."""
        return f"127.0.0.1:{self.port}"

    def traffic(self, digest: str = "") -> Traffic:
        """What was read from it so far, by its own account; see :func:`read_log`."""
        return read_log(self.log.read_bytes(), digest)

    def close(self) -> None:
        """Ends the registry; its content stays."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
