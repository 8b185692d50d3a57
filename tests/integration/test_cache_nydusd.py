"""A cache directory that a nydusd uses, beside a daemon that serves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guest.daemon import Daemon
from tests.unit.test_cache_nydusd import nydusd
from virtiofsd_rafs.errors import CacheError
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import MadeImage


def test_a_running_nydusd_is_seen(made_image: MadeImage, short_dir: Path, tmp_path: Path) -> None:
    """Although a process in a sandbox may not look at the descriptors of one outside."""
    cache = short_dir / "cache"
    arguments = ["--cache-dir", str(cache), "--cache-nydusd"]
    image = str(made_image.out / BOOTSTRAP_NAME)
    with Daemon(image, short_dir, short_dir / "log", arguments) as daemon:
        while not list(cache.glob("*.chunk_map")):
            assert daemon.process.poll() is None
            time.sleep(0.01)
    (data,) = cache.glob("*.blob.data")
    with nydusd(tmp_path, data) as pid, Daemon(image, short_dir, short_dir / "log", arguments) as daemon:
        assert daemon.wait_end() == CacheError.exit_code
        assert f"nydusd (pid {pid}) uses {data}" in daemon.log.read_text()
