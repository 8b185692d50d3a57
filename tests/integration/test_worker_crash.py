"""The worker may die at any moment: every request is answered exactly once, with the right bytes."""

from __future__ import annotations

import errno
import random
import threading
import time

import pytest

from tests.integration.conftest import Served, kill
from virtiofsd_rafs.native.session import ABORT, HANG, KILL

# The queue is smaller than the number of requests of a test, so that every index wraps.
RING = 64

# native/crates/session/src/failpoint.rs
RECOVERED, STOPPING, POOL_SUBMITTED = 1, 15, 16
POINTS = {
    "taken": 2,
    "logged": 3,
    "parking": 4,
    "posted": 5,
    "unparked": 6,
    "copying": 7,
    "copied": 8,
    "used-written": 10,
    "batch-noted": 11,
    "published": 12,
    "cleared": 13,
    "signalled": 14,
}
ONLY_WHEN_COLD = {"parking", "posted", "unparked"}


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("action", [KILL, ABORT], ids=["kill", "abort"])
@pytest.mark.parametrize("point", POINTS)
def test_every_failpoint_cold(start, point: str, action: int, skip: int) -> None:
    """Requests wait for a registry while the worker dies at *point*."""
    served: Served = start(queue_size=RING)
    rng = random.Random(f"{point} {action} {skip}")
    before = served.worker()["generation"]
    served.session.arm_failpoint(POINTS[point], skip=skip, action=action)
    for _ in range(4):
        served.collect(served.random_reads(rng))
    assert served.session.armed_failpoint() == 0, "the failpoint was never passed"
    # The last reply may have been sent by the worker that died just after it: the keeper has yet to reap it.
    served.wait_for(lambda: served.worker()["generation"] > before)
    assert served.worker()["generation"] == before + 1
    served.check_ring()


@pytest.mark.parametrize("point", [p for p in POINTS if p not in ONLY_WHEN_COLD])
def test_every_failpoint_warm(start, point: str) -> None:
    """The same with everything in the cache, many times over."""
    served: Served = start(queue_size=RING)
    rng = random.Random(point)
    for name, data in served.image.files.items():
        served.collect([served.submit_read(name, at, 131072) for at in range(0, len(data), 131072)])
    for skip in range(6):
        served.session.arm_failpoint(POINTS[point], skip=skip)
        served.collect(served.random_reads(rng))
        served.wait_for(
            lambda: served.session.armed_failpoint() == 0 or served.collect(served.random_reads(rng))
        )
        # Behind "signalled" nothing waits for the successor: without this the next failpoint could be armed,
        # and the crashes be counted, before the keeper has reaped the worker.
        served.wait_for(lambda crashes=skip + 1: served.worker()["crashes"] >= crashes)
    assert served.worker()["crashes"] == 6
    served.check_ring()


def test_a_worker_that_dies_while_it_recovers(start) -> None:
    served: Served = start(queue_size=RING)
    reads = served.random_reads(random.Random(1))
    served.session.arm_failpoint(RECOVERED, times=3)
    kill(served.worker()["pid"])
    served.collect(reads)
    served.wait_for(lambda: served.session.armed_failpoint() == 0)
    served.check_ring()


@pytest.mark.parametrize("queues", [1, 3])
def test_killed_200_times(start, queues: int) -> None:
    """At random moments, while 32 requests are in flight and the ring wraps."""
    served: Served = start(queue_size=RING, queues=queues)
    rng = random.Random(queues)
    pauses = random.Random(99)
    ended = threading.Event()

    def killer() -> None:
        for _ in range(200):
            time.sleep(pauses.random() * 0.02)
            kill(served.worker()["pid"] or 1 << 30)
        ended.set()

    thread = threading.Thread(target=killer)
    thread.start()
    rounds = 0
    while not ended.is_set() or rounds < 20:
        served.collect(served.random_reads(rng, queue=1 + rounds % queues))
        rounds += 1
    thread.join()
    assert served.worker()["crashes"] >= 100
    served.check_ring()


def test_a_stuck_worker_is_replaced(start) -> None:
    served: Served = start(queue_size=RING)
    served.session.arm_failpoint(POINTS["copying"], action=HANG)
    served.collect(served.random_reads(random.Random(2)))
    assert served.worker()["generation"] == 2
    served.check_ring()


def test_a_poisonous_request_fails_and_the_others_do_not(start) -> None:
    """Only a request that was being served at three crashes in a row is given up."""
    served: Served = start(queue_size=RING)
    served.collect([served.submit_read("f001", 0, 4096)])
    served.session.arm_failpoint(POINTS["copying"], action=ABORT, times=3)
    token, _ = served.submit_read("f001", 0, 4096)
    assert served.fe.wait(token, 30).error == errno.EIO
    assert served.worker()["crashes"] == 3
    served.collect(served.random_reads(random.Random(3)))
    served.check_ring()


def test_a_dead_control_is_restarted_while_hits_go_on(start) -> None:
    served: Served = start(queue_size=RING)
    served.collect([served.submit_read("f001", 0, 4096)])
    with_fault = served.sim.fault("hold", where="blob")
    waiting = [served.submit_read("big", 2 << 20, 4096)]
    served.wait_for(lambda: served.parked() == 1)
    old = served.session.status()["processes"]["control"]["pid"]
    kill(old)
    served.collect([served.submit_read("f001", 0, 4096)])
    with_fault.release()
    served.collect(waiting)
    assert served.session.status()["processes"]["control"]["pid"] != old
    assert served.worker()["generation"] == 1
    served.collect(served.random_reads(random.Random(5)))
    served.check_ring()


def test_children_die_with_the_keeper(start) -> None:
    served: Served = start()
    processes = served.session.status()["processes"]
    kill(served.daemon.process.pid)
    served.daemon.process.wait()
    from pathlib import Path

    served.wait_for(lambda: not Path(f"/proc/{processes['worker']['pid']}").exists())
    served.wait_for(lambda: not Path(f"/proc/{processes['control']['pid']}").exists())
