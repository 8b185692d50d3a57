"""Lists of what a guest has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from click.testing import CliRunner

from tests.sim.images import make_image
from tests.unit.test_api import record, rig
from virtiofsd_rafs.cli.record import record as record_command
from virtiofsd_rafs.runtime.accessed import accessed, order_of_use
from virtiofsd_rafs.runtime.metrics import runs_of
from virtiofsd_rafs.runtime.prefetch import Listed, parse_list, resolve

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CHUNK = 4096


def test_the_order_is_that_of_the_fetches_and_what_was_not_read_is_left_out() -> None:
    log = [
        record(started_ns=30, runs=runs_of([(9, "prefetch"), (10, "prefetch")])),
        record(started_ns=10, runs=runs_of([(5, "demand"), (6, "read-ahead"), (7, "read-ahead")])),
        record(started_ns=20, blob_index=1, runs=runs_of([(0, "demand")])),
        record(started_ns=40, runs=runs_of([(5, "demand"), (11, "fill")])),
    ]
    touched = bytearray(20)
    for chunk, value in ((3, 2), (6, 1), (10, 1), (19, 1)):
        touched[chunk] = value
    order = order_of_use(log, {0: bytes(touched), 1: bytes(4)})
    assert list(order) == [(0, 5), (0, 6), (1, 0), (0, 10), (0, 3), (0, 19)]


def test_parts_of_files_are_joined_and_resolve_to_the_same_chunks(tmp_path: Path) -> None:
    image = make_image(tmp_path, n_files=4, chunks_each=4)
    # Chunks 4 to 7 are file001 and so on.
    order = dict.fromkeys((0, chunk) for chunk in (9, 10, 4, 5, 6, 7, 2, 15, 99))
    entries = accessed(image.bootstrap, order)
    size = image.chunks[15].uncompressed_size
    assert entries == [
        Listed(b"/file002", CHUNK, 2 * CHUNK),
        Listed(b"/file001"),
        Listed(b"/file000", 2 * CHUNK, CHUNK),
        Listed(b"/file003", 3 * CHUNK, size),
    ]
    runs = resolve(image.bootstrap, entries).runs
    assert [run.first + i for run in runs for i in range(run.n_chunks)] == [9, 10, 4, 5, 6, 7, 2, 15]


async def test_the_command_writes_what_the_daemon_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    image = make_image(tmp_path / "made", n_files=3, chunks_each=2)
    async with rig(image, tmp_path) as r:
        assert (await r.get("/api/v1/accessed"))[2] == ""
        r.mount()
        r.view.metrics.fetched(record(runs=runs_of([(3, "demand"), (0, "demand"), (1, "demand")])), 1)
        monkeypatch.chdir(tmp_path)
        for arguments, expected in (
            ([], [Listed(b"/file001", CHUNK, image.chunks[3].uncompressed_size), Listed(b"/file000")]),
            (["--files"], [Listed(b"/file001"), Listed(b"/file000")]),
        ):
            arguments += ["--api-socket", str(r.socket), "-o", "list"]
            result = await asyncio.to_thread(CliRunner().invoke, record_command, arguments)
            assert result.exit_code == 0, result.output
            assert parse_list((tmp_path / "list").read_bytes()) == (expected, [])
