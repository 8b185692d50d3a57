"""The benchmark kit from end to end, in small: everything is counted, nothing is timed."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.bench import sides
from tests.bench.__main__ import main
from tests.bench.kit import floor
from tests.bench.kit.cases import CASES, find_targets
from virtiofsd_rafs.native.frontend import Frontend, Load, Op, Target, Walk
from virtiofsd_rafs.native.frontend_link import Region

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of 1 MiB and some small ones."""
    root = tmp_path_factory.mktemp("tree")
    rng = random.Random(7)
    for i in range(8):
        (root / f"large{i}").write_bytes(rng.randbytes(SIZE))
    (root / "sub").mkdir()
    for i in range(30):
        (root / "sub" / f"small{i}").write_bytes(b"%d" % i)
    return root


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floor.build(tmp_path_factory.mktemp("floor"))


@pytest.mark.parametrize("options", [[], ["--poll-us", "50"]], ids=["sleeps", "polls"])
def test_the_floor_answers_all_that_is_asked(
    program: Path, tree: Path, short_dir: Path, options: list[str]
) -> None:
    data = floor.data_of(tree, short_dir)
    content = data.read_bytes()
    back_end = floor.start(program, data, short_dir, ["--dirs", "3", "--names", "70", *options])
    with sides.start("floor", back_end, queues=2) as side:
        fe = side.fe
        found = fe.read_tree(xattrs=False)
        assert len(found) == 1 + 8 + 3 + 3 * 70
        for i in range(8):
            digest = hashlib.sha256(content[i * SIZE : (i + 1) * SIZE]).hexdigest()
            assert found[b"/large%03d" % i].sha256 == digest
        large = [
            Target(found[b"/large%03d" % i].nodeid, SIZE, content=data, content_offset=i * SIZE)
            for i in range(8)
        ]
        names = [Target(1, name=b"dir00002"), Target(1, name=b"large007")]
        ops = [
            *(Op("read", large, size) for size in (4096, 128 << 10, SIZE)),
            *(Op("getattr", large), Op("lookup", names), Op("open", large)),
            Op("absent", [Target(1, name=b"absent-1")]),
        ]
        result = fe.load(Load(ops, depth=32, count=2000, queues=[1, 2]))
        assert result.total.count == 4000
        assert result.clean, result
        assert sum(n for _, n in result.steps) == 4000
        by_name = find_targets(fe, found)
        assert [fe.lookup(t.nodeid, t.name).nodeid for t in by_name.names[:20]] == [
            t.nodeid for t in by_name.named[:20]
        ]
        forgotten = fe.load(Load([Op("forget", large)], depth=64, count=500, queues=[0]))
        assert (forgotten.total.count, forgotten.clean) == (500, True)
        walk = fe.walk(Walk(count=2, depth=4))
        assert (walk.walks, walk.names, walk.directories) == (2, 2 * (11 + 210), 2 * 4)
        assert walk.load.clean
        # A pause, and memory that comes and goes: rings go on where they were.
        fe.resume(fe.stop())
        fe.add_region(Region(1 << 40, 4 << 20))
        assert fe.read(large[1].nodeid, 10, 20) == content[SIZE + 10 : SIZE + 30]
        fe.remove_region(1 << 40)
        assert fe.getattr(1).mode == 0o40755
        with pytest.raises(FileNotFoundError):
            fe.lookup(1, "absent")
        assert fe.check() == {}
    assert back_end.process.returncode == 0


def test_what_makes_no_sense_does_not_end_the_floor(program: Path, tree: Path, short_dir: Path) -> None:
    back_end = floor.start(program, floor.data_of(tree, short_dir), short_dir)
    with back_end:
        back_end.wait_ready()
        with Frontend.connect(back_end.socket) as fe:
            fe.start()
            fe.init()
            room = fe.alloc(4096)
            for chain in (
                [(room, 8, False), (room + 64, 16, True)],  # no header
                [(0xFFFF_FFFF_0000, 64, False)],  # no memory
                [(room, 64, True)],  # nothing to read
            ):
                fe.wait(fe.submit_raw(chain))
            assert fe.getattr(1).mode == 0o40755


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_comparison_from_command_line_to_document(tree: Path, short_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--quick", "--no-pin", "--dir", str(tree), "--work", str(short_dir), "--json", str(out)]
    output = bench(*options, "--virtiofsd", "none", "--rounds", "1", "--seconds", "0.05")
    document: dict[str, Any] = json.loads(out.read_text())
    cases = {case["name"]: case["sides"] for case in document["results"]["cases"]}
    assert list(cases) == [case.name for case in CASES if case.quick]
    assert document["results"]["sides"]["rafs"]["files"] == 8 + 1 + 30 + 1
    for name, both in cases.items():
        assert list(both) == ["rafs", "floor"], name
        for side, record in both.items():
            assert record["note"] or len(record["runs"]) == 1, (name, side, output)
            for run in record["runs"]:
                faults = run["faults"], run["errors"], run["wrong"], run["lost"]
                assert faults == ({}, 0, 0, 0), (name, side)
                assert run["requests"] > 0
    assert "ENOSYS" in cases["open and release qd32"]["rafs"]["note"]
    assert cases["open and release qd32"]["floor"]["runs"]
    stalled = cases["stalled remote, read 4k random qd32"]["rafs"]["runs"]
    assert all(run["remote_requests"] > 0 for run in stalled)
    latencies = (tmp_path / "latency.html").read_text()
    assert all(f"<h2>{name}</h2>" in latencies for name in cases)
    text = tmp_path / "benchmarks.md"
    text.write_text("".join(f"<!-- bench: operations {name} -->\n<!-- /bench -->\n" for name in PARTS))
    bench("docs", str(out), "--file", str(text))
    assert "| getattr qd32 | rafs |" in text.read_text()


PARTS = ("sides", "bars", "ratios", "numbers", "stalled")


def test_a_side_with_too_few_queues_or_that_ends_is_told_and_left_out(
    program: Path, tree: Path, short_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    data = floor.data_of(tree, short_dir)
    one = f"one={program} --socket {{socket}} --data {data} --queues 1"
    options = ["--no-pin", "--dir", str(tree), "--work", str(short_dir), "--json", str(out), "--no-own"]
    options += ["--virtiofsd", "none", "--command", one, "--rounds", "1", "--seconds", "0.05"]
    bad = "bad=sh -c 'echo no such option; exit 3' {socket}"
    output = bench("operations", *options, "--command", bad, "--case", "getattr qd32")
    assert "bad: sh ended with exit code 3" in output
    assert "no such option" in output
    cases = {case["name"]: case["sides"] for case in json.loads(out.read_text())["results"]["cases"]}
    assert cases["getattr qd32"]["one"]["runs"]
    note = cases["getattr qd32"]["bad"]["note"]
    assert "exit code 3" in note
    assert "\n" not in note
    for name in ("getattr qd32 x 2 queues", "getattr qd32 x 4 queues"):
        assert cases[name]["one"]["note"] == "offers 1 request queue"
        assert not cases[name]["one"]["runs"]
        assert cases[name]["floor"]["runs"]
