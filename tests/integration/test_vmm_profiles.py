"""The same life of a VM in the message order of each VMM: boot, pause, memory, reset, end, under load."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest

from guest.daemon import Daemon
from tests.integration.conftest import Served, kill, run_daemon
from virtiofsd_rafs.native.frontend import Frontend, Load, LoadResult, Op, Target
from virtiofsd_rafs.native.frontend_link import PeerError, Region, RequestLost
from virtiofsd_rafs.native.frontend_vmm import CLOUD_HYPERVISOR, QEMU_10, VMMS, Vmm
from virtiofsd_rafs.native.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.conftest import MadeImage
    from tests.sim.registry import RegistrySimulator
    from virtiofsd_rafs.native.frontend_device import Token

every_vmm = pytest.mark.parametrize("vmm", VMMS, ids=lambda vmm: vmm.name)


@every_vmm
def test_a_life_under_load(start: Callable[..., Served], vmm: Vmm) -> None:
    served = start(vmm=vmm, queues=2, queue_size=128)
    rng = random.Random(11)
    # Paused with requests that wait for data, which come meanwhile: not a byte of memory changes.
    for first in (0, 60, 120):
        fault = served.sim.fault("hold", where="blob")
        names = [f"f{i:03}" for i in range(first, first + 48)]
        waiting = [served.submit_read(name, 0, 65536, queue=1 + i % 2) for i, name in enumerate(names)]
        served.wait_for(lambda: served.parked() > 0)
        bases = served.fe.stop()
        fault.release()
        served.wait_for(lambda: served.daemon.status()["agent"]["fetches_in_flight"] == 0)
        served.fe.resume(bases)
        served.collect(waiting)
        served.check_ring()
    pauses_under_load(served)
    # Memory is plugged in and out under load.
    for _ in range(3):
        reads = served.random_reads(rng)
        region = served.fe.add_region(Region(gpa=1 << 36, size=4 << 20))
        served.collect(reads)
        reads = served.random_reads(rng)
        served.fe.remove_region(region.gpa)
        served.collect(reads)
    # The worker dies while the VM stands still, and in the middle of things.
    waiting = served.random_reads(rng)
    bases = served.fe.stop()
    before = served.worker()["generation"]
    kill(served.worker()["pid"])
    served.wait_for(lambda: served.worker()["pid"] == 0 or served.worker()["generation"] > before)
    served.fe.resume(bases)
    served.collect(waiting)
    # Reset with requests that will never be answered, then a guest that boots anew.
    fault = served.sim.fault("hold", where="blob")
    asked = [served.submit_read("big", offset, 65536)[0] for offset in range(0, 4 << 20, 1 << 18)]
    served.wait_for(lambda: served.parked() > 0)
    served.fe.reset()
    fault.release()
    assert served.fe.init().major == 7
    assert lost(served, asked) > 0
    served.collect(served.random_reads(rng))
    served.check_ring()
    served.fe.close()
    assert served.daemon.wait_end() == 0


def lost(served: Served, tokens: list[Token]) -> int:
    """How many of the requests have no answer; a few may have been read ahead, and answered before."""
    n = 0
    for token in tokens:
        try:
            assert served.fe.wait(token, 10).error == 0
        except RequestLost:
            n += 1
    return n


def pauses_under_load(served: Served) -> None:
    """The VM is paused again and again, at any moment of a load whose every byte is compared."""
    targets = []
    for name in ("f000", "f060", "f120"):
        size = len(served.image.files[name])
        targets.append(Target(served.node(name), size, content=served.image.source / name))
    load = Load([Op("read", targets, 65536), Op("getattr", targets)], depth=32, count=5000, queues=(1, 2))
    results: list[LoadResult] = []
    thread = threading.Thread(target=lambda: results.append(served.fe.load(load)))
    thread.start()
    pauses = 0
    while thread.is_alive():
        served.fe.resume(served.fe.stop())
        pauses += 1
    thread.join()
    assert results[0].clean, served.fe.fault_texts()
    assert pauses > 1, "the load was over before it was paused"


@every_vmm
def test_the_next_vm_of_a_kept_daemon(
    made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path, vmm: Vmm
) -> None:
    """Cloud Hypervisor reboots a VM this way: it closes the connection and makes another one."""
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep") as daemon:
        for _ in range(3):
            with Frontend.connect(daemon.socket, vmm=vmm) as fe:
                fe.start()
                fe.init()
                served = Served(daemon, Session.attach(daemon.process.pid), made_image, registry_sim, fe)
                served.collect(served.random_reads(random.Random(12)))
                served.check_ring()


def test_cloud_hypervisor_goes_on_with_another_daemon(
    made_image: MadeImage, registry_sim: RegistrySimulator, short_dir: Path
) -> None:
    """The daemon is gone as a whole; the VM goes on with the next at the same socket, without a FUSE_INIT."""
    registry_sim.store.add_build("app", "1", made_image.out)
    arguments = ["--plain-http", "--cache-dir", str(short_dir / "cache")]
    image = f"{registry_sim.host}/app:1"
    rng = random.Random(13)
    with Frontend(vmm=CLOUD_HYPERVISOR) as fe:
        nodes: dict[str, int] = {}
        for generation in range(2):
            with Daemon(image, short_dir, short_dir / f"log-{generation}", arguments) as daemon:
                daemon.wait_ready()
                if generation == 0:
                    fe.attach(daemon.socket)
                    fe.start()
                    fe.init()
                else:
                    fe.reconnect(daemon.socket)
                session = Session.attach(daemon.process.pid)
                served = Served(daemon, session, made_image, registry_sim, fe, nodes)
                served.collect(served.random_reads(rng))
                kill(daemon.process.pid)
                daemon.process.wait()
            daemon.socket.unlink(missing_ok=True)
        served.check_ring()


def test_qemu_does_not_reconnect(start: Callable[..., Served]) -> None:
    served = start("--keep", vmm=QEMU_10)
    served.fe.detach()
    with pytest.raises(PeerError, match="qemu-10 does not reconnect"):
        served.fe.reconnect(served.daemon.socket)
