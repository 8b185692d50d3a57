"""What VMMs do to a running device, played by the front-end kit."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.bench import races
from tests.integration.conftest import TIMEOUT_S, Served, attach, children, run_daemon
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import HIPRIO, Frontend, Load, Op, Target
from virtiofsd_rafs.native.frontend_link import Region
from virtiofsd_rafs.native.session import Session


def test_warm_requests_do_not_wait_for_a_missing_chunk(start) -> None:
    served: Served = start()
    served.collect([served.submit_read("f001", 0, 4096)])
    fault = served.sim.fault("hold", where="blob")
    waiting = [served.submit_read("big", 1 << 20, 65536)]
    served.wait_for(lambda: served.parked() == 1)
    for _ in range(100):
        served.collect([served.submit_read("f001", 0, 4096)])
        assert served.fe.getattr(served.node("f001")).size == len(served.image.files["f001"])
        served.fe.forget(served.node("f001"))
    assert served.parked() == 1
    fault.release()
    served.collect(waiting)
    served.check_ring()


def test_stop_and_continue_with_parked_requests(start) -> None:
    """QEMU `stop` / `cont`: GET_VRING_BASE is answered with a dead remote, nothing is written meanwhile."""
    served: Served = start(queue_size=64)
    fault = served.sim.fault("hold", where="blob")
    waiting = served.random_reads(random.Random(1))
    served.wait_for(lambda: served.parked() == 32)
    bases = served.fe.stop()
    fault.release()
    served.check_ring()
    served.fe.resume(bases)
    served.collect(waiting)
    served.check_ring()


def test_stop_and_continue_again_and_again(start) -> None:
    served: Served = start(queue_size=64)
    rng = random.Random(2)
    for _ in range(20):
        reads = served.random_reads(rng)
        served.fe.resume(served.fe.stop())
        served.collect(reads)
    served.check_ring()


def test_the_worker_dies_while_it_stops(start) -> None:
    served: Served = start(queue_size=64)
    fault = served.sim.fault("hold", where="blob")
    waiting = served.random_reads(random.Random(3))
    served.wait_for(lambda: served.parked() == 32)
    served.session.arm_failpoint(15)
    bases = served.fe.stop()
    assert served.session.armed_failpoint() == 0
    fault.release()
    served.fe.resume(bases)
    served.collect(waiting)
    served.check_ring()


@pytest.mark.parametrize("again", [False, True], ids=["same-base", "used-index"])
def test_64_parked_requests_are_answered_once_after_a_restart(start, again: bool) -> None:
    """Each waits for a chunk of its own, and the remote is dead while the ring is stopped.

    A VMM that goes on at the used index (QEMU does when it was not told the base) offers them once more: the
    ring is another one then, what was parked belongs to nobody, and the requests are taken from it anew.
    """
    served: Served = start(queue_size=256)
    fault = served.sim.fault("hold", where="blob")
    waiting = [served.submit_read("big", 65536 * chunk, 4096) for chunk in range(64)]
    served.wait_for(lambda: served.parked() == 64)
    bases = served.fe.stop()
    info = served.fe.queue_info(1)
    assert bases[1] == info.avail_idx == info.used_idx + 64
    served.check_ring()
    served.fe.resume([info.used_idx if again and queue == 1 else base for queue, base in enumerate(bases)])
    served.wait_for(lambda: served.parked() == 64)
    fault.release()
    served.collect(waiting)
    info = served.fe.queue_info(1)
    assert info.used_idx == info.avail_idx == bases[1]
    served.check_ring()


def test_a_million_forgets_beside_requests_that_wait(start) -> None:
    """They only need their buffers back, which they get though 64 requests wait in the other queue."""
    served: Served = start(queue_size=256)
    node = served.node("f001")
    fault = served.sim.fault("hold", where="blob")
    waiting = [served.submit_read("big", 65536 * chunk, 4096) for chunk in range(64)]
    served.wait_for(lambda: served.parked() == 64)
    result = served.fe.load(
        Load([Op("forget", [Target(node)])], depth=128, count=1_000_000, queues=(HIPRIO,), canaries=False)
    )
    assert (result.total.count, result.lost, result.faults) == (1_000_000, 0, {})
    assert served.parked() == 64
    fault.release()
    served.collect(waiting)
    served.check_ring()


def test_starts_whose_first_request_races_the_ring(made_image) -> None:
    """At each moment of a start, in each VMM's order; three of them at a process that has just begun."""
    done = races.run(races.keeping("rafs", made_image.out / "image.boot", made_image.out), 50, 3, TIMEOUT_S)
    assert [each for each in done if each.answer_ms is None or each.faults] == []
    assert sum(each.fresh for each in done) == 3
    assert len({(each.vmm, each.when) for each in done}) == len(races.VMMS) * len(races.WHENS)


def test_idle_processes_sleep(start) -> None:
    """Once a load is over nobody is woken: no clock of worker or keeper goes on, but for a look 3 s later."""
    served: Served = start()
    served.collect(served.random_reads(random.Random(10)))
    keeper, worker = served.daemon.process.pid, served.worker()["pid"]

    def sleeps() -> dict[str, int]:
        found = {}
        for task in (task for pid in (keeper, worker) for task in Path(f"/proc/{pid}/task").iterdir()):
            status = (task / "status").read_text()
            found[task.name] = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return found

    def rests(seconds: float) -> bool:
        before = sleeps()
        time.sleep(seconds)
        return sleeps() == before

    served.wait_for(lambda: rests(0.5))
    # Longer than any clock that they have, or had.
    served.wait_for(lambda: rests(6))
    served.collect(served.random_reads(random.Random(11)))
    served.check_ring()


def test_reset_with_parked_requests_starts_a_new_session(start) -> None:
    """QEMU `system_reset`: the old guest's requests are forgotten, the new guest gets an INIT of its own."""
    served: Served = start(queue_size=64)
    fault = served.sim.fault("hold", where="blob")
    served.random_reads(random.Random(4))
    served.wait_for(lambda: served.parked() == 32)
    served.fe.reset()
    fault.release()
    served.fe.start()
    assert served.fe.init().major == 7
    served.collect(served.random_reads(random.Random(5)))
    served.check_ring()


def test_a_second_init_without_destroy(start) -> None:
    served: Served = start()
    served.collect([served.submit_read("f001", 0, 4096)])
    assert served.fe.init().major == 7
    served.collect([served.submit_read("f002", 0, 4096)])
    served.check_ring()


def test_call_fds_are_swapped_while_requests_run(start) -> None:
    served: Served = start(queue_size=64)
    rng = random.Random(6)
    for _ in range(20):
        reads = served.random_reads(rng)
        served.fe.swap_call(1)
        served.collect(reads)
    served.check_ring()


def test_memory_comes_and_goes_while_requests_run(start) -> None:
    served: Served = start(queue_size=64)
    rng = random.Random(7)
    for _ in range(5):
        reads = served.random_reads(rng)
        region = served.fe.add_region(Region(gpa=1 << 36, size=4 << 20))
        served.collect(reads)
        reads = served.random_reads(rng)
        served.fe.remove_region(region.gpa)
        served.collect(reads)
    served.check_ring()


@pytest.mark.parametrize("worker_dies", [False, True])
def test_requests_wait_for_the_memory_of_their_buffers(start, worker_dies: bool) -> None:
    """Taken between REM_MEM_REG and ADD_MEM_REG of the region that holds what they say and ask for."""
    served: Served = start(queue_size=64)
    fe, node = served.fe, served.node("f001")
    region = fe.add_region(Region(gpa=1 << 36, size=4 << 20))
    fe.rem_mem_reg(region)
    tokens = [fe.request(Opcode.GETATTR, node, bytes(16), 104, region=region.gpa) for _ in range(8)]
    served.wait_for(lambda: served.parked() == 8)
    served.collect(served.random_reads(random.Random(7)))
    if worker_dies:
        before = served.worker()["generation"]
        os.kill(served.worker()["pid"], signal.SIGKILL)
        served.wait_for(lambda: served.worker()["generation"] > before and served.parked() == 8)
    assert not fe.poll(1, 0.2)
    fe.add_mem_reg(region)
    assert [fe.wait(token, 10).error for token in tokens] == [0] * 8
    served.check_ring()


def test_a_kick_before_the_ring_is_enabled_is_not_lost(start) -> None:
    served: Served = start()
    node = served.node("f001")
    served.fe.set_vring_enable(1, False)
    served.fe.get_features()  # Disabling is not acknowledged; this reply says that it was read.
    token = served.fe.request(Opcode.GETATTR, node, bytes(16), 104)
    assert token.id not in served.fe.poll(1, 0.2), "a disabled ring was served"
    served.fe.set_vring_enable(1, True)
    assert served.fe.wait(token, 10).error == 0
    served.check_ring()


@pytest.mark.parametrize("queues", [2, 8])
def test_several_request_queues(start, queues: int) -> None:
    served: Served = start(queues=queues, queue_size=128)
    rng = random.Random(8)
    for _ in range(5):
        reads = []
        for queue in range(1, queues + 1):
            reads += served.random_reads(rng, queue=queue)
        served.collect(reads)
    served.check_ring()


@pytest.mark.parametrize("size", [2, 8, 1024])
def test_queue_sizes(start, size: int) -> None:
    """With indirect tables a request takes one slot, so the smallest ring holds two."""
    served: Served = start(queue_size=size)
    rng = random.Random(size)
    for _ in range(20):
        served.collect(served.random_reads(rng, min(size, 32)))
    served.check_ring()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_while_the_registry_is_dead(start, name: str) -> None:
    served: Served = start()
    served.sim.fault("hold", where="blob")
    served.random_reads(random.Random(9))
    served.wait_for(lambda: served.parked() == 32)
    pids = children(served.daemon.process.pid)
    assert len(pids) == 2
    os.kill(served.daemon.process.pid, getattr(signal, name))
    assert served.daemon.wait_end() == 0
    assert not served.daemon.socket.exists()
    assert not served.daemon.api_socket.exists()


def test_it_ends_with_its_vm(start) -> None:
    served: Served = start()
    served.fe.close()
    assert served.daemon.wait_end() == 0


def test_a_second_daemon_at_the_same_socket_does_no_harm(made_image, registry_sim, short_dir) -> None:
    """It finds out by connecting that the socket is taken; that is no VM that came and went."""
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir) as daemon:
        command = [*daemon.process.args[:3], "--socket-path", str(daemon.socket), "--no-cache"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 5
        assert "another process listens there" in second.stderr
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            assert fe.init().major == 7
        assert daemon.wait_end() == 0


def test_who_connects_and_says_nothing_is_no_vmm(made_image, registry_sim, short_dir) -> None:
    """A probe, or a VMM that died early: not logged, not counted, and not the end of a VM."""
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir) as daemon:
        session = attach(daemon)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as silent:
                silent.connect(str(daemon.socket))
        with Frontend.connect(daemon.socket) as fe:
            # Connected, and the probes before it are gone: nothing has been said yet.
            assert session.status()["session"]["connected_ns"] == 0
            fe.start()
            fe.init()
            assert session.status()["session"]["connected_ns"] > 0
            # Control hears of the VM when it gets round to it, and of its end never, if that comes first.
            served = Served(daemon, session, made_image, registry_sim, fe)
            served.wait_for(lambda: "the VMM has connected" in daemon.log.read_text())
        assert daemon.wait_end() == 0
        assert daemon.log.read_text().count("the VMM has connected") == 1


def test_keep_listens_again(made_image, registry_sim, short_dir) -> None:
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep") as daemon:
        for _ in range(3):
            with Frontend.connect(daemon.socket) as fe:
                fe.start()
                fe.init()
                served = Served(daemon, Session.attach(daemon.process.pid), made_image, registry_sim, fe)
                served.collect([served.submit_read("f003", 0, 65536)])
                served.check_ring()


def test_half_a_message_ends_the_connection_and_not_the_keeper(made_image, registry_sim, short_dir) -> None:
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep") as daemon:
        with socket.socket(socket.AF_UNIX) as half:
            half.connect(str(daemon.socket))
            half.sendall(bytes([1, 0, 0, 0, 1, 0]))
            half.settimeout(20)
            # The keeper closes with half a message unread, which a unix socket reports as a reset.
            with pytest.raises(ConnectionResetError):
                half.recv(1)
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            assert fe.init().major == 7
