"""Runs control with a session that a test plays: ``python -m tests.sim.control_child JSON``.

The JSON names the configuration and the inherited descriptors: the keeper's socket, the API's listener, an
eventfd and a pipe with posts (blob and chunk, u32 each), an eventfd for wake-ups, and the mount of a
predecessor.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.native.session import BlobFds, MountFds, Post, Trace
from virtiofsd_rafs.runtime import control


class PlayedSession:
    def __init__(self, fds: dict[str, Any]) -> None:
        self.post_fd = fds["post_event"]
        self._pipe = fds["post_pipe"]
        self._wake = fds["wake"]
        self._mount = fds["mount"]
        os.set_blocking(self._pipe, False)

    def posts(self) -> list[Post]:
        try:
            data = os.read(self._pipe, 65536)
        except BlockingIOError:
            return []
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        pairs = zip(words[::2], words[1::2], strict=True)
        return [Post(0, blob, chunk, 1, 0, time.monotonic_ns()) for blob, chunk in pairs]

    def trace(self) -> list[Trace]:
        return []

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    @property
    def wake_fds(self) -> list[int]:
        return [self._wake]

    def mount_fds(self, mount: int = 0) -> MountFds | None:
        if mount != 0 or self._mount is None:
            return None
        bootstrap, spill, blobs = self._mount
        return MountFds(bootstrap, spill, [BlobFds(*fds) for fds in blobs])

    def status(self) -> dict[str, Any]:
        return {
            "processes": {"control": {"pid": os.getpid()}, "worker": {"pid": 0, "crashes": 0}},
            "session": {"frontend_connected": False},
            "queues": [],
            "counters": {"requests": {}},
            "modules": sorted(sys.modules),
        }


def main() -> int:
    control.PREPARE_AFTER_S = 3600.0  # a test that takes longer would see it happen
    setup = json.loads(sys.argv[1])
    paths = ("api_socket", "cache_dir", "blob_dir")
    config = ServeConfig(**{k: Path(v) if k in paths and v else v for k, v in setup["config"].items()})
    keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=setup["fds"]["keeper"])
    api = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=setup["fds"]["api"])
    return control.main(PlayedSession(setup["fds"]), keeper, api, config)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
