"""Power loss at any moment: a start afterwards serves right bytes only, and goes on from what survived.

The writes of a scripted life of two boots are recorded block by block: chunks stored one after the other,
verified, evicted, files made and replaced. None of them is synced, so a disk may have any of a block's
versions, in any combination, torn at any sector, with files that are shorter or not there yet. What is synced
(manifests and bootstraps, ``image/content.py``) is cut off at each of its steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.errors import NotFound
from virtiofsd_rafs.image import content
from virtiofsd_rafs.image.resolve import resolve_image
from virtiofsd_rafs.native.store import OK, Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.registry import RegistrySimulator

BLOCK = 4096
SECTOR = 512
DATA_INO = 136


class Moment(NamedTuple):
    """The directory after a step: inode number and content of each file, by name."""

    files: dict[str, tuple[int, bytes]]


def look(folder: Path) -> Moment:
    return Moment({p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir()})


def live(image: MadeImage) -> list[Moment]:
    """Two boots of a daemon, looked at after each step."""
    moments = []
    rng = random.Random(11)
    n = len(image.chunks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def step(what: Callable[[], object]) -> None:
            what()
            moments.append(look(folder))

        for boot, for_nydusd in ((b"A" * 16, False), (b"B" * 16, True)):
            store = Store(
                image.bootstrap, cache_dir=folder, spill_size=1 << 20, boot_id=boot, for_nydusd=for_nydusd
            )
            step(lambda store=store: store.open_blob(0))
            for chunk in rng.sample(range(n), n):
                step(lambda store=store, chunk=chunk: store.verify_present(0, chunk))
                step(lambda store=store, chunk=chunk: store.ingest(0, 0, image.blob, [chunk]))
            if not for_nydusd:
                step(lambda store=store: store.sweep(n * 3500))
                step(lambda store=store: store.ingest(0, 0, image.blob, range(n // 2)))
            store.close()
        (folder / f"{image.blob_id}.blob.data").unlink()
        store = Store(image.bootstrap, cache_dir=folder, spill_size=1 << 20, boot_id=b"B" * 16)
        step(lambda: store.open_blob(0))
        step(lambda: store.ingest(0, 0, image.blob, [1, 2]))
        store.close()
    return moments


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeImage, list[Moment]]:
    image = make_image(tmp_path_factory.mktemp("made"), n_files=3, chunks_each=4)
    return image, live(image)


def lose_power(moments: list[Moment], end: int, rng: random.Random, folder: Path) -> None:
    """What a disk may have when power fails after step *end*."""
    reordered = rng.random() < 0.8
    inodes = {}
    for name in moments[end].files if not reordered else {n for m in moments[: end + 1] for n in m.files}:
        versions = [m.files[name] for m in moments[: end + 1] if name in m.files]
        if name not in moments[end].files and rng.random() < 0.7:
            continue  # it is gone, most likely
        if reordered and rng.random() < 0.1:
            continue  # it was not there yet
        inode = versions[-1][0] if rng.random() < 0.9 else rng.choice(versions)[0]
        contents = [data for ino, data in versions if ino == inode]
        final = contents[-1]
        if not reordered:
            disk = bytearray(final)
            if len(contents) > 1 and rng.random() < 0.5:  # a prefix of the last write
                cut = rng.randrange(0, len(final), SECTOR) if final else 0
                disk[cut:] = contents[-2][cut:].ljust(len(final) - cut, b"\0")[: len(final) - cut]
        else:
            size = len(rng.choice(contents)) if rng.random() < 0.2 else len(final)
            disk = bytearray(size)
            for at in range(0, size, BLOCK):
                block = some_version(contents, at, rng)
                disk[at : at + BLOCK] = block[: size - at]
        (folder / name).write_bytes(disk)
        inodes[name] = inode
    for name in inodes:
        if name.endswith(".chunk_state"):
            bind(folder, name, inodes)


def some_version(contents: list[bytes], at: int, rng: random.Random) -> bytes:
    """One version of a block, or two that meet at a sector; a block that was never written is zeros."""
    if rng.random() < 0.5:
        return contents[-1][at : at + BLOCK]
    one, two = (rng.choice([b"", *contents])[at : at + BLOCK].ljust(BLOCK, b"\0") for _ in range(2))
    cut = rng.randrange(0, BLOCK + 1, SECTOR)
    return one[:cut] + two[cut:]


def bind(folder: Path, name: str, inodes: dict[str, int]) -> None:
    """A state file names its data file by inode number, which is another one in the copy."""
    data = name.removesuffix(".chunk_state") + ".blob.data"
    with (folder / name).open("r+b") as f:
        head = f.read(DATA_INO + 8)
        if len(head) < DATA_INO + 8:
            return
        if data in inodes and struct.unpack_from("<Q", head, DATA_INO)[0] == inodes[data]:
            f.seek(DATA_INO)
            f.write(struct.pack("<Q", (folder / data).stat().st_ino))


def served(store: Store, n: int) -> dict[int, bytes]:
    """What a worker would answer with."""
    state, extents, touched, data = store.share(0)
    assert data is not None
    out = {}
    for chunk in range(n):
        if os.pread(state, 1, 4096 + 4 * chunk)[0] & 7 == 3:
            offset, size = struct.unpack("<QI", os.pread(extents, 12, 64 + 32 * chunk))
            out[chunk] = os.pread(data, size, offset)
    for fd in (state, extents, touched, data):
        os.close(fd)
    return out


survived = 0


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def check_power_loss(image: MadeImage, moments: list[Moment], seed: int) -> None:
    global survived
    rng = random.Random(seed)
    n = len(image.chunks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lose_power(moments, rng.randrange(len(moments)), rng, folder)
        with Store(image.bootstrap, cache_dir=folder, spill_size=1 << 20, boot_id=b"C" * 16) as store:
            assert store.open_blob(0)
            assert served(store, n) == {}  # nothing is believed
            view = store.chunks(0)
            for chunk in rng.sample(range(n), n):
                if view.unverified(chunk):
                    store.verify_present(0, chunk)
            good = served(store, n)
            assert good == {chunk: image.plain[chunk] for chunk in good}
            survived += len(good)
            assert store.ingest(0, 0, image.blob, range(n)) == bytes([OK]) * n
            assert served(store, n) == dict(enumerate(image.plain))
            # Places may have been damaged as well: nobody's bytes are taken for another's.
            store.sweep(n * 2000)
            good = served(store, n)
            assert good == {chunk: image.plain[chunk] for chunk in good}


def test_any_combination_of_unsynced_writes(recorded: tuple[MadeImage, list[Moment]]) -> None:
    check_power_loss(*recorded)
    assert survived > 500, "hardly anything survived: the recording was not replayed"


def test_every_prefix_of_the_writes(recorded: tuple[MadeImage, list[Moment]]) -> None:
    image, moments = recorded
    n = len(image.chunks)
    for end in range(len(moments)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, (_, data) in moments[end].files.items():
                (folder / file).write_bytes(data)
            inodes = {file: inode for file, (inode, _) in moments[end].files.items()}
            for file in inodes:
                if file.endswith(".chunk_state"):
                    bind(folder, file, inodes)
            with Store(image.bootstrap, cache_dir=folder, spill_size=4096, boot_id=b"C" * 16) as store:
                store.open_blob(0)
                stored = store.states(0).present
                view = store.chunks(0)
                good = sum(store.verify_present(0, c) for c in range(n) if view.unverified(c))
                assert good == stored
                answers = served(store, n)
                assert answers == {chunk: image.plain[chunk] for chunk in answers}


class PowerLoss(BaseException):
    """Not an error that anybody could handle."""


@pytest.mark.parametrize("torn", [False, True])
def test_manifests_and_bootstraps_survive_or_are_absent(
    registry_sim: RegistrySimulator,
    recorded: tuple[MadeImage, list[Moment]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torn: bool,
) -> None:
    image, _ = recorded
    registry_sim.store.add_image("app", "1", image.bootstrap, [image.blob])

    def resolve(folder: Path, pull: Any) -> bytes:
        resolved = resolve_image(
            f"{registry_sim.host}/app:1",
            cache_dir=folder,
            blob_dir=None,
            pull=pull,
            access=RegistryAccess(plain_http=True),
        )
        return asyncio.run(resolved).bootstrap

    steps = {"write": content._write_synced, "rename": Path.replace, "sync": content._sync_directory}
    left = [0]

    def cut(name: str) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if name == "write" and torn:
                    args[0].write(args[1][: len(args[1]) // 2])
                    args[0].flush()
                raise PowerLoss
            return steps[name](*args)

        return act

    monkeypatch.setattr(content, "_write_synced", cut("write"))
    monkeypatch.setattr(Path, "replace", cut("rename"))
    monkeypatch.setattr(content, "_sync_directory", cut("sync"))
    outcomes = []
    for n_steps in range(1, 100):
        folder = tmp_path / str(n_steps)
        left[0] = n_steps
        with contextlib.suppress(PowerLoss):
            assert resolve(folder, "missing") == image.bootstrap
        done = left[0] > 0
        left[0] = -1
        try:
            assert resolve(folder, "never") == image.bootstrap
            outcomes.append(True)
        except NotFound:
            outcomes.append(False)
        assert resolve(folder, "missing") == image.bootstrap
        if done:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) == 10  # manifest, layer and tag, three steps each, and one time without a loss
