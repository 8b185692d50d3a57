"""What the keeper owns is given back, and nothing that a front-end does keeps it from ending."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.conftest import Served, children, kill, run_daemon
from tests.preference import may_be_preferred
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.frontend_link import Region
from virtiofsd_rafs.native.session import HANG, Session
from virtiofsd_rafs.runtime.scheduling import ANSWER_NICE, LOOP_NICE

if TYPE_CHECKING:
    from collections.abc import Callable

# native/crates/session/src/failpoint.rs
COPYING = 7


def descriptors(pid: int) -> Counter[str]:
    """What *pid* has open, without the numbers in the names."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[os.readlink(link).partition(":[")[0]] += 1
        except FileNotFoundError:
            continue
    return found


def regions_come_and_go(served: Served) -> None:
    region = served.fe.add_region(Region(gpa=1 << 36, size=1 << 20))
    served.fe.remove_region(region.gpa)


def whole_tables(served: Served) -> None:
    served.fe.set_mem_table(served.fe.regions)


def calls_are_swapped(served: Served) -> None:
    served.fe.swap_call(1)


def stop_and_continue(served: Served) -> None:
    served.fe.resume(served.fe.stop())


def the_worker_dies(served: Served) -> None:
    before = served.worker()["generation"]
    kill(served.worker()["pid"])
    served.wait_for(lambda: served.worker()["generation"] > before and served.worker()["pid"])


@pytest.mark.parametrize(
    ("happens", "times"),
    [
        (regions_come_and_go, 30),
        (whole_tables, 30),
        (calls_are_swapped, 100),
        (stop_and_continue, 30),
        (the_worker_dies, 20),
    ],
)
def test_no_descriptor_is_left_behind(start, happens: Callable[[Served], None], times: int) -> None:
    served: Served = start(queue_size=64, queues=2)
    rng = random.Random(times)

    def so_often(n: int) -> list[Counter[str]]:
        for _ in range(n):
            reads = served.random_reads(rng, 8)
            happens(served)
            served.collect(reads)
        # Both have started, and done all that they were told, once these are answered.
        stop_and_continue(served)
        served.fe.get_features()
        pids = [served.daemon.process.pid, served.worker()["pid"]]
        return [descriptors(pid) for pid in pids]

    before = so_often(2)
    assert so_often(times) == before
    served.check_ring()


def test_front_ends_that_come_and_go_leave_nothing(made_image, registry_sim, short_dir) -> None:
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep") as daemon:
        pid = daemon.process.pid
        counts = []
        for _ in range(12):
            with Frontend.connect(daemon.socket, queue_size=64) as fe:
                fe.start()
                fe.init()
                served = Served(daemon, Session.attach(pid), made_image, registry_sim, fe)
                served.collect(served.random_reads(random.Random(1), 8))
                counts.append(descriptors(pid))
        assert counts[2:] == [counts[2]] * 10
        # Control alone is left; a zombie would be one of them.
        served.wait_for(lambda: len(children(pid)) == 1)


def test_a_whole_table_while_requests_wait(start) -> None:
    """SET_MEM_TABLE with the memory that is there already: nobody notices, parked requests least of all."""
    served: Served = start(queue_size=64)
    fault = served.sim.fault("hold", where="blob")
    waiting = served.random_reads(random.Random(1))
    served.wait_for(lambda: served.parked() == 32)
    for _ in range(5):
        served.fe.set_mem_table(served.fe.regions)
    fault.release()
    for _ in range(50):
        served.fe.set_mem_table(served.fe.regions)
    served.collect(waiting)
    served.check_ring()


def test_rings_that_run_are_set_up_anew(start) -> None:
    """A VMM that resets its device without stopping it first, and names the ring's base last."""
    served: Served = start(queue_size=64)
    fe = served.fe
    served.collect(served.random_reads(random.Random(2)))
    for size in (64, 128, 32, 64):
        fe.make_queue(1, size=size)
        fe.set_vring_num(1, size)
        fe.set_vring_addr(1)
        fe.set_vring_base(1, 0)
        fe.swap_call(1)
        fe.set_vring_kick(1, fe.kick_fd(1))
        fe.set_vring_enable(1, True)
        assert fe.init().major == 7
        served.collect(served.random_reads(random.Random(3), 16))
        served.check_ring()
    bases = fe.stop()
    fe.resume(bases)
    served.collect(served.random_reads(random.Random(4), 16))
    served.check_ring()


def test_a_front_end_that_reads_no_answers(made_image, registry_sim, short_dir) -> None:
    registry_sim.store.add_build("app", "1", made_image.out)
    with run_daemon(registry_sim, short_dir, "--keep") as daemon:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(daemon.socket))
            deaf.settimeout(20)
            # Far more than both directions of the socket hold.
            questions = struct.pack("<III", 1, 1, 0) * (1 << 20)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                deaf.sendall(questions)
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            assert fe.init().major == 7


@pytest.mark.parametrize("state", ["deaf", "half", "hung worker", "stopped", "no control"])
def test_a_signal_ends_it_in_any_state(start, state: str) -> None:
    served: Served = start()
    served.node("f001")
    if state == "deaf":
        served.fe.send_bytes(struct.pack("<III", 1, 1, 0) * 4096)
    elif state == "half":
        served.fe.send_bytes(bytes([1, 0, 0]))
    elif state == "hung worker":
        served.session.arm_failpoint(COPYING, action=HANG)
        served.submit_read("f001", 0, 4096)
    elif state == "stopped":
        served.fe.stop()
    else:
        kill(served.session.status()["processes"]["control"]["pid"])
    served.daemon.process.send_signal(signal.SIGTERM)
    assert served.daemon.wait_end() == 0
    assert not served.daemon.socket.exists()


def test_only_the_event_loop_of_control_has_a_preference(start) -> None:
    served = start()
    pids = {role: process["pid"] for role, process in served.daemon.status()["processes"].items()}
    # Just after an answer it has another one.
    served.wait_for(lambda: os.getpriority(os.PRIO_PROCESS, pids["control"]) != ANSWER_NICE)
    nice = {
        role: {int(task.name): os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in tasks}
        for role, tasks in ((role, list(Path(f"/proc/{pid}/task").iterdir())) for role, pid in pids.items())
    }
    assert nice["control"].pop(pids["control"]) == (LOOP_NICE if may_be_preferred() else 0)
    assert {value for values in nice.values() for value in values.values()} == {0}
