"""The test front-end against a simulated back-end: what it sends and understands, which misdeeds it sees."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from tests.sim.fuse_tree import FuseTree
from tests.sim.vhost_backend import BackendSim
from virtiofsd_rafs.errors import PeerError, SocketSetupError
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.fuse.structs import AttrOut, GetattrIn
from virtiofsd_rafs.native.frontend import (
    Frontend,
    FrontendTimeout,
    Layout,
    Load,
    Op,
    Region,
    RequestLost,
    Target,
    pc_layout,
)
from virtiofsd_rafs.native.frontend_vmm import CLOUD_HYPERVISOR, CROSVM, QEMU_11
from virtiofsd_rafs.native.vhost_user import Protocol, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MiB = 1 << 20


@pytest.fixture
def sim() -> Iterator[BackendSim]:
    with BackendSim(FuseTree()) as sim:
        yield sim


@pytest.fixture
def fe(sim: BackendSim) -> Iterator[Frontend]:
    with Frontend.connect(sim.socket, memory=16 * MiB, timeout_s=10) as fe:
        yield fe


@pytest.fixture
def running(fe: Frontend) -> Frontend:
    fe.start()
    fe.init()
    return fe


REALIZE = [
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_MAX_MEM_SLOTS",
    "SET_BACKEND_REQ_FD+1!",
    "SET_OWNER",
    "GET_FEATURES",
    *["SET_VRING_CALL+1", "SET_VRING_ERR+1"] * 2,
    "RESET_DEVICE",
]
VRINGS = [
    *["SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_KICK+1"] * 2,
    *["SET_VRING_ENABLE!"] * 2,
    *["SET_VRING_CALL+1"] * 2,
]
CALLS = ["SET_VRING_CALL+1"] * 2
DRIVER_OK = ["RESET_DEVICE", *CALLS, "SET_FEATURES", "ADD_MEM_REG+1!", "ADD_MEM_REG+1!", *VRINGS]
STOP = ["SET_VRING_ENABLE!"] * 2 + ["GET_VRING_BASE"] * 2 + CALLS


def test_messages_come_in_qemus_order(sim: BackendSim, fe: Frontend) -> None:
    fe.start()
    fe.get_features()  # Its reply says that everything before it was read.
    assert sim.messages == [*REALIZE, *DRIVER_OK, "GET_FEATURES"]
    sim.messages.clear()
    bases = fe.stop()
    fe.resume(bases)
    fe.get_features()
    assert sim.messages == [*STOP, *CALLS, "SET_FEATURES", *VRINGS, "GET_FEATURES"]


def test_qemu_11_has_descriptors_of_rings_acknowledged(sim: BackendSim) -> None:
    """The same order as in QEMU 10, as a recording of QEMU 11.1.3 showed."""
    with Frontend.connect(sim.socket, memory=16 * MiB, vmm=QEMU_11) as fe:
        fe.start()
        fe.resume(fe.stop())
        fe.get_features()
    order = [*REALIZE, *DRIVER_OK, *STOP, *CALLS, "SET_FEATURES", *VRINGS, "GET_FEATURES"]
    rings = ("SET_VRING_CALL", "SET_VRING_ERR", "SET_VRING_KICK")
    assert sim.messages == [f"{name}!" if name.startswith(rings) else name for name in order]


def test_cloud_hypervisors_order(sim: BackendSim) -> None:
    vrings = [
        *["SET_VRING_NUM!"] * 2,
        *["SET_VRING_ADDR!", "SET_VRING_BASE!", "SET_VRING_CALL+1!", "SET_VRING_KICK+1!"] * 2,
        *["SET_VRING_ENABLE!"] * 2,
    ]
    activate = ["SET_FEATURES!", "SET_MEM_TABLE+2!", *vrings]
    negotiate = [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM!",
    ]
    with Frontend.connect(sim.socket, memory=16 * MiB, vmm=CLOUD_HYPERVISOR) as fe:
        fe.start()
        assert sim.messages == [*negotiate, *activate]
        sim.messages.clear()
        bases = fe.stop()
        assert bases == []
        fe.resume(bases)
        assert sim.messages == ["SET_VRING_ENABLE!"] * 4
        sim.messages.clear()
        fe.reset()
        assert sim.messages == [*["SET_VRING_ENABLE!", "GET_VRING_BASE!"] * 2, *activate]


def test_crosvms_order(sim: BackendSim) -> None:
    ring = ["SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "SET_VRING_CALL+1", "SET_VRING_KICK+1"]
    activate = ["SET_MEM_TABLE+2", *[*ring, "SET_VRING_ENABLE"] * 2]
    negotiate = ["SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"]
    with Frontend.connect(sim.socket, memory=16 * MiB, vmm=CROSVM) as fe:
        fe.start()
        bases = fe.stop()
        fe.resume(bases)
        fe.get_features()
    assert bases == [0, 0]
    assert sim.messages == [
        *[*negotiate, "SET_BACKEND_REQ_FD+1", "GET_QUEUE_NUM", "SET_FEATURES", *activate],
        *[*["SET_VRING_ENABLE", "GET_VRING_BASE"] * 2, *activate, "GET_FEATURES"],
    ]


def test_without_memory_slots_a_table_is_sent() -> None:
    with (
        BackendSim(FuseTree(), protocol=Protocol.MQ | Protocol.REPLY_ACK) as sim,
        Frontend.connect(sim.socket, memory=16 * MiB) as fe,
    ):
        fe.start()
        assert "SET_MEM_TABLE+2!" in sim.messages
        assert not {"ADD_MEM_REG+1!", "SET_BACKEND_REQ_FD+1!", "GET_MAX_MEM_SLOTS"} & set(sim.messages)
        assert "RESET_OWNER" in sim.messages
        fe.init()
        assert fe.getattr(1).ino == 1


def test_helpers_speak_fuse(running: Frontend) -> None:
    fe = running
    root = fe.getattr(1)
    assert (root.ino, root.mode) == (1, 0o40755)
    big = fe.lookup(1, "big")
    assert (big.nodeid, big.attr.size) == (2, 300_000)
    assert fe.lookup(1, "absent").nodeid == 0
    assert fe.resolve("/many/7").nodeid == 107
    with pytest.raises(FileNotFoundError):
        fe.resolve("/many/absent")
    assert fe.read(2, 299_000, 4096) == FuseTree().nodes[2].data[299_000:]
    assert [e.name for e in fe.readdirplus(1)] == [b".", b"..", b"big", b"empty", b"link", b"many"]
    assert [e.off for e in fe.readdir(1, 4)] == [5, 6]
    assert fe.readdir(1, 6) == []
    assert fe.readlink(4) == b"many/0"
    assert fe.listxattr(2) == [b"user.a", b"user.b"]
    assert (fe.getxattr(2, "user.a"), fe.getxattr_size(2, "user.a")) == (b"1", 1)
    assert fe.statfs().blocks == 77
    assert fe.lseek(2, 5, 3) == 5
    assert fe.open(2) == 0
    with pytest.raises(OSError, match="GETXATTR of node 2") as caught:
        fe.getxattr(2, "user.c")
    assert caught.value.errno == errno.ENODATA
    reply = fe.forget(2)
    assert (reply.used_len, reply.error, reply.data) == (0, 0, b"")
    fe.destroy()
    assert fe.check() == {}


@pytest.mark.parametrize("queue_size", [2, 8, 1024])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout("compact"), Layout("pieces", pieces=1000), Layout("compact", indirect=False)]
)
def test_every_layout_and_queue_size(sim: BackendSim, queue_size: int, layout: Layout) -> None:
    with Frontend.connect(sim.socket, memory=16 * MiB, queue_size=queue_size, layout=layout) as fe:
        fe.start()
        fe.init()
        data = FuseTree().nodes[2].data
        for i in range(40):
            assert fe.read(2, i * 5000, 5000) == data[i * 5000 : i * 5000 + 5000]
        assert fe.check() == {}


def getattr_token(fe: Frontend, nodeid: int = 1, **options: int) -> object:
    return fe.request(Opcode.GETATTR, nodeid, GetattrIn().pack(), AttrOut.SIZE, **options)


def test_replies_in_any_order(sim: BackendSim, running: Frontend) -> None:
    sim.hold = True
    tokens = [getattr_token(running, nodeid) for nodeid in range(1, 6)]
    sim.wait_for(lambda: len(sim.held) == 5)
    assert running.poll() == set()
    for chain in reversed(sim.held):
        sim.answer(chain, sim.handler(chain.request))
    for nodeid, token in enumerate(tokens, 1):
        reply = running.wait(token)
        assert (AttrOut.unpack(reply.data).attr.ino, reply.unique) == (nodeid, token.unique)
    assert running.check() == {}


def held_getattr(sim: BackendSim, fe: Frontend) -> tuple[object, object, bytes]:
    """A request under way: token, chain, and what should be answered."""
    sim.hold = True
    token = getattr_token(fe)
    sim.wait_for(lambda: sim.held)
    chain = sim.held.pop()
    reply = sim.handler(chain.request)
    assert reply is not None
    return token, chain, reply


def test_a_used_length_of_zero_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    sim.answer(chain, reply, used=0)
    assert running.wait(token).data == reply[16:]
    assert running.faults() == {"used_length": 1}
    assert "used length 0" in running.fault_texts()[0]
    assert running.faults(clear=True)
    assert running.faults() == {}


def test_a_second_completion_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    sim.answer(chain, reply)
    sim.answer(chain, None, used=len(reply))
    running.wait(token)
    running.poll()
    assert running.faults() == {"not_in_flight": 1}


def test_an_unknown_head_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    sim.put_used(1, 1024, 0)
    sim.answer(chain, reply)
    running.wait(token)
    assert running.faults() == {"used_id_range": 1}


def test_a_wrong_unique_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    sim.answer(chain, reply[:8] + bytes(8) + reply[16:])
    running.wait(token)
    assert running.faults() == {"unique": 1}


def test_a_late_write_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    sim.answer(chain, reply)
    running.wait(token)
    assert running.check() == {}
    sim.write(chain.writable[0][0], reply[:4])
    assert running.check() == {"late_write": 1}


def test_a_write_beyond_the_buffer_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    gpa, size = chain.writable[-1]
    sim.write(gpa + size, b"!")
    sim.answer(chain, reply)
    running.wait(token)
    assert running.faults() == {"write_outside": 1}


def test_stop_and_resume_keep_requests(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    before = running.queue_info(1)
    bases = running.stop()
    assert bases == [0, before.avail_idx]
    assert running.check() == {}
    running.resume(bases)
    sim.answer(chain, reply)
    assert running.wait(token).data == reply[16:]
    sim.hold = False
    assert running.getattr(1).ino == 1
    assert running.check() == {}


def test_a_write_while_stopped_is_a_fault(sim: BackendSim, running: Frontend) -> None:
    _, chain, reply = held_getattr(sim, running)
    running.stop()
    sim.answer(chain, reply)
    assert running.check() == {"write_while_stopped": 2}


def test_a_reset_loses_requests_and_starts_anew(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)
    rings = running.queue_info(1).gpas
    running.reset()
    assert running.queue_info(1).gpas != rings
    with pytest.raises(RequestLost):
        running.wait(token)
    sim.hold = False
    assert running.init().major == 7
    assert running.check() == {}
    sim.write(chain.writable[0][0], reply[:16])
    assert running.check() == {"late_write": 1}


def test_call_descriptors_are_swapped_while_requests_run(sim: BackendSim, running: Frontend) -> None:
    token, chain, reply = held_getattr(sim, running)

    def swap_and_answer() -> None:
        running.swap_call(1)
        running.get_features()  # Its reply says that the swap has been read.
        sim.answer(chain, reply)

    timer = threading.Timer(0.01, swap_and_answer)
    timer.start()
    assert running.wait(token).data == reply[16:]
    timer.join()
    assert running.faults() == {}


def test_regions_come_and_go(sim: BackendSim, running: Frontend) -> None:
    gpa = 0x40_0000_0000
    running.add_region(Region(gpa, MiB))
    reply = running.wait(getattr_token(running, region=gpa))
    assert AttrOut.unpack(reply.data).attr.ino == 1
    running.write_memory(gpa + 5, b"hello")
    assert sim.read(gpa + 5, 5) == b"hello" == running.read_memory(gpa + 5, 5)
    assert gpa <= running.alloc(4096, align=4096, region=gpa) < gpa + MiB
    running.remove_region(gpa)
    assert len(sim.regions) == 2
    assert sim.messages[-1] == "REM_MEM_REG!"
    assert running.getattr(1).ino == 1


def test_raw_chains(sim: BackendSim, running: Frontend) -> None:
    sim.hold = True
    gpa = running.alloc(8192, align=4096)
    running.write_memory(gpa, b"abc")
    token = running.submit_raw([(gpa, 3, False), (gpa + 4096, 7, True), (gpa, 0, False)], queue=0)
    sim.wait_for(lambda: sim.held)
    chain = sim.held.pop()
    assert (chain.queue, chain.request, chain.writable) == (0, b"abc", [(gpa + 4096, 7)])
    sim.answer(chain, b"xyz")
    assert running.wait(token).used_len == 3
    assert running.read_memory(gpa + 4096, 3) == b"xyz"


def test_time_outs_refusals_and_hang_ups(sim: BackendSim, running: Frontend) -> None:
    token, _, _ = held_getattr(sim, running)
    with pytest.raises(FrontendTimeout):
        running.wait(token, timeout_s=0.01)
    sim.refuse.add(Request.SET_VRING_ENABLE)
    with pytest.raises(PeerError, match="SET_VRING_ENABLE was refused"):
        running.set_vring_enable(1, True)
    threading.Timer(0.01, sim.hang_up).start()
    with pytest.raises(PeerError, match="closed the connection"):
        running.wait(token)


def content(tree: FuseTree) -> dict[bytes, tuple[int, str | None, bytes | None]]:
    """What ``read_tree`` should find: path → (nodeid, digest, link target)."""
    found: dict[bytes, tuple[int, str | None, bytes | None]] = {}

    def walk(path: bytes, ino: int) -> None:
        node = tree.nodes[ino]
        kind = node.mode >> 12
        digest = hashlib.sha256(node.data).hexdigest() if kind == 8 else None
        found[path] = (ino, digest, node.data if kind == 10 else None)
        for name, child in node.children.items():
            walk(path.rstrip(b"/") + b"/" + name, child)

    walk(b"/", 1)
    return found


def test_a_tree_is_read_whatever_the_order_of_the_replies(sim: BackendSim, running: Frontend) -> None:
    sim.hold = True
    done = threading.Event()
    shuffle = random.Random(1)

    def answer() -> None:
        for idle in itertools.count():
            if done.is_set():
                return
            with sim._lock:
                held, sim.held[:] = sim.held[:], []
            shuffle.shuffle(held)
            # A reply is held back as long as others come.
            for chain in held if idle % 2 else held[1:]:
                sim.answer(chain, sim.handler(chain.request))
            if not idle % 2:
                sim.held.extend(held[:1])
            done.wait(0.0005)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        tree = running.read_tree(read_size=4096)
    finally:
        done.set()
        thread.join()
    assert {p: (e.nodeid, e.sha256, e.target) for p, e in tree.items()} == content(FuseTree())
    assert tree[b"/big"].xattrs == {b"user.a": b"1", b"user.b": b""}
    assert all(e.error == 0 for e in tree.values())
    assert running.check() == {}


def load_ops(tmp_path: Path) -> list[Op]:
    data = FuseTree().nodes[2].data
    (tmp_path / "big").write_bytes(data)
    blocks = b"".join(hashlib.sha256(data[i : i + 5000]).digest() for i in range(0, len(data), 5000))
    return [
        Op("getattr", [Target(1), Target(2)]),
        Op("lookup", [Target(1, name=b"big"), Target(1, name=b"empty")], random=False),
        Op("read", [Target(2, size=len(data), content=tmp_path / "big")], size=4096),
        Op("read", [Target(2, size=len(data), digests=blocks)], size=5000, random=False),
    ]


@pytest.mark.parametrize("wait", ["sleep", "poll"])
def test_a_load_is_counted_and_checked(running: Frontend, tmp_path: Path, wait: str) -> None:
    result = running.load(Load(load_ops(tmp_path), depth=8, count=300, wait=wait))
    assert result.clean, (result, running.fault_texts())
    assert result.total.count == 300 == sum(op.count for op in result.ops)
    assert all(op.count for op in result.ops)
    assert 0 < result.total.p50_us <= result.total.p99_us <= result.total.max_us
    assert running.check() == {}


def test_wrong_data_are_noticed(sim: BackendSim, running: Frontend, tmp_path: Path) -> None:
    ops = load_ops(tmp_path)[2:]
    sim.handler.nodes[2].data = b"\xff" + sim.handler.nodes[2].data[1:]
    result = running.load(Load(ops, depth=4, count=200))
    assert result.total.wrong > 0
    assert result.faults == {"wrong_data": result.total.wrong}
    assert not result.clean


def test_errors_and_lost_requests_are_counted(sim: BackendSim, running: Frontend) -> None:
    result = running.load(Load([Op("getattr", [Target(999)])], depth=2, count=10))
    assert (result.total.errors, result.total.first_errno) == (10, errno.ESTALE)
    sim.hold = True
    result = running.load(Load([Op("getattr", [Target(1)])], depth=3, count=10, stall_s=0.05))
    assert (result.lost, result.total.count) == (3, 0)


def test_a_load_goes_on_over_stop_and_resume_and_ends_when_told(running: Frontend) -> None:
    results = []
    load = Load([Op("getattr", [Target(1)])], depth=4, duration_s=None, count=10**9)
    thread = threading.Thread(target=lambda: results.append(running.load(load)))
    thread.start()
    try:
        for _ in range(3):
            seen = running.queue_info(1).completions
            while running.queue_info(1).completions < seen + 20:
                os.sched_yield()
            running.resume(running.stop())
            assert running.getattr(2).ino == 2
    finally:
        running.stop_loads()
        thread.join()
    assert results[0].clean, (results[0], running.fault_texts())
    assert results[0].total.count > 60


def test_a_load_on_several_queues(sim: BackendSim, tmp_path: Path) -> None:
    with Frontend.connect(sim.socket, queues=3, memory=32 * MiB, timeout_s=10) as fe:
        fe.start()
        fe.init()
        result = fe.load(Load(load_ops(tmp_path), depth=4, count=100, queues=(1, 2, 3)))
        assert result.clean, (result, fe.fault_texts())
        assert result.total.count == 300
        assert [fe.queue_info(q).completions >= 100 for q in (1, 2, 3)] == [True] * 3
        assert fe.check() == {}


def test_a_load_without_end_or_targets_is_refused(running: Frontend) -> None:
    with pytest.raises(ValueError, match="duration or a count"):
        running.load(Load([Op("getattr", [Target(1)])]))
    with pytest.raises(ValueError, match="targets"):
        running.load(Load([Op("getattr", [])], count=1))


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (16 * MiB, [(0, 0xA0000, 0), (MiB, 15 * MiB, MiB)]),
        (3 << 30, [(0, 0xA0000, 0), (MiB, (2 << 30) - MiB, MiB), (4 << 30, 1 << 30, 2 << 30)]),
    ],
)
def test_memory_is_laid_out_as_in_a_pc(size: int, regions: list[tuple[int, int, int]]) -> None:
    layout = pc_layout(size)
    assert [(r.gpa, r.size, r.file_offset) for r in layout] == regions
    with BackendSim(FuseTree()) as sim, Frontend.connect(sim.socket, regions=layout) as fe:
        fe.start()
        assert [(gpa, length) for gpa, length, _, _ in sim.regions] == [(g, n) for g, n, _ in regions]
        # One file behind all regions: the hole between them is in the file, not in guest memory.
        with pytest.raises(ValueError, match="no guest memory at 0xa0000"):
            fe.read_memory(0xA0000, 1)
        fe.init()


def test_what_cannot_be_set_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(SocketSetupError, match="connect: No such file"):
        Frontend.connect(tmp_path / "absent.sock", memory=MiB * 2)
    # More than any machine has reserved.
    with pytest.raises(SocketSetupError, match="nr_hugepages"):
        Frontend(regions=pc_layout(1 << 44, huge=True))
