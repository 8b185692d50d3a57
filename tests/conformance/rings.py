"""Rings: their sizes, their indices at every turn, disabled and stopped ones."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.conformance.check import check, checks, ensure
from tests.conformance.subject import SETTLE_S
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import Load, Op, Target
from virtiofsd_rafs.native.frontend_device import Layout

if TYPE_CHECKING:
    from tests.conformance.subject import Subject, Vm
    from virtiofsd_rafs.native.frontend_device import Token

_STATES = "vhost-user.rst, Ring states"


@checks(
    "ring.size-",
    "A ring of {} entries is served, many times around",
    {str(1 << i): 1 << i for i in range(1, 11)},
    source="virtio 1.3, 2.7, 2.7.6; vhost-user.rst, VHOST_USER_SET_VRING_NUM",
    says="Queue Size is a power of two up to 32768; the slot is the index modulo Queue Size.",
)
def _sizes(subject: Subject, case: int) -> None:
    with subject.vm(queue_size=case) as vm:
        n = min(case, 64)
        for _ in range(max(3, 40 // n)):
            vm.collect(vm.reads(n, sizes=(512, 4096)))
        if case >= 4:
            layout = Layout("compact", indirect=False)
            node = vm.node("f00")
            for _ in range(6):
                tokens = [
                    vm.fe.request(Opcode.GETATTR, node, bytes(16), 104, layout=layout)
                    for _ in range(min(case // 2, 64))
                ]
                ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")


def start_at(vm: Vm, base: int) -> None:
    """Boots with all rings' indices at *base*."""
    fe = vm.fe
    fe.realize()
    for queue in range(fe.n_queues):
        fe.make_queue(queue, base=base)
    fe.vmm.start(fe, [base] * fe.n_queues)
    fe.init()


_WRAP = "virtio 1.3, 2.7.6, 2.7.8 (idx is free-running)"
_WRAP_SAYS = "Indices count up and wrap naturally at 65536, whatever the Queue Size."


@checks(
    "wrap.index-",
    "The indices pass from 65535 to 0: {}",
    {
        "size-4": (4, {}),
        "size-64": (64, {}),
        "size-1024": (1024, {}),
        "no-event-idx": (64, {"features": (1 << 32) | (1 << 28)}),
        "chained": (64, {"features": (1 << 32) | (1 << 29)}),
    },
    source=_WRAP,
    says=_WRAP_SAYS,
)
def _wrap(subject: Subject, case: tuple[int, dict[str, int]]) -> None:
    size, options = case
    with subject.vm(start=False, init=False, queue_size=size, **options) as vm:
        start_at(vm, 65536 - 20)
        layout = Layout("compact", vm.fe.layout.indirect)
        node = vm.node("f00")
        for _ in range(20):
            tokens = [
                vm.fe.request(Opcode.GETATTR, node, bytes(16), 104, layout=layout)
                for _ in range(min(size // 2, 8))
            ]
            ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")
        ensure(vm.fe.queue_info(1).avail_idx < 1000, "the check itself is wrong")
        vm.serves()
        vm.fe.forget(node)


@checks(
    "wrap.batch-",
    "A batch of 48 requests is taken whole when the index wraps behind its request {}",
    {"1": 1, "7": 7, "31": 31},
    source=_WRAP,
    says=_WRAP_SAYS,
)
def _wrap_batch(subject: Subject, case: int) -> None:
    with subject.vm(start=False, init=False, queue_size=64) as vm:
        # INIT and the LOOKUP come first.
        start_at(vm, 65536 - case - 2)
        tokens = _ask(vm, 48)
        _answered(vm, tokens)
        ensure(vm.fe.queue_info(1).avail_idx == 48 - case, "the check itself is wrong")


@check(
    "wrap.full-circle",
    "70 000 requests pass every value of the indices",
    source=_WRAP,
    says=_WRAP_SAYS,
)
def _full_circle(subject: Subject) -> None:
    with subject.vm(queue_size=256) as vm:
        load = Load([Op("getattr", [Target(vm.node("f00"))])], depth=32, count=70_000, canaries=False)
        result = vm.fe.load(load)
        ensure(not result.lost and not result.total.errors, f"{result.lost} of 70000 were not answered")


@check(
    "wrap.pause",
    "GET_VRING_BASE answers an index of 16 bits, and a ring goes on from there across the wrap",
    source="vhost-user.rst, VHOST_USER_GET_VRING_BASE, VHOST_USER_SET_VRING_BASE; " + _WRAP,
    says="For a split ring the base is the 16 bit index of the next available entry.",
)
def _wrap_pause(subject: Subject) -> None:
    with subject.vm(start=False, init=False, queue_size=64) as vm:
        start_at(vm, 65536 - 6)
        node = vm.node("f00")
        for _ in range(8):
            tokens = [vm.fe.request(Opcode.GETATTR, node, bytes(16), 104) for _ in range(3)]
            bases = vm.fe.stop()
            ensure(all(base < 65536 for base in bases), f"bases {bases}")
            vm.fe.resume(bases)
            ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")
        vm.serves()


def _ask(vm: Vm, n: int = 1) -> list[Token]:
    node = vm.node("f00")
    return [vm.fe.request(Opcode.GETATTR, node, bytes(16), 104) for _ in range(n)]


def _answered(vm: Vm, tokens: list[Token]) -> None:
    ensure(all(vm.fe.wait(token).error == 0 for token in tokens), "a GETATTR failed")


def _silent(vm: Vm, what: str, settle_s: float = SETTLE_S) -> None:
    """Nothing completes for a while."""
    before = vm.fe.queue_info(1).used_idx
    time.sleep(settle_s)
    after = vm.fe.queue_info(1).used_idx
    ensure(after == before, f"{(after - before) & 0xFFFF} requests were answered on {what}")


@check(
    "ring.disabled",
    "A disabled ring is not served, whatever kicks it gets; enabled, it is",
    source=_STATES + ", VHOST_USER_SET_VRING_ENABLE",
    says="Started but disabled: processed without side effects. A file system's request has side effects.",
)
def _disabled(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.node("f00")
        for _ in range(3):
            vm.fe.set_vring_enable(1, False)
            vm.fe.get_features()  # Disabling may go unacknowledged; this reply says that it was read.
            tokens = _ask(vm, 4)
            for _ in range(10):
                vm.fe.kick(1)
            _silent(vm, "a disabled ring")
            vm.fe.set_vring_enable(1, True)
            _answered(vm, tokens)
        vm.serves()


@check(
    "ring.kick-before-enable",
    "A kick that came before the ring was enabled is not lost",
    source=_STATES,
    says="A ring starts upon a kick whether enabled or not; the enabled state comes into effect then.",
)
def _kick_before_enable(subject: Subject) -> None:
    with subject.vm(init=False) as vm:
        vm.fe.init()
        vm.node("f00")
        bases = vm.fe.stop()
        fe = vm.fe
        for queue in range(fe.n_queues):
            fe.thaw(queue)
            fe.go_on(queue)
        tokens = _ask(vm, 2)
        for queue, base in enumerate(bases):
            vm.start_ring(queue, base, enable=False)
        fe.get_features()
        _silent(vm, "a ring that was never enabled")
        for queue in range(fe.n_queues):
            fe.set_vring_enable(queue, True)
        _answered(vm, tokens)
        vm.serves()


@check(
    "ring.enable-then-requests",
    "A ring that is enabled before its kick descriptor comes starts with its first kick",
    source=_STATES,
    says="The enabled state of a stopped ring is tracked, and comes into effect once it is started.",
)
def _enable_first(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.node("f00")
        bases = vm.fe.stop()
        fe = vm.fe
        for queue in range(fe.n_queues):
            fe.thaw(queue)
            fe.go_on(queue)
        for queue, base in enumerate(bases):
            fe.set_vring_num(queue, fe.queue_size)
            fe.set_vring_base(queue, base)
            fe.set_vring_addr(queue)
            fe.set_vring_enable(queue, True)
        for queue in range(fe.n_queues):
            fe.swap_call(queue)
            fe.set_vring_kick(queue, fe.kick_fd(queue))
        _answered(vm, _ask(vm, 2))
        vm.serves()


@check(
    "ring.stopped",
    "A stopped ring is not served, whatever kicks it gets",
    source=_STATES + ", Suspended device state",
    says="While a ring is stopped the back-end must not process it at all, enabled or not.",
)
def _stopped(subject: Subject) -> None:
    with subject.vm() as vm:
        vm.node("f00")
        tokens = _ask(vm, 2)
        _answered(vm, tokens)
        fe = vm.fe
        base = fe.get_vring_base(1)
        fe.freeze(1)
        tokens = _ask(vm, 4)
        for _ in range(10):
            fe.kick(1)
        _silent(vm, "a stopped ring")
        fe.thaw(1)
        vm.start_ring(1, base)
        _answered(vm, tokens)
        vm.serves()


@check(
    "ring.one-stopped",
    "The hiprio ring is served while the request ring is stopped",
    source=_STATES + "; virtio 1.3, 5.11.6.2",
    says="Rings are stopped one by one; the high priority queue does not depend on the request queues.",
)
def _one_stopped(subject: Subject) -> None:
    with subject.vm() as vm:
        node = vm.node("f00")
        base = vm.fe.get_vring_base(1)
        ensure(vm.fe.forget(node).used_len in (0, 16), "FORGET was answered at length")
        vm.start_ring(1, base)
        vm.forget_nodes()
        vm.serves()


@checks(
    "ring.queues-",
    "{} request queues are served, each for itself",
    {"2": 2, "4": 4, "8": 8},
    source="virtio 1.3, 5.11.2, 5.11.6.1; vhost-user.rst, Multiple queue support",
    says="num_request_queues queues; requests may be put into any of them.",
)
def _queues(subject: Subject, case: int) -> None:
    with subject.vm(queues=case, queue_size=128) as vm:
        reads = [read for queue in range(1, case + 1) for read in vm.reads(12, queue=queue)]
        vm.collect(reads)
        for queue in range(1, case + 1):
            vm.serves(queue=queue)


@check(
    "ring.queues-in-part",
    "Queues that the driver does not set up may be left out",
    source="virtio 1.3, 5.11.5; crosvm devices/src/virtio/vhost_user_frontend",
    says="The driver uses as many of the offered request queues as it likes.",
)
def _queues_in_part(subject: Subject) -> None:
    with subject.vm(queues=1) as vm:
        vm.serves()
        vm.fe.resume(vm.fe.stop())
        vm.serves()
