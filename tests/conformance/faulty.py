"""A back-end with a defect by name, to prove that checks can fail."""

from __future__ import annotations

import errno
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs

from tests.conformance.subject import Subject
from tests.sim.fuse_tree import FuseTree, Node
from tests.sim.vhost_backend import BackendSim, Chain
from virtiofsd_rafs.fuse import Opcode
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.vhost_user import Request

if TYPE_CHECKING:
    from typing import Self

    from tests.conformance.tree import Tree

DEFECTS = {
    "": "none",
    "double-answer": "every request is completed twice",
    "used-length-zero": "the used length is always 0",
    "used-length-long": "the used length is too large by 4",
    "serves-disabled": "a disabled ring is served",
    "serves-stopped": "a stopped ring is served",
    "writes-behind-reply": "a byte behind the reply is written",
    "writes-behind-buffer": "a byte behind the last writable buffer is written",
    "writes-late": "a buffer is written again a moment after its completion",
    "writes-stopped": "the used ring is written after GET_VRING_BASE",
    "wrong-unique": "unique comes back changed",
    "wrong-data": "a bit of the data is flipped",
    "positive-error": "errors are positive",
    "loses-requests": "every tenth request is not answered",
    "loses-interrupts": "no interrupt is ever sent",
    "interrupts-always": "an interrupt is sent at each completion, wanted or not",
    "wants-no-kick": "no kick is ever asked for",
    "wrong-base": "GET_VRING_BASE answers one too many",
    "forgets-acks": "NEED_REPLY is ignored",
    "accepts-all": "whatever cannot be done is acknowledged",
}


@attrs.define(slots=False)
class FaultySim(BackendSim):
    """``BackendSim`` with one of ``DEFECTS``."""

    defect: str = ""
    _answered: int = 0

    def _handle(self, request: Request, payload: bytes, fds: list[int]) -> bytes | None:
        index, value = struct.unpack_from("<II", payload) if len(payload) >= 8 else (0, 0)
        if request is Request.SET_VRING_ENABLE and not value and self.defect == "serves-disabled":
            return None
        if request is Request.SET_VRING_NUM and index >= 64:
            if self.defect != "accepts-all":
                self.refuse.add(request)
            return None
        reply = super()._handle(request, payload, fds)
        if request is Request.GET_VRING_BASE and reply is not None:
            return self._stopped(index, reply)
        return reply

    def _stopped(self, index: int, reply: bytes) -> bytes:
        ring = self.ring(index)
        match self.defect:
            case "serves-stopped":
                ring.enabled = True
            case "wrong-base":
                return struct.pack("<II", index, ring.base + 1)
            case "writes-stopped" if ring.addresses != (0, 0, 0):
                used = self._user(ring.addresses[2] + 2, 2)
                threading.Timer(0.02, self._store_u16, (used, (ring.used_idx + 1) & 0xFFFF)).start()
        return reply

    def _acknowledges(self) -> bool:
        return self.defect != "forgets-acks"

    def answer(self, chain: Chain, reply: bytes | None, *, used: int | None = None) -> None:
        self._answered += 1
        if self.defect == "loses-requests" and self._answered % 10 == 0:
            return
        size = sum(size for _, size in chain.writable)
        if reply is not None:
            if len(reply) > size:
                reply = struct.pack("<IiQ", 16, -errno.EIO, struct.unpack_from("<IiQ", reply)[2])[:size]
            reply = self._spoil(reply) if len(reply) >= 16 else reply
        super().answer(chain, reply, used=used)
        if not size or reply is None:
            return
        gpa, length = chain.writable[-1]
        if self.defect == "writes-behind-buffer":
            self.write(gpa + length, b"!")
        if self.defect == "writes-behind-reply" and len(reply) < size:
            self.write(gpa + length - 1, b"!")
        if self.defect == "writes-late":
            time.sleep(0.001)
            self.write(chain.writable[0][0], b"!")

    def _spoil(self, reply: bytes) -> bytes:
        length, error, unique = struct.unpack_from("<IiQ", reply)
        body = reply[16:]
        match self.defect:
            case "wrong-unique":
                unique ^= 1 << 40
            case "positive-error":
                error = -error
            case "wrong-data" if len(body) not in (0, 64, 104, 128):
                body = body[:-1] + bytes([body[-1] ^ 1])
        return struct.pack("<IiQ", length, error, unique) + body

    def put_used(self, queue: int, head: int, length: int) -> None:
        match self.defect:
            case "used-length-zero":
                length = 0
            case "used-length-long":
                length += 4
            case "double-answer":
                super().put_used(queue, head, length)
        super().put_used(queue, head, length)

    def _wants_interrupt(self, wanted: bool) -> bool:
        return (wanted or self.defect == "interrupts-always") and self.defect != "loses-interrupts"

    def _asks_for_kick(self) -> bool:
        return self.defect != "wants-no-kick"


@attrs.frozen
class _Server:
    """``FuseTree`` as far as it goes, and errors for the rest."""

    tree: FuseTree

    def __call__(self, request: bytes) -> bytes | None:
        _, opcode, unique, nodeid = struct.unpack_from("<IIQQ", request)
        if opcode in (Opcode.READLINK, Opcode.READ) and not self._is(nodeid, opcode):
            return struct.pack("<IiQ", 16, -errno.EINVAL, unique)
        if opcode not in set(Opcode):
            return struct.pack("<IiQ", 16, -errno.ENOSYS, unique)
        return self.tree(request)

    def _is(self, nodeid: int, opcode: int) -> bool:
        node = self.tree.nodes.get(nodeid)
        kind = stat.S_ISLNK if opcode == Opcode.READLINK else stat.S_ISREG
        return node is not None and kind(node.mode)


def _nodes(tree: Tree) -> dict[int, Node]:
    nodes = {1: Node(1, stat.S_IFDIR | 0o755)}
    for ino, (name, data) in enumerate(tree.files.items(), 2):
        nodes[ino] = Node(ino, stat.S_IFREG | 0o644, data)
        nodes[1].children[name.encode()] = ino
    return nodes


class Faulty(Subject):
    """A subject in this process; each connection is to a back-end of its own."""

    name = "simulated"
    # What such a back-end answers at all it answers at once.
    timeout_s = 1.0

    def __init__(self, tree: Tree, defect: str) -> None:
        self.tree = tree
        self._defect = defect
        self._sims: list[FaultySim] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sim in self._sims:
            # What the simulator itself trips over is the front-end's doing as well as the defect's.
            sim.failure = None
            sim.__exit__(None)

    def connect(self, **options: Any) -> Frontend:
        sim = FaultySim(_Server(FuseTree(_nodes(self.tree))), defect=self._defect)
        sim.__enter__()
        self._sims.append(sim)
        return Frontend.connect(sim.socket, **options)

    def check_alive(self) -> None:
        """It lives in this process."""
