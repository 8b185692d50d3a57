"""The arithmetic and the fixed traces of the benchmarks. What they measure is nothing for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from guest.registry import Traffic, read_log
from tests.bench import build, processes
from tests.bench.__main__ import main
from tests.bench.cold import Replay, Result, add_extras, compared, in_common
from tests.bench.crash import verdict
from tests.bench.figures import Spread, percentile, ratios, table, write_json
from tests.bench.held import Outcome, best
from tests.bench.many import Traffic as Sent
from tests.bench.many import traffic
from tests.bench.planner_model import Access, Blob, Model, recorded
from tests.bench.stalls import Beside
from tests.bench.start import summary
from tests.bench.trace import STEP, boot_like
from virtiofsd_rafs.native.frontend import LoadResult, OpResult
from virtiofsd_rafs.runtime.backlog import Run

ROOT = Path(__file__).resolve().parents[2]


def test_percentiles_are_measured_values() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(values, share) for share in (0, 0.2, 0.21, 0.5, 0.95, 1)] == [1, 1, 2, 3, 5, 5]
    assert percentile([7.0], 0.99) == 7


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_percentiles_of_nothing_are_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratios([1, 9, 4], [2, 3, 4]) == Spread(1, 0.5, 3)
    assert Spread(1, 0.5, 3).text() == "1.00 (0.50 to 3.00)"
    with pytest.raises(ValueError, match="zip"):
        ratios([1], [1, 2])


def test_tables_align_numbers_to_the_right() -> None:
    lines = table(["name", "n", "x"], [["a", 5, 1.5], ["long name", 1234, 20000.0]])
    assert lines == [
        "  name          n          x",
        "  a             5       1.50",
        "  long name  1234  20,000.00",
    ]


def test_json_holds_the_machine(tmp_path: Path) -> None:
    write_json(None, [])
    write_json(tmp_path / "out.json", [{"a": 1}])
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["results"] == [{"a": 1}]
    assert document["machine"]["cpus"] == len(os.sched_getaffinity(0))


def test_a_rollup_is_split_into_own_and_shared_memory() -> None:
    text = "55-7f ---p 0 00:00 0 [rollup]\nRss: 90 kB\nPss: 70 kB\nPss_File: 5 kB\nPss_Shmem: 15 kB\n"
    found = processes.parse_rollup("a", text)
    assert (found.pss, found.shared, found.own) == (70, 15, 55)


SMAPS = """7f01-7f02 r--p 00000000 fd:00 12 /usr/lib/a.so
Rss:                  40 kB
Pss:                   4 kB
VmFlags: rd mr
7f02-7f03 r-xp 00001000 fd:00 12 /usr/lib/a.so
Rss:                   8 kB
7f03-7f04 rw-p 00000000 00:00 0
Rss:                 100 kB
7f04-7f05 rw-s 00000000 00:01 9 /memfd:guest (deleted)
Rss:                 200 kB
7ffc-7ffd rw-p 00000000 00:00 0 [stack]
Rss:                   4 kB
"""


def test_files_in_memory_are_found_among_mappings() -> None:
    assert processes.mapped_files(SMAPS) == {
        ("/usr/lib/a.so", "00000000"): 40,
        ("/usr/lib/a.so", "00001000"): 8,
    }


def test_a_family_has_all_descendants() -> None:
    # A grandchild, which lives as long as its input is open.
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert len(processes.family(child.pid)) == 2
        assert all(each.pss > 0 for each in processes.memory(child.pid))
        assert processes.usage(child.pid).cpu_ns > 0
        assert processes.alone_kib(child.pid) >= sum(each.pss for each in processes.memory(child.pid))
        child.communicate(b"\n")


def op_result(p99_us: float) -> OpResult:
    return OpResult(1, 0, 0, 0, 0, 1, 1, 1, p99_us, p99_us, p99_us)


def test_the_best_held_round_is_compared_with_the_best_idle_one() -> None:
    rounds = [("read", 1, 9, 9), ("both", 1, 10, 30), ("both", 2, 20, 25), ("both", 3, 50, 40)]
    outcomes = [
        Outcome("a", "chunk", n, op, op_result(before), op_result(held), Beside())
        for op, n, before, held in rounds
    ]
    assert best(outcomes) == (2.5, 25)


def test_starts_are_compared_with_the_bare_interpreter() -> None:
    rows = summary([[10, 20, 40], [20, 80, 60], [10, 30, 50]])
    assert rows[1] == ["socket bound", 30, 80, 20, "3.0 (2.0 to 4.0)"]


def test_boots_are_compared_by_image_and_cache() -> None:
    results = [
        Result("rafs", "image", "cold", 1, 5.0, 40, 1000),
        Result("nydusd", "image", "cold", 1, 10.0, 80, 500),
        Result("nydusd", "image", "warm", 1, 4.0, 0, 0),
        Result("rafs", "image", "warm", 1, 2.0, 0, 0),
        Result("rafs", "extended", "cold", 1, 5.0, 40, 1000),
    ]
    half, double = "0.50 (0.50 to 0.50)", "2.00 (2.00 to 2.00)"
    assert compared(results) == [["image", "cold", half, half, double], ["image", "warm", half, "", ""]]


def test_requests_in_common_are_counted_as_often_as_they_came() -> None:
    a, b = (Replay("", 0, 0, 3, 3, contents) for contents in (["x", "x", "y"], ["y", "x", "z"]))
    assert (in_common(a, b), in_common(a, a)) == (2, 3)


def test_faults_are_counted_by_what_they_mean_for_a_vm() -> None:
    total = OpResult(10, 1, 5, 2, 0, 1, 1, 1, 1, 1, 1)
    result = LoadResult((total,), total, 1.0, 3, 0, 0, 0, {})
    faults = {"not_in_flight": 4, "late_write": 5, "write_outside": 6, "used_length": 7, "wrong_data": 2}
    assert list(verdict(result, faults).values()) == [1, 2, 3, 4, 11, 7]


def test_a_trace_is_always_the_same_and_stays_within_the_files() -> None:
    sizes = {b"/%d" % i: size for i, size in enumerate([0, 1, 4096, 200_000, 1 << 20, 5_000_001] * 20)}
    parts = list(boot_like(sizes))
    assert parts == list(boot_like(dict(reversed(sizes.items()))))
    assert all(0 < part.length <= STEP for part in parts)
    assert all(part.offset + part.length <= sizes[part.path] for part in parts)
    assert len({part.path for part in parts}) == 15
    for path in {part.path for part in parts if sizes[part.path] < 1 << 20}:
        assert sum(part.length for part in parts if part.path == path) == sizes[path]


def test_a_trace_does_not_change_with_files_that_are_left_out() -> None:
    assert list(boot_like({b"/empty": 0})) == []
    assert [part.path for part in boot_like({b"/one": 5})] == [b"/one"]


def test_extra_files_are_spread_over_folders_and_all_differ(tmp_path: Path) -> None:
    add_extras(tmp_path, 2001)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len({path.read_bytes() for path in files}) == 2001
    assert len({path.parent for path in files}) == 3


def test_builds_are_compared_pair_by_pair() -> None:
    def cost(side: str, number: int, wall_s: float, peak_kib: int) -> build.Cost:
        return build.Cost("files", side, number, wall_s, 2.0, peak_kib, 1_000_000, 2_000_000, "")

    costs = [cost("rafs", 1, 1.0, 1024), cost("nydus-image", 1, 4.0, 9000)]
    costs += [cost("rafs", 2, 3.0, 2048), cost("nydus-image", 2, 6.0, 9000)]
    rows = build.compared(costs)
    assert rows[0] == ["files", "rafs", "2.00 (1.00 to 3.00)", 2.0, 2.0, 1.0, 2.0, "0.38 (0.25 to 0.50)"]
    assert [row[-1] for row in rows] == ["0.38 (0.25 to 0.50)", ""]
    assert [row[-1] for row in build.compared(costs[::2])] == [""]


def test_a_build_is_measured_with_all_it_has_written(tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'image.boot')!r}, 'w').write('b' * 7); b = bytearray(64 << 20)"
    (tmp_path / ("a" * 64)).write_bytes(b"x" * 5)
    cost = build.measured("files", "rafs", 1, [sys.executable, "-c", script], tmp_path)
    assert (cost.blob_size, cost.bootstrap_size) == (5, 7)
    assert cost.peak_kib > 64 << 10
    assert cost.wall_s > 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        build.measured("files", "rafs", 1, [sys.executable, "-c", "exit(3)"], tmp_path)


LOG = b"""127.0.0.1 - - [24/Nov/2026:06:25:00 +0000] "GET /v2/a/b/blobs/sha256:aa HTTP/1.1" 206 100 "" "x"
127.0.0.1 - - [24/Nov/2026:06:25:00 +0000] "GET /v2/a/b/blobs/sha256:bb HTTP/1.1" 200 30 "" "x"
127.0.0.1 - - [24/Nov/2026:06:25:00 +0000] "HEAD /v2/a/b/blobs/sha256:aa HTTP/1.1" 200 0 "" "x"
127.0.0.1 - - [24/Nov/2026:06:25:00 +0000] "GET /v2/ HTTP/1.1" 200 2 "" "x"
127.0.0.1 - - [24/Nov/2026:06:25:00 +0000] "PUT /v2/a/b/blobs/uploads/1?digest=aa HTTP/1.1" 201 0 "" "x"
time="2026-11-24T05:06:39Z" level=info msg="nothing"
"""


def test_traffic_is_counted_whole_or_for_one_blob() -> None:
    assert read_log(LOG) == Traffic(3, 130)
    assert read_log(LOG, "aa") == Traffic(2, 100)
    assert read_log(LOG, "cc") == Traffic(0, 0)


def test_bytes_that_a_registry_sent_twice_are_counted() -> None:
    assert traffic([]) == Sent(0, 0, 0)
    apart = traffic([(100, 199), (0, 99), (300, 300)])
    assert (apart.n_requests, apart.sent, apart.different, apart.twice) == (3, 201, 201, 0)
    assert traffic([(0, 99), (50, 149), (60, 70)]).twice == 61


@pytest.mark.parametrize("mode", sorted(main.commands))
def test_every_mode_is_documented_and_explains_itself(mode: str) -> None:
    assert CliRunner().invoke(main, [mode, "--help"]).exit_code == 0
    assert f"scripts/bench {mode}" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_model_of_the_planner_counts_time_as_a_link_does() -> None:
    blob = Blob([i * 10_000 for i in range(100)], [10_000] * 100, [20_000] * 100)
    # One chunk at a time, nothing ahead: a round trip, the transfer and the decoding for each.
    cost = Model(blob, 1e6, 0.1, amplify=0).run([Access(1.0, (50,)), Access(0.5, (7,)), Access(0.0, (7,))])
    assert cost.requests == 2
    assert cost.bytes == 20_000
    assert cost.waited == pytest.approx(2 * (0.1 + 0.01 + 10_000 / 250e6))
    assert cost.seconds == pytest.approx(1.5 + cost.waited)
    # Two at a time share the link, and pay for one round trip.
    both = Model(blob, 1e6, 0.1, amplify=0).run([Access(0.0, (50, 7))])
    assert both.waited == pytest.approx(0.1 + 0.02 + 10_000 / 250e6)
    # What is listed comes while the guest thinks; what nobody read is waste.
    listed = Model(blob, 1e6, 0.1).run([Access(1.0, (50,))], [Run(0, 50, 1), Run(0, 20, 1)])
    assert (listed.waited, listed.requests, listed.wasted) == (0.0, 2, 10_000)


def test_recorded_boots_keep_the_order_and_the_pauses() -> None:
    def fetch(start: int, end: int, *chunks: int) -> dict[str, object]:
        return {
            "started_ns": start * 10**6,
            "ended_ns": end * 10**6,
            "chunks": [[chunk, "demand"] for chunk in chunks],
        }

    trace = {"first_init_ns": 10**6, "fetches": [fetch(300, 350, 9), fetch(11, 20, 5), fetch(15, 40, 6, 7)]}
    assert recorded(trace) == [Access(0.01, (5, 6, 7)), Access(0.26, (9,))]
