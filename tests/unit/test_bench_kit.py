"""What a comparison makes of its measurements: ratios, verdicts, tables, pictures, documents."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import attrs
import click
import pytest
from click.testing import CliRunner

from tests.bench import docs, processes
from tests.bench.__main__ import main
from tests.bench.build import Cost
from tests.bench.cold import Result
from tests.bench.faults import Outcome as Damage
from tests.bench.fullread import Full
from tests.bench.held import Outcome
from tests.bench.kit import bars, contenders, page, syscalls, tables
from tests.bench.kit.cases import CASES, chosen
from tests.bench.kit.results import CaseResult, Record, from_json, to_json
from tests.bench.kit.runs import Run, median, merged
from tests.bench.material import Material
from tests.bench.processes import Memory, Usage
from tests.bench.races import Start
from tests.bench.stalls import Beside
from tests.bench.start import EVENTS
from virtiofsd_rafs.native.frontend import OpResult

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {
    "cpus": 2,
    "memory_bytes": 24 << 30,
    "hardware_virtualisation": False,
    "kernel": "6.18.44-a-b",
    "load_average": [0.04, 1, 2],
}


def run(ops: float, cpu: float, p50: float = 10.0, **more: Any) -> Run:
    values = {"bytes_per_s": ops * 4096, "kicks": 0.1, "interrupts": 0.2, "wakeups": 0.3, "requests": 1000}
    values |= {"p99_us": 2 * p50, "p999_us": 3 * p50, "max_us": 4 * p50, "disk_bytes": 0, "faults": {}}
    steps = ((p50, 500), (2 * p50, 490), (4 * p50, 10))
    return Run(ops_per_s=ops, cpu_us=cpu, p50_us=p50, **(values | {"steps": steps} | more))


def results() -> list[CaseResult]:
    warm = CaseResult(
        "getattr qd32",
        "load",
        "rate",
        {
            "rafs": Record([run(900, 1.0), run(1000, 1.0), run(1100, 1.0)], 0.06, "perf", 40_960),
            "nydusd": Record([run(800, 2.0, faults={"used_length": 7}) for _ in range(3)], 0.1, "strace", 9),
            "floor": Record([run(1000, 0.5) for _ in range(3)], None, "n/a", 100),
        },
    )
    deep = CaseResult(
        "read 4k random qd1",
        "load",
        "p50",
        {
            "rafs": Record([run(50, 9.0, 20)]),
            "nydusd": Record(note="offers 1 queue"),
            "floor": Record([run(50, 9.0, 60)]),
        },
    )
    remote = {"remote_requests": 4, "remote_bytes": 5_000_000}
    stalled = CaseResult(
        "stalled remote, read 4k random qd32",
        "stalled",
        "rate",
        {
            "rafs": Record([run(50, 9.0, 20, idle_p99_us=20.0, **remote) for _ in range(2)]),
            "nydusd": Record([run(50, 9.0, 2e6, idle_p99_us=100.0) for _ in range(2)]),
            "floor": Record(note="serves no image from a registry"),
        },
    )
    return [warm, deep, stalled]


def test_ratios_are_in_favour_of_the_first_side_above_one_in_speed_and_below_in_cost() -> None:
    warm, deep, _ = results()
    speed, cpu = warm.speed("nydusd"), warm.cpu("nydusd")
    assert speed is not None
    assert cpu is not None
    assert speed.text() == "1.25 (1.12 to 1.38)"
    assert cpu.text() == "0.50 (0.50 to 0.50)"
    # By latency it is the other's that stands above.
    by_p50 = deep.speed("floor")
    assert by_p50 is not None
    assert by_p50.median == 3
    assert deep.speed("nydusd") is None
    assert deep.speed("unknown") is None


def test_medians_add_up_what_went_wrong() -> None:
    runs = [
        run(1, 3.0, errors=2),
        run(3, 1.0, faults={"used_length": 2}),
        run(9, 2.0, faults={"used_length": 5}),
    ]
    m = median(runs)
    assert (m.ops_per_s, m.cpu_us, m.errors, m.faults) == (3, 2.0, 2, {"used_length": 7})
    assert m.failed == "2 errors, 7 used_length"
    assert m.remote_requests is None
    assert m.steps == ((10.0, 1500), (20.0, 1470), (40.0, 30))
    assert merged([]) == ()


def test_results_survive_json() -> None:
    before = results()
    after = from_json(json.loads(json.dumps(to_json(before))))
    assert [case.name for case in after] == [case.name for case in before]
    for a, b in zip(after, before, strict=True):
        assert (a.what, a.by, list(a.records)) == (b.what, b.by, list(b.records))
        for name, record in a.records.items():
            assert record.steps() == b.records[name].steps()
            assert attrs.evolve(record, runs=[]) == attrs.evolve(b.records[name], runs=[])
            assert [r.ops_per_s for r in record.runs] == [r.ops_per_s for r in b.records[name].runs]
    assert docs.render(document("operations", operations()))["operations ratios"]


def test_bars_are_judged_by_the_better_peer_and_the_floor() -> None:
    verdicts = {row[:2]: row[2:] for row in bars.verdicts(results())}
    assert verdicts["getattr qd32", "speed, nydusd"] == (">= 1.20", "1.25 (1.12 to 1.38)", "kept")
    assert verdicts["getattr qd32", "cpu, nydusd"] == ("<= 1.00", "0.50 (0.50 to 0.50)", "kept")
    assert verdicts["getattr qd32", "cpu, floor"] == ("<= 1.60", "2.00 (2.00 to 2.00)", "MISSED")
    assert verdicts["stalled remote, read 4k random qd32", "p99, idle"] == ("<= 3.00", "2.00", "kept")
    assert ("read 4k random qd1", "speed, nydusd") not in verdicts
    assert verdicts["all cases", "ring faults"] == ("0", "0", "kept")
    broken = results()
    broken[1].records["rafs"].runs.append(run(1, 1.0, faults={"unique": 2, "used_length": 1}))
    assert bars.verdicts(broken)[-1][2:] == ("0", "3", "MISSED")
    warm, *_ = results()
    assert not bars.verdicts([attrs.evolve(warm, records={"other": warm.records["rafs"]})])
    both = bars.Bar(warm.name, ("nydusd", "floor"), 1.0, 1.0)
    # The floor is slower to beat and cheaper: both count against us.
    texts = [row[1] for row in bars._against_peers(warm, both)]
    assert texts == ["speed, floor", "cpu, floor"]


def test_bars_are_of_cases_that_exist() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {bar.case for bar in bars.BARS} <= set(names)
    assert [case.name for case in chosen(["queues"], quick=True)] == [n for n in names if "queues" in n]


def test_tables_tell_what_has_no_number() -> None:
    warm, deep, stalled = results()
    text = "\n".join(tables.lines(warm))
    assert "faults: 21 used_length" in text
    assert "strace" in text
    assert text.splitlines()[3].split()[:3] == ["rafs", "1,000", "0.00"]
    assert "n/a" in text.splitlines()[-1]
    assert "offers 1 queue" in "\n".join(tables.lines(deep))
    assert "p99 is 2.00 x that without" in "\n".join(tables.lines(stalled))
    assert "remote: 4 requests, 5.0 MB" in tables.remarks(stalled, "rafs")
    widths = {line.count("|") for line in tables.number_table(results())}
    assert len(widths) == 1


class Page(HTMLParser):
    """Tags that are open, and all places that something would be loaded from."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.curves: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.loads += [str(found[name]) for name in ("src", "href") if name in found]
        if found.get("class") == "curve":
            self.curves.append(str(found["d"]))
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag


def test_the_page_of_latencies_is_whole_and_loads_nothing() -> None:
    html = page.render(results(), MACHINE)
    parser = Page()
    parser.feed(html)
    assert parser.open == []
    assert parser.loads == []
    assert "url(" not in html
    assert len(parser.curves) == 3 + 2 + 2
    # A curve never goes back: latency and share only grow.
    for curve in parser.curves:
        places = [tuple(map(float, step.split())) for step in curve[1:].split("L")]
        assert places == sorted(places, key=lambda place: (place[0], -place[1]))
    assert html == page.render(results(), MACHINE)


def test_percentiles_of_steps_are_those_that_so_many_requests_did_not_exceed() -> None:
    steps = ((10.0, 500), (20.0, 490), (40.0, 10))
    assert [page.percentile(steps, share) for share in (0.5, 0.501, 0.99, 0.991, 1)] == [10, 20, 20, 40, 40]
    with pytest.raises(ValueError, match="no requests"):
        page.percentile((), 0.5)
    assert [round(page.nines(share), 6) for share in (0, 0.9, 0.999, 1)] == [0, 1, 3, 5]
    assert [page.duration(us) for us in (0.3, 12, 3400, 1.2e6)] == ["0.3 µs", "12 µs", "3.4 ms", "1.2 s"]


# -- documents ---------------------------------------------------------------------------------------------


def document(name: str, found: Any, arguments: list[str] | None = None) -> dict[str, Any]:
    values = {"benchmark": name, "machine": MACHINE, "arguments": arguments or [name], "results": found}
    parsed: dict[str, Any] = json.loads(json.dumps(values))
    return parsed


def operations() -> dict[str, Any]:
    idle = {"wakeups": 2.5, "cpu_us": [["rafs-keeper", 0.0], ["rafs-control", 120.4]]}
    seen = {"version": "1.2", "files": 3110, "pss_kib": 10_240, "processes": 2, "idle": idle}
    settings = {"rounds": 3, "duration_s": 1.0, "wait": "sleep"}
    return {"settings": settings, "sides": {"rafs": seen}, "cases": to_json(results())}


def documents() -> list[dict[str, Any]]:
    """One of each benchmark whose tables are made."""
    op = OpResult(1, 0, 0, 0, 0, 1, 10.0, 20.0, 30.0, 40.0, 50.0)
    slow = attrs.evolve(op, p99_us=60.0)
    beside = Beside(stop_ms=3.25, failed=2)
    outcomes = [Outcome("rafs", "chunks", 1, name, op, slow, beside) for name in ("read", "both")]
    outcomes.append(Outcome("rafs", "chunks", 2, "both", op, op, Beside(stop_ms=1.0)))
    held = [attrs.asdict(each) | {"ratio": each.ratio} for each in outcomes]
    memory = {"side": "rafs", "cache": "cold", "read_bytes": 1, "alone_kib": 2048}
    memory["kib"] = [attrs.asdict(Memory(f"rafs-{n}", 1024, 512, 100)) for n in ("keeper", "worker")]
    boots = [Result(side, "image", "cold", 1, 5.0, 40, 1_000_000) for side in ("rafs", "nydusd")]
    costs = [Cost("files", side, 1, 1.0, 2.0, 1024, 10**6, 10**6, "") for side in ("rafs", "nydus-image")]
    return [
        document("operations", operations()),
        document("held", held),
        document("start", [dict(zip(EVENTS, [9.0, 50.0, 80.0], strict=True))]),
        document("memory", [memory]),
        document("memory", [memory], ["memory", "--dir", "x"]),
        document("cold", {"boots": [attrs.asdict(boot) for boot in boots]}),
        document("fullread", [attrs.asdict(Full("rafs", 1, 10**6, 0.5, 0.1, 3, 5, None))]),
        document("build", [attrs.asdict(cost) for cost in costs]),
        document("races", [attrs.asdict(Start("rafs", True, "QEMU 10", "with the enable", 0.5, 0))]),
        document("faults", [attrs.asdict(Damage("rafs", n, 9, 3, 0, 1, False)) for n in (1, 2)]),
    ]


def test_every_part_has_its_place_in_the_document_and_makes_the_same_again() -> None:
    assert {each["benchmark"] for each in documents()} == set(docs.RENDERERS)
    text = docs.DOCUMENT.read_text()
    seen = []
    for each in documents():
        blocks = docs.render(each)
        seen += list(blocks)
        for lines in blocks.values():
            assert lines[0] == "2 CPUs, 24 GiB, Linux 6.18; load average 0.0 at the start."
            rows = [line.count("|") for line in lines if line.startswith("|")]
            assert len(rows) >= 3
            assert len(set(rows)) == 1
        once = docs.placed(text, blocks)
        assert once != text
        assert docs.placed(once, blocks) == once
        text = once
    assert sorted(seen) == sorted(set(seen))
    # No part of the document is left that nothing makes.
    assert text.count("<!-- bench: ") == text.count("<!-- /bench -->") == len(seen)


def test_what_is_made_is_what_was_measured() -> None:
    made = {name: lines for each in documents() for name, lines in docs.render(each).items()}
    assert made["held"][-2] == "| rafs | chunks | 1 | 10, 30, 40, 50 | 10, 60, 40, 50 | 2.00 |"
    assert made["held best"][-1] == "| chunks | rafs | 1.00 | 0.1 | 3.2 | 2 |"
    assert made["start"][-2] == "| socket bound | 50 | 50 | 50 | 5.6 (5.6 to 5.6) |"
    assert made["memory"][-1] == "| rafs | cold | 2.0 | 1.0 | 1.0 | 2.0 | keeper 1.0, worker 1.0 |"
    assert made["faults"][-1] == "| rafs | 3, 3 | 0, 0 | 1, 1 | 0 |"
    assert made["cold"][-1] == "| image | cold | nydusd | 5.0 (5.0 to 5.0) | 40 | 1.0 |"
    assert made["operations sides"][-1] == "| rafs | 1.2 | 3110 | 2 | 10 | 2 | keeper 0, control 120 |"
    stalled = "| rafs | 20 (20 to 20) | 40 (40 to 40) | 2.00 (2.00 to 2.00) | 0.1 |"
    assert stalled in made["operations stalled"]


def test_a_document_without_the_place_is_refused(tmp_path: Path) -> None:
    text = "a\n<!-- bench: x -->\nold\n<!-- /bench -->\nb\n<!-- bench: y -->\nkept\n<!-- /bench -->\n"
    new = docs.placed(text, {"x": [r"new \1"]})
    assert new == text.replace("old", r"new \1")
    with pytest.raises(click.UsageError, match="0 parts"):
        docs.placed(text, {"z": []})
    with pytest.raises(click.UsageError, match="2 parts"):
        docs.placed(text + text, {"x": []})
    unknown = tmp_path / "a.json"
    unknown.write_text(json.dumps(document("crash", {})))
    result = CliRunner().invoke(main, ["docs", str(unknown)])
    assert result.exit_code == 2
    assert "results of crash" in result.output


def test_json_of_another_benchmark_has_no_latencies(tmp_path: Path) -> None:
    for each, code in ((documents()[0], 0), (documents()[1], 2)):
        (tmp_path / "a.json").write_text(json.dumps(each))
        arguments = ["page", str(tmp_path / "a.json"), str(tmp_path / "out.html")]
        assert CliRunner().invoke(main, arguments).exit_code == code
    assert (tmp_path / "out.html").read_text() == page.render(results(), MACHINE)


# -- command line and processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "command"), [(["--quick"], "operations"), ([], "operations"), (["--cold"], "cold")]
)
def test_without_a_command_back_ends_are_compared(
    arguments: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("operations", "cold"):
        each = main.commands[name]
        monkeypatch.setattr(each, "callback", lambda _name=name, **_: called.append(_name))
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert called == [command]
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


@pytest.mark.parametrize("text", ["", "a", "a=b", "a=b,c", "=b,1", "a=,1"])
def test_bad_places_to_attach_to_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="NAME=SOCKET,PID"):
        contenders.Attached.parse(text)


def test_a_command_gets_its_places(tmp_path: Path) -> None:
    material = Material(tmp_path / "tree", tmp_path / "image")
    with pytest.raises(click.BadParameter, match="socket"):
        contenders.command("a=prog --dir {dir}", material)
    script = "import sys; open(sys.argv[3] + '/seen', 'w').write(' '.join(sys.argv[1:]))"
    line = f'a={sys.executable} -c "{script}" {{socket}} x{{dir}} {{work}}'
    with contenders.command(line, material).start(tmp_path) as back_end:
        assert back_end.process.wait(30) == 0
    assert (tmp_path / "seen").read_text() == f"{tmp_path / 'vhost.sock'} x{tmp_path / 'tree'} {tmp_path}"


CALLS = "import os; input(); [os.getppid() for _ in range(3000)]; print(1, flush=True); input()"


def test_system_calls_are_counted_or_there_is_no_number() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with syscalls.counting([child.pid]) as counted:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        child.communicate(b"\n")
    if counted.method == "n/a":
        assert counted.calls is None
    else:
        assert counted.calls is not None
        assert 3000 <= counted.calls < 3300


SUMMARY = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 99.00    0.010000          10      1000           read
  1.00    0.000100          10        10         2 write
------ ----------- ----------- --------- --------- ----------------
100.00    0.010100          10      1010         2 total
"""


def test_calls_are_read_from_a_summary() -> None:
    assert syscalls.total_of(SUMMARY) == 1010
    assert syscalls.total_of("") == 0
    assert len(syscalls.perf_attr(5)) == 64


def test_usage_leaves_out_what_began_and_ended_meanwhile() -> None:
    before = Usage({1: 100, 2: 50}, {1: 5, 2: 9}, {1: 0})
    after = Usage({1: 150, 3: 7}, {1: 6, 3: 1}, {1: 4096})
    used = after - before
    assert (used.cpu_ns, used.wakeups, used.disk_bytes) == (57, 2, 4096)
    mine = processes.usage(child_of_nobody())
    assert (mine.cpu_ns, mine.wakeups) == (0, 0)


def test_pinning_knows_all_processors_also_the_second_time() -> None:
    script = (
        "import os, subprocess, sys; from tests.bench import processes; n = os.sched_getaffinity(0)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "for _ in range(2): processes.pin([child.pid])\n"
        "found = os.sched_getaffinity(0), os.sched_getaffinity(child.pid); child.kill(); child.wait()\n"
        "assert found == ({min(n)}, n - {min(n)} or n), (found, n)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def child_of_nobody() -> int:
    """A pid that has been used and is free again."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        pass
    return child.pid
