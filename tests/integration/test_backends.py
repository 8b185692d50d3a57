"""One body of tests over everything that blobs can come from."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.daemon import Daemon
from tests.integration.places import NAMES, Place, open_place
from virtiofsd_rafs.backends.base import ANSWERED_BY
from virtiofsd_rafs.errors import AuthError, BackendError, BadReply, ConfigError, NotFound
from virtiofsd_rafs.native.frontend import Frontend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.integration.conftest import MadeImage

BLOB = random.Random(1).randbytes(300_000)
BLOB_ID = hashlib.sha256(BLOB).hexdigest()
# More than any buffer on the way holds.
BIG = random.Random(2).randbytes(24 << 20)
BIG_ID = hashlib.sha256(BIG).hexdigest()
MISSING_ID = hashlib.sha256(b"missing").hexdigest()

GUARD_S = 60.0


@pytest.fixture(scope="module", params=NAMES)
def running(
    request: pytest.FixtureRequest, tool: Callable[[str], str], made_image: MadeImage
) -> Iterator[Place]:
    """Each place once for all tests, with the blobs of this module and of the made image in it."""
    with (
        tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as folder,
        open_place(request.param, Path(folder), tool) as place,
    ):
        with pytest.MonkeyPatch.context() as monkeypatch:
            (Path(folder) / "setup").mkdir()
            place.reset(monkeypatch, Path(folder) / "setup")
            place.put(BLOB_ID, BLOB)
            place.put(BIG_ID, BIG)
            for path in made_image.out.iterdir():
                if path.name != "image.boot":
                    place.put(path.name, path.read_bytes())
        yield place


@pytest.fixture
async def place(running: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Place]:
    (tmp_path / "place").mkdir()
    running.reset(monkeypatch, tmp_path / "place")
    yield running
    await running.close()


async def test_ranges(place: Place) -> None:
    source = place.source()
    end = len(BLOB)
    wanted = [(0, 1), (0, end), (end - 1, 1), (12345, 70_000), (end - 4097, 4097), (1, end - 1)]
    for offset, length in wanted:
        assert await source.read_range(BLOB_ID, offset, length) == BLOB[offset : offset + length]
        assert ANSWERED_BY.get() in ("registry", "local", "s3", "oss", "http-proxy")


async def test_size(place: Place) -> None:
    source = place.source()
    assert await source.blob_size(BLOB_ID) == len(BLOB)
    assert await source.blob_size(BIG_ID) == len(BIG)


@pytest.mark.parametrize(("past", "length"), [(0, 1), (4096, 4096), (-1, 2), (-70_000, 70_001)])
async def test_beyond_the_end(place: Place, past: int, length: int) -> None:
    source = place.source(connections=1)
    for _ in range(2):
        with pytest.raises(BadReply) as e:
            await source.read_range(BLOB_ID, len(BLOB) + past, length)
        assert e.value.retryable  # it may still be growing
        assert await source.read_range(BLOB_ID, 5, 5) == BLOB[5:10]


async def test_missing_blob(place: Place) -> None:
    source = place.source()
    for call in (source.read_range(MISSING_ID, 0, 10), source.blob_size(MISSING_ID)):
        with pytest.raises(NotFound) as e:
            await call
        assert MISSING_ID[:8] in str(e.value)
        assert not e.value.retryable
    assert await source.read_range(BLOB_ID, 5, 5) == BLOB[5:10]


async def test_many_at_once_use_connections_again(place: Place) -> None:
    source = place.source(connections=4)
    rng = random.Random(3)
    spans = [(offset, rng.randrange(1, 20_000)) for offset in (rng.randrange(280_000) for _ in range(200))]

    async def read(offset: int, length: int) -> bytes:
        return await source.read_range(BLOB_ID, offset, length)

    got = await asyncio.gather(*(read(*span) for span in spans))
    assert got == [BLOB[o : o + n] for o, n in spans]
    assert 1 <= place.connections() <= 4


async def test_one_after_the_other_uses_one_connection(place: Place) -> None:
    source = place.source()
    for offset in range(30):
        assert await source.read_range(BLOB_ID, offset * 1000, 999) == BLOB[offset * 1000 :][:999]
    assert place.connections() == 1


async def test_a_big_range(place: Place) -> None:
    source = place.source()
    got = await asyncio.gather(source.read_range(BIG_ID, 0, len(BIG)), source.read_range(BIG_ID, 7, 1 << 20))
    assert got == [BIG, BIG[7 : 7 + (1 << 20)]]


async def test_cancelled_reads_give_their_connections_back(place: Place) -> None:
    source = place.source(connections=2)
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    hold = place.hold()
    tasks = [asyncio.create_task(source.read_range(BLOB_ID, 100, 10)) for _ in range(2)]
    async with asyncio.timeout(GUARD_S):
        while hold.hits < 2:  # noqa: ASYNC110  (counted in another thread)
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await _outcomes(tasks))
        hold.release()
        assert await source.read_range(BLOB_ID, 200, 10) == BLOB[200:210]


async def _outcomes(tasks: list[asyncio.Task[bytes]]) -> list[object]:
    return list(await asyncio.gather(*tasks, return_exceptions=True))


async def test_a_held_read_holds_nobody_else(place: Place) -> None:
    """The loop goes on, whatever hangs."""
    source = place.source()
    hold = place.hold()
    held = asyncio.create_task(source.read_range(BLOB_ID, 0, 10))
    async with asyncio.timeout(GUARD_S):
        while hold.hits < 1:  # noqa: ASYNC110  (counted in another thread)
            await asyncio.sleep(0.005)
    assert not held.done()
    hold.release()
    assert await held == BLOB[:10]


async def test_refused_credentials(place: Place) -> None:
    source = place.source(backend=place.refused())
    with pytest.raises(AuthError) as e:
        await source.read_range(BLOB_ID, 0, 10)
    text = str(e.value)
    assert "hunter2" not in text
    assert "wrong" not in text
    assert e.value.remedy
    assert not e.value.retryable


async def test_credentials_that_expire_are_renewed(place: Place) -> None:
    source = place.source()
    for round_ in range(3):
        assert await source.read_range(BLOB_ID, round_, 10) == BLOB[round_ : round_ + 10]
        place.expire(source)
        got = await asyncio.gather(*(source.read_range(BLOB_ID, 1000 + i, 10) for i in range(20)))
        assert got == [BLOB[1000 + i : 1010 + i] for i in range(20)]


async def test_away_and_back(place: Place) -> None:
    source = place.source()
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]
    place.away()
    try:
        for _ in range(3):
            with pytest.raises(BackendError) as e:
                await source.read_range(BLOB_ID, 0, 10)
            assert e.value.retryable
    finally:
        place.back()
    assert await source.read_range(BLOB_ID, 0, 10) == BLOB[:10]


@pytest.mark.parametrize("name", ["", "..", "../" + "a" * 61, "a/b", "a\0b", "a" * 300, "a?b", "a b", "ü"])
async def test_bad_names(place: Place, name: str) -> None:
    source = place.source()
    for call in (source.read_range(name, 0, 1), source.blob_size(name)):
        with pytest.raises(BackendError) as e:
            await call
        assert e.value.msgid == "backend.bad-blob-id"
        assert not e.value.retryable
    assert place.connections() == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 0), (0, -1), (1 << 63, 1)])
async def test_ranges_that_are_none(place: Place, offset: int, length: int) -> None:
    with pytest.raises(ConfigError):
        await place.source().read_range(BLOB_ID, offset, length)


@contextmanager
def serving(made_image: MadeImage, options: list[str], log: Path) -> Iterator[Callable[[list[str]], None]]:
    """A daemon with an empty cache; yields what reads files through a front-end, and checks them."""
    with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as folder:
        # Not beside its blobs: they can come from the place alone.
        alone = Path(folder) / "alone.boot"
        alone.write_bytes((made_image.out / "image.boot").read_bytes())
        options = ["--cache-dir", f"{folder}/cache", "--log-level", "debug", *options]
        with Daemon(str(alone), Path(folder), log, options) as daemon:
            daemon.wait_ready()
            with Frontend.connect(daemon.socket) as fe:
                fe.start()
                fe.init()

                def read(names: list[str]) -> None:
                    for name in names:
                        data = made_image.files[name]
                        node = fe.resolve(name).nodeid
                        steps = range(0, len(data), 1 << 20)
                        got = b"".join(fe.read(node, at, min(1 << 20, len(data) - at)) for at in steps)
                        assert got == data, name

                yield read
                assert fe.check() == {}
            daemon.stop()
    told = log.read_text()
    for secret in ("hunter", "s3cr3t", "tok+en", "Signature", "aHVudGVy"):
        assert secret not in told


async def test_a_whole_daemon(place: Place, made_image: MadeImage, tmp_path: Path) -> None:
    """It finds credentials where the place's users keep them; all files are read right."""

    def run() -> None:
        with serving(made_image, place.serve_options(), tmp_path / "log") as read:
            read(sorted(made_image.files))

    await asyncio.to_thread(run)


@pytest.mark.parametrize("version", [1, 2])
async def test_a_daemon_with_nydusds_configuration(
    place: Place, made_image: MadeImage, tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its credentials from the file, and new ones when those end."""
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "OSS_ACCESS_KEY_ID", "OSS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    path = tmp_path / "nydusd.json"

    def write() -> None:
        kind, settings = place.settings()
        if version == 1:
            backend = {"device": {"backend": {"type": kind, "config": settings}}, "mode": "direct"}
        else:
            backend = {"version": 2, "backend": {"type": kind, kind: settings}}
        path.write_text(json.dumps(backend))

    def run() -> None:
        write()
        names = sorted(made_image.files)
        with serving(made_image, ["--config", str(path)], tmp_path / "log") as read:
            read(names[:20])
            place.rotate()
            write()
            read(names[20:])

    await asyncio.to_thread(run)
