"""nydusd with a registry as its back-end, for comparisons. The program is the user's."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class Nydusd:
    """A running nydusd; leaving the context ends it.

    Args:
        program: the executable.
        bootstrap: what it serves.
        host: of the registry, which speaks plain http.
        repository: that holds the blobs.
        work: folder for its sockets and its log.
        cache: its cache directory (default: one in *work*).
    """

    def __init__(
        self,
        program: str,
        bootstrap: Path,
        host: str,
        repository: str,
        work: Path,
        *,
        cache: Path | None = None,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        cache = cache or work / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        self.socket = work / "n.sock"
        self._api = work / "n.api"
        backend = {"scheme": "http", "host": host, "repo": repository, "timeout": 60}
        config = {
            "device": {
                "backend": {"type": "registry", "config": backend},
                "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
            },
            "mode": "direct",
            "enable_xattr": True,
            "fs_prefetch": {"enable": False},
        }
        (work / "n.json").write_text(json.dumps(config))
        self._log = (work / "n.log").open("wb")
        argv = [program, "virtiofs", "--sock", str(self.socket), "--apisock", str(self._api)]
        argv += ["--bootstrap", str(bootstrap), "--config", str(work / "n.json"), "--rlimit-nofile", "10000"]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nydusd did not start: {(work / 'n.log').read_text(errors='replace')}")
            time.sleep(0.005)

    def get(self, path: str) -> bytes:
        """The body that its API answers."""
        connection = _UnixConnection(self._api)
        connection.request("GET", path)
        return connection.getresponse().read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
