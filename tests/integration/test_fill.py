"""A filled image needs no registry any more: a real daemon, a real registry that goes away, and a VM."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest

from guest.registry import Registry
from tests.integration.conftest import Served, children, kill, serving
from virtiofsd_rafs.image.push import push_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guest.daemon import Daemon
    from tests.integration.conftest import MadeImage

TOLD = "it needs no registry any more"


@pytest.fixture
def registry(tool: Callable[[str], str], tmp_path: Path, made_image: MadeImage) -> Iterator[Registry]:
    """Debian's docker-registry, with the image as ``app:1``."""
    tool("docker-registry")
    with Registry(tmp_path / "registry") as running:
        asyncio.run(push_image(made_image.out, f"{running.host}/app:1", plain_http=True))
        yield running


def first_start(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["agent"]["first_start"]
    return found


def complete(daemon: Daemon) -> bool:
    return bool(daemon.status()["image"]["complete"])


def stored(served: Served) -> int:
    """Chunks that are in the cache."""
    return sum(int(blob["states"]["verified"]) for blob in served.daemon.status()["image"]["blobs"])


def read_all(served: Served) -> None:
    """Every byte of every file, without an error."""
    for name, data in sorted(served.image.files.items()):
        served.collect([served.submit_read(name, at, 1 << 17) for at in range(0, len(data), 1 << 17)])
    served.check_ring()
    counters = served.session.status()["counters"]
    assert (counters["errors"], counters["deadline_errors"]) == (0, 0)


def blob_bytes(image: MadeImage) -> int:
    return sum(path.stat().st_size for path in image.out.iterdir() if path.name != "image.boot")


@pytest.mark.parametrize("when", ["now", "after-start"])
def test_the_registry_may_go_when_the_fill_is_done(
    registry: Registry, made_image: MadeImage, short_dir: Path, when: str
) -> None:
    with serving(registry, made_image, short_dir, "--fill", when) as served:
        served.collect([served.submit_read("big", 0, 4096)])
        served.wait_for(lambda: complete(served.daemon))
        served.wait_for(lambda: first_start(served.daemon)["fill"] == "done")
        assert TOLD in (short_dir / "log").read_text()
        # Each chunk once, and hardly anything besides.
        assert registry.traffic().bytes < 1.05 * blob_bytes(made_image)
        registry.close()
        read_all(served)
        assert set(served.daemon.status()["agent"]["fetches"]) == {"ok"}
    # What has been pulled once starts without the registry, and asks it for nothing.
    with serving(registry, made_image, short_dir, "--fill", when) as served:
        assert complete(served.daemon)
        assert TOLD in (short_dir / "log").read_text()
        read_all(served)
        assert served.daemon.status()["agent"]["fetches"] == {}


def test_a_fill_goes_on_when_control_is_killed(
    registry: Registry, made_image: MadeImage, short_dir: Path
) -> None:
    rate = blob_bytes(made_image) // 3  # so it takes seconds, and there is something to interrupt
    with serving(registry, made_image, short_dir, "--fill", "now", "--fill-rate", str(rate)) as served:
        for part in (1, 2, 3):
            n = 100 * part
            served.wait_for(lambda n=n: stored(served) > n)  # type: ignore[misc]
            pid = served.session.status()["processes"]["control"]["pid"]
            kill(pid, signal.SIGKILL)
            served.wait_for(
                lambda pid=pid: served.session.status()["processes"]["control"]["pid"] not in (0, pid)
            )  # type: ignore[misc]
        served.wait_for(lambda: complete(served.daemon))
        # What had come before is not fetched again: only what was under way is.
        assert registry.traffic().bytes < 1.3 * blob_bytes(made_image)
        registry.close()
        read_all(served)


def test_a_fill_ends_with_the_mount(registry: Registry, made_image: MadeImage, short_dir: Path) -> None:
    with serving(registry, made_image, short_dir, "--fill", "now", "--fill-rate", "1MiB") as served:
        served.wait_for(lambda: stored(served) > 3)
        pids = [served.daemon.process.pid, *children(served.daemon.process.pid)]
        served.fe.close()
        assert served.daemon.wait_end() == 0
        assert len(pids) == 3
        asked = registry.traffic()
        assert 0 < asked.bytes < blob_bytes(made_image) // 2
    # What it had brought is there for the next one, which fetches the rest.
    with serving(registry, made_image, short_dir, "--fill", "now") as served:
        had = stored(served)
        assert had > 3
        served.wait_for(lambda: complete(served.daemon))
        assert registry.traffic().bytes < 1.05 * blob_bytes(made_image)
