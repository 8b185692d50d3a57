"""A cache directory that a nydusd uses, beside a daemon that serves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guest.daemon import Daemon
from tests.unit.test_cache_nydusd import nydusd
from virtiofsd_rafs.errors import CacheError
from virtiofsd_rafs.image.build import BOOTSTRAP_NAME
from virtiofsd_rafs.native.frontend import Frontend

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


def test_what_only_nydusd_has_is_left_to_it(made_image: MadeImage, short_dir: Path, tmp_path: Path) -> None:
    """While it runs; the image gets files of its own."""
    cache = short_dir / "cache"
    arguments = ["--cache-dir", str(cache), "--cache-nydusd"]
    image = str(made_image.out / BOOTSTRAP_NAME)

    def read() -> None:
        with Daemon(image, short_dir, short_dir / "log", arguments) as daemon:
            daemon.wait_ready()
            with Frontend.connect(daemon.socket) as fe:
                fe.start()
                fe.init()
                assert fe.read(fe.resolve("big").nodeid, 0, 4096) == made_image.files["big"][:4096]
            assert daemon.wait_end() == 0

    read()
    (data,) = cache.glob("*.blob.data")
    next(cache.glob("*.chunk_state")).unlink()  # as if we had never been here
    before = data.read_bytes()
    with nydusd(tmp_path, data):
        read()
    assert len(list(cache.glob("*.blob.data"))) == 2
    assert data.read_bytes() == before
