"""The chunk store through its facade: what the Rust codecs store is what the Python codecs say."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.errors import BadImage, CacheError, ConfigError, UnsupportedFeature
from virtiofsd_rafs.native.store import (
    DECODE_ERROR,
    DIGEST_MISMATCH,
    INVALID,
    NO_SPACE,
    OK,
    OUT_OF_RANGE,
    Store,
    paths,
    trim,
)

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/nydus"
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def open_store(image: MadeImage, cache: Path | None, **options: bytes) -> Store:
    store = Store(image.bootstrap, cache_dir=cache, spill_size=MIB, **options)
    store.open_blob(0)
    return store


def everything(image: MadeImage) -> list[int]:
    return [chunk.chunk_index for chunk in image.chunks]


def data_file(cache: Path, image: MadeImage) -> Path:
    return cache / f"{image.blob_id}.blob.data"


def check_data(cache: Path, image: MadeImage, chunks: list[int]) -> None:
    data = data_file(cache, image).read_bytes()
    for chunk in chunks:
        info = image.chunks[chunk]
        at = info.uncompressed_offset
        assert data[at : at + info.uncompressed_size] == image.plain[chunk], f"chunk {chunk}"


@pytest.mark.parametrize("digester", ["blake3", "sha256"])
@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "gzip", "none"])
def test_decodes_what_python_decodes(tmp_path: Path, cache: Path, compressor: str, digester: str) -> None:
    image = make_image(tmp_path / "made", compressor=compressor, digester=digester)
    with open_store(image, cache) as store:
        chunks = everything(image)
        assert store.ingest(0, 0, image.blob, chunks) == bytes(len(chunks))
        assert all(store.chunks(0).ready(chunk) for chunk in chunks)
    check_data(cache, image, chunks)


def test_describes_the_blob_as_python_does(image: MadeImage) -> None:
    with open_store(image, None) as store:
        (blob,) = store.blobs()
        assert (blob.blob_id, blob.n_known, blob.n_without_digest) == (image.blob_id, len(image.chunks), 0)
        assert not blob.needs_chunk_info
        view = store.chunks(0)
        assert len(view) == len(image.chunks)
        for info in image.chunks:
            at = info.chunk_index
            assert view.promised(at)
            assert (view.offsets[at], view.lengths[at]) == (info.compressed_offset, info.compressed_size)
            assert view.size(at) == info.uncompressed_size
        assert not view.promised(len(image.chunks))
        assert not view.promised(-1)


@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "gzip", "none"])
def test_a_flipped_byte_never_yields_wrong_bytes(tmp_path: Path, cache: Path, compressor: str) -> None:
    image = make_image(tmp_path / "made", compressor=compressor, n_files=1, chunks_each=1)
    (only,) = image.chunks
    noticed = 0
    for at in range(only.compressed_offset, only.compressed_offset + only.compressed_size):
        damaged = bytearray(image.blob)
        damaged[at] ^= 1
        with open_store(image, cache, boot_id=bytes(16)) as store:
            (outcome,) = store.ingest(0, 0, bytes(damaged), [0])
        if outcome == OK:
            # Some bits of a frame mean nothing: what it decodes to is right.
            check_data(cache, image, [0])
            (cache / f"{image.blob_id}.chunk_state").unlink()
        else:
            assert outcome in (DIGEST_MISMATCH, DECODE_ERROR)
            noticed += 1
    assert noticed > 0.9 * only.compressed_size
    with open_store(image, cache) as store:
        assert store.ingest(0, 0, image.blob, [0]) == bytes([OK])


def test_a_bad_neighbour_harms_nobody(tmp_path: Path, cache: Path) -> None:
    image = make_image(tmp_path / "made", compressor="none")
    damaged = bytearray(image.blob)
    damaged[image.chunks[1].compressed_offset] ^= 1
    with open_store(image, cache) as store:
        assert store.ingest(0, 0, bytes(damaged), [0, 1, 2]) == bytes([OK, DIGEST_MISMATCH, OK])
        assert [store.chunks(0).ready(chunk) for chunk in range(3)] == [True, False, True]
    check_data(cache, image, [0, 2])


def test_a_range_holds_what_it_holds(image: MadeImage, cache: Path) -> None:
    third = image.chunks[2]
    end = third.compressed_offset + third.compressed_size
    piece = image.blob[third.compressed_offset : end]
    with open_store(image, cache) as store:
        wanted = [1, 2, 3, 10_000]
        outcomes = store.ingest(0, third.compressed_offset, piece, wanted)
        assert outcomes == bytes([OUT_OF_RANGE, OK, OUT_OF_RANGE, INVALID])
        assert store.ingest(0, third.compressed_offset, piece[:-1], [2]) == bytes([OK])  # it is there already


def test_states_are_shared_and_survive(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as one, open_store(image, cache) as two:
        one.ingest(0, 0, image.blob, [0, 1])
        assert two.chunks(0).ready(1)
        two.hint_fetching(0, [2, 0], True)
        assert one.states(0).fetching == 1
        assert [chunk for chunk in range(4) if one.chunks(0).hinted(chunk)] == [2]
        one.hint_fetching(0, [2], False)
        assert two.states(0) == (len(image.chunks) - 2, 0, 0, 2, 0)
    with open_store(image, cache) as again:
        assert again.states(0).verified == 2


def test_another_boot_verifies_again(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache, boot_id=b"A" * 16) as store:
        store.ingest(0, 0, image.blob, [0, 1])
    with data_file(cache, image).open("r+b") as f:
        f.seek(image.chunks[1].uncompressed_offset)
        f.write(b"\0")
    with open_store(image, cache, boot_id=b"B" * 16) as store:
        view = store.chunks(0)
        assert [view.ready(0), view.unverified(0), view.unverified(2)] == [False, True, False]
        assert store.verify_present(0, 0)
        assert not store.verify_present(0, 1)
        assert not store.verify_present(0, 2)
        assert store.states(0)[:4] == (len(image.chunks) - 1, 0, 0, 1)


def test_memory_stands_in_for_the_disk(image: MadeImage) -> None:
    with open_store(image, None) as store:
        assert store.share(0)[3] is None
        store.ingest(0, 0, image.blob, everything(image))
        stats = store.stats()
        assert stats.spill_chunks == len(image.chunks) == store.states(0).spilled
        assert stats.spill_used <= stats.spill_capacity == MIB


def test_a_chunk_that_memory_cannot_hold(tmp_path: Path) -> None:
    image = make_image(tmp_path / "made", chunk_size=65536)
    with Store(image.bootstrap, cache_dir=None, spill_size=4096) as store:
        store.open_blob(0)
        assert store.ingest(0, 0, image.blob, [0]) == bytes([NO_SPACE])


def test_a_successor_takes_over(image: MadeImage, cache: Path) -> None:
    with open_store(image, None) as first:
        first.ingest(0, 0, image.blob, [0, 3])
        fds = first.share(0)
        spill = first.share_spill()
    with Store(image.bootstrap, cache_dir=cache, spill_size=MIB) as second:
        assert not second.adopt_blob(0, *fds)
        second.adopt_spill(spill)
        view = second.chunks(0)
        assert [view.ready(chunk) for chunk in range(4)] == [True, False, False, True]
        assert second.ingest(0, 0, image.blob, [1]) == bytes([OK])
        assert second.stats().spill_chunks == 3
    for fd in (*fds[:3], spill):
        os.close(fd)


def test_tables_of_another_image_are_not_taken_over(tmp_path: Path, image: MadeImage) -> None:
    other = make_image(tmp_path / "other", seed=2)
    with (
        open_store(other, None) as first,
        Store(image.bootstrap, cache_dir=None, spill_size=MIB) as second,
    ):
        state, extents, touched, _ = first.share(0)
        with pytest.raises(CacheError):
            second.adopt_blob(0, state, extents, touched, None)
        for fd in (state, extents, touched):
            os.close(fd)


def test_workers_get_descriptors_that_they_cannot_write(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        state, extents, touched, data = store.share(0)
        os.close(touched)
        fds = [state, extents, data, store.share_spill()]
        for fd in fds:
            assert fd is not None
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            os.close(fd)


def test_the_state_file_is_what_the_document_says(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache, boot_id=b"B" * 16) as store:
        store.ingest(0, 0, image.blob, [1])
        digest = store.map_digest(0)
    raw = (cache / f"{image.blob_id}.chunk_state").read_bytes()
    used_at = (4096 + 4 * len(image.chunks) + 7) // 8 * 8
    places_at = (used_at + 4 * len(image.chunks) + 7) // 8 * 8
    assert len(raw) == places_at + 16 * len(image.chunks)
    magic, version, count, boot, found, blob_id, size, ino = struct.unpack_from("<8sII16s32s64sQQ", raw)
    assert (magic, version, count, boot) == (b"VRCHSTAT", 1, len(image.chunks), b"B" * 16)
    assert (found, blob_id.rstrip(b"\0")) == (digest, image.blob_id.encode())
    status = data_file(cache, image).stat()
    assert (size, ino) == (status.st_size, status.st_ino)
    words = struct.unpack_from(f"<{count}I", raw, 4096)
    assert [word & 7 for word in words[:3]] == [0, 3, 0]
    assert struct.unpack_from("<I", raw, 144) == (1,)
    used = struct.unpack_from(f"<{count}I", raw, used_at)
    assert [bool(when) for when in used[:3]] == [False, True, False]
    assert abs(used[1] - time.time()) < 60
    places = list(struct.iter_unpack("<QII", raw[places_at:]))
    assert places == [(chunk.uncompressed_offset, chunk.uncompressed_size, 1) for chunk in image.chunks]


def test_the_map_digest_covers_what_the_document_says(image: MadeImage) -> None:
    hash_ = hashlib.sha256(b"virtiofsd-rafs chunk map v1\0" + image.blob_id.encode().ljust(64, b"\0"))
    with open_store(image, None) as store:
        (blob,) = store.blobs()
        hash_.update(
            struct.pack("<QIII", blob.uncompressed_size, blob.compressor, blob.digester, len(image.chunks))
        )
        for info in image.chunks:
            valid, compressed, digest = 1, 2 * info.compressed, 4
            hash_.update(
                struct.pack(
                    "<QIQIB",
                    info.compressed_offset,
                    info.compressed_size,
                    info.uncompressed_offset,
                    info.uncompressed_size,
                    valid | compressed | digest,
                )
            )
            hash_.update(info.digest or bytes(32))
        assert store.map_digest(0) == hash_.digest()


def test_a_cache_that_is_no_folder_is_refused(image: MadeImage, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        Store(image.bootstrap, cache_dir=tmp_path / "nowhere", spill_size=MIB)


@pytest.mark.parametrize("cut", [0, 100, 4096, 20_000])
def test_a_cut_bootstrap_is_a_bad_image(image: MadeImage, cut: int) -> None:
    with pytest.raises((BadImage, UnsupportedFeature)):
        Store(image.bootstrap[:cut], cache_dir=None, spill_size=MIB)


def test_misuse_is_an_error_not_a_crash(image: MadeImage) -> None:
    with Store(image.bootstrap, cache_dir=None, spill_size=MIB) as store:
        with pytest.raises(CacheError):
            store.ingest(0, 0, b"", [0])
        with pytest.raises(ConfigError):
            store.blob(1)
        with pytest.raises((BadImage, ConfigError)):
            store.open_blob(7)
        store.open_blob(0)
        with pytest.raises(CacheError, match="open already"):
            store.open_blob(0)
        view = store.chunks(0)
    with pytest.raises(ValueError, match="released"):
        view.ready(0)
    with pytest.raises(ConfigError):
        store.states(0)
    with pytest.raises(ValueError, match="16 bytes"):
        Store(image.bootstrap, cache_dir=None, spill_size=MIB, boot_id=b"short")
    trim()


def test_names_of_nodes(image: MadeImage) -> None:
    from virtiofsd_rafs.rafs.v6 import Tree

    tree = Tree.parse(image.bootstrap)
    found = tree.lookup(tree.inode(tree.root), b"file003")
    assert found is not None
    nodeid = found[0] + 2
    assert paths(image.bootstrap, [nodeid, 1, 1 << 40]) == {nodeid: "/file003", 1: "/"}
    assert paths(image.bootstrap, []) == {}


# -- crashes ------------------------------------------------------------------------------------------------

_INGEST_FOR_EVER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from virtiofsd_rafs.native.store import Store

    bootstrap, blob, cache = (Path(arg) for arg in sys.argv[1:4])
    data = blob.read_bytes()
    store = Store(bootstrap.read_bytes(), cache_dir=cache, spill_size=1 << 20)
    store.open_blob(0)
    n = len(store.chunks(0))
    print("ready", flush=True)
    for chunk in range(n):
        assert store.ingest(0, 0, data, [chunk]) == b"\\0"
        print(chunk, flush=True)
    """
)


@pytest.fixture
def large_image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "large", n_files=40, chunks_each=16)


@pytest.mark.parametrize("n_before", [0, 3, 50, 200])
def test_a_kill_in_the_middle_leaves_only_right_bytes(
    large_image: MadeImage, cache: Path, n_before: int
) -> None:
    image = large_image
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _INGEST_FOR_EVER,
            image.folder / "image.boot",
            image.folder / image.blob_id,
            cache,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for _ in range(n_before + 1):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    with open_store(image, cache) as store:
        view = store.chunks(0)
        ready = [chunk for chunk in everything(image) if view.ready(chunk)]
        assert len(ready) >= n_before
        check_data(cache, image, ready)
        # And it goes on from there.
        assert set(store.ingest(0, 0, image.blob, everything(image))) == {OK}
    check_data(cache, image, everything(image))


@pytest.fixture
def fixture_image() -> tuple[bytes, bytes]:
    if not FIXTURES.is_dir():
        pytest.skip("the folder of public test data is absent")
    blob = FIXTURES / "blobs" / "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    return (FIXTURES / "bootstrap/rafs-v6-2.2.boot").read_bytes(), blob.read_bytes()


def test_an_image_of_the_reference_builder(fixture_image: tuple[bytes, bytes], cache: Path) -> None:
    bootstrap, blob = fixture_image
    with Store(bootstrap, cache_dir=cache, spill_size=MIB) as store:
        store.open_blob(0)
        assert store.ingest(0, 0, blob, [0, 1]) == bytes([OK, OK])
        (info,) = store.blobs()
        data = (cache / f"{info.blob_id}.blob.data").read_bytes()
    assert len(data) == info.uncompressed_size
    assert re.match(rb"// Copyright", data)


def test_chunk_information_can_come_from_the_blob(fixture_image: tuple[bytes, bytes]) -> None:
    bootstrap, blob = fixture_image
    with Store(bootstrap, cache_dir=None, spill_size=MIB) as store:
        store.open_blob(0)
        by_table = store.map_digest(0)
    with Store(bootstrap, cache_dir=None, spill_size=MIB) as store:
        store.set_chunk_info(0, blob[8314:8346], digests=blob[12954:13018])
        store.open_blob(0)
        assert store.map_digest(0) == by_table
    with Store(bootstrap, cache_dir=None, spill_size=MIB) as store:
        meta = blob[8314:8346].ljust(4096, b"\0") + blob[8346:12442]
        store.set_chunk_info(0, meta, meta_file=True)
        assert store.blob(0).n_without_digest == 2
        with pytest.raises(BadImage):
            store.set_chunk_info(0, meta[:-1], meta_file=True)
        with pytest.raises(BadImage):
            store.set_chunk_info(0, blob[8314:8346], digests=b"short")


def test_touched_chunks_are_counted(image: MadeImage, cache: Path) -> None:
    with open_store(image, cache) as store:
        assert store.touched_counts(0) == (0, 0, 0)
        assert store.n_touched(0) == 0
        _, _, touched, _ = fds = store.share(0)
        os.pwrite(touched, b"\1\2", 2)  # as a worker does
        assert bytes(store.touched(0)) == bytes([0, 0, 1, 2]) + bytes(len(image.chunks) - 4)
        two = image.chunks[2:4]
        assert store.n_touched(0) == store.touched_counts(0).n_chunks > 0
        assert store.touched_counts(0) == (
            2,
            sum(chunk.compressed_size for chunk in two),
            sum(chunk.uncompressed_size for chunk in two),
        )
        with pytest.raises(OSError, match="Operation not permitted"):
            os.ftruncate(touched, 0)
        for fd in fds:
            assert fd is not None
            os.close(fd)
