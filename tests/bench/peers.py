"""The programs that the daemon is compared with. Their executables are the user's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from guest.daemon import BackEnd
from virtiofsd_rafs.cli._api import fetch_json

if TYPE_CHECKING:
    from pathlib import Path


class Nydusd(BackEnd):
    """nydusd on an image, with its blob cache and without prefetch. It does not verify chunks by default.

    Args:
        program: the executable.
        bootstrap: what it serves.
        backend: where the blobs are: :func:`localfs` or :func:`registry`.
        work: folder for its sockets.
        cache: its cache directory.
        log: file for its output (default: one in *work*).
    """

    def __init__(
        self,
        program: str,
        bootstrap: Path,
        backend: dict[str, Any],
        work: Path,
        cache: Path,
        log: Path | None = None,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        socket, self._api_socket = work / "vhost.sock", work / "api.sock"
        socket.unlink(missing_ok=True)  # of an earlier one: it would be taken for this one's
        config = {
            "device": {
                "backend": backend,
                "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
            },
            "mode": "direct",
            "digest_validate": False,
            "iostats_files": False,
            "enable_xattr": True,
            "fs_prefetch": {"enable": False},
        }
        (work / "config.json").write_text(json.dumps(config))
        argv = [program, "virtiofs", "--sock", str(socket), "--apisock", str(self._api_socket)]
        argv += ["--bootstrap", str(bootstrap), "--config", str(work / "config.json")]
        # Its default is above what many machines allow.
        argv += ["--log-level", "warn", "--rlimit-nofile", "20000"]
        super().__init__(argv, socket, log or work / "log")

    def status(self) -> dict[str, Any]:
        """Its account of the requests to the back-end."""
        return fetch_json(self._api_socket, "/api/v1/metrics/backend")

    def wait_end(self, timeout: float = 30) -> int:
        """It goes on without a VM, so it is ended."""
        self.stop(timeout)
        return 0


def localfs(blob_dir: Path) -> dict[str, Any]:
    """A back-end for nydusd: blobs in a directory."""
    return {"type": "localfs", "config": {"dir": str(blob_dir)}}


def registry(host: str, repository: str) -> dict[str, Any]:
    """A back-end for nydusd: blobs in a registry that speaks plain http. It waits as long as the daemon."""
    return {
        "type": "registry",
        "config": {"scheme": "http", "host": host, "repo": repository, "timeout": 90},
    }
