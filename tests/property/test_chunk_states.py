"""Whatever happens to daemons, the host and the cache folder: what is ready has the promised bytes.

Two daemons share a cache folder. They serve an image or its evil twin, whose bootstrap names the same blob
and promises other bytes. Daemons crash, the host reboots and loses what had not reached the disk, people
remove files. After every step each chunk that a worker would serve is read as a worker reads it.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.sim.images import make_image
from virtiofsd_rafs.native.store import OK, Store

N_CHUNKS = 6
_STATE_HEADER, _EXTENT_HEADER = 4096, 64
_VERIFIED = 3


def _twins() -> tuple[dict[str, bytes], dict[str, bytes], dict[str, list[bytes]], str]:
    """Bootstraps, blobs and chunks of an image and its evil twin, in which two chunks have changed places."""
    with tempfile.TemporaryDirectory() as folder:
        image = make_image(Path(folder), n_files=2, chunks_each=3, compressor="none")
    assert len(image.chunks) == N_CHUNKS
    full = [chunk for chunk in image.chunks if chunk.uncompressed_size == 4096]
    one, two = full[0], full[1]
    assert one.digest is not None
    assert two.digest is not None
    at = image.bootstrap.index(one.digest)
    evil = bytearray(image.bootstrap)
    evil[at : at + 32] = two.digest
    at = image.bootstrap.index(two.digest)
    evil[at : at + 32] = one.digest
    blob = bytearray(image.blob)
    blob[one.compressed_offset : one.compressed_offset + 4096] = image.plain[two.chunk_index]
    blob[two.compressed_offset : two.compressed_offset + 4096] = image.plain[one.chunk_index]
    plain = list(image.plain)
    plain[one.chunk_index], plain[two.chunk_index] = plain[two.chunk_index], plain[one.chunk_index]
    return (
        {"good": image.bootstrap, "evil": bytes(evil)},
        {"good": image.blob, "evil": bytes(blob)},
        {"good": image.plain, "evil": plain},
        image.blob_id,
    )


BOOTSTRAPS, BLOBS, PLAIN, BLOB_ID = _twins()


def _data_size() -> int:
    with Store(BOOTSTRAPS["good"], cache_dir=None, spill_size=4096) as store:
        return store.blob(0).uncompressed_size


DATA_SIZE = _data_size()

slots = st.integers(0, 1)
chunks = st.integers(0, N_CHUNKS - 1)
chunk_sets = st.lists(chunks, min_size=1, max_size=N_CHUNKS, unique=True)


def served(store: Store) -> dict[int, bytes]:
    """What a worker would answer with, chunk by chunk."""
    state, extents, touched, data = store.share(0)
    spill = store.share_spill()
    out = {}
    try:
        for chunk in range(N_CHUNKS):
            (word,) = struct.unpack("<I", os.pread(state, 4, _STATE_HEADER + 4 * chunk))
            offset, size, flags, place = struct.unpack(
                "<QIIQ", os.pread(extents, 24, _EXTENT_HEADER + 32 * chunk)
            )
            assert flags & 1
            if word & 7 == _VERIFIED and data is not None:
                out[chunk] = os.pread(data, size, offset)
            elif place:
                out[chunk] = os.pread(spill, size, ((place & (1 << 40) - 1) - 1) * 4096)
    finally:
        for fd in (state, extents, touched, data, spill):
            if fd is not None:
                os.close(fd)
    return out


class ChunkStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = Path(tempfile.mkdtemp(prefix="chunk-states-"))
        self.boot = 1
        self.daemons: dict[int, tuple[str, Store]] = {}

    def teardown(self) -> None:
        for _, store in self.daemons.values():
            store.close()
        shutil.rmtree(self.cache)

    @rule(slot=slots, kind=st.sampled_from(["good", "good", "evil"]), on_disk=st.booleans())
    def start(self, slot: int, kind: str, on_disk: bool) -> None:
        self.crash(slot)
        store = Store(
            BOOTSTRAPS[kind],
            cache_dir=self.cache if on_disk else None,
            spill_size=4 * 4096,
            boot_id=self.boot.to_bytes(16, "little"),
        )
        assert store.open_blob(0) == on_disk
        self.daemons[slot] = (kind, store)

    @rule(slot=slots)
    def crash(self, slot: int) -> None:
        if slot in self.daemons:
            self.daemons.pop(slot)[1].close()

    @precondition(lambda self: self.daemons)
    @rule(slot=slots)
    def restart_control(self, slot: int) -> None:
        """A successor takes the tables over, while the worker goes on with them."""
        if slot not in self.daemons:
            return
        kind, old = self.daemons[slot]
        fds, spill = old.share(0), old.share_spill()
        before = served(old)
        old.close()
        new = Store(BOOTSTRAPS[kind], cache_dir=None, spill_size=4096, boot_id=bytes(16))
        new.adopt_blob(0, *fds)
        new.adopt_spill(spill)
        for fd in (*fds, spill):
            if fd is not None:
                os.close(fd)
        self.daemons[slot] = (kind, new)
        assert served(new) == before

    @precondition(lambda self: self.daemons)
    @rule(slot=slots, wanted=chunk_sets, damaged=st.sets(chunks))
    def fetch(self, slot: int, wanted: list[int], damaged: set[int]) -> None:
        if slot not in self.daemons:
            return
        kind, store = self.daemons[slot]
        view = store.chunks(0)
        was_ready = {chunk for chunk in wanted if view.ready(chunk)}
        data = bytearray(BLOBS[kind])
        for chunk in damaged:
            data[view.offsets[chunk]] ^= 0x80
        outcomes = store.ingest(0, 0, bytes(data), wanted)
        for chunk, outcome in zip(wanted, outcomes, strict=True):
            if chunk not in damaged:
                assert outcome == OK
            elif view.has_data or chunk not in was_ready:
                # In memory, storing one chunk may push out another that was ready.
                assert (outcome == OK) == (chunk in was_ready)

    @precondition(lambda self: self.daemons)
    @rule(slot=slots, chunk=chunks, force=st.booleans())
    def verify(self, slot: int, chunk: int, force: bool) -> None:
        if slot not in self.daemons:
            return
        _, store = self.daemons[slot]
        good = store.verify_present(0, chunk, force=force)
        assert good == store.chunks(0).ready(chunk)
        assert not store.chunks(0).unverified(chunk)

    @precondition(lambda self: self.daemons)
    @rule(slot=slots, wanted=chunk_sets, on=st.booleans())
    def hint(self, slot: int, wanted: list[int], on: bool) -> None:
        if slot in self.daemons:
            self.daemons[slot][1].hint_fetching(0, wanted, on)

    @rule(lost=st.sets(chunks))
    def reboot(self, lost: set[int]) -> None:
        """The host goes down; blocks of *lost* chunks had not reached the disk."""
        for slot in list(self.daemons):
            self.crash(slot)
        self.boot += 1
        for data in self.cache.glob("*.blob.data"):
            with data.open("r+b") as f:
                for chunk in lost:
                    f.seek(chunk * 4096)
                    f.write(bytes(100))

    @precondition(lambda self: self.daemons)
    @rule(slot=slots, held=st.sets(chunks), read=st.sets(chunks), limit=st.sampled_from([1, 20_000, 1 << 20]))
    def evict(self, slot: int, held: set[int], read: set[int], limit: int) -> None:
        """Some chunks are waited for, some were read since."""
        if slot not in self.daemons:
            return
        _, store = self.daemons[slot]
        store.hold(0, held, 3600)
        touched = store.share(0)[2]
        for chunk in read:
            os.pwrite(touched, b"\1", chunk)
        os.close(touched)
        view = store.chunks(0)
        protected = {chunk for chunk in held - read if view.ready(chunk)}
        store.sweep(limit, recover=True)
        assert all(view.ready(chunk) for chunk in protected)

    @rule(wanted=st.sets(chunks), punched=st.booleans())
    def an_eviction_dies(self, wanted: set[int], punched: bool) -> None:
        """Between marking and the end, with or without the hole."""
        for path in self.cache.glob("*.chunk_state"):
            stem = path.name.removesuffix(".chunk_state")
            if not (self.cache / f"{stem}.blob.data").exists():
                return
            with path.open("r+b") as f, (self.cache / f"{stem}.blob.data").open("r+b") as data:
                if struct.unpack_from("<Q", f.read(144), 136)[0] != os.fstat(data.fileno()).st_ino:
                    return
                for chunk in wanted:
                    word = int.from_bytes(os.pread(f.fileno(), 4, _STATE_HEADER + 4 * chunk), "little")
                    if word & 7 in (2, 3):
                        word = ((word >> 3) + 1 << 3 | 4) & 0xFFFF_FFFF
                        os.pwrite(f.fileno(), word.to_bytes(4, "little"), _STATE_HEADER + 4 * chunk)
                        if punched:
                            os.pwrite(data.fileno(), bytes(4096), chunk * 4096)
            return

    @precondition(lambda self: not self.daemons)
    @rule(bits=st.integers(0, 63), right=st.sets(chunks), damaged=st.booleans())
    def nydusd_was_here(self, bits: int, right: set[int], damaged: bool) -> None:
        """It says that it stored chunks, which may be true."""
        for path in self.cache.iterdir():
            path.unlink()
        header = bytearray(struct.pack("<4I", 0x424D4150, 1, 0x434D4150, 0).ljust(4096, b"\0"))
        header[8 if damaged else 100] ^= 1
        (self.cache / f"{BLOB_ID}.blob.data.chunk_map").write_bytes(header + bytes([bits << 2]))
        data = bytearray(DATA_SIZE)
        for chunk in right:
            data[chunk * 4096 : chunk * 4096 + len(PLAIN["good"][chunk])] = PLAIN["good"][chunk]
        (self.cache / f"{BLOB_ID}.blob.data").write_bytes(data)

    @rule(pattern=st.sampled_from(["*.blob.data", "*.chunk_state", "*-*", "*.chunk_map"]))
    def remove_files(self, pattern: str) -> None:
        for path in self.cache.glob(pattern):
            path.unlink()

    @precondition(lambda self: not self.daemons)
    @rule(at=st.integers(0, 15) | st.integers(32, 200), value=st.integers(0, 255))
    def damage_a_header(self, at: int, value: int) -> None:
        """Any byte but those of the boot id: one that claims the next boot would be a lie about this one."""
        for path in self.cache.glob("*.chunk_state"):
            with path.open("r+b") as f:
                f.seek(at)
                f.write(bytes([value]))
            break

    @invariant()
    def what_is_ready_is_right(self) -> None:
        for kind, store in self.daemons.values():
            view = store.chunks(0)
            answers = served(store)
            assert set(answers) == {chunk for chunk in range(N_CHUNKS) if view.ready(chunk)}
            for chunk, data in answers.items():
                assert data == PLAIN[kind][chunk], f"chunk {chunk} of the {kind} image"


TestChunkStates = ChunkStates.TestCase
TestChunkStates.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
