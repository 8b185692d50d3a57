"""What reports say about traces: times, traffic, causes, words. And what they refuse."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.traces import HOSTILE, fetch, lively, ns, stall, trace
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.errors import ConfigError, Unreachable, VirtiofsdRafsError
from virtiofsd_rafs.report.intervals import Intervals
from virtiofsd_rafs.report.model import Report, analyse
from virtiofsd_rafs.report.text import lines, side_by_side
from virtiofsd_rafs.report.trace import parse, printable
from virtiofsd_rafs.report.units import amount, duration, percent
from virtiofsd_rafs.report.verdict import headline, verdict

if TYPE_CHECKING:
    from pathlib import Path


def report(
    fetches: list[dict[str, Any]], stalls: list[dict[str, Any]], *, everything: bool = False, **fields: Any
) -> Report:
    return analyse(parse(trace(fetches, stalls, **fields)), everything=everything)


def causes(found: Report) -> dict[str, float]:
    return {cause: round(seconds, 6) for cause, seconds in found.causes if seconds > 1e-9}


# -- intervals ----------------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(SPANS, SPANS, st.integers(0, 60), st.integers(0, 60))
def test_intervals_are_sets(a: list[tuple[int, int]], b: list[tuple[int, int]], start: int, end: int) -> None:
    def members(spans: list[tuple[int, int]]) -> set[int]:
        return {t for first, last in spans for t in range(first, last)}

    first, second = Intervals(a), Intervals(b)
    assert first.total == len(members(a))
    assert (first | second).total == len(members(a) | members(b))
    assert (first & second).total == len(members(a) & members(b))
    assert first.within(start, end) == len(members(a) & set(range(start, end)))


# -- a boot -------------------------------------------------------------------------------------------------


def test_traffic_and_times() -> None:
    found = report(
        [
            fetch(
                2,
                3,
                length=200_000,
                bytes_by_reason={"demand": 50_000, "read-ahead": 149_000},
                unread_bytes=9,
            ),
            fetch(3, 3.5, reason="prefetch", unread_bytes=1),
            fetch(4, 4.1, result="backend.timeout", source=""),
            fetch(4.2, 4.4, attempt=2),
            fetch(4.4, 4.5, result="digest-mismatch", length=70),
        ],
        [stall(2, 3), stall(2.5, 3.5, "/bin/ls"), stall(4, 4.4)],
    )
    assert (found.bytes, found.lost_bytes, found.unread_bytes) == (400_000, 70, 10)
    # What lies between its chunks counts as the reason of the fetch.
    assert dict(found.by_reason) == {"demand": 151_000, "read-ahead": 149_000, "prefetch": 100_000}
    assert found.image_bytes == 50_000_000
    assert [(event.name, round(event.at_s, 3)) for event in found.events] == [
        ("daemon started", 0.0),
        ("VM connected", 0.2),
        ("image mounted", 0.5),
        ("FUSE_INIT", 2.0),
        ("first fetch", 2.0),
        ("first read of a program", 2.2),
    ]
    assert (round(found.waiting_s, 6), round(found.waits_s, 6), found.end_s) == (1.9, 2.4, 4.5)
    assert [(file.path, file.n_requests, round(file.seconds, 6)) for file in found.files] == [
        ("/bin/sh", 2, 1.4),
        ("/bin/ls", 1, 1.0),
    ]
    assert [(s.name, s.tries, s.failures) for s in found.sources] == [("registry", 4, 1), ("", 1, 1)]
    assert found.errors == (("backend.timeout", 1), ("digest-mismatch", 1))
    assert json.loads(json.dumps(found.as_dict()))["n_failed"] == 2


def test_the_causes_of_waiting_add_up() -> None:
    found = report(
        [
            fetch(2, 3, path="/a", result="backend.timeout"),
            fetch(3.5, 4, path="/a", attempt=2),
            fetch(5, 6, path="/b"),
            fetch(7, 8, path="", reason="prefetch"),
        ],
        [
            stall(2, 4.25, "/a"),  # failing and pausing 1.5 s, the link 0.5 s, here 0.25 s
            stall(5, 6, "/b"),
            stall(7.5, 8.5, "/c"),  # half of it behind a prefetch
        ],
    )
    assert causes(found) == {"link": 1.5, "retries": 1.5, "background": 0.5, "here": 0.75}
    assert sum(causes(found).values()) == pytest.approx(found.waits_s)


def test_another_file_on_the_link_does_not_hide_a_retry() -> None:
    found = report(
        [fetch(2, 4, path="/b"), fetch(2, 3, path="/a", offset=10**6, result="backend.bad-reply")],
        [stall(2, 3, "/a"), stall(2, 4, "/b")],
    )
    assert causes(found) == {"link": 2.0, "retries": 1.0}


@pytest.mark.parametrize(("seed", "n"), [(1, 60), (2, 300), (3, 1)])
def test_the_causes_of_a_lively_boot_add_up(seed: int, n: int) -> None:
    found = analyse(parse(lively(n, seed)))
    assert sum(seconds for _, seconds in found.causes) == pytest.approx(found.waits_s)
    assert found.waiting_s <= found.waits_s + 1e-9
    assert sum(size for _, size in found.by_reason) == found.bytes


def test_the_rate_of_the_link_is_what_it_carried_at_its_best() -> None:
    steady = [fetch(2 + i / 10, 2.1 + i / 10, length=300_000, offset=i) for i in range(20)]
    assert report(steady, []).best_rate == pytest.approx(3e6, rel=0.02)
    twice = [fetch(2, 3, length=10**6), fetch(2, 3, length=10**6, offset=1)]
    assert report(twice, []).best_rate == pytest.approx(2e6, rel=0.1)


def test_a_boot_ends_with_the_first_quiet_stretch() -> None:
    fetches = [fetch(2, 3), fetch(15, 16), fetch(40, 41), fetch(90, 91, reason="fill", path="")]
    stalls = [stall(2, 3), stall(15, 16), stall(40, 41)]
    found = report(fetches, stalls)
    assert (len(found.fetches), len(found.stalls), found.n_later) == (2, 2, 2)
    assert any("2 later fetches" in sentence for sentence in verdict(found))
    assert len(report(fetches, stalls, everything=True).fetches) == 4
    # Who watched the boot knows when it was over.
    assert report(fetches, stalls, events={"HTTP 200": ns(50)}).end_s == 50


def test_a_vm_that_comes_late_begins_its_own_time_line() -> None:
    hour = 3600.0
    found = report(
        [fetch(hour + 1, hour + 2)], [], connected_at_ns=ns(hour), first_init_ns=ns(hour + 1), first_exec_ns=0
    )
    assert found.at("VM connected") == 0
    assert found.at("daemon started") == -hour
    assert found.end_s == 2


# -- words --------------------------------------------------------------------------------------------------


SMALL = [fetch(2 + i, 2.1 + i, length=1000, offset=i) for i in range(4)]


@pytest.mark.parametrize(
    ("fetches", "stalls", "fields", "expected"),
    [
        ([], [], {}, "Nothing had to be fetched"),
        ([], [], {}, "No request had to wait"),
        ([fetch(2, 3)], [], {}, "Lazy: 100.0 kB in 1 request were fetched, <1 % of the image's 50.0 MB."),
        ([fetch(2, 3)], [], {"blobs": [{"id": "a", "size": None}]}, "size of the image is not known"),
        ([fetch(2, 3, length=40_000_000)], [], {}, "Hardly lazy"),
        ([fetch(2, 3, length=40_000_000, reason="fill")], [], {}, "Lazy, then filled"),
        ([fetch(2, 3, length=40_000_000, reason="pull")], [], {}, "Not lazy"),
        ([fetch(2, 3, length=3_000_000)], [stall(2, 3)], {}, "the link's rate"),
        (
            [*SMALL, fetch(8, 9, reason="fill", length=10**6)],
            [stall(2 + i, 2.1 + i) for i in range(4)],
            {},
            "round trips: it carried 10.0 kB/s of the 1.0 MB/s",
        ),
        (
            [fetch(2, 3, result="backend.timeout", source="mirror:1"), fetch(3, 3.1, attempt=2)],
            [stall(2, 3.1)],
            {},
            "1 fetch failed and had to be repeated: backend.timeout (1), from mirror:1",
        ),
        ([fetch(2, 3, reason="prefetch", path="")], [stall(2, 3)], {}, "nobody had asked for"),
        ([], [stall(2, 3)], {}, "on this host"),
        ([fetch(2, 3, length=9_000_000, reason="prefetch", unread_bytes=8_000_000)], [], {}, "--amplify"),
        ([fetch(2, 3)], [], {"events": {"HTTP 200": ns(3)}, "first_init_ns": ns(2)}, "1.80 s (60 %) went by"),
    ],
)  # fmt: skip
def test_verdicts(
    fetches: list[dict[str, Any]], stalls: list[dict[str, Any]], fields: dict[str, Any], expected: str
) -> None:
    assert expected in " ".join(verdict(report(fetches, stalls, **fields)))


def test_full_logs_are_told() -> None:
    found = report([fetch(2 + i / 1000, 2.1 + i / 1000, offset=i) for i in range(4096)], [])
    assert "logs were full" in " ".join(verdict(found))


def test_text() -> None:
    found = analyse(parse(lively(40)))
    text = "\n".join([*lines(found), *side_by_side([found, found])])
    for expected in (
        "demand",
        "read-ahead",
        "(not read)",
        "mirror:5000",
        "backend.timeout",
        "HTTP 200",
        "\u2588",
    ):
        assert expected in text
    assert not any(ord(char) < 32 and char != "\n" for char in text), "names cannot steer a terminal"
    assert headline([found]).startswith("Up in ")


def test_names_become_visible() -> None:
    assert printable(HOSTILE[3]) == r"/srv/\xff\xfe\x1b[31m\u202egnp.exe\x0a"
    assert printable("Gr\u00fc\u00dfe \u4e16") == "Gr\u00fc\u00dfe \u4e16"
    assert printable("\U000e0001\u00a0\x85") == r"\U000e0001\xa0\x85"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.0 kB"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (3e12, "3000.0 GB"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


def test_other_units() -> None:
    assert [duration(s) for s in (0, 0.0123, 0.9996, 4.2, 75)] == [
        "0 ms",
        "12 ms",
        "1.00 s",
        "4.20 s",
        "75.0 s",
    ]
    assert [percent(a, 1000) for a in (0, 1, 60, 997, 1000)] == ["0 %", "<1 %", "6 %", ">99 %", "100 %"]
    assert percent(1, 0) == "0 %"


# -- what is no trace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"fetches": 3},
        {"fetches": [3]},
        {"fetches": [{}]},
        {"fetches": [{"started_ns": -1}]},
        trace([fetch(2, 3, length="x")], []),
        trace([fetch(2, 3, length=True)], []),
        trace([fetch(2, 3, path=3)], []),
        trace([fetch(2, 3, bytes_by_reason={"a": -1})], []),
        trace([fetch(2, 3, bytes_by_reason=[])], []),
        trace([], [{"parked_ns": 1 << 63}]),
        trace([], [], blobs=[3]),
        trace([], [], events={str(i): 1 for i in range(100)}),
    ],
)
def test_what_is_no_trace_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError):
        parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_trace_breaks_a_report(data: st.DataObject) -> None:
    """Any value in any place: it is refused, or there is a report of it, and a page."""
    from virtiofsd_rafs.report.html import page

    made: dict[str, Any] = trace([fetch(2, 3), fetch(3, 4)], [stall(2, 3)])
    # The parts are kept aside: a value may take the place of the array that holds them.
    parts = [made, made["fetches"][0], made["stalls"][0], made["blobs"][0]]
    for _ in range(data.draw(st.integers(1, 3))):
        target = parts[data.draw(st.integers(0, len(parts) - 1))]
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        found = analyse(parse(made))
    except VirtiofsdRafsError:
        return
    assert lines(found)
    assert page([found, found])


# -- the command --------------------------------------------------------------------------------------------


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, ["boot", "report", *args])


def test_the_command_reads_files(tmp_path: Path) -> None:
    for name in ("cold", "warm"):
        (tmp_path / f"{name}.json").write_text(json.dumps(lively(20)))
    both = [str(tmp_path / "cold.json"), str(tmp_path / "warm.json")]
    done = run(*both, "--html", str(tmp_path / "page.html"))
    assert done.exit_code == 0
    assert f"page: {tmp_path / 'page.html'}" in done.output
    assert "cold" in (tmp_path / "page.html").read_text()
    figures = json.loads(run(*both, "--json").output)
    assert [boot["name"] for boot in figures["boots"]] == ["cold", "warm"]


def test_the_command_says_what_is_wrong_with_its_argument(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "deep").write_text("[" * 100_000)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gone"))
    listener.close()
    for name, kind, words in (
        ("nothing", ConfigError, "no such socket or file"),
        ("text", ConfigError, "is no JSON"),
        ("deep", ConfigError, "is no JSON"),
        (".", ConfigError, "is a directory"),
        ("gone", Unreachable, "has gone"),
    ):
        error = run(str(tmp_path / name)).exception
        assert isinstance(error, kind), name
        assert words in str(error)
