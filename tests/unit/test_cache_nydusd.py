"""nydusd's cache files: what it left is verified and used, what it may use is left alone, ours it reads."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.cache.nydusd import check_unused, read_meta, write_meta
from virtiofsd_rafs.cli.cache import cache as command
from virtiofsd_rafs.errors import CacheError
from virtiofsd_rafs.native.store import OK, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N = 24
# nydus: storage/src/cache/state/persist_map.rs. The last word is "PAMM" when all chunks are there.
HEADER = b"PAMB\1\0\0\0PAMC\0\0\0\0".ljust(4096, b"\0")


def bitmap(chunks: set[int]) -> bytes:
    bits = bytearray((N + 7) // 8)
    for chunk in chunks:
        bits[chunk // 8] |= 0x80 >> chunk % 8
    return HEADER + bytes(bits)


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@contextmanager
def nydusd(tmp_path: Path, data: Path) -> Iterator[int]:
    """A process of that name that has *data* open; its pid."""
    program = tmp_path / "nydusd"
    if not program.exists():
        program.symlink_to("/bin/sleep")
    with data.open("r+b") as f, subprocess.Popen([program, "100"], stdin=f) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def open_store(image: MadeImage, cache: Path, *, for_nydusd: bool = False) -> Store:
    store = Store(image.bootstrap, cache_dir=cache, spill_size=1 << 20, for_nydusd=for_nydusd)
    assert store.open_blob(0)
    return store


def files(image: MadeImage, cache: Path) -> tuple[Path, Path, Path]:
    """Data, nydusd's record, our states."""
    data = cache / f"{image.blob_id}.blob.data"
    return data, data.with_name(data.name + ".chunk_map"), cache / f"{image.blob_id}.chunk_state"


def leave(image: MadeImage, cache: Path, said: set[int], stored: set[int]) -> None:
    """What nydusd leaves: it says that it has *said*; *stored* is right."""
    data, record, _ = files(image, cache)
    with Store(image.bootstrap, cache_dir=None, spill_size=4096) as store:
        size = store.blob(0).uncompressed_size
    with data.open("wb") as f:
        f.truncate(size)
        for chunk in stored:
            f.seek(image.chunks[chunk].uncompressed_offset)
            f.write(image.plain[chunk])
    record.write_bytes(bitmap(said))


def test_what_nydusd_left_is_verified_before_it_is_used(image: MadeImage, cache: Path) -> None:
    leave(image, cache, said={0, 1, 9, 23}, stored={0, 9, 10, 23})
    data, record, _ = files(image, cache)
    inode = data.stat().st_ino
    with open_store(image, cache) as store:
        view = store.chunks(0)
        assert [c for c in range(N) if view.unverified(c)] == [0, 1, 9, 23]
        assert not any(view.ready(c) for c in range(N))
        assert [store.verify_present(0, c) for c in (0, 1, 9)] == [True, False, True]
        assert data.stat().st_ino == inode
        # Its record is kept right: the bad one is gone from it, and what we store is in it.
        assert record.read_bytes() == bitmap({0, 9, 23})
        assert store.ingest(0, 0, image.blob, [1, 2]) == bytes([OK, OK])
        assert record.read_bytes() == bitmap({0, 1, 2, 9, 23})
        # nydusd would go on to believe in it, so nothing of it is evicted.
        sweep = store.sweep(1)
        assert sweep is not None
        assert (sweep.n_chunks, sweep.held > 0) == (0, True)


def test_a_complete_one_is_recognised(image: MadeImage, cache: Path) -> None:
    leave(image, cache, said=set(), stored=set(range(N)))
    _, record, _ = files(image, cache)
    record.write_bytes(HEADER[:12] + b"PAMM" + bitmap(set())[16:])
    with open_store(image, cache) as store:
        assert store.states(0).present == N
        assert all(store.verify_present(0, c) for c in range(N))


@pytest.mark.parametrize("spoil", ["magic", "short", "long", "data"])
def test_files_that_do_not_fit_are_left_alone(image: MadeImage, cache: Path, spoil: str) -> None:
    leave(image, cache, said={1}, stored={1})
    data, record, _ = files(image, cache)
    raw = record.read_bytes()
    if spoil == "data":
        data.write_bytes(data.read_bytes() + b"x")
    else:
        record.write_bytes({"magic": b"x" + raw[1:], "short": raw[:-1], "long": raw + b"\0"}[spoil])
    before = data.read_bytes(), record.read_bytes()
    with open_store(image, cache) as store:
        assert store.states(0).present == 0
        store.ingest(0, 0, image.blob, range(N))
    assert (data.read_bytes(), record.read_bytes()) == before
    assert len(list(cache.glob(f"{image.blob_id}-*.blob.data"))) == 1


def test_files_that_somebody_has_open_are_left_alone(image: MadeImage, cache: Path) -> None:
    leave(image, cache, said={1}, stored={1})
    data, record, states = files(image, cache)
    code = "import sys; f = open(sys.argv[1], 'r+b'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as nydusd:
        assert nydusd.stdout is not None
        nydusd.stdout.readline()
        with open_store(image, cache) as store:
            store.ingest(0, 0, image.blob, range(N))
            assert store.states(0).verified == N
        nydusd.communicate()
    assert record.read_bytes() == bitmap({1})
    assert not states.exists()
    # Once it has gone, its files are taken over, although ours are there too.
    with open_store(image, cache) as store:
        assert store.states(0).present == 1


def test_ours_are_readable_for_nydusd(image: MadeImage, cache: Path) -> None:
    _, record, _ = files(image, cache)
    with open_store(image, cache) as store:
        store.ingest(0, 0, image.blob, [3])
        assert not record.exists()
    with open_store(image, cache, for_nydusd=True) as store:
        assert record.read_bytes() == bitmap({3})
        store.ingest(0, 0, image.blob, [0, 8])
        assert record.read_bytes() == bitmap({0, 3, 8})
    # A daemon without the option keeps it right as well.
    with open_store(image, cache) as store:
        store.ingest(0, 0, image.blob, [15])
        fds = store.share(0)
        with Store(image.bootstrap, cache_dir=cache, spill_size=4096) as successor:
            successor.adopt_blob(0, *fds)
            successor.ingest(0, 0, image.blob, [16])
    assert record.read_bytes() == bitmap({0, 3, 8, 15, 16})


def test_export(image: MadeImage, cache: Path) -> None:
    _, record, _ = files(image, cache)
    with open_store(image, cache) as store:
        store.ingest(0, 0, image.blob, [5, 6])
    bootstrap = image.folder / "image.boot"
    arguments = ["export", "--cache-dir", str(cache), "--bootstrap", str(bootstrap)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "2 chunks" in result.output
    assert record.read_bytes() == bitmap({5, 6})


def test_chunk_maps_are_kept_beside_the_data(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_meta(cache, "ab", None)
    assert read_meta(cache, "ab") is None
    assert read_meta(None, "ab") is None
    write_meta(cache, "ab", b"one")
    write_meta(cache, "ab", b"two")
    assert [path.name for path in cache.iterdir()] == ["ab.blob.meta"]
    assert read_meta(cache, "ab") == b"one"
    monkeypatch.setattr("virtiofsd_rafs.cache.nydusd.MAX_META_LEN", 2)
    assert read_meta(cache, "ab") is None


def test_bits_do_not_outlive_their_data(image: MadeImage, cache: Path) -> None:
    data, record, _ = files(image, cache)
    for lose in (data.unlink, lambda: data.open("r+b").truncate(4096)):
        with open_store(image, cache, for_nydusd=True) as store:
            store.ingest(0, 0, image.blob, [3])
        assert record.exists()
        lose()
        with open_store(image, cache) as store:
            assert store.states(0).verified == 0
        assert not record.exists()
    record.write_bytes(bitmap({1}))
    data.unlink()
    with open_store(image, cache) as store:
        assert store.states(0).present == 0
    assert not record.exists()


def test_a_running_nydusd_is_told_and_not_joined(image: MadeImage, cache: Path, tmp_path: Path) -> None:
    data, _, states = files(image, cache)
    with open_store(image, cache, for_nydusd=True) as store:
        store.ingest(0, 0, image.blob, [1, 2])
        # Daemons of ours share it, whatever they keep for nydusd.
        check_unused(cache, [image.blob_id])
    with nydusd(tmp_path, data) as pid:
        with pytest.raises(CacheError, match=f"pid {pid}") as e:
            check_unused(cache, [image.blob_id])
        assert "--cache-dir" in e.value.remedy
        arguments = ["export", "--cache-dir", str(cache), "--bootstrap", str(image.folder / "image.boot")]
        assert isinstance(CliRunner().invoke(command, arguments).exception, CacheError)
        # What is nydusd's alone is left alone without a word.
        states.unlink()
        check_unused(cache, [image.blob_id])
    open_store(image, cache).close()
    check_unused(cache, [image.blob_id])
